"""What a rank does after the loss of a stage: it forgets its requests and builds the live ones anew by vLLM's code.

Stages that were not lost do the same, because they have run steps whose results never came back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput

__all__ = ["forget_requests", "restore_requests"]


def forget_requests(worker: Any) -> None:
    """Removes everything that vLLM's worker knows of requests, by vLLM's own code where it has any.

    Args:
        worker: vLLM's wrapper around its worker.
    """
    runner = worker.worker.model_runner
    runner.execute_model_state = None
    runner.kv_connector_output = None
    for name in ("_draft_token_ids", "_draft_probs", "_draft_prob_req_ids", "_draft_token_req_ids"):
        if hasattr(runner, name):
            setattr(runner, name, None)
    runner.mamba_state_idx.clear()
    worker.worker._pp_send_work = []
    batch = getattr(runner, "input_batch", None)  # made with the KV cache
    if batch is None:
        return
    batch.prev_sampled_token_ids = None
    batch.prev_req_id_to_index = None
    runner.encoder_cache.clear()
    schedule = SchedulerOutput.make_empty()
    schedule.finished_req_ids = set(runner.requests)
    worker.execute_model(schedule)


def restore_requests(worker: Any, schedule: SchedulerOutput, outputs: Sequence[Sequence[int]]) -> None:
    """Builds the state of ``schedule.scheduled_new_reqs``, which have run before, by vLLM's own code.

    Args:
        worker: vLLM's wrapper around its worker, which has forgotten these requests.
        schedule: without tokens; at most ``max_num_seqs`` requests.
        outputs: the tokens that each request has got so far, in the same order.
    """
    if not schedule.scheduled_new_reqs:
        return
    runner = worker.worker.model_runner
    worker.execute_model(schedule)
    worker.execute_model(SchedulerOutput.make_empty())  # takes them out of the batch: none of them runs yet
    for request, accepted in zip(schedule.scheduled_new_reqs, outputs, strict=True):
        state = runner.requests[request.req_id]
        state.output_token_ids[:] = accepted
        if accepted:  # the prompt's log-probabilities were delivered with the first token
            runner.num_prompt_logprobs.pop(request.req_id, None)
        if state.generator is not None:
            _fast_forward(state.generator, len(accepted), runner)


def _fast_forward(generator: torch.Generator, num_tokens: int, runner: Any) -> None:
    """Draws as often as the sampler did for ``num_tokens`` tokens (v1/sample/ops/topk_topp_sampler.py)."""
    if generator.device.type != "cpu":
        # 4 is the offset by which vLLM takes one token's draw back (`_bookkeeping_sync`). Not run on a GPU.
        generator.set_offset(generator.get_offset() + 4 * num_tokens)
        return
    vocab_size, wants_fp64 = runner.input_batch.vocab_size, runner.model_config.use_fp64_gumbel
    for _ in range(num_tokens):
        if wants_fp64:
            torch.empty(vocab_size, dtype=torch.float64).exponential_(generator=generator)
        else:
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
