"""n-gram speculation over stages, which stock vLLM does not support.

The tail drafts, because it samples. Its drafts come back with the step's result, so that the scheduler takes them with
the step that they belong to. The stages before the tail get the accepted drafts with the next schedule. Stock vLLM
sends them only the one token after the drafts, and their rows lack the accepted ones (docs/design/vllm-seams.md,
"Speculation").
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds

from stagewire.errors import ConfigError, PeerError
from stagewire.vllm_plugin.codec.speculative import SpeculativeRequestData

__all__ = [
    "check_method",
    "check_speculation",
    "describe_speculation",
    "only_of",
    "prepare_runner",
    "take_accepted",
    "with_accepted",
]

METHOD = "ngram"
# The fields of vLLM's SpeculativeConfig on which n-gram drafting and the check of the drafts depend.
_SETTINGS = (
    *("method", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"),
    *("rejection_sample_method", "num_speculative_tokens_per_batch_size"),
)


def check_method(method: str | None) -> None:
    """Raises ConfigError for every method but n-grams. ``None``: no method was named.

    May be called before vLLM resolves its settings, which for some methods needs packages that are not installed.
    """
    if method not in (None, METHOD):
        raise ConfigError(
            f"speculative decoding by {method!r} is not carried between stages: its drafter would sit on the "
            f'last stage alone; give --speculative-config \'{{"method": "{METHOD}", ...}}\', or none'
        )


def check_speculation(vllm_config: Any) -> None:
    """Raises ConfigError for every kind of speculation but n-grams, also one that a checkpoint asks for by itself."""
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
    """The settings that must be equal on all stages, as text; empty without speculation."""
    config = vllm_config.speculative_config
    return "" if config is None else json.dumps({name: getattr(config, name) for name in _SETTINGS})


def prepare_runner(runner: Any, *, is_tail: bool) -> None:
    """Corrects vLLM's runner for n-grams. To be called after loading, before the KV cache is made."""
    if runner.speculative_config is None:
        return
    if is_tail:
        # The runner checks that drafts fit a draft model, but n-grams have none. When one request is close to the end
        # of the context, it drafts zeros for every row, also for a prompt whose last chunk is already in flight. The
        # n-gram drafter keeps to the limit by itself, so here the check always passes.
        runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens
    else:
        runner.drafter = None  # `initialize_kv_cache` reads it, but only the last stage has one


def with_accepted(cached: CachedRequestData, requests: Any, num_spec_tokens: int) -> SpeculativeRequestData:
    """``cached`` with the accepted tokens of each request.

    Args:
        cached: vLLM's own.
        requests: the scheduler's requests by id.
        num_spec_tokens: how many tokens one step drafts at most.
    """
    accepted = []
    for req_id, end in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        request = requests[req_id]
        begin = max(request.num_prompt_tokens, end - num_spec_tokens)
        accepted.append(list(request.all_token_ids[begin:end]) if begin < end else [])
    own = {each.name: getattr(cached, each.name) for each in fields(CachedRequestData)}
    return SpeculativeRequestData(**own, accepted_token_ids=accepted)


def take_accepted(runner: Any, schedule: SchedulerOutput) -> None:
    """Appends the accepted tokens that the rows of a stage before the tail lack, before it runs ``schedule``.

    Raises:
        PeerError: the stage lacks more tokens than came, so its rows would be wrong.
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
    """The drafts of these requests, in their old order."""
    wanted = set(req_ids)
    kept = [
        (req_id, tokens)
        for req_id, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
        if req_id in wanted
    ]
    return DraftTokenIds([req_id for req_id, _ in kept], [tokens for _, tokens in kept])
