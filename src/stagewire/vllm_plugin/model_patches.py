"""What vLLM's models need to be cut into stages, beyond what they do by themselves.

Stock pipeline parallelism has these faults too; the records with reasons are in compat.py. Applied by each stage's
process before its model is built, so modules may be imported here that a process without stages never needs.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models import utils

from stagewire.errors import ConfigError
from stagewire.vllm_plugin import compat

__all__ = ["check_heads", "heads_without_embedding", "install", "load_head"]

_WITHOUT_EMBEDDING = "stagewire_without_embedding"


def install(model_config: Any) -> None:
    """Those of this model. Raises ConfigError when a target is not what it was."""
    _patch_missing_layers()
    _patch_tied_heads()
    if model_config.using_transformers_backend():
        _patch_transformers_backend()
    if model_config.architecture.startswith("Gemma4"):
        _patch_gemma4()


# ---- layers of other stages ------------------------------------------------------------------------------------------


def _patch_missing_layers() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not args and {"hidden_states", "residual"} <= kwargs.keys():
                return kwargs["hidden_states"], kwargs["residual"]
            return original(self, *args, **kwargs)

        return forward

    def tie_weights(self: Any, _: Any) -> Any:
        return self

    compat.wrap(utils.PPMissingLayer, "forward", make)
    compat.add(utils.PPMissingLayer, "tie_weights", tie_weights)


# ---- tied heads ------------------------------------------------------------------------------------------------------


def _patch_tied_heads() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def tie_weights(self: Any, embed_tokens: Any) -> Any:
            if isinstance(embed_tokens, utils.PPMissingLayer):
                setattr(self, _WITHOUT_EMBEDDING, True)
                return self
            return original(self, embed_tokens)

        return tie_weights

    compat.wrap(ParallelLMHead, "tie_weights", make)


def heads_without_embedding(model: nn.Module) -> list[nn.Module]:
    """Output heads that are tied to an embedding which this stage does not have, and are not loaded yet."""
    return [module for module in model.modules() if getattr(module, _WITHOUT_EMBEDDING, False)]


def load_head(head: nn.Module, embedding: torch.Tensor) -> None:
    """``embedding``: the checkpoint's. # [vocab_size, hidden_size]"""
    head.weight.weight_loader(head.weight, embedding)
    setattr(head, _WITHOUT_EMBEDDING, False)


def check_heads(model: nn.Module) -> None:
    """Raises ConfigError when a tied head got no weights: not every way of loading is ours."""
    if heads_without_embedding(model):
        raise ConfigError(
            "the output head is tied to the embedding, which vLLM's model has on stage 0 alone, and this --load-format "
            "does not copy it: give --load-format auto"
        )


# ---- the Transformers backend ----------------------------------------------------------------------------------------


class _DoneBefore(utils.PPMissingLayer):
    """Stands for what came before layer 0. Hidden states have it already: they pass, and an index adds nothing.

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


def _patch_transformers_backend() -> None:
    from vllm.model_executor.models.transformers import base

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def pipeline_parallel(self: Any) -> None:
            before = [] if self.pp_group.is_first_rank else _modules_before_layers(self.model)
            original(self)
            for owner, name in before:
                setattr(owner, name, _DoneBefore(self.model_config.dtype))

        return pipeline_parallel

    compat.wrap(base.Base, "pipeline_parallel", make)


def _modules_before_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Owner and name of each, without the token embedding, which no later stage calls (or the last one shares)."""
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
    return []  # vLLM says what is wrong with a model without a list of layers


# ---- Gemma 4 ---------------------------------------------------------------------------------------------------------


def _patch_gemma4() -> None:
    from vllm.model_executor.models import gemma4

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(
            self: Any,
            input_ids: Any,
            positions: Any,
            intermediate_tensors: Any = None,
            inputs_embeds: Any = None,
            per_layer_inputs: Any = None,
            **kwargs: Any,
        ) -> Any:
            if per_layer_inputs is None and intermediate_tensors is not None:
                per_layer_inputs = intermediate_tensors.tensors.get("per_layer_inputs")
            return original(self, input_ids, positions, intermediate_tensors, inputs_embeds, per_layer_inputs, **kwargs)

        return forward

    compat.wrap(gemma4.Gemma4Model, "forward", make)
