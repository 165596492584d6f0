"""A worker stage between its ring and its ranks, both of which are played: what it runs, keeps, and tells the head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest

from stagewire.errors import PeerError, StageLost
from stagewire.ring.observer import Broken, Delivery
from stagewire.wire.messages import Call, CallResult, Reply, Result, Sample, Step

pytestmark = pytest.mark.vllm


def make_host(stage: int = 1, num_stages: int = 3) -> Any:
    from stagewire.vllm_plugin.codec.values import encode_value
    from stagewire.vllm_plugin.host.stage_host import _StageHost

    config = SimpleNamespace(stage=stage, is_tail=stage == num_stages - 1, is_head=False)
    process, ranks = Mock(), Mock(config=config, num_ranks=1)
    process.ring.hop_ns, process.ring.state.epoch = 0, 7
    process.ring.identities = [SimpleNamespace(incarnation="head", tensor_parallel=1)]
    ranks.call.return_value = [CallResult(stage, 0, "", "")], [encode_value(None)]
    ranks.own.adapters.known, ranks.execute.return_value = {}, None
    return _StageHost(process, ranks)


def make_step(step: int, epoch: int = 7, *, waits_for_sample: bool = False) -> Delivery:
    """Of one request with one token."""
    from vllm.v1.core.sched.output import SchedulerOutput

    from stagewire.vllm_plugin.codec.schedules import encode_schedule

    schedule = SchedulerOutput.make_empty()
    schedule.num_scheduled_tokens, schedule.total_num_scheduled_tokens = {"a": 1}, 1
    return Delivery(Step(epoch, step, 1, 0, waits_for_sample, [], []), [encode_schedule(schedule)], 0)


def make_call(call_id: int, method: str, args: bytes = b"", epoch: int = 7) -> Delivery:
    return Delivery(Call(epoch, call_id, method), [args], 0)


def serve(host: Any, *items: Any) -> None:
    """Until there is nothing left to receive."""
    host._ring.receive.side_effect = [*items, None]
    host.run()


def sent(host: Any) -> list[Any]:
    return [call.args[0] for call in host._ring.send.call_args_list]


def ran(host: Any) -> list[Any]:
    """Methods of the calls that the ranks were asked to run."""
    return [call.args[0] for call in host._ranks.call.call_args_list]


def test_a_step_of_an_epoch_that_is_over_is_not_run() -> None:
    host = make_host()
    serve(host, make_step(1, epoch=6), make_step(2))
    assert [message.step for message in sent(host)] == [2]
    assert host._ranks.execute.call_count == 1


def test_after_a_step_that_failed_the_rest_of_its_epoch_is_not_run() -> None:
    host = make_host()
    host._ranks.execute.side_effect = RuntimeError("any")
    serve(host, make_step(1), make_step(2))
    assert host._ranks.execute.call_count == 1
    assert host._process.end_epoch.call_args.args[:2] == (7, 1)


def test_the_tail_samples_the_step_that_the_head_names() -> None:
    from vllm.v1.outputs import ModelRunnerOutput

    host = make_host(stage=2)
    host._ranks.answer.return_value = ModelRunnerOutput(["a"], {"a": 0}, [[5]])
    host._ranks.own.take_drafts.return_value = None
    serve(host, make_step(1, waits_for_sample=True), Delivery(Sample(7, 1), [], 0), make_step(2))
    assert [(type(message), message.step) for message in sent(host)] == [(Result, 1), (Result, 2)]


def test_a_sample_of_a_lost_step_is_nobodys() -> None:
    """Its grammar would be applied to the next step's rows."""
    host = make_host(stage=2)
    lost = Broken(7, StageLost(1, "stage 1 is lost"))
    serve(host, make_step(1, waits_for_sample=True), lost, Delivery(Sample(7, 1), [], 0))
    assert sent(host) == []
    assert not host._ranks.answer.called


def test_what_a_head_asks_for_at_its_start_is_done_once_for_the_same_arguments() -> None:
    host = make_host()
    same, other = b"one KV cache", b"another"
    method = "initialize_from_config"
    serve(host, *(make_call(number, method, args) for number, args in enumerate((same, same, other, same))))
    assert [call.args[1] for call in host._ranks.call.call_args_list] == [same, other, same]
    assert [message.call_id for message in sent(host)] == [0, 1, 2, 3]


def test_a_new_heads_requests_do_not_meet_those_of_the_one_before() -> None:
    host = make_host()
    serve(host, make_call(1, "get_stage_state"))
    assert not host._ranks.forget.called
    host._ring.identities = [SimpleNamespace(incarnation="the next head", tensor_parallel=1)]
    serve(host, make_call(2, "get_stage_state"), make_call(3, "get_stage_state"))
    host._ranks.forget.assert_called_once()


def test_of_a_journal_a_stage_runs_what_it_has_not_run() -> None:
    from stagewire.vllm_plugin.codec.calls import PREPARE
    from stagewire.vllm_plugin.codec.values import encode_value

    host = make_host()
    first, second = (1, "add_lora", b"first"), (2, "add_lora", b"second")
    serve(host, make_call(*first))
    serve(host, make_call(9, PREPARE, encode_value([first, second])))
    assert [call.args[1] for call in host._ranks.call.call_args_list] == [b"first", b"second"]


@pytest.mark.parametrize("method", ["restore_requests", "get_stage_state"])
def test_a_stage_that_cannot_take_up_its_requests_ends_and_any_other_call_may_fail(method: str) -> None:
    from stagewire.errors import InternalError

    host = make_host()
    host._ranks.call.return_value = [CallResult(1, 0, "MemoryError", "")], [b""]
    if method == "restore_requests":
        with pytest.raises(InternalError, match="cannot take up its requests"):
            serve(host, make_call(1, method))
        assert sent(host) == []
    else:
        serve(host, make_call(1, method))
        assert sent(host)[0].results[0].error_type == "MemoryError"


def test_a_stage_knows_how_many_ranks_come_before_its_own() -> None:
    """vLLM picks a worker's KV cache by that number."""
    host = make_host(stage=2)
    host._ring.identities = [SimpleNamespace(incarnation="head", tensor_parallel=ranks) for ranks in (2, 4)]
    serve(host, make_call(1, "get_stage_state"))
    assert host._ranks.call.call_args.args[2] == 6


@pytest.mark.parametrize("error_type", ["ConfigError", "MemoryError"])
def test_a_stage_that_cannot_catch_up_ends(error_type: str) -> None:
    from stagewire.errors import ConfigError, InternalError
    from stagewire.vllm_plugin.codec.calls import PREPARE
    from stagewire.vllm_plugin.codec.values import encode_value

    host = make_host()
    host._ranks.call.return_value = [CallResult(1, 0, error_type, "why")], [b""]
    with pytest.raises(ConfigError if error_type == "ConfigError" else InternalError, match="cannot catch up"):
        serve(host, make_call(9, PREPARE, encode_value([(1, "add_lora", b"first")])))
    assert sent(host) == []


def test_results_are_passed_on_in_the_order_of_stages() -> None:
    host = make_host(stage=2)
    serve(host, make_call(5, "get_stage_state"), Delivery(Reply(7, 5, [CallResult(1, 0, "", "")]), [b"1"], 0))
    message, payloads = host._ring.send.call_args.args
    assert [result.stage for result in message.results] == [1, 2]
    assert payloads[0] == b"1"


def test_a_reply_to_a_call_that_was_not_run_here_is_refused() -> None:
    with pytest.raises(PeerError, match="a reply to call 5"):
        serve(make_host(stage=2), Delivery(Reply(7, 5, []), [], 0))


def test_a_step_with_another_number_of_tokens_than_its_schedule_is_refused() -> None:
    step = make_step(1)
    wrong = Delivery(msgspec.structs.replace(step.message, num_tokens=2), step.payloads, 0)
    with pytest.raises(PeerError, match="2 tokens in the header"):
        serve(make_host(), wrong)


def test_a_sample_for_another_step_is_refused() -> None:
    host = make_host(stage=2)
    with pytest.raises(PeerError, match="a Sample for step 2"):
        serve(host, make_step(1, waits_for_sample=True), Delivery(Sample(7, 2), [], 0))
    assert not host._ranks.answer.called
