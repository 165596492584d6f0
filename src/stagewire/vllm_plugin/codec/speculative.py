"""What vLLM's step objects lack for n-gram speculation over stages."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

__all__ = ["DraftingOutput", "SpeculativeRequestData"]


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
