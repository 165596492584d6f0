"""The ring as people meet it: four stages on one in-memory network, whole processes coming and going."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from stagewire.config import Address
from stagewire.errors import ConfigError, PeerError, StageLost
from stagewire.ring.rules.actions import Side
from stagewire.ring.rules.admission import EXPORT_SETTING, MODEL_SETTING, WEIGHTS_SETTING
from stagewire.ring.rules.phases import Phase
from stagewire.ring.transport.interface import Disconnected
from stagewire.ring.transport.memory import MemoryTransport
from stagewire.wire.codec import encode
from stagewire.wire.messages import Call, CallResult, Fault, Hello, Reply, Result, Sample, Step
from unit.ring_harness import (
    OWN_PORTS,
    QUICKSTART_PORTS,
    MemoryRing,
    Stage,
    assert_whole,
    make_config,
    make_identity,
)

ORDERS = list(itertools.permutations(range(4)))
LAYOUTS = pytest.mark.parametrize("ports", [QUICKSTART_PORTS, OWN_PORTS], ids=["one port", "own ports"])


class TestStart:
    @LAYOUTS
    @pytest.mark.parametrize("order", ORDERS, ids=["".join(map(str, order)) for order in ORDERS])
    def test_any_order(self, order: tuple[int, ...], ports: tuple[tuple[int, int], ...]) -> None:
        stages = MemoryRing(ports).start_all(order)
        assert_whole(stages)

    @LAYOUTS
    def test_all_at_once(self, ports: tuple[tuple[int, int], ...]) -> None:
        ring = MemoryRing(ports)
        stages = [ring.start(index) for index in range(4)]
        ring.wait(3)
        assert_whole(stages)

    @pytest.mark.parametrize("num_stages", [2, 3, 5])
    def test_other_numbers_of_stages(self, num_stages: int) -> None:
        ring = MemoryRing()
        configs = [
            make_config(
                stage,
                layers=(stage, stage + 1),
                num_stages=num_stages,
                bind_port=16000 + stage,
                predecessor_port=16000 + (stage - 1) % num_stages,
            )
            for stage in range(num_stages)
        ]
        stages = [ring.start(config) for config in configs]
        ring.wait(2)
        assert_whole(stages)

    def test_binds_once_in_public_and_says_where(self) -> None:
        stages = MemoryRing(QUICKSTART_PORTS).start_all()
        assert [stage.record.bound[0] for stage in stages][::3] == ["127.0.0.1:15550", "127.0.0.1:15554"]
        assert not {stage.record.bound[0] for stage in stages[1:3]} & {"127.0.0.1:15550", "127.0.0.1:15554"}


class TestTraffic:
    def test_steps_calls_and_replies_go_round(self) -> None:
        ring = MemoryRing(QUICKSTART_PORTS)
        head, one, two, tail = ring.start_all()
        head.send(Call(0, 7, "check_health"), [b"args"])
        ring.settle()
        epoch = head.ring.state.epoch
        for worker in (one, two, tail):  # passed on by the ring: nobody has run anything yet
            assert worker.deliveries() == [Call(epoch, 7, "check_health")]
        results: list[CallResult] = []
        for worker in (one, two, tail):
            results.append(CallResult(worker.index, 0, "", ""))
            worker.send(Reply(0, 7, list(results)), [b"r"] * len(results))
            ring.settle()
        assert two.deliveries() == [Reply(epoch, 7, results[:1])]
        assert head.deliveries() == [Reply(epoch, 7, results)]

        step = Step(0, 1, 4, 99, True, [], [])
        head.send(step, [b"schedule"])
        head.send(Sample(0, 1), [b"mask"])
        ring.settle()
        assert [type(message) for message in one.deliveries()] == [Step, Sample]
        assert two.deliveries() == []  # steps are passed on by the model's thread, not by the ring
        tail.send(Result(0, 1, []), [b"tokens"])
        ring.settle()
        assert head.deliveries() == [Result(epoch, 1, [])]
        assert {stage.phase for stage in ring.stages} == {Phase.SERVING}

    def test_what_is_sent_in_an_epoch_does_not_leave_in_another(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stages[2].is_frozen = True
        ring.kill(stages[1])
        stages[0].send(Call(0, 2, "check_health"), [b""])
        ring.wait(3)
        stages[2].is_frozen = False
        stages[1] = ring.start(1)
        ring.wait(8)
        assert {stage.phase for stage in stages} == {Phase.OPEN}
        assert not stages[1].deliveries()

    def test_frames_of_another_epoch_are_dropped_and_counted(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        head, one = stages[:2]
        peer = head.ring.state.successor_peer
        assert peer is not None
        for epoch in (head.ring.state.epoch - 1, head.ring.state.epoch + 1):
            head.transport.send(Side.SUCCESSOR, peer, encode(Sample(epoch, 1)))
        ring.settle()
        assert one.deliveries() == []
        assert one.ring.state.num_stale_frames == 2
        assert one.phase is Phase.SERVING

    def test_a_message_for_the_other_end_is_not_delivered(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        epoch = stages[0].ring.state.epoch
        for sender, receiver, message in (
            (stages[3], stages[0], Call(epoch, 2, "check_health")),
            (stages[0], stages[1], Result(epoch, 2, [])),
        ):
            peer = sender.ring.state.successor_peer
            assert peer is not None
            sender.transport.send(Side.SUCCESSOR, peer, encode(message, [b""]))
            ring.settle()
            assert receiver.deliveries() == []
            assert receiver.ring.state.num_bad_messages == 1

    def test_hop_time_is_half_a_ping(self) -> None:
        ring = MemoryRing()
        one = ring.start_all()[1]
        head = ring.stages[0]
        head.is_frozen = True
        ring.wait(1.5)
        ring.clock.seconds = 200.0
        one.ring.turn(0)  # sends the ping
        ring.clock.seconds += 0.25
        head.is_frozen = False
        head.ring.turn(0)
        one.ring.turn(0)
        assert one.ring.state.hop_ns == pytest.approx(125_000_000)


def is_whole(stages: list[Stage]) -> bool:
    return {stage.phase for stage in stages} <= {Phase.OPEN, Phase.SERVING} and (
        len({stage.ring.state.epoch for stage in stages}) == 1
    )


class TestLoss:
    @LAYOUTS
    @pytest.mark.parametrize("is_serving", [False, True])
    @pytest.mark.parametrize("pause_s", [0, 2, 7])
    @pytest.mark.parametrize("lost", range(4))
    def test_the_others_wait_and_its_return_completes_the_ring(
        self, lost: int, pause_s: float, is_serving: bool, ports: tuple[tuple[int, int], ...]
    ) -> None:
        ring = MemoryRing(ports)
        stages = ring.start_serving() if is_serving else ring.start_all()
        old_epoch = stages[0].ring.state.epoch
        ring.kill(stages[lost])
        ring.wait(pause_s)
        survivors = [stage for stage in stages if stage.index != lost]
        assert all(stage.is_running for stage in survivors)
        if pause_s > 2:
            assert {stage.phase for stage in survivors} == {Phase.LINKING}
            for stage in survivors:
                epoch, error = stage.record.broken[-1]
                assert (epoch, error.stage) == (old_epoch, lost)
                assert f"stage {lost} is lost" in str(error)
        stages[lost] = ring.start(lost)
        ring.wait(8)
        assert_whole(stages)
        assert stages[0].ring.state.epoch != old_epoch
        ring.call(stages)
        assert stages[0].deliveries()

    @LAYOUTS
    @pytest.mark.parametrize("lost", list(itertools.combinations(range(4), 2)))
    def test_two_at_once(self, lost: tuple[int, int], ports: tuple[tuple[int, int], ...]) -> None:
        ring = MemoryRing(ports)
        stages = ring.start_serving()
        for index in lost:
            ring.kill(stages[index])
        ring.wait(4)
        for index in reversed(lost):
            stages[index] = ring.start(index)
            ring.wait(3)
        ring.wait(8)
        assert_whole(stages)

    @LAYOUTS
    @pytest.mark.parametrize("lost", range(4))
    def test_a_frozen_stage_takes_part_again(self, lost: int, ports: tuple[tuple[int, int], ...]) -> None:
        ring = MemoryRing(ports)
        stages = ring.start_serving()
        stages[lost].is_frozen = True
        successor = stages[(lost + 1) % 4]
        for event in (Disconnected(Side.PREDECESSOR, "no answer"),):
            successor.transport._push(event)
        ring.wait(5)
        assert {stage.phase for stage in stages if stage.index != lost} == {Phase.LINKING}
        stages[lost].is_frozen = False
        ring.wait_until(lambda: is_whole(stages))
        ring.call(stages, 2)
        assert stages[0].deliveries()
        assert all(stage.is_running for stage in stages)

    def test_again_and_again_every_epoch_is_new(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        epochs = [stages[0].ring.state.epoch]
        for lost in (1, 2, 3, 1, 2, 2):
            ring.kill(stages[lost])
            ring.wait(2)
            stages[lost] = ring.start(lost)
            ring.wait(4)
            assert_whole(stages)
            ring.call(stages, len(epochs))
            epochs.append(stages[0].ring.state.epoch)
        assert len(set(epochs)) == len(epochs)

    @pytest.mark.parametrize("failed", range(4))
    def test_a_failed_step_ends_the_epoch_and_no_process(self, failed: int) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        epoch = stages[0].ring.state.epoch
        error = StageLost(failed, f"stage {failed} failed step 7: ValueError", 7)
        stages[failed].ring.end_epoch(epoch - 1, error)  # too late: of an epoch that is over
        ring.wait(1)
        assert is_whole(stages)
        stages[failed].ring.end_epoch(epoch, error)
        ring.wait(3)
        assert_whole(stages)
        assert stages[0].ring.state.epoch > epoch
        for stage in stages:
            ((when, error),) = stage.record.broken
            assert (when, error.stage, error.step) == (epoch, failed, 7)
            assert str(error) == f"stage {failed} failed step 7: ValueError"

    def test_whoever_cannot_go_on_is_named_with_its_reason(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stages[2].ring.request_fail(PeerError("RuntimeError: out of memory"))
        ring.wait(3)
        for stage in (stages[3], stages[0], stages[1]):
            assert str(stage.record.broken[0][1]) == "stage 2 failed: RuntimeError: out of memory"
            assert stage.is_running

    def test_a_stopped_worker_is_named(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stages[1].ring.request_stop("was told to stop")
        ring.wait(3)
        assert stages[1].record.stops == ["was told to stop"]
        assert not stages[1].record.errors
        for stage in (stages[2], stages[3], stages[0]):
            assert str(stage.record.broken[0][1]) == "stage 1 stopped: was told to stop"

    def test_a_fault_goes_round_once(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        for stage in stages:  # nobody leaves: a Fault that comes back must end where it began
            stage.transport.close = lambda linger_s=1.0: None  # type: ignore[method-assign]
        stages[1].ring.request_fail(PeerError("bad step"))
        ring.wait(0.5)
        assert [len(stage.record.broken) for stage in stages] == [1, 0, 1, 1]

    def test_a_fault_of_an_epoch_that_is_over_ends_nothing(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        for epoch in (stages[0].ring.state.epoch - 1, stages[0].ring.state.epoch + 1):
            peer = stages[0].ring.state.successor_peer
            assert peer is not None
            stages[0].transport.send(Side.SUCCESSOR, peer, encode(Fault(epoch, 2, -1, "stage 2 is lost")))
        ring.wait(2)
        assert {stage.phase for stage in stages} == {Phase.SERVING}

    def test_text_that_cannot_be_encoded_does_not_stop_the_notice(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stages[2].ring.request_fail(PeerError("file \udc80 " + "x" * 2_000_000))
        ring.wait(3)
        assert str(stages[0].record.broken[0][1]).startswith("stage 2 failed: file ? xxx")

    def test_a_gone_successor_of_which_nobody_tells(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        for stage in stages[1:]:
            stage.is_frozen = True
        stages[1].transport.close()
        stages[0].send(Call(0, 2, "check_health"), [b""])
        ring.wait(1)
        assert stages[0].phase is Phase.SERVING  # the word may be on its way
        ring.wait(3)
        assert str(stages[0].record.broken[0][1]) == "stage 1 is lost: its connection to stage 0 is gone"

    @pytest.mark.parametrize("lost", range(1, 4))
    def test_what_a_head_sends_at_that_moment_does_not_come_late(self, lost: int) -> None:
        ring = MemoryRing()
        stages = ring.start_all()
        ring.kill(stages[lost])
        stages[0].send(Call(0, 1, "check_health"), [b""])
        ring.wait(4)
        assert stages[0].record.broken[-1][1].stage == lost
        stages[lost] = ring.start(lost)
        ring.wait(8)
        assert_whole(stages)
        assert not stages[lost].deliveries()

    def test_a_load_that_fails_is_news_for_the_head_but_not_its_end(self) -> None:
        ring = MemoryRing()
        stages = ring.start_all()
        stages[1].ring.request_fail(ConfigError("no such file"))
        ring.wait(2)
        assert "stage 1 failed: no such file" in stages[0].record.log
        assert [stage.is_running for stage in stages] == [True, False, True, True]


class TestChaos:
    @LAYOUTS
    @pytest.mark.parametrize("seed", range(25))
    def test_whatever_happens_the_ring_comes_back(self, seed: int, ports: tuple[tuple[int, int], ...]) -> None:
        """Kills, freezes, cut connections and failed steps at random moments, also of two stages, also meanwhile."""
        rng = random.Random(seed)
        ring = MemoryRing(ports)
        stages = ring.start_serving()
        for _ in range(12):
            stage = stages[rng.randrange(4)]
            match rng.randrange(4):
                case 0:
                    ring.kill(stage)
                    stages[stage.index] = ring.start(stage.index)
                case 1:
                    stage.is_frozen = not stage.is_frozen
                case 2:
                    stage.transport._push(Disconnected(Side.PREDECESSOR, "cut"))
                case 3:
                    error = StageLost(stage.index, "a failed step", 3)
                    stage.ring.end_epoch(stage.ring.state.epoch, error)
            ring.wait(rng.choice((0, 0.5, 1, 3, 8)), step_s=0.25)
            for index, each in enumerate(stages):
                if not each.is_running:  # it was refused, or ended as the one that hangs: somebody starts it again
                    stages[index] = ring.start(index)
        for stage in stages:
            stage.is_frozen = False
        for _ in range(3):
            ring.wait(12)
            for index, each in enumerate(stages):
                if not each.is_running:
                    stages[index] = ring.start(index)
        ring.wait_until(lambda: is_whole(stages))
        for stage in stages:
            stage.deliveries()
        ring.call(stages, 99)
        assert [type(message) for message in stages[0].deliveries()] == [Reply]


class TestStandby:
    @staticmethod
    def stand_by(ring: MemoryRing, index: int) -> Stage:
        return ring.start(dataclasses.replace(make_config(index, ring.ports), stands_by=True))

    @LAYOUTS
    @pytest.mark.parametrize("index", [1, 2, 3])
    def test_it_waits_and_takes_the_place(self, index: int, ports: tuple[tuple[int, int], ...]) -> None:
        ring = MemoryRing(ports)
        stages = ring.start_serving()
        standby = self.stand_by(ring, index)
        ring.wait(200)
        assert {stage.phase for stage in stages} == {Phase.SERVING}
        assert standby.is_running
        assert f"waiting for the end of the stage {index} that has port" in standby.record.log
        ring.kill(stages[index])
        stages[index] = standby
        ring.wait(4 if ports is OWN_PORTS else 9)
        assert_whole(stages)
        ring.call(stages, 2)
        assert stages[0].deliveries()
        another = self.stand_by(ring, index)
        ring.wait(5)
        assert {stage.phase for stage in stages} == {Phase.SERVING}
        ring.kill(standby)
        stages[index] = another
        ring.wait(9)
        assert_whole(stages)

    def test_with_nobody_in_its_place_it_takes_it_at_once(self) -> None:
        ring = MemoryRing()
        stages = [self.stand_by(ring, index) if index == 2 else ring.start(index) for index in range(4)]
        ring.wait(3)
        assert_whole(stages)

    def test_while_the_one_before_it_is_frozen_it_waits(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        standby = self.stand_by(ring, 2)
        ring.wait(2)
        stages[2].is_frozen = True
        stages[3].transport._push(Disconnected(Side.PREDECESSOR, "no answer"))
        ring.wait(20)
        stages[2].is_frozen = False
        ring.wait_until(lambda: is_whole(stages))
        assert standby.is_running


class TestPatience:
    @staticmethod
    def lose_silently(ring: MemoryRing, stage: Stage) -> None:
        stage.transport._push(Disconnected(Side.PREDECESSOR, "no answer", is_silent=True))
        ring.settle()

    @pytest.mark.parametrize("index", [0, 2])
    def test_who_was_only_slow_is_given_more_time(self, index: int) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        for expected in (2.0, 4.0):
            self.lose_silently(ring, stages[index])
            ring.wait_until(lambda: is_whole(stages))
            assert [stage.transport.patience_s for stage in stages] == [
                expected if stage is stages[index] else 1.0 for stage in stages
            ]
        assert f"stage {(index - 1) % 4} had only been slow" in stages[index].record.log

    def test_who_was_dead_teaches_nothing(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stages[1].is_frozen = True
        self.lose_silently(ring, stages[2])
        ring.kill(stages[1])
        stages[1] = ring.start(1)
        ring.wait_until(lambda: is_whole(stages))
        assert {stage.transport.patience_s for stage in stages} == {1.0}

    def test_a_connection_that_ends_is_no_silence(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stages[2].transport._push(Disconnected(Side.PREDECESSOR, "cut"))
        ring.settle()
        ring.wait_until(lambda: is_whole(stages))
        assert {stage.transport.patience_s for stage in stages} == {1.0}


class TestDeadlinesOfALoss:
    def test_before_serving_the_start_deadline_begins_anew(self) -> None:
        ring = MemoryRing()
        stages = ring.start_all()
        ring.wait(100)
        assert_whole(stages)
        ring.kill(stages[2])
        ring.wait(50)
        assert all(stages[index].is_running for index in (0, 1, 3))
        ring.wait(20)
        assert not stages[3].is_running
        assert "waited 60 s for stage 2" in stages[3].error

    def test_a_ring_that_has_served_waits_for_a_stage_without_limit(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        ring.kill(stages[2])
        ring.wait(2000, step_s=2)
        assert all(stages[index].is_running for index in (0, 1, 3))
        stages[2] = ring.start(2)
        ring.wait(8)
        assert_whole(stages)

    def test_but_for_a_head_only_so_long(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        ring.kill(stages[0])
        ring.wait(110)  # of 120
        assert all(stage.is_running for stage in stages[1:])
        ring.wait(20)
        assert not any(stage.is_running for stage in stages[1:])
        assert "stage 1 waited 120 s for stage 0" in stages[1].error


class TestStop:
    @LAYOUTS
    @pytest.mark.parametrize("is_serving", [False, True])
    def test_the_heads_bye_stops_all(self, is_serving: bool, ports: tuple[tuple[int, int], ...]) -> None:
        ring = MemoryRing(ports)
        stages = ring.start_serving() if is_serving else ring.start_all()
        stages[0].ring.request_stop("the API server ended")
        ring.wait(6)
        for stage in stages:
            assert stage.record.stops == ["the API server ended"]
            assert not stage.record.errors
            assert not stage.is_running

    def test_a_tail_that_still_answers_a_stopping_head_has_not_failed(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        tail = stages[3]
        for stage in stages[1:3]:
            stage.is_frozen = True
        stages[0].ring.request_stop("done")
        ring.turn()
        for _ in range(3):
            tail.send(Result(0, 1, []), [b""])
            ring.turn()
        for stage in stages[1:3]:
            stage.is_frozen = False
        ring.wait(1)
        assert tail.record.stops == ["done"]
        assert not tail.record.errors

    def test_what_was_sent_before_leaves_before(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stages[0].send(Call(0, 9, "shutdown"), [b""])
        stages[0].ring.request_stop("done")
        ring.settle()
        assert stages[3].deliveries() == [Call(stages[0].ring.state.epoch, 9, "shutdown")]

    def test_twice_is_once(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        for _ in range(2):
            stages[0].ring.request_stop("done")
        stages[0].ring.request_fail(PeerError("too late"))
        ring.wait(1)
        assert stages[0].record.stops == ["done"]
        assert not stages[0].record.errors


class TestWaiting:
    @pytest.mark.parametrize(
        ("alone", "whom"),
        [(0, "stage 3 at 127.0.0.1:15553 (connection refused)"), (2, "stage 1 at 127.0.0.1:15551")],
    )
    def test_alone_it_says_every_10_s_whom_it_waits_for_and_ends(self, alone: int, whom: str) -> None:
        ring = MemoryRing()
        stage = ring.start(alone)
        ring.wait(59)
        lines = [line for line in stage.record.logs if "waiting for" in line]
        assert [line.rpartition(", ")[2] for line in lines] == [f"{s} of 60 s" for s in (10, 20, 30, 40, 50)]
        assert all(whom in line for line in lines)
        assert stage.is_running
        ring.wait(2)
        assert f"stage {alone} waited 60 s for {whom}" in stage.error
        assert isinstance(stage.record.errors[0], PeerError)

    def test_for_the_successor(self) -> None:
        ring = MemoryRing()
        ring.start(0)
        one = ring.start(1)
        ring.wait(11)
        assert "waiting for stage 2 to connect to 127.0.0.1 port 15551" in one.record.log

    def test_on_a_shared_port_for_one_that_is_not_there(self) -> None:
        ring = MemoryRing(QUICKSTART_PORTS)
        ring.start(0)
        two = ring.start(2)
        ring.wait(11)
        assert "stage 1 at 127.0.0.1:15550 (the port is up, stage 1 has not registered there yet)" in two.record.log

    def test_an_open_ring_waits_for_nobody(self) -> None:
        ring = MemoryRing()
        stages = ring.start_all()
        ring.wait(200)
        assert_whole(stages)


class TestDuplicates:
    @LAYOUTS
    @pytest.mark.parametrize("is_serving", [False, True])
    @pytest.mark.parametrize("index", range(4))
    def test_refused_while_the_first_answers(
        self, index: int, is_serving: bool, ports: tuple[tuple[int, int], ...]
    ) -> None:
        ring = MemoryRing(ports)
        stages = ring.start_serving() if is_serving else ring.start_all()
        config = make_config(index, ports, bind_port=17000)
        second = ring.start(config)
        ring.wait(10)
        assert not second.is_running
        assert f"there is already a stage {index} in this pipeline" in second.error
        assert isinstance(second.record.errors[0], ConfigError)
        assert all(stage.is_running for stage in stages)
        if not is_serving:
            assert_whole(stages)

    def test_refused_on_the_shared_port(self) -> None:
        ring = MemoryRing(QUICKSTART_PORTS)
        stages = ring.start_all()
        seconds = [ring.start(index) for index in (0, 1, 2)]
        ring.wait(10)
        assert [second.error.split(" in ")[0] for second in seconds] == [
            f"there is already a stage {index}" for index in (0, 1, 2)
        ]
        assert_whole(stages)

    @pytest.mark.parametrize("index", range(4))
    def test_takes_the_place_of_a_silent_one(self, index: int) -> None:
        ring = MemoryRing()
        stages = ring.start_all()
        first = stages[index]
        first.is_frozen = True
        ring.wait(1)
        stages[index] = ring.start(make_config(index, bind_port=17000))
        ring.wait(8)
        if (
            index == 3
        ):  # the head looks for the tail at its old address, so only the link to the tail's predecessor moves
            assert stages[2].ring.state.successor_peer is not None
        first.is_frozen = False
        ring.wait(2)
        assert "there is already a stage" in first.error
        assert stages[index].is_running

    def test_the_head_hears_of_it(self) -> None:
        ring = MemoryRing()
        stages = ring.start_all()
        ring.start(make_config(3, bind_port=17000))
        ring.wait(5)
        assert "stage 3 was refused: there is already a stage 3" in stages[0].record.log


LATER_FIRST = [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)]


class TestRefusals:
    @pytest.mark.parametrize("order", LATER_FIRST)
    @pytest.mark.parametrize(
        ("wrong", "layers", "says"),
        [
            (2, (17, 24), "layer 16"),
            (1, (9, 16), "layer 8"),
            (2, (14, 24), "layers 14"),
            (2, (0, 8), "stage 2"),
        ],
        ids=["gap", "gap at 1", "overlap", "wrong order"],
    )
    def test_ranges(self, wrong: int, layers: tuple[int, int], says: str, order: tuple[int, ...]) -> None:
        ring = MemoryRing()
        config = make_config(wrong, layers=layers)
        for index in order:
            ring.start(config if index == wrong else index)
            ring.settle()
        ring.wait(5)
        by_index = {stage.index: stage for stage in ring.stages}
        culprit = by_index.pop(wrong)
        assert not culprit.is_running
        assert says in culprit.error
        assert f"stage {wrong} was refused" in by_index[0].record.log
        # A wrong end is also a wrong start of the next one, which leaves too; the rest waits for the corrected stages.
        assert all(by_index[index].is_running for index in range(wrong))
        ring.wait(1)
        stages = dict(by_index)
        for index in range(4):
            if index not in stages or not stages[index].is_running:
                stages[index] = ring.start(index)
        ring.wait(8)
        assert_whole([stages[index] for index in range(4)])

    @pytest.mark.parametrize("order", LATER_FIRST)
    @pytest.mark.parametrize("wrong", [1, 2, 3])
    @pytest.mark.parametrize(
        ("name", "value"),
        [("model", "m2"), ("--dtype", "bfloat16"), ("--max-model-len", "8192"), ("vLLM version", "0.31.0")],
    )
    def test_whoever_differs_from_the_head_exits(
        self, name: str, value: str, wrong: int, order: tuple[int, ...]
    ) -> None:
        ring = MemoryRing(QUICKSTART_PORTS)
        for index in order:
            ring.start(index, shared={name: value} if index == wrong else {})
            ring.settle()
        ring.wait(5)
        self._check_refused(ring, wrong, [name, value])

    @pytest.mark.parametrize("order", LATER_FIRST)
    @pytest.mark.parametrize(
        ("exports", "wrong", "first"),
        [
            (("e1", "e1", "e2", "e1"), 2, 0),
            (("", "e1", "", "e2"), 3, 1),
            (("", "e1", "e2", ""), 2, 1),
        ],
    )
    def test_another_export_than_the_first_that_has_one(
        self, exports: tuple[str, ...], wrong: int, first: int, order: tuple[int, ...]
    ) -> None:
        ring = MemoryRing(QUICKSTART_PORTS)
        for index in order:
            ring.start(index, shared={EXPORT_SETTING: exports[index]})
            ring.settle()
        ring.wait(5)
        self._check_refused(
            ring, wrong, [f"stage {wrong}'s folder is of {EXPORT_SETTING} e2", f"stage {first}'s of e1"]
        )

    @pytest.mark.parametrize("order", LATER_FIRST)
    @pytest.mark.parametrize(
        ("weights", "wrong", "first"),
        [
            (("w1", "w2", "w1", "w1"), 1, 0),
            (("w1", "w1", "w1", "w2"), 3, 0),
            (("", "w1", "", "w2"), 3, 1),
            (("w1", "", "w2", ""), 2, 0),
        ],
    )
    def test_other_weights_than_the_first_that_knows_its_own(
        self, weights: tuple[str, ...], wrong: int, first: int, order: tuple[int, ...]
    ) -> None:
        """A base model and its fine-tune: headers, configuration and exports say nothing."""
        ring = MemoryRing(QUICKSTART_PORTS)
        for index in order:
            ring.start(index, shared={WEIGHTS_SETTING: weights[index]})
            ring.settle()
        ring.wait(5)
        said = f"w2 on stage {wrong} and w1 on stage {first}"
        self._check_refused(ring, wrong, [f"stage {wrong} has other weights than stage {first}", said, "sha256sum"])

    @pytest.mark.parametrize("order", LATER_FIRST)
    def test_another_model_than_the_first_that_knows_its_own(self, order: tuple[int, ...]) -> None:
        """A folder with a part of the files has the headers of a part only, and its stage may be the head."""
        ring = MemoryRing(QUICKSTART_PORTS)
        for index in order:
            ring.start(index, shared={MODEL_SETTING: ("", "m1", "", "m2")[index]})
            ring.settle()
        ring.wait(5)
        self._check_refused(ring, 3, [f"{MODEL_SETTING} is m2 on stage 3 but m1 on stage 1"])

    @pytest.mark.parametrize("setting", [EXPORT_SETTING, WEIGHTS_SETTING, MODEL_SETTING])
    @pytest.mark.parametrize("values", [("e1", "", "e1", ""), ("", "e1", "e1", ""), ("",) * 4, ("e1",) * 4])
    def test_stages_that_cannot_tell_fit_any(self, values: tuple[str, ...], setting: str) -> None:
        """Full and pre-split stages, folders with all weights and with a part of them."""
        ring = MemoryRing()
        stages = [ring.start(index, shared={setting: value}) for index, value in enumerate(values)]
        ring.wait(5)
        assert_whole(stages)

    @pytest.mark.parametrize("order", LATER_FIRST)
    @pytest.mark.parametrize("wrong", [1, 2, 3])
    def test_another_number_of_stages(self, wrong: int, order: tuple[int, ...]) -> None:
        ring = MemoryRing()
        config = make_config(wrong, num_stages=5)
        for index in order:
            ring.start(config if index == wrong else index)
            ring.settle()
        ring.wait(5)
        self._check_refused(ring, wrong, ["--pipeline-total-stages is 5", "4 on stage 0"])

    def test_a_stage_beyond_the_heads_total(self) -> None:
        ring = MemoryRing()
        stages = ring.start_all()
        extra = ring.start(make_config(4, layers=(32, 40), num_stages=5, bind_port=15560, predecessor_port=15553))
        ring.wait(5)
        assert "--pipeline-total-stages is 5 on stage 4 but 4 on stage 0" in extra.error
        assert_whole(stages)

    def test_a_head_that_differs_ends_all_the_others(self) -> None:
        ring = MemoryRing()
        head = ring.start(0, shared={"--dtype": "bfloat16"})
        others = [ring.start(index) for index in (1, 2, 3)]
        ring.wait(10)
        assert head.is_running
        assert "--dtype is float32 on stage 1 but bfloat16 on stage 0" in others[0].error
        assert "stage 1 was refused" in head.record.log

    @pytest.mark.parametrize("order", LATER_FIRST)
    @pytest.mark.parametrize("wrong", [1, 2, 3])
    def test_another_pipeline_id(self, wrong: int, order: tuple[int, ...]) -> None:
        ring = MemoryRing()
        for index in order:
            config = make_config(index)
            ring.start(config, make_identity(config, pipeline_id="b" if index == wrong else "a"))
            ring.settle()
        ring.wait(5)
        self._check_refused(ring, wrong, ["--pipeline-id is b", "a on stage 0"], pipeline_id="a")

    def test_another_pipeline_on_the_same_port(self) -> None:
        ring = MemoryRing(QUICKSTART_PORTS)
        stages = ring.start_all()
        config = make_config(1, QUICKSTART_PORTS)
        stranger = ring.start(config, make_identity(config, pipeline_id="b"))
        ring.wait(5)
        assert "--pipeline-id" in stranger.error
        assert_whole(stages)

    def _check_refused(self, ring: MemoryRing, wrong: int, says: list[str], pipeline_id: str = "") -> None:
        """Only the wrong one left, both ends say why, and a corrected one completes the ring."""
        stages = {stage.index: stage for stage in ring.stages}
        assert [index for index in range(4) if not stages[index].is_running] == [wrong]
        assert isinstance(stages[wrong].record.errors[0], ConfigError)
        for text in says:
            assert text in stages[wrong].error
            assert text in stages[0].record.log
        config = make_config(wrong, ring.ports)
        stages[wrong] = ring.start(config, make_identity(config, pipeline_id=pipeline_id))
        ring.wait(8)
        assert_whole([stages[index] for index in range(4)])


class Stranger:
    """Not a stage: a transport that sends and answers what it likes."""

    def __init__(self, ring: MemoryRing, port: int = 0) -> None:
        self.transport = MemoryTransport(ring.network)
        if port:
            self.transport.bind(port)

    def throw(self, port: int, *frames: bytes) -> None:
        self.transport.connect(Side.PREDECESSOR, Address("127.0.0.1", port))
        self.transport.send(Side.PREDECESSOR, b"", frames)


def in_other_version(frames: list[bytes | bytearray | memoryview]) -> list[bytes]:
    return [bytes(frames[0])[:2] + b"\x00\x63" + bytes(frames[0])[4:]]


class TestStrangers:
    def test_garbage_is_logged_once_per_peer_and_the_ring_goes_on(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stranger = Stranger(ring)
        stranger.throw(15551, b"GET / HTTP/1.1")
        for _ in range(50):
            stranger.transport.send(Side.PREDECESSOR, b"", [b"\x00" * 10])
        ring.settle()
        assert sum("dropped an invalid message" in line for line in stages[1].record.logs) == 1
        ring.call(stages, call_id=2)
        assert stages[0].deliveries()

    def test_a_thousand_strangers_fill_neither_memory_nor_the_log(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        stranger = Stranger(ring)
        for _ in range(1500):
            stranger.throw(15551, b"garbage")
        ring.settle()
        assert len(stages[1].record.logs) <= 1001
        assert stages[1].ring.state.num_bad_messages == 1500

    def test_hellos_of_impossible_stages_are_dropped(self) -> None:
        ring = MemoryRing()
        stages = ring.start_serving()
        hello = bytes(encode(Hello(make_identity(make_config(2)), 1))[0])
        impossible = hello.replace(b"\x02\x04\x10\x18", b"\x02\x04\x18\x10")  # layers 24 to 16
        assert impossible != hello
        Stranger(ring).throw(15551, impossible)
        ring.settle()
        assert stages[1].is_running
        assert "malformed Hello" in stages[1].record.log

    def test_every_message_from_a_stranger_is_harmless(self) -> None:
        from unit.test_wire_codec import EXAMPLES

        ring = MemoryRing()
        stages = ring.start_serving()
        stranger = Stranger(ring)
        for port in (15550, 15551, 15552, 15553):
            for message, payloads in EXAMPLES:
                stranger.throw(port, *(bytes(frame) for frame in encode(message, payloads)))
        ring.wait(3)
        assert {stage.phase for stage in stages} == {Phase.SERVING}
        ring.call(stages, call_id=2)
        assert stages[0].deliveries()

    def test_a_predecessor_that_is_something_else(self) -> None:
        ring = MemoryRing()
        stranger = Stranger(ring, 15550)
        one = ring.start(1)
        ring.wait(35)
        assert "something listens there but answers nothing" in one.error
        assert "--pipeline-prev-stage-service-addr 127.0.0.1:15550" in one.error
        assert stranger.transport.poll(0)

    def test_a_predecessor_that_talks_nonsense(self) -> None:
        ring = MemoryRing()
        stranger = Stranger(ring, 15550)
        one = ring.start(1)
        for _ in range(3):
            ring.settle()
            for event in stranger.transport.poll(0):
                stranger.transport.send(Side.SUCCESSOR, event.peer, [b"220 ready"])  # type: ignore[union-attr]
        ring.settle()
        assert "does not speak Stagewire's protocol" in one.error

    def test_a_shared_port_that_belongs_to_something_else(self) -> None:
        ring = MemoryRing()
        Stranger(ring, 15551)
        one = ring.start(1)
        ring.wait(12)
        assert "port 15551 is taken by another program" in one.error

    def test_a_port_that_is_taken_and_refuses_connections(self) -> None:
        ring = MemoryRing()
        one = ring.start(1)
        ring.network.taken.add(15551)
        ring.wait(12)
        assert "port 15551 is taken by another program" in one.error


class TestWireVersions:
    @pytest.fixture
    def ring(self) -> MemoryRing:
        return MemoryRing()

    def test_a_worker_of_another_version_than_its_predecessor_exits(self, ring: MemoryRing) -> None:
        stranger = Stranger(ring, 15550)
        one = ring.start(1)
        ring.settle()
        answer = in_other_version(encode(Hello(make_identity(make_config(1)), 0)))
        for event in stranger.transport.poll(0):
            stranger.transport.send(Side.SUCCESSOR, event.peer, answer)  # type: ignore[union-attr]
        ring.settle()
        assert "stage 0 at 127.0.0.1:15550: wire version 99, this stage speaks 2" in one.error
        assert isinstance(one.record.errors[0], ConfigError)

    def test_the_head_is_right_and_waits(self, ring: MemoryRing) -> None:
        stranger = Stranger(ring, 15553)
        head = ring.start(0)
        answer = in_other_version(encode(Hello(make_identity(make_config(1)), 0)))
        for _ in range(45):
            ring.wait(1)
            for event in stranger.transport.poll(0):
                if hasattr(event, "peer"):
                    stranger.transport.send(Side.SUCCESSOR, event.peer, answer)
        assert head.is_running
        assert sum("Stage 0: stage 3 at 127.0.0.1:15553: wire version 99" in line for line in head.record.logs) == 1

    def test_whoever_knows_the_head_answers_so_that_the_other_learns_its_version(self, ring: MemoryRing) -> None:
        stages = ring.start_all()
        ring.kill(stages[1])
        ring.settle()
        stranger = Stranger(ring)
        stranger.throw(15550, *in_other_version(encode(Hello(make_identity(make_config(1)), 0))))
        ring.settle()
        assert "wire version 99" in stages[0].record.log
        assert len(stranger.transport.poll(0)) == 2  # connected, and an answer that shows our version


def test_repr_says_where_it_stands() -> None:
    stage: Stage = MemoryRing().start_all()[1]
    assert "stage=1/4, phase=open" in repr(stage.ring)
