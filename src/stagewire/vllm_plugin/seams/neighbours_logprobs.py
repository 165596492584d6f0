"""Keeps the top log-probabilities of requests in a batch with a request that has ``logprob_token_ids``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCHES", "keep_logprobs_of_neighbours"]

PATCHES = (
    Patch(
        "vllm.v1.sample.sampler:Sampler.forward",
        "notes how many log-probabilities the batch asks for, for the next patch; only where a stage's layers run",
        "the next one is gone",
    ),
    Patch(
        "vllm.v1.sample.sampler:Sampler.gather_specific_token_logprobs",
        "beside one request with logprob_token_ids every other request of the step loses its likeliest tokens, and a "
        "beam search its beams; rows without such a list get what they asked for; only where a stage's layers run",
        "vLLM gathers both kinds row by row",
    ),
)


def keep_logprobs_of_neighbours() -> None:
    """In a process that runs layers: rows without ``logprob_token_ids`` keep their top log-probabilities.

    If one row has such a list, `Sampler.forward` returns the table of chosen tokens for all rows. The table made here
    has chosen tokens in rows with a list and top tokens in the others. It is as wide as the wider of both, and vLLM's
    API server cuts each row to what its request asked for.
    """
    import torch
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.sampler import Sampler

    def make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            self.stagewire_num_logprobs = sampling_metadata.max_num_logprobs
            return original(self, logits, sampling_metadata, *args, **kwargs)

        return forward

    def make_gather(original: Callable[..., Any]) -> Callable[..., Any]:
        def gather_specific_token_logprobs(self: Any, logprobs: Any, logprob_token_ids: Any, sampled: Any) -> Any:
            chosen = original(self, logprobs, logprob_token_ids, sampled)
            count = self.stagewire_num_logprobs
            if chosen is None or count is None or count < 0:  # no list, no top tokens, or all tokens of the vocabulary
                return chosen
            top = self.gather_logprobs(logprobs, count, token_ids=sampled)
            num_rows, width = len(sampled), max(chosen.logprobs.shape[1], top.logprobs.shape[1])
            ids = chosen.logprob_token_ids.new_zeros(num_rows, width)
            values = chosen.logprobs.new_full((num_rows, width), float("-inf"))
            rows = torch.tensor([row not in logprob_token_ids for row in range(num_rows)], device=ids.device)
            for table, of in ((chosen, ~rows), (top, rows)):
                ids[of, : table.logprobs.shape[1]] = table.logprob_token_ids[of]
                values[of, : table.logprobs.shape[1]] = table.logprobs[of]
            return LogprobsTensors(ids, values, chosen.selected_token_ranks)

        return gather_specific_token_logprobs

    wrap(Sampler, "forward", make_forward)
    wrap(Sampler, "gather_specific_token_logprobs", make_gather)
