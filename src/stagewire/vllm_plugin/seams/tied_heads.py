"""Gives weights to an output head that is tied to the embedding, on a stage that has no embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models import utils

from stagewire.errors import ConfigError
from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCH", "check_heads", "heads_without_embedding", "load_head", "mend_tied_heads"]

PATCH = Patch(
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead.tie_weights",
    "some models have the embedding on the first stage alone and tie the last stage's head to it all the same: the "
    "head keeps a tensor of its own there, which is read from the embedding's; only in a stage's process",
    "models build the embedding on the last stage too when it is tied",
)

_WITHOUT_EMBEDDING = "stagewire_without_embedding"


def mend_tied_heads() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def tie_weights(self: Any, embed_tokens: Any) -> Any:
            if isinstance(embed_tokens, utils.PPMissingLayer):
                setattr(self, _WITHOUT_EMBEDDING, True)
                return self
            return original(self, embed_tokens)

        return tie_weights

    wrap(ParallelLMHead, "tie_weights", make)


def heads_without_embedding(model: nn.Module) -> list[nn.Module]:
    """Output heads that are tied to an embedding which this stage does not have, and that have no weights yet."""
    return [module for module in model.modules() if getattr(module, _WITHOUT_EMBEDDING, False)]


def load_head(head: nn.Module, embedding: torch.Tensor) -> None:
    """Loads the head from the checkpoint's ``embedding``. # [vocab_size, hidden_size]"""
    head.weight.weight_loader(head.weight, embedding)
    setattr(head, _WITHOUT_EMBEDDING, False)


def check_heads(model: nn.Module) -> None:
    """Raises ConfigError when a tied head got no weights: only our own loader calls `load_head`."""
    if heads_without_embedding(model):
        raise ConfigError(
            "the output head is tied to the embedding, which vLLM's model has on stage 0 alone, and this --load-format "
            "does not copy it: give --load-format auto"
        )
