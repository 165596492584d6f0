"""What a stage says and does about places: its own address, other ways to a neighbour, a link that carries nothing."""

from __future__ import annotations

import pytest

from stagewire.ring.rules.actions import Connect, Log, Stall, Way
from stagewire.ring.rules.phases import Phase
from stagewire.ring.rules.predecessor import PredecessorLink
from stagewire.ring.rules.timeouts import FORWARDING_S, OTHER_WAY_INTERVAL_S
from stagewire.ring.transport.interface import AddressGone, NoAddressError
from stagewire.ring.transport.memory import MemoryNetwork, MemoryTransport
from unit.ring_harness import MemoryRing, assert_whole, make_config, make_identity

STALL = Stall(123_456, 6.0, "10.0.0.1:15551 -> 10.0.0.2:4000", 1448)


class TestStalled:
    def test_a_link_by_which_nothing_arrives_ends_the_epoch_and_the_head_learns_why(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        one = stages[1]
        peer = one.ring.state.successor_peer
        assert peer is not None
        one.ring._perform(one.ring.state.stalled(peer, STALL, ring.clock.seconds))
        text = str(one.record.broken[-1][1])
        assert "123456 bytes on link 1 -> 2 (10.0.0.1:15551 -> 10.0.0.2:4000) were not acknowledged for 6 s" in text
        assert "small messages pass: the path swallows packets of 1448 bytes" in text
        ring.wait(5)
        assert_whole(stages)
        assert text in stages[0].record.log

    def test_a_successor_that_says_nothing_may_be_gone(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        peer = stages[1].ring.state.successor_peer
        assert peer is not None
        stages[1].ring._perform(stages[1].ring.state.stalled(peer, STALL, ring.clock.seconds + 10))
        assert "small messages" not in str(stages[1].record.broken[-1][1])

    def test_a_connection_that_the_successor_has_left_is_nobodys_loss(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        assert stages[1].ring.state.stalled(b"another", STALL, ring.clock.seconds) == []
        assert stages[1].phase is Phase.SERVING


class TestRedirect:
    def link(self) -> PredecessorLink:
        config = make_config(2)
        return PredecessorLink(config, make_identity(config))

    def test_to_a_port_that_never_answers_is_explained(self) -> None:
        link = self.link()
        for now in (0.0, 1.0, FORWARDING_S + 1):
            link.connected(now)
            assert link.redirected(50001) == [Connect(50001)]
            link.disconnected("10.0.0.1 port 50001 refused the connection", now)
            link.connected(now)
            assert ("sends this stage on to port 50001" in link.why) == (now > FORWARDING_S)
        assert "where stage 1 listens: 10.0.0.1 port 50001 refused the connection" in link.why
        assert "forward that port too, or give stage 1 a --pipeline-local-bind-port of its own" in link.why
        link.welcomed()
        assert link.why == "linked"

    def test_to_another_port_begins_anew(self) -> None:
        link = self.link()
        for now, port in ((0.0, 50001), (FORWARDING_S + 1, 50002)):
            link.connected(now)
            link.redirected(port)
            link.disconnected("refused", now)
        assert link.why == "refused"


class TestOtherWays:
    def test_who_is_not_there_is_looked_for_elsewhere_on_the_machine(self) -> None:
        config = make_config(2)
        link = PredecessorLink(config, make_identity(config))
        link.connected(0.0, Way(has_others=True))
        assert link.not_here(1, OTHER_WAY_INTERVAL_S / 2) == []
        assert link.not_here(1, OTHER_WAY_INTERVAL_S) == [Connect()]
        link.connected(9.0)
        assert link.not_here(1, 99.0) == []  # the one address of another machine

    @pytest.mark.parametrize("is_doubtful", [True, False])
    def test_a_refusal_by_a_stage_of_another_ring_ends_nobody(self, is_doubtful: bool) -> None:
        config = make_config(2)
        link = PredecessorLink(config, make_identity(config))
        link.connected(0.0, Way("127.0.0.1 port 15550", is_doubtful, has_others=True))
        assert link.is_doubtful is is_doubtful
        assert link.is_another_ring("another model") == [Connect()]
        assert "127.0.0.1 port 15550, on this machine too, is of another ring: another model" in link.note

    def test_it_says_that_it_was_found_elsewhere(self) -> None:
        config = make_config(2)
        link = PredecessorLink(config, make_identity(config))
        link.connected(0.0, Way("127.0.0.1 port 15550"))
        (line,) = link.welcomed()
        assert isinstance(line, Log)
        assert "linked to stage 1 at 127.0.0.1:15551 by 127.0.0.1 port 15550: the same machine" in line.text


class LateTransport(MemoryTransport):
    """Does not know its address at first."""

    num_tries = 0

    def bind(self, port: int):  # type: ignore[no-untyped-def]
        self.num_tries += 1
        if self.num_tries <= 3:
            raise NoAddressError("the name late.test does not resolve here")
        return super().bind(port)


class TestOwnAddress:
    def test_one_that_is_not_known_yet_is_asked_for_again(self) -> None:
        ring = MemoryRing()
        one = ring.start(1)
        one.ring.transport = one.transport = LateTransport(MemoryNetwork())
        ring.wait(2)
        assert one.record.bound == []
        ring.wait(4)
        assert one.record.bound == ["127.0.0.1:15551"]
        assert one.record.log.count("listens nowhere yet: the name late.test does not resolve here") == 1

    def test_one_that_is_gone_is_in_what_it_waits_for(self) -> None:
        ring = MemoryRing()
        one = ring.start(1)
        ring.settle()
        one.ring._perform(one.ring._handle(AddressGone("10.0.0.1 is gone")))
        assert one.ring.state.waits_for().endswith("; 10.0.0.1 is gone")
        one.ring._perform(one.ring._handle(AddressGone("")))
        assert "gone" not in one.ring.state.waits_for()

    def test_others_of_the_machine_are_named_while_nobody_has_come(self) -> None:
        ring = MemoryRing()
        one = ring.start(1)
        ring.settle()
        one.ring.state.waiting.other_addresses = ["10.0.2.1 (eth1)"]
        ring.wait(25)
        line = "listens on 127.0.0.1 port 15551 only. This machine also has 10.0.2.1 (eth1): if stage 2 calls that"
        assert one.record.log.count(line) == 1
