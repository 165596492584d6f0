"""Reports of the stages on their way round the ring: they come regularly, and a wrong one ends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest

from stagewire.ring.rules.actions import Side
from stagewire.ring.rules.phases import Phase
from stagewire.ring.transport.interface import UnreachableError
from stagewire.wire.codec import Frame, decode, encode
from stagewire.wire.messages import Report, StageReport, Step
from unit.ring_harness import MemoryRing, Stage, assert_whole, make_report


def let_all_report(stages: Sequence[Stage]) -> None:
    for stage in stages:
        stage.record.own_report = partial(make_report, stage.index)


def send_report(sender: Stage, report: Report) -> None:
    peer = sender.ring.state.successor_peer
    assert peer is not None
    sender.transport.send(Side.SUCCESSOR, peer, encode(report))


ALL = [make_report(stage) for stage in range(4)]


class TestRound:
    def test_once_a_second_from_every_stage_in_order(self) -> None:
        ring = MemoryRing()
        stages = ring.start_all()
        let_all_report(stages)
        stages[0].record.reports.clear()
        ring.wait(10)
        assert stages[0].record.reports == [ALL] * 10
        assert not any(stage.record.reports for stage in stages[1:])

    def test_they_are_no_traffic_of_the_model(self) -> None:
        """An open ring that only reports has not begun to serve, and its threads hear nothing of it."""
        ring = MemoryRing()
        stages = ring.start_all()
        let_all_report(stages)
        ring.wait(3)
        assert_whole(stages)
        assert not any(stage.deliveries() for stage in stages)

    def test_none_before_the_ring_is_whole_and_none_after_its_end(self) -> None:
        ring = MemoryRing()
        head = ring.start(0)
        others = [ring.start(stage) for stage in (1, 2)]
        let_all_report([head, *others])
        ring.wait(5)
        assert head.record.reports == []
        stages = [head, *others, ring.start(3)]
        let_all_report(stages)
        ring.wait(3)
        ring.call(stages)
        ring.wait(2)
        assert head.record.reports[-1] == ALL
        ring.kill(stages[2])
        ring.wait(6)
        assert head.phase is Phase.LINKING
        seen = len(head.record.reports)
        ring.wait(5)
        assert len(head.record.reports) == seen

    def test_linked_stages_as_the_head_knows_them(self) -> None:
        ring = MemoryRing()
        head = ring.start(0)
        found = []
        for stage in (None, 1, 3, 2):
            if stage is not None:
                ring.start(stage)
            ring.wait(2)
            found.append(head.ring.state.linked_stages)
        assert found == [(), (1,), (1, 3), (0, 1, 2, 3)]


class TestWrong:
    def test_one_of_another_epoch_is_dropped_and_counted(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        head, one, tail = stages[0], stages[1], stages[3]
        head.record.reports.clear()
        for epoch in (head.ring.state.epoch - 1, head.ring.state.epoch + 1):
            send_report(tail, Report(epoch, ALL))
            send_report(head, Report(epoch, ALL[:1]))
        ring.settle()
        assert head.record.reports == []
        assert (head.ring.state.num_stale_frames, one.ring.state.num_stale_frames) == (2, 2)
        assert stages[2].ring.state.num_stale_frames == 0  # nor was it passed on

    @pytest.mark.parametrize(
        "stages_named", [[1, 0], [0, 0], [0, 1], [1]], ids=["order", "twice", "the receiver", "only the receiver"]
    )
    def test_reports_that_no_earlier_stage_can_have_sent(self, stages_named: list[int]) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stages[0].record.reports.clear()
        send_report(stages[0], Report(stages[0].ring.state.epoch, [make_report(stage) for stage in stages_named]))
        ring.settle()
        assert stages[0].record.reports == []
        assert stages[1].ring.state.num_bad_messages == 1
        assert {stage.phase for stage in stages} == {Phase.SERVING}

    def test_one_from_a_caller_is_not_accepted(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stages[0].record.reports.clear()
        stages[1].transport.send(Side.PREDECESSOR, b"", encode(Report(stages[0].ring.state.epoch, ALL)))
        ring.settle()
        assert stages[0].record.reports == []
        assert stages[0].ring.state.num_bad_messages == 1

    @pytest.mark.parametrize("how", ["raises", "too long", "does not encode", "nothing to say"])
    def test_a_stage_that_cannot_report_is_missing_and_nothing_else(self, how: str) -> None:
        def own_report() -> StageReport | None:
            if how == "raises":
                raise RuntimeError("no /proc here")
            text = {"too long": "x" * 129, "does not encode": "\udc80"}.get(how)
            return None if text is None else make_report(2, host=text)

        ring = MemoryRing()
        stages = ring.start_serving()
        let_all_report(stages)
        stages[2].record.own_report = own_report
        ring.wait(5)
        assert stages[0].record.reports[-1] == [ALL[0], ALL[1], ALL[3]]
        assert {stage.phase for stage in stages} == {Phase.SERVING}
        said = [line for line in stages[2].record.logs if "cannot report on itself" in line]
        assert len(said) == (0 if how == "nothing to say" else 1)


class TestFullQueue:
    def test_a_report_is_dropped_and_steps_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        let_all_report(stages)
        one = stages[1]
        send = one.transport.send

        def send_all_but_reports(side: Side, peer: bytes, frames: Sequence[Frame]) -> None:
            if isinstance(decode(frames)[0], Report):
                raise UnreachableError(side.value)  # what a socket says whose queue is full
            send(side, peer, frames)

        ring.wait(2)
        seen = len(stages[0].record.reports)
        monkeypatch.setattr(one.transport, "send", send_all_but_reports)
        ring.wait(5)  # longer than a lost successor is waited for
        assert len(stages[0].record.reports) == seen
        assert {stage.phase for stage in stages} == {Phase.SERVING}
        one.send(Step(0, 1, 4, 99, False, [], []), [b"schedule"])
        ring.settle()
        assert [type(message) for message in stages[2].deliveries()] == [Step]
        monkeypatch.setattr(one.transport, "send", send)
        ring.wait(2)
        assert stages[0].record.reports[-1] == ALL
