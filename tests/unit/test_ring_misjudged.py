"""Stages that were misjudged: replaced while they only stalled, forgotten, taken for headless, or for lost."""

from __future__ import annotations

import dataclasses

import pytest

from stagewire.errors import StageLost
from stagewire.ring.rules.actions import Side
from stagewire.ring.rules.successor import MAX_EARLIER
from stagewire.wire.messages import Hello, Refused
from unit.ring_harness import QUICKSTART_PORTS, MemoryRing, Stage, assert_whole, make_config

WORKERS_SHARE = ((15550, 15553), (15551, 15550), (15551, 15551), (15553, 15551))  # stages 1 and 2 have one port


def start_standby(ring: MemoryRing, index: int, ports: tuple[tuple[int, int], ...]) -> Stage:
    standby = ring.start(dataclasses.replace(make_config(index, ports), stands_by=True))
    ring.wait(3)
    assert standby.ring.state.waits_for().startswith("the end of the stage")
    return standby


def test_the_last_words_of_a_successor_that_a_send_has_found_gone_are_read() -> None:
    ring = MemoryRing()
    state = ring.start_serving()[0].ring.state
    peer, now = state.successor_peer, ring.clock.seconds
    assert peer is not None
    state.successor_unreachable(now)
    refusal = Refused(1, "--dtype", "float32", "bfloat16", "--dtype is bfloat16")
    (said,) = state.received(Side.SUCCESSOR, peer, refusal, (), now)
    assert "stage 1 was refused: --dtype is bfloat16" in str(said)
    assert state.received(Side.SUCCESSOR, b"stranger", refusal, (), now) == []


@pytest.mark.parametrize("num_greetings", [1, 2, 3])
def test_the_last_words_are_read_after_late_greetings(num_greetings: int) -> None:
    """It had to connect again while this stage did not answer. Each late greeting is taken for it, and found gone."""
    ring = MemoryRing()
    head, stage = ring.start_serving()[:2]
    state, now = head.ring.state, ring.clock.seconds
    newer = state.successor_peer
    assert newer is not None
    refusal = Refused(1, "--dtype", "float32", "bfloat16", "--dtype is bfloat16")
    for _ in range(num_greetings):
        state.received(Side.SUCCESSOR, b"older", Hello(stage.ring.state.identity, 0), (), now)
        assert state.successor_peer == b"older"
        (said,) = state.received(Side.SUCCESSOR, newer, refusal, (), now)
        assert "stage 1 was refused: --dtype is bfloat16" in str(said)
        state.successor_unreachable(now)
        (said,) = state.received(Side.SUCCESSOR, newer, refusal, (), now)
        assert "stage 1 was refused: --dtype is bfloat16" in str(said)


def test_a_bounded_number_of_ended_connections_is_remembered() -> None:
    ring = MemoryRing()
    head, stage = ring.start_serving()[:2]
    state, now = head.ring.state, ring.clock.seconds
    refusal = Refused(1, "--dtype", "float32", "bfloat16", "--dtype is bfloat16")
    peers = [b"%d" % number for number in range(100)]
    for peer in peers:
        state.received(Side.SUCCESSOR, peer, Hello(stage.ring.state.identity, 0), (), now)
        state.successor_unreachable(now)
    known = [peer for peer in peers if state.received(Side.SUCCESSOR, peer, refusal, (), now)]
    assert known == peers[-MAX_EARLIER:]


class TestReplaced:
    """Its Python stalls while its sockets answer: no connection is lost, and still it is silent."""

    @pytest.mark.parametrize("index", [1, 2, 3])
    def test_it_does_not_go_on_serving_what_is_over(self, index: int) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        first = stages[index]
        first.is_frozen = True
        ring.wait(1)
        ring.start(make_config(index, bind_port=17000))
        ring.wait(8)
        first.is_frozen = False
        ring.wait(30)
        assert not first.is_running
        assert "there is already a stage" in first.error

    def test_by_its_standby(self) -> None:
        ring = MemoryRing(QUICKSTART_PORTS)
        stages = ring.start_serving()
        standby = start_standby(ring, 2, QUICKSTART_PORTS)
        first = stages[2]
        first.is_frozen = True
        ring.wait(20)
        first.is_frozen = False
        ring.wait(200)
        assert first.is_running != standby.is_running
        stages[2] = first if first.is_running else standby
        assert_whole(stages)


def test_a_forgotten_successor_is_found_again() -> None:
    """Its predecessor read an older connection's greeting last, say, and took that for the present one."""
    ring = MemoryRing()
    stages = ring.start_serving()
    stages[1].ring.state.successor_unreachable(ring.clock.seconds)
    ring.wait(20)
    assert_whole(stages)


class TestStandbyOfALivingStage:
    """The owner of a shared port goes. Who only stands by must not take it from the one that serves."""

    @pytest.mark.parametrize("is_first", [False, True], ids=["stage first", "standby first"])
    @pytest.mark.parametrize(
        ("ports", "owner", "index"), [(QUICKSTART_PORTS, 0, 1), (QUICKSTART_PORTS, 0, 2), (WORKERS_SHARE, 1, 2)]
    )
    def test_leaves_it_the_port(
        self, ports: tuple[tuple[int, int], ...], owner: int, index: int, is_first: bool
    ) -> None:
        ring = MemoryRing(ports)
        stages = ring.start_serving()
        start_standby(ring, index, ports)
        if is_first:
            ring.stages.insert(0, ring.stages.pop())
        ring.kill(stages[owner])
        ring.wait(3)
        stages[owner] = ring.start(owner)
        ring.wait(20)
        assert_whole(stages)


class TestHeadless:
    def test_not_for_a_step_that_failed_on_the_head(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        error = StageLost(0, "stage 0 failed step 7: ValueError", 7)
        stages[0].ring.end_epoch(stages[0].ring.state.epoch, error)
        ring.kill(stages[2])
        ring.wait(1.1 * stages[1].ring.config.recovery_timeout_s)
        assert all(stages[index].is_running for index in (0, 1, 3))

    def test_not_for_a_head_that_is_replaced_late_in_an_outage(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        ring.kill(stages[2])
        ring.wait(1.5 * stages[1].ring.config.recovery_timeout_s, step_s=2)
        ring.kill(stages[0])
        ring.wait(5)
        stages[0], stages[2] = ring.start(make_config(0)), ring.start(make_config(2))
        ring.wait(30)
        assert_whole(stages)

    @pytest.mark.parametrize("lost", [2, 3])
    def test_when_the_head_dies_while_a_stage_is_lost(self, lost: int) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        ring.kill(stages[lost])
        ring.wait(5)
        ring.kill(stages[0])
        ring.wait(3000, step_s=2)
        assert not any(stage.is_running for stage in stages)

    @pytest.mark.parametrize("lost", [1, 2])
    def test_when_the_head_stops_while_a_stage_is_lost(self, lost: int) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        ring.kill(stages[lost])
        ring.wait(5)
        stages[0].ring.request_stop("done")
        ring.wait(3000, step_s=2)
        assert not any(stage.is_running for stage in stages)
