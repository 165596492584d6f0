"""Checks of the ring behind which another one stands: that one of them is gone shows only where it is alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from stagewire.config import Address
from stagewire.errors import PeerError, ProtocolError
from stagewire.ring.rules.actions import Fail, Send, Side
from stagewire.ring.rules.admission import settings_refusal
from stagewire.ring.rules.phases import Phase
from stagewire.wire.codec import Frame, decode
from stagewire.wire.messages import Call, Fault, Hello, NotHere, Open, Redirect, Refused, Roll
from unit.ring_harness import QUICKSTART_PORTS, MemoryRing, assert_whole, make_config, make_identity


def test_what_was_sent_in_an_epoch_that_is_over_does_not_even_leave() -> None:
    """The successor would drop it too."""
    ring = MemoryRing()
    head, one = ring.start_serving()[:2]
    before = one.ring.state.num_stale_frames
    head.ring.send(Call(head.ring.state.epoch - 1, 2, "check_health"), [b""])
    ring.settle()
    assert one.ring.state.num_stale_frames == before


def test_a_stage_of_another_pipeline_is_not_let_in_before_the_head_is_known() -> None:
    """Later its settings are compared; meanwhile the right one would find its place taken."""
    ring = MemoryRing()
    state = ring.start(1).ring.state
    caller = make_identity(make_config(2), pipeline_id="another")
    assert state.received(Side.SUCCESSOR, b"x", Hello(caller, 1), (), ring.clock.seconds) == [
        Send(Side.SUCCESSOR, NotHere(1), b"x")
    ]
    assert state.successor_peer is None


def test_nobody_is_sent_to_the_port_of_a_stage_that_is_gone() -> None:
    """Or each attempt would cost the successor a connection that fails."""
    ring = MemoryRing(QUICKSTART_PORTS)
    owner = ring.start(0)
    ring.settle()
    one = ring.start(1)
    ring.wait(2)
    hello = Hello(make_identity(make_config(2)), 1)

    def answer() -> object:
        (said,) = owner.ring.state.received(Side.SUCCESSOR, b"x", hello, (), ring.clock.seconds)
        assert isinstance(said, Send)
        return said.message

    assert isinstance(answer(), Redirect)
    ring.kill(one)
    ring.wait(6)
    assert answer() == NotHere(1)


def test_who_is_redirected_stays_with_its_predecessors_host() -> None:
    """Over the network in memory, hosts do not count."""
    ring = MemoryRing(QUICKSTART_PORTS)
    config = dataclasses.replace(make_config(2, QUICKSTART_PORTS), predecessor=Address("10.0.0.7", 15550))
    stage = ring.start(config)
    ring.settle()
    asked: list[Address] = []
    stage.transport.connect = lambda side, address: asked.append(address)  # type: ignore[method-assign]
    state, now = stage.ring.state, ring.clock.seconds
    state.connected(Side.PREDECESSOR, now)
    stage.ring._perform(state.received(Side.PREDECESSOR, b"", Redirect(1, 50123), (), now))
    assert asked == [Address("10.0.0.7", 50123)]


def test_a_roll_with_the_stages_in_another_order_is_none() -> None:
    ring = MemoryRing()
    stages = ring.start_serving()
    state, head = stages[2].ring.state, stages[0].ring.state.identity
    for identities in ([head, stages[3].ring.state.identity], [head, head], [head]):
        before = state.num_bad_messages
        assert state.received(Side.PREDECESSOR, b"", Roll(state.epoch + 1, identities), (), ring.clock.seconds) == []
        assert state.num_bad_messages == before + 1
        assert state.phase is Phase.SERVING


def test_a_roll_that_an_earlier_process_of_the_head_has_called_opens_nothing() -> None:
    ring = MemoryRing()
    head = ring.start(0)
    ring.start(3)
    ring.wait(3)
    state = head.ring.state
    others = [make_identity(make_config(stage)) for stage in (1, 2, 3)]
    epoch = max(state.epoch + 1, state.first_epoch)
    for mine, is_opened in ((make_identity(make_config(0), "an earlier one"), False), (state.identity, True)):
        state.received(Side.PREDECESSOR, b"", Roll(epoch, [mine, *others]), (), ring.clock.seconds)
        assert state.phase is (Phase.OPENING if is_opened else Phase.LINKING)


def test_an_open_that_was_lost_is_sent_again_with_the_next_roll() -> None:
    ring = MemoryRing()
    stages = [ring.start(index) for index in range(4)]
    head = stages[0]
    send, lost = head.transport.send, list[bytes]()

    def lose_the_first_open(side: Side, peer: bytes, frames: Sequence[Frame]) -> None:
        if not lost and isinstance(decode(frames)[0], Open):
            lost.append(peer)
            return
        send(side, peer, frames)

    head.transport.send = lose_the_first_open  # type: ignore[method-assign]
    ring.wait(3)
    assert head.phase is Phase.OPENING
    ring.wait(6)
    assert_whole(stages)


def test_a_predecessor_whose_words_do_not_decode_while_steps_go_round_is_the_end() -> None:
    """One of them was a step: its rows would be missing in the next."""
    ring = MemoryRing()
    stages = ring.start_serving()
    actions = stages[2].ring.state.bad_message(Side.PREDECESSOR, b"", ProtocolError("any"), ring.clock.seconds)
    (failed,) = (action for action in actions if isinstance(action, Fail))
    assert isinstance(failed.error, PeerError)
    assert stages[2].phase is Phase.FAILED


@pytest.mark.parametrize(("accused", "step", "ends"), [(2, 5, True), (1, 5, False), (2, -1, False)])
def test_a_stage_that_is_accused_of_a_step_ends_and_no_other(accused: int, step: int, ends: bool) -> None:
    """It hangs: with the next epoch it would hang again. A loss without a step accuses nobody."""
    ring = MemoryRing()
    state = ring.start_serving()[2].ring.state
    fault = Fault(state.epoch, accused, step, "it hangs")
    actions = state.received(Side.PREDECESSOR, b"", fault, (), ring.clock.seconds)
    assert any(isinstance(action, Fail) for action in actions) == ends
    assert state.phase is (Phase.FAILED if ends else Phase.LINKING)


def test_a_refusal_does_not_end_a_stage_that_serves() -> None:
    ring = MemoryRing()
    state = ring.start_serving()[2].ring.state
    refusal = Refused(2, "--dtype", "float32", "bfloat16", "--dtype is bfloat16")
    for side in (Side.PREDECESSOR, Side.OWNER):
        assert state.received(side, b"", refusal, (), ring.clock.seconds) == []
    assert state.phase is Phase.SERVING


@pytest.mark.parametrize("who", ["the head", "the other"])
def test_a_setting_that_only_one_of_two_stages_has_is_a_difference(who: str) -> None:
    with_it, without = {"--new": "on"}, dict[str, str]()
    of_head, of_other = (with_it, without) if who == "the head" else (without, with_it)
    refusal = settings_refusal(make_identity(make_config(0), **of_head), make_identity(make_config(1), **of_other))
    assert refusal is not None
    assert (refusal.stage, refusal.field) == (1, "--new")
    assert {refusal.expected, refusal.found} == {"on", "(not set)"}
