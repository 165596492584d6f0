"""The head's executor when the ring breaks around a call, with stages that are played; no process is started."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

pytestmark = pytest.mark.vllm


class Stages:
    """Two stages and what they hold. With ``breaks`` the ring ends in the next `add_lora`, once the head has run it."""

    def __init__(self) -> None:
        self.adapters: list[set[int]] = [set(), set()]
        self.breaks = self.is_broken = False
        self.calls: list[str] = []

    def __call__(self, method: str, args: Sequence[Any], timeout: float | None, own_args: Any = None) -> list[Any]:
        from stagewire.vllm_plugin.head.executor import _RingBroken

        self.calls.append(method)
        if self.is_broken:
            raise _RingBroken(f"{method}: stage 1 is lost")
        match method:
            case "list_loras":
                return [set(each) for each in self.adapters]
            case "check_lora":
                return ["digest", "digest"]
            case "add_lora":
                self.adapters[0].add(args[0].lora_int_id)
                if self.breaks:
                    self.is_broken = True
                    raise _RingBroken("add_lora: stage 1 is lost")
                self.adapters[1].add(args[0].lora_int_id)
            case "remove_lora":
                for each in self.adapters:
                    each.discard(args[0])
        return [True, True]

    def mend(self) -> None:
        """With a new stage 1, which knows nothing."""
        self.breaks = self.is_broken = False
        self.adapters[1] = set()


@pytest.fixture
def stages() -> Stages:
    return Stages()


@pytest.fixture
def executor(stages: Stages) -> Any:
    from stagewire.vllm_plugin.head.executor import RingExecutor
    from stagewire.vllm_plugin.member.journal import Journal

    built: Any = RingExecutor.__new__(RingExecutor)
    built._call, built._adapters, built._is_started = stages, {}, True
    built.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
    built._ranks, built._process, built._stage = Mock(), Mock(journal=Journal()), SimpleNamespace(step_timeout_s=1)
    return built


def adapter(number: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"a{number}", number, f"/a{number}")


def request_with(lora: Any) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData

    return NewRequestData("r", [1], [], SamplingParams(), None, ([],), 0, lora)


@pytest.mark.parametrize("number", [7, 8], ids=["the same", "another"])
def test_an_adapter_that_was_half_added_is_in_nobodys_way(executor: Any, stages: Stages, number: int) -> None:
    stages.breaks = True
    with pytest.raises(RuntimeError, match="stage 1 is lost"):
        executor.add_lora(adapter(7))
    stages.mend()
    assert executor.restore([])
    assert executor.add_lora(adapter(number))


def test_a_stage_that_came_back_may_hold_other_adapters(executor: Any, stages: Stages) -> None:
    """With room for one, the others have the one that was used last, a replay leaves the one that was added last."""
    stages.adapters = [{7}, {8}]
    assert executor.list_loras() == set()
    assert executor.add_lora(adapter(9))


def test_a_removed_adapter_that_a_request_names_again_is_added_again(executor: Any, stages: Stages) -> None:
    executor.add_lora(adapter(7))
    executor.remove_lora(7)
    executor._introduce_adapters(SimpleNamespace(scheduled_new_reqs=[SimpleNamespace(lora_request=adapter(7))]))
    assert stages.calls.count("add_lora") == 2


def test_nor_is_it_missed_when_its_request_is_restored(executor: Any, stages: Stages) -> None:
    """The request was running when its adapter was removed, and went on with it, as in stock vLLM."""
    from stagewire.vllm_plugin.head.live_requests import Restored

    executor.add_lora(adapter(7))
    executor.remove_lora(7)
    assert executor.restore([Restored(request_with(adapter(7)), [])])
    assert stages.calls.count("add_lora") == 2


def test_a_schedule_without_tokens_that_fails_on_the_head_is_no_end_of_the_engine(executor: Any) -> None:
    """EngineCore takes such a schedule's own future for the step's output, and None ends it."""
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    executor._next_step, executor.epoch, executor._steps, executor._current = 0, 1, {}, None
    executor._ranks.num_ranks = 1
    executor._ranks.execute.side_effect = RuntimeError("any")
    schedule = SchedulerOutput.make_empty()
    schedule.finished_req_ids = {"a"}
    assert executor.execute_model(schedule, non_block=True).result(None) is EMPTY_MODEL_RUNNER_OUTPUT
    assert executor._process.end_epoch.called


def test_a_head_with_requests_and_without_a_ring_pauses(executor: Any) -> None:
    """Or it takes half a core from the stage that comes back; a ring that is whole again ends the pause."""
    from stagewire.ring.observer import Whole

    waited: list[float] = []
    news: list[Any] = []

    def receive(timeout_s: float) -> Any:
        waited.append(timeout_s)
        if not news:
            raise queue.Empty
        return news.pop()

    executor.is_whole, executor._process.given_up = False, None
    executor._process.ring.receive = receive
    executor.poll(0.5)
    assert waited == [0.5]
    news.append(Whole(7))
    executor.poll(0.5)
    assert waited == [0.5, 0.5, 0]
    executor.poll(0.5)
    assert waited == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("stages_in_timings", [[], [0], [0, 2], [0, 1, 1]])
def test_a_result_with_the_timings_of_other_stages_is_refused(executor: Any, stages_in_timings: list[int]) -> None:
    from stagewire.errors import PeerError
    from stagewire.ring.observer import Delivery
    from stagewire.wire.messages import Result, StageTiming

    executor._stage.num_stages = 2
    executor._steps = {5: Mock()}
    timings = [StageTiming(stage, 1, 2, 3, 4, 5) for stage in stages_in_timings]
    with pytest.raises(PeerError, match="timings of stages"):
        executor._take(Delivery(Result(1, 5, timings), [b""], 1))


def test_a_result_that_does_not_decode_ends_its_epoch(executor: Any) -> None:
    from stagewire.ring.observer import Delivery
    from stagewire.wire.messages import Result, StageTiming

    in_flight = Mock(req_ids=["a"])
    executor._steps, executor.epoch = {5: in_flight}, 3
    executor._stage = SimpleNamespace(num_stages=2)
    timings = [StageTiming(stage, 0, 0, 0, 0, 0) for stage in range(2)]
    executor._take(Delivery(Result(3, 5, timings), [b"no result"], 1))
    executor._process.end_epoch.assert_called_once()
    assert executor._process.end_epoch.call_args.args[:2] == (3, 5)
    assert executor._steps == {5: in_flight}  # until the ring's thread says that the epoch is over


@pytest.mark.parametrize(
    ("end", "is_child", "is_in_order"),
    [(AssertionError, True, False), (SystemExit, True, True), (ValueError, False, True)],
    ids=["EngineCore failed", "asked to stop", "an error of somebody's own Python"],
)
def test_only_an_end_in_order_takes_the_stages_along(
    executor: Any, end: type[BaseException], is_child: bool, is_in_order: bool
) -> None:
    executor._process.is_child = is_child

    def run_engine_core() -> None:
        try:
            raise end("why")
        finally:
            executor.shutdown()

    with pytest.raises(end):
        run_engine_core()
    assert executor._process.stop.called == is_in_order
    assert executor._process.fail_from.called != is_in_order


@pytest.mark.parametrize("is_head", [True, False])
def test_a_stage_of_one_rank_ends_itself_when_it_hangs_in_a_step(is_head: bool) -> None:
    """The head may have forgotten the step, with the ring. Its own layers it runs in the thread that would look."""
    from stagewire.vllm_plugin.ranks.stage_ranks import StageRanks

    now, seen = [0.0], []
    config: Any = SimpleNamespace(stage=1, is_head=is_head, is_tail=False, step_timeout_s=300)
    vllm_config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1), model_config=SimpleNamespace(runner_type="generate")
    )
    ranks = StageRanks(config, vllm_config)
    ranks.followers._clock = lambda: now[0]
    ranks.own = Mock()

    def hang(*_: Any) -> None:
        for now[0] in (599.0, 601.0):
            seen.append(ranks.problem())

    ranks.own.execute.side_effect = hang
    schedule: Any = SimpleNamespace(total_num_scheduled_tokens=1, scheduled_encoder_inputs={})
    ranks.execute(schedule, b"", 0, (), ())
    assert seen[0] is None
    assert (seen[1] is None) == is_head


def test_a_start_up_call_that_failed_is_not_answered_from_memory() -> None:
    """A new head's, of another KV cache, for which the old one had gone; then the old one's again."""
    from stagewire.vllm_plugin.host.stage_host import _StageHost
    from stagewire.wire.messages import CallResult

    fine, failed = CallResult(1, 0, "", ""), CallResult(1, 0, "MemoryError", "")
    ranks = Mock()
    ranks.call.side_effect = [([fine], [b"1"]), ([failed], [b""]), ([fine], [b"2"])]
    process = Mock()
    process.ring.identities = []
    host = _StageHost(process, ranks)
    calls = [host._call(number, "initialize_from_config", value) for number, value in enumerate((b"x", b"y", b"x"))]
    assert [payloads for _, payloads in calls] == [[b"1"], [b""], [b"2"]]


class TestDeadlineOfTheRecovery:
    @pytest.fixture
    def process(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The head's, with a clock to turn."""
        from stagewire.vllm_plugin.member import member

        built: Any = member.Member.__new__(member.Member)
        built.now = 1000.0
        monkeypatch.setattr(member, "logger", Mock())
        monkeypatch.setattr(member, "time", SimpleNamespace(monotonic=lambda: built.now))
        built._config = SimpleNamespace(is_head=True, recovery_timeout_s=600)
        built.ring, built._status, built._news, built._prepare, built._state = Mock(), Mock(), None, None, "serving"
        built._broken = built.given_up = None
        built._broken_at = built._whole_at = 0.0
        built._is_recovered = True
        return built

    @staticmethod
    def breaks(process: Any) -> None:
        from stagewire.errors import StageLost

        process.on_broken(1, StageLost(1, "stage 1 is lost"))

    def test_goes_on_when_the_ring_is_whole_in_vain(self, process: Any) -> None:
        """A stage that ends whenever it is given its requests."""
        for _ in range(20):
            self.breaks(process)
            process.now += 35
            process._mind_deadline(process._broken)
            if process.given_up:
                break
            process._set_whole(2)
            process.now += 1
        assert process.given_up is not None
        assert process.now - 1000 < 700

    @pytest.mark.parametrize("serves_for", [1.0, 100.0])
    def test_begins_anew_once_it_has_come_back(self, process: Any, serves_for: float) -> None:
        self.breaks(process)
        process.now += 500
        process._set_whole(2)
        if serves_for < 60:
            process.mark_recovered(3)
        process.now += serves_for
        self.breaks(process)
        process.now += 500
        process._mind_deadline(process._broken)
        assert process.given_up is None
