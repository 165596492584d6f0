"""The head's executor with a ring that is played: what it asks of stages, compares, and waits for."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from stagewire.errors import InternalError, PeerError, StageLost
from stagewire.wire.messages import CallResult

pytestmark = pytest.mark.vllm

NUM_STAGES = 3


@pytest.fixture
def executor() -> Any:
    from stagewire.observe.deadlines import StepDeadlines
    from stagewire.vllm_plugin.head.executor import RingExecutor

    built: Any = RingExecutor.__new__(RingExecutor)
    built._stage = SimpleNamespace(step_timeout_s=1, start_timeout_s=1, num_stages=NUM_STAGES)
    built._process, built._ranks = Mock(given_up=None), Mock()
    built._process.ring.identities = [SimpleNamespace(stage=stage, tensor_parallel=1) for stage in range(NUM_STAGES)]
    built._steps, built._replies, built._reply_payloads, built._losses = {}, {}, {}, []
    built._adapters, built._current, built._next_call = {}, None, 5
    built.epoch, built.is_whole = 1, True
    built._deadlines = StepDeadlines(100)
    built.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=2))
    return built


def in_flight(step: int, req_ids: list[str], num_tokens: int = 1) -> Any:
    return SimpleNamespace(step=step, future=Future(), waited_s=0.0, req_ids=req_ids, num_tokens=num_tokens)


# ---- start-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "expected"), [([3, 1, 2], 1), ([None, 4, None], 4), ([None, None, None], None)], ids=str
)
def test_all_stages_get_the_smallest_threshold_of_row_order(
    answers: list[int | None], expected: int | None, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.executor.abstract import Executor

    monkeypatch.setattr(Executor, "initialize_from_config", Mock())
    executor.collective_rpc = Mock(return_value=answers)
    executor.initialize_from_config([SimpleNamespace(num_blocks=7)])
    executor.collective_rpc.assert_called_with("set_reorder_batch_threshold", args=(expected,))
    executor._process.reach.assert_called_once_with("kv_cache", 7)


def test_only_layouts_that_every_stage_supports_are_offered(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.executor.abstract import Executor

    from stagewire.errors import ConfigError

    each = [["a", "b", "c"], ["c", "b"], ["b", "c", "d"]]
    monkeypatch.setattr(Executor, "get_supported_kv_cache_layouts", lambda self: each)
    assert executor.get_supported_kv_cache_layouts() == [["b", "c"]] * NUM_STAGES
    each[2] = ["d"]
    with pytest.raises(ConfigError, match="share no KV cache layout"):
        executor.get_supported_kv_cache_layouts()


def test_an_adapter_with_other_bytes_on_a_stage_is_taken_in_by_nobody(executor: Any) -> None:
    from vllm.lora.request import LoRARequest

    calls: list[str] = []

    def collective_rpc(method: str, **_: Any) -> list[Any]:
        calls.append(method)
        return [set(), set(), set()] if method == "list_loras" else ["d1", "d1", "d2"]

    executor.collective_rpc = collective_rpc
    with pytest.raises(RuntimeError, match="stage 0 has d1, stage 2 has d2"):
        executor.add_lora(LoRARequest("a", 7, "/a"))
    assert calls == ["list_loras", "check_lora"]


@pytest.mark.parametrize("was_loaded", [False, True])
def test_an_adapter_that_a_stage_cannot_take_in_is_taken_off_the_others(was_loaded: bool, executor: Any) -> None:
    """Unless they had it before: then they go on with what they had."""
    from vllm.lora.request import LoRARequest

    calls: list[str] = []

    def collective_rpc(method: str, **_: Any) -> list[Any]:
        calls.append(method)
        if method == "add_lora":
            raise RuntimeError("add_lora failed on stage 1")
        return [{7} if was_loaded else set()] * 3 if method == "list_loras" else ["digest"] * 3

    executor.collective_rpc = collective_rpc
    with pytest.raises(RuntimeError, match="failed on stage 1"):
        executor.add_lora(LoRARequest("a", 7, "/a"))
    assert ("remove_lora" in calls) == (not was_loaded)


# ---- calls -----------------------------------------------------------------------------------------------------------


def reply(executor: Any, *results: tuple[int, int]) -> Callable[[Any], None]:
    """The ring's answer to a call: (stage, rank) of each result."""

    def receive(timeout_s: Any) -> None:
        from stagewire.vllm_plugin.codec.values import encode_value

        call_id = next(iter(executor._replies))
        executor._replies[call_id] = SimpleNamespace(results=[CallResult(*where, "", "") for where in results])
        executor._reply_payloads[call_id] = [encode_value(True) for _ in results]

    return receive


def begin_call(executor: Any, *results: tuple[int, int]) -> Any:
    from stagewire.vllm_plugin.codec.values import encode_value

    executor._ranks.call.return_value = [CallResult(0, 0, "", "")], [encode_value(True)]
    executor._receive, executor.poll = reply(executor, *results), Mock()
    return executor._call("pin_lora", (7,), None)


def test_a_call_that_succeeded_everywhere_is_in_the_journal(executor: Any) -> None:
    assert begin_call(executor, (1, 0), (2, 0)) == [True, True, True]
    (entry,) = executor._process.journal.add.call_args_list
    assert entry.args[:3] == (5, "pin_lora", (7,))


@pytest.mark.parametrize("results", [[(2, 0), (1, 0)], [(1, 0)], [(1, 0), (1, 1)], [(1, 0), (2, 0), (3, 0)]], ids=str)
def test_results_that_are_not_one_of_each_rank_in_order_are_refused(results: Any, executor: Any) -> None:
    """vLLM takes the values by position: one stage's KV cache would be another's."""
    with pytest.raises(PeerError, match="results of"):
        begin_call(executor, *results)
    assert not executor._process.journal.add.called


def test_a_call_that_does_not_come_back_is_given_up(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stagewire.vllm_plugin.head import executor as executor_module

    now = [1000.0]
    monkeypatch.setattr(executor_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    executor._ranks.call.return_value, executor.poll = ([], []), Mock()

    def receive(timeout_s: float | None) -> None:
        assert now[0] < 2000, "no end"
        if timeout_s is None:
            assert executor._process.accuse.called
            executor._lose(1, StageLost(1, "stage 1 hangs"))
            return
        now[0] += timeout_s
        raise queue.Empty

    executor._receive = receive
    with pytest.raises(RuntimeError, match="pin_lora"):
        executor._call("pin_lora", (7,), None)
    assert now[0] == pytest.approx(1001)
    assert not executor._process.journal.add.called


# ---- steps and losses ------------------------------------------------------------------------------------------------


def test_a_step_that_does_not_come_back_is_given_up(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the whole limit, in pieces; then somebody is accused, and the end of the epoch ends the wait."""
    from stagewire.vllm_plugin.head import executor as executor_module

    now = [1000.0]
    monkeypatch.setattr(executor_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    executor._steps = {4: in_flight(4, ["a"])}

    def receive(timeout_s: float | None) -> None:
        assert now[0] < 2000, "no end"
        if timeout_s is None:  # the end of the epoch, which follows an accusation
            assert executor._process.accuse.called
            executor._lose(1, StageLost(1, "stage 1 hangs", 4))
            return
        now[0] += timeout_s
        raise queue.Empty

    executor._receive = receive
    executor._pump(executor._steps[4].future)
    assert executor._process.accuse.call_args.args[:2] == (1, 4)
    assert now[0] == pytest.approx(1100)


def test_a_result_of_a_step_that_nobody_waits_for_is_refused(executor: Any) -> None:
    from stagewire.ring.observer import Delivery
    from stagewire.wire.messages import Result, StageTiming

    executor._steps = {4: in_flight(4, ["a"])}
    timings = [StageTiming(stage, 0, 0, 0, 0, 0) for stage in range(NUM_STAGES)]
    with pytest.raises(PeerError, match="step 5, which is not in flight"):
        executor._take(Delivery(Result(1, 5, timings), [b""], 0))


def test_with_the_ring_every_step_in_flight_is_over(executor: Any) -> None:
    """And what was learnt of steps, too: the next stages may be slower, or compile anew."""
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    steps = [in_flight(4, ["a", "b"]), in_flight(5, ["c"])]
    executor._steps = {each.step: each for each in steps}
    executor._deadlines.add(8, 1.0)
    assert executor._deadlines.limit_s(1) == 90
    executor._lose(1, StageLost(2, "stage 2 failed step 5", 5))
    assert [each.future.result(0) for each in steps] == [EMPTY_MODEL_RUNNER_OUTPUT] * 2
    assert not executor._steps
    assert not executor.is_whole
    (loss,) = executor.take_losses()
    assert (loss.failed, loss.in_flight) == (["c"], ["a", "b", "c"])
    assert executor._deadlines.limit_s(1) == 100


def test_more_live_requests_than_a_batch_has_rows_are_restored_in_parts(executor: Any) -> None:
    """The first part makes the stages forget, and only that: the others would be gone again."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData

    from stagewire.vllm_plugin.codec.schedules import decode_schedule
    from stagewire.vllm_plugin.head.live_requests import Restored

    asked: list[Any] = []
    executor._call = lambda method, args, timeout, own_args: asked.append((method, args, own_args))
    live = [
        Restored(NewRequestData(name, [1], [], SamplingParams(), None, ([],), 0, None), [index])
        for index, name in enumerate("abcde")
    ]
    assert executor.restore(live)
    parts = [(decode_schedule(data), outputs, is_first) for _, (data, outputs, is_first), _ in asked]
    assert [own[1:] for _, _, own in asked] == [part[1:] for part in parts], "the head's own rank does as the others"
    assert [own[0].scheduled_new_reqs[0].req_id for _, _, own in asked] == ["a", "c", "e"]
    assert [[each.req_id for each in part.scheduled_new_reqs] for part, _, _ in parts] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]
    assert [outputs for _, outputs, _ in parts] == [[[0], [1]], [[2], [3]], [[4]]]
    assert [is_first for _, _, is_first in parts] == [True, False, False]


# ---- the process around it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last_steps", "accused"),
    [({1: 4, 2: 3}, 2), ({1: 3, 2: 3}, 1), ({1: 4, 2: 4}, 2), ({}, 1), ({1: 9, 2: 9}, 2)],
    ids=["the second", "both", "the tail, which has not answered", "nobody has reported", "the answer was lost"],
)
def test_of_an_overdue_step_the_first_stage_that_has_not_run_it_is_accused(
    last_steps: dict[int, int], accused: int
) -> None:
    from stagewire.vllm_plugin.member.member import Member

    process: Any = Member.__new__(Member)
    process._config, process._last_steps, process.ring = SimpleNamespace(num_stages=3), last_steps, Mock()
    process.accuse(1, 4, "step 4 did not come back")
    epoch, lost = process.ring.end_epoch.call_args.args
    assert (epoch, lost.stage, lost.step) == (1, accused, 4)


def test_only_the_answer_to_catching_up_ends_it() -> None:
    from stagewire.ring.observer import Delivery
    from stagewire.vllm_plugin.member.member import Member
    from stagewire.wire.messages import Reply

    process = Mock(_prepare=(7, 55))
    assert not Member.takes(process, Delivery(Reply(7, 54, []), [], 0))
    assert not process._set_whole.called
    assert Member.takes(process, Delivery(Reply(7, 55, []), [], 0))
    process._set_whole.assert_called_once_with(7)


@pytest.mark.parametrize(("now", "is_accused"), [(99.0, False), (101.0, True)])
def test_a_stage_that_does_not_catch_up_in_time_is_accused(
    now: float, is_accused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagewire.vllm_plugin.member import member

    monkeypatch.setattr(member, "time", SimpleNamespace(monotonic=lambda: now))
    process = Mock(_prepare=(7, 55), _prepare_until=100.0, _news=None, _broken=None, _leaving=None, _parent=None)
    process._ranks.problem.return_value = None
    member.Member._watch(process)
    assert process.accuse.called == is_accused
    assert (process._prepare is None) == is_accused


@pytest.mark.parametrize(
    ("now", "num_left", "is_broken", "leaves"),
    [(99.0, 2, False, False), (101.0, 2, False, True), (99.0, 0, False, True), (99.0, 2, True, True)],
    ids=["it has requests", "their time is over", "it has none", "in a broken ring nobody can finish"],
)
def test_a_stage_that_is_told_to_stop_waits_for_its_requests_but_not_for_ever(
    now: float, num_left: int, is_broken: bool, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagewire.vllm_plugin.member import member

    monkeypatch.setattr(member, "time", SimpleNamespace(monotonic=lambda: now))
    process = Mock(_broken=StageLost(2, "stage 2 is lost") if is_broken else None)
    process._count_requests.return_value = num_left
    member.Member._mind_leaving(process, "stage 1 was told to stop", 100.0)
    assert process.ring.request_stop.called == leaves


@pytest.mark.parametrize(
    ("error", "num_ranks", "goes_on"),
    [
        (ValueError("any"), 1, True),
        (ValueError("any"), 2, False),  # the others may be stuck in a collective
        (torch.AcceleratorError("any"), 1, False),
        (InternalError("a bug"), 1, False),
        (PeerError("rows in another order"), 1, True),
    ],
    ids=str,
)
def test_what_a_stage_can_go_on_after(error: Exception, num_ranks: int, goes_on: bool) -> None:
    from stagewire.vllm_plugin.ranks.stage_ranks import is_step_failure

    assert is_step_failure(Mock(num_ranks=num_ranks), error) == goes_on


@pytest.mark.parametrize("answers", [True, False])
def test_a_stage_goes_on_only_with_a_device_that_answers(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the step raised: libraries beside torch have errors of their own for a device that is lost."""
    from stagewire.vllm_plugin.ranks.stage_ranks import is_step_failure

    asked = Mock(side_effect=None if answers else torch.AcceleratorError("an illegal memory access was encountered"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", asked)
    assert is_step_failure(Mock(num_ranks=1), RuntimeError("any")) == answers
    assert asked.called


def test_the_process_of_a_ring_that_failed_ends_with_the_errors_code() -> None:
    from stagewire.errors import ConfigError
    from stagewire.vllm_plugin.member.member import Member

    process: Any = Member.__new__(Member)
    process._config, process._news, process._status = SimpleNamespace(stage=1), None, Mock()
    process.on_failed(ConfigError("a wrong setting"))
    assert process._exit_code == 2
    assert process._status.send.call_args.args[1:] == ("a wrong setting", 2)
