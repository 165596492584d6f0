"""What vLLM's versions name or take differently. Each function here works with all supported versions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from stagewire.vllm_plugin.seams.versions import is_at_least

__all__ = ["bytes_per_kv_block", "frontend_args", "main_task", "mapped_name", "plan_kv_cache", "returns_routed_experts"]


def bytes_per_kv_block(vllm_config: Any, groups: Any) -> int:
    """Bytes of one block of a worker's KV cache, over all its layers."""
    module = "kv_cache_planning" if is_at_least(0, 33) else "kv_cache_utils"
    count: Callable[..., int] = importlib.import_module(f"vllm.v1.core.{module}")._pool_bytes_per_block
    return count(vllm_config, groups) if is_at_least(0, 32) else count(groups)


def plan_kv_cache(vllm_config: Any, groups: Any, num_blocks: int) -> Any:
    """vLLM's own KV cache configuration of these groups of layers.

    It has another number of blocks than ``num_blocks`` when --num-gpu-blocks-override says so.
    """
    if is_at_least(0, 33):
        builder = importlib.import_module("vllm.v1.core.kv_cache_config_builder")
        return builder.get_kv_cache_config_builder(vllm_config).get_kv_cache_config_from_groups(
            vllm_config, groups, num_blocks
        )
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    num_bytes = num_blocks * bytes_per_kv_block(vllm_config, groups)
    return utils.get_kv_cache_config_from_groups(vllm_config, groups, num_bytes)


def frontend_args() -> Any:
    """The dataclass of the API server's own arguments."""
    package = "common" if is_at_least(0, 33) else "launchers"
    return importlib.import_module(f"vllm.entrypoints.{package}.cli_args").FrontendArgs


def main_task(supported_tasks: Sequence[str], model_config: Any) -> str:
    """The task by which vLLM's API server picks its routes; ``score`` for a model that compares two texts."""
    if "generate" in supported_tasks:
        return "generate"
    task: str | None = model_config.get_pooling_task(tuple(supported_tasks))
    if task is None:
        return supported_tasks[0] if supported_tasks else ""
    is_cross_encoder = task == "classify" and getattr(model_config.hf_config, "num_labels", 0) == 1
    return "score" if is_cross_encoder else task


def mapped_name(mapper: Any, name: str) -> str | None:
    """A tensor's name in vLLM's model, by the model's ``WeightsMapper`` if it has one. None if the mapper drops it."""
    if mapper is None:
        return name
    mapped: str | None = mapper.map_name(name) if is_at_least(0, 31) else mapper._map_name(name)
    return mapped


def returns_routed_experts(vllm_config: Any) -> bool:
    """Whether answers must name the experts that each token went to."""
    holder = vllm_config.aux_output_config if is_at_least(0, 31) else vllm_config.model_config
    return bool(holder.enable_return_routed_experts)
