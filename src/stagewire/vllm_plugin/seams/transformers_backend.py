"""Models of the Transformers backend: only the first stage runs the modules before layer 0."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models import utils

from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCH", "mend_transformers_backend"]

PATCH = Patch(
    "vllm.model_executor.models.transformers.base:Base.pipeline_parallel",
    "the Transformers backend runs what comes between embedding and first layer (positions, a norm) again on later "
    "stages; only in a process that runs a model through that backend",
    "later stages leave it out",
)


class _DoneBefore(utils.PPMissingLayer):
    """Replaces a module before layer 0, whose result the incoming hidden states contain already.

    Hidden states pass unchanged. For indices, such as positions, the result is zeros, which add nothing.

    Args:
        dtype: of the hidden states.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if value.is_floating_point():
            return value
        return torch.zeros((*value.shape, 1), dtype=self._dtype, device=value.device)


def mend_transformers_backend() -> None:
    from vllm.model_executor.models.transformers import base

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def pipeline_parallel(self: Any) -> None:
            before = [] if self.pp_group.is_first_rank else _modules_before_layers(self.model)
            original(self)
            for owner, name in before:
                setattr(owner, name, _DoneBefore(self.model_config.dtype))

        return pipeline_parallel

    wrap(base.Base, "pipeline_parallel", make)


def _modules_before_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Owner and name of each module with weights before the layers, without the token embedding.

    Later stages do not call the embedding, and the last one may share it with the head.
    """
    decoder = model if model.supports_pp_plan else model.get_decoder()
    names = list(model._pp_plan) if model.supports_pp_plan else [name for name, _ in decoder.named_children()]
    embedding = model.get_input_embeddings()
    found: list[tuple[nn.Module, str]] = []
    for name in names:
        module = attrgetter(name)(decoder)
        if isinstance(module, nn.ModuleList):
            return found
        owner, _, last = name.rpartition(".")
        if module is not embedding and next(module.parameters(), None) is not None:
            found.append((decoder.get_submodule(owner), last))
    return []  # vLLM itself refuses a model without a list of layers
