"""vLLM's step objects with the fields that n-gram speculation over stages needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

__all__ = ["DraftingOutput", "SpeculativeRequestData"]


@dataclass
class SpeculativeRequestData(CachedRequestData):
    """``accepted_token_ids``: per request, the last tokens before ``num_computed_tokens``.

    There are at most as many as one step can accept. A stage appends from their end the tokens that it lacks.
    """

    accepted_token_ids: list[list[int]] = field(default_factory=list)


@dataclass
class DraftingOutput(ModelRunnerOutput):
    """A step's result with the drafts for the next one."""

    draft_token_ids: DraftTokenIds | None = None
