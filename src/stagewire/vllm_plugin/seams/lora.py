"""LoRA: every stage takes a step's adapters in the same order, and requests to the base model get no adapter."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from stagewire.vllm_plugin.seams.patching import Patch, wrap
from stagewire.vllm_plugin.seams.versions import is_at_least

__all__ = ["PATCHES", "mend_lora"]

# The second module imports the operators of the first by name.
_TORCH_LORA_MODULES = ("ops.torch_ops.lora_ops", "punica_wrapper.punica_cpu")

_TORCH_LORA_OPERATORS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")

PATCHES = (
    Patch(
        "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters",
        "a step's adapters come as a set of names, which each process iterates in an order of its own, so stages would "
        "evict different ones; only in a stage's process",
        "vLLM touches a step's adapters in an order that is the same everywhere",
    ),
    *(
        Patch(
            f"vllm.lora.{module}:{name}",
            "-1 stands for the base model and is used as an index, so requests to the base model get the last slot's "
            "adapter when their batch has adapters; only in a stage's process, without effect off the CPU",
            "vLLM 0.33 is the oldest that is supported: its torch operators leave out rows of index -1",
        )
        for module in _TORCH_LORA_MODULES
        for name in _TORCH_LORA_OPERATORS
    ),
)


def mend_lora() -> None:
    """Installs the patches in a stage's process. To be called before the first step."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _apply_adapters(self: Any, lora_requests: Any) -> None:
            original(self, sorted(lora_requests, key=lambda request: request.lora_int_id))

        return _apply_adapters

    wrap(LRUCacheWorkerLoRAManager, "_apply_adapters", make)
    if is_at_least(0, 33):
        return  # vLLM leaves rows of the base model out itself
    for module in _TORCH_LORA_MODULES:
        owner = importlib.import_module(f"vllm.lora.{module}")
        for name in _TORCH_LORA_OPERATORS:
            wrap(owner, name, _without_base_rows)


def _without_base_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def operator(inputs: Any, weights: Any, output: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
        # inputs: [num_rows, ...]; a row of zeros adds nothing with any adapter.
        rows = inputs.masked_fill((indices < 0).unsqueeze(-1), 0)
        return original(rows, weights, output, indices, *args, **kwargs)

    return operator
