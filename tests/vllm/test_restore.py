"""What a stage makes of the requests that it gets anew after a loss; with a worker that is played."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytestmark = pytest.mark.vllm

VOCAB_SIZE = 50


def make_worker(wants_fp64: bool = False, **states: Any) -> Any:
    runner = SimpleNamespace(
        requests=states,
        num_prompt_logprobs=dict.fromkeys(states, 2),
        input_batch=SimpleNamespace(vocab_size=VOCAB_SIZE),
        model_config=SimpleNamespace(use_fp64_gumbel=wants_fp64),
    )
    return SimpleNamespace(worker=SimpleNamespace(model_runner=runner), execute_model=Mock())


def make_state(seed: int | None = None) -> Any:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return SimpleNamespace(output_token_ids=[], generator=generator)


def restore(worker: Any, outputs: dict[str, list[int]]) -> None:
    from vllm.v1.core.sched.output import SchedulerOutput

    from stagewire.vllm_plugin.worker.restore import restore_requests

    schedule = SchedulerOutput.make_empty()
    schedule.scheduled_new_reqs = [SimpleNamespace(req_id=req_id) for req_id in outputs]
    restore_requests(worker, schedule, list(outputs.values()))


def test_they_have_their_tokens_and_are_in_no_batch_yet() -> None:
    worker = make_worker(a=make_state(), b=make_state())
    restore(worker, {"a": [7, 8, 9], "b": []})
    requests = worker.worker.model_runner.requests
    assert [requests[name].output_token_ids for name in "ab"] == [[7, 8, 9], []]
    first, second = (call.args[0] for call in worker.execute_model.call_args_list)
    assert len(first.scheduled_new_reqs) == 2
    assert not second.scheduled_new_reqs


def test_log_probabilities_of_a_prompt_come_once() -> None:
    """With a request's first token; who has none yet is still to get them."""
    worker = make_worker(told=make_state(), waits=make_state())
    restore(worker, {"told": [7], "waits": []})
    assert worker.worker.model_runner.num_prompt_logprobs == {"waits": 2}


@pytest.mark.parametrize("wants_fp64", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_a_seeded_request_draws_on_where_vllms_sampler_was(num_tokens: int, wants_fp64: bool) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    current_platform.import_kernels()
    undisturbed, sampler = torch.Generator().manual_seed(3), TopKTopPSampler(use_fp64_gumbel=wants_fp64)
    for _ in range(num_tokens):
        sampler.forward_cpu(torch.zeros(1, VOCAB_SIZE), {0: undisturbed}, None, None)
    state = make_state(seed=3)
    restore(make_worker(wants_fp64, a=state), {"a": [7] * num_tokens})
    assert torch.equal(state.generator.get_state(), undisturbed.get_state())
