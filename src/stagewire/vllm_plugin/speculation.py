"""n-gram speculation over stages: what vLLM leaves to one process, and what it leaves out of its own pipelines.

The tail drafts, because it samples; its drafts come back with the step's result, in step with the scheduler (as a call
they would run ahead of it). The stages before the tail hear of the drafts that were accepted with the next schedule:
stock vLLM sends them only the one token after those, and their rows then lack the accepted ones
(docs/design/vllm-seams.md, "Speculation").
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from stagewire.errors import ConfigError, PeerError

__all__ = [
    "DraftingOutput",
    "SpeculativeRequestData",
    "check_method",
    "check_speculation",
    "describe_speculation",
    "only_of",
    "prepare_runner",
    "take_accepted",
    "with_accepted",
]

METHOD = "ngram"
# Of vLLM's SpeculativeConfig, what n-gram drafting and the check of its drafts depend on.
_SETTINGS = (
    *("method", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"),
    *("rejection_sample_method", "num_speculative_tokens_per_batch_size"),
)


@dataclass
class SpeculativeRequestData(CachedRequestData):
    """``accepted_token_ids``: per request, the tokens right before ``num_computed_tokens``; at most as many as one step
    can have accepted, so that a stage takes from their end what it lacks.
    """

    accepted_token_ids: list[list[int]] = field(default_factory=list)


@dataclass
class DraftingOutput(ModelRunnerOutput):
    """A step's result with the drafts for the next one."""

    draft_token_ids: DraftTokenIds | None = None


def check_method(method: str | None) -> None:
    """Also before vLLM has looked at it, which wants some methods' packages first. ``None``: not said.

    Raises ConfigError for every method but n-grams.
    """
    if method not in (None, METHOD):
        raise ConfigError(
            f"speculative decoding by {method!r} is not carried between stages: its drafter would sit on the "
            f'last stage alone; give --speculative-config \'{{"method": "{METHOD}", ...}}\', or none'
        )


def check_speculation(vllm_config: Any) -> None:
    """Raises ConfigError for every kind of speculation but n-grams, however it was asked for: a checkpoint may name its
    own draft model.
    """
    config = vllm_config.speculative_config
    if config is None:
        return
    check_method(config.method)
    if config.rejection_sample_method == "synthetic":
        raise ConfigError("rejection_sample_method 'synthetic' in --speculative-config gives other tokens on purpose")
    if vllm_config.model_config.is_hybrid:
        raise ConfigError(
            f"{vllm_config.model_config.architecture} has state-space layers, whose state must be taken back when a "
            "draft is rejected; vLLM does that only on the stage that samples: drop --speculative-config"
        )


def describe_speculation(vllm_config: Any) -> str:
    """What must be equal on all stages, as text; empty without speculation."""
    config = vllm_config.speculative_config
    return "" if config is None else json.dumps({name: getattr(config, name) for name in _SETTINGS})


def prepare_runner(runner: Any, *, is_tail: bool) -> None:
    """After loading, before the KV cache: two things that vLLM's runner gets wrong for n-grams."""
    if runner.speculative_config is None:
        return
    if is_tail:
        # It checks that drafts fit a draft model, of which there is none. When the longest request is too close to the
        # context's end it drafts zeros for every row instead, also for prompts whose last chunk is in the next
        # micro-batch already. The n-gram drafter minds the limit itself.
        runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens
    else:
        runner.drafter = None  # asked for by `initialize_kv_cache`, built on the last stage only


def with_accepted(cached: CachedRequestData, requests: Any, num_spec_tokens: int) -> SpeculativeRequestData:
    """``cached`` and the accepted tokens of each request.

    Args:
        cached: vLLM's own.
        requests: of the scheduler, by id.
        num_spec_tokens: the most that one step drafts.
    """
    accepted = []
    for req_id, end in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        request = requests[req_id]
        begin = max(request.num_prompt_tokens, end - num_spec_tokens)
        accepted.append(list(request.all_token_ids[begin:end]) if begin < end else [])
    own = {each.name: getattr(cached, each.name) for each in fields(CachedRequestData)}
    return SpeculativeRequestData(**own, accepted_token_ids=accepted)


def take_accepted(runner: Any, schedule: SchedulerOutput) -> None:
    """On a stage before the tail, before it runs ``schedule``: appends the accepted tokens that its rows lack.

    Raises:
        PeerError: it lacks more than came; its rows would be wrong.
    """
    cached = schedule.scheduled_cached_reqs
    if not isinstance(cached, SpeculativeRequestData):
        return
    batch = runner.input_batch
    for req_id, end, accepted in zip(
        cached.req_ids, cached.num_computed_tokens, cached.accepted_token_ids, strict=True
    ):
        request = runner.requests[req_id]
        begin = request.num_tokens
        num_missing = end - begin
        if num_missing <= 0:
            continue
        if num_missing > len(accepted):
            raise PeerError(
                f"request {req_id}: {end} tokens are computed, this stage knows {begin} and was sent {len(accepted)}: "
                "its rows would be wrong, so the step is failed"
            )
        tokens = accepted[-num_missing:]
        request.output_token_ids.extend(tokens)
        row = batch.req_id_to_index.get(req_id)
        if row is not None:
            batch.token_ids_cpu[row, begin:end] = tokens
            batch.is_token_ids[row, begin:end] = True
            batch.num_tokens_no_spec[row] = end


def only_of(drafts: DraftTokenIds, req_ids: Iterable[str]) -> DraftTokenIds:
    """The drafts of these requests, in the order in which they were."""
    wanted = set(req_ids)
    kept = [
        (req_id, tokens)
        for req_id, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
        if req_id in wanted
    ]
    return DraftTokenIds([req_id for req_id, _ in kept], [tokens for _, tokens in kept])
