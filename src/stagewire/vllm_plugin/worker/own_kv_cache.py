"""The KV cache configuration of a stage's rank, out of the one that the head has made for all of them.

The head makes it once, from what the stages said when it started. A stage that takes another one's place may have other
settings of its own: another number of ranks, another type of KV cache. The number of blocks and which layers share them
are the scheduler's and stay; the bytes of a block are the stage's, and are planned anew by vLLM's own code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, UniformTypeKVCacheSpecs

from stagewire.errors import ConfigError
from stagewire.vllm_plugin.seams.interfaces import plan_kv_cache

__all__ = ["own_kv_cache_config"]

# What a stage's own settings decide of a layer's cache. Everything else is of the whole model: block size, window.
_DECIDED = ("num_kv_heads", "head_size", "head_size_v", "dtype", "kv_quant_mode", "cache_dtype_str", "shapes", "dtypes")
# What follows from it, as the stage's attention backend says.
_DERIVED = ("max_tp_shards", "num_head_slots", "state_content_bytes", "tokens_per_state", "block_stride_alignment")


def own_kv_cache_config(
    configs: Sequence[KVCacheConfig], worker: int, specs: Mapping[str, KVCacheSpec], vllm_config: VllmConfig
) -> KVCacheConfig:
    """The one for this rank: as the head made it, or with other sizes when ``specs`` has others.

    Args:
        configs: one for each worker of all stages, as they were when the head made them.
        worker: which of all workers this rank is now.
        specs: what vLLM's worker says of its own layers' caches.
        vllm_config: this stage's, with the layout that all have agreed on.

    Raises:
        ConfigError: no configuration is of these layers, or another size does not fit the model's other layers.
    """
    config = _of_layers(configs, worker, set(specs))
    groups = [_with_own_sizes(group, specs) for group in config.kv_cache_groups]
    if groups == config.kv_cache_groups:
        return config
    planned = plan_kv_cache(vllm_config, groups, config.num_blocks)
    if planned.num_blocks != config.num_blocks:
        raise ConfigError(
            f"this stage plans {planned.num_blocks} KV blocks and the ring has {config.num_blocks}: start it without "
            "--num-gpu-blocks-override, or with stage 0's"
        )
    return replace(config, kv_cache_tensors=planned.kv_cache_tensors, kv_cache_groups=planned.kv_cache_groups)


def _of_layers(configs: Sequence[KVCacheConfig], worker: int, layers: set[str]) -> KVCacheConfig:
    """The worker's own, or that of any rank of the stage that had the same layers."""
    for config in [*configs[worker : worker + 1], *configs]:
        if {name for group in config.kv_cache_groups for name in group.layer_names} == layers:
            return config
    raise ConfigError(f"stage 0 has made no KV cache for {len(layers)} layers of this stage: {sorted(layers)[:3]}, ...")


def _with_own_sizes(group: KVCacheGroupSpec, specs: Mapping[str, KVCacheSpec]) -> KVCacheGroupSpec:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        layers = {name: _sized(each, specs[name]) for name, each in spec.kv_cache_specs.items()}
        if layers == spec.kv_cache_specs:
            return group
        return replace(group, kv_cache_spec=replace(spec, kv_cache_specs=layers))
    if not group.layer_names:
        return group
    sized = [_sized(spec, specs[name]) for name in group.layer_names]
    if any(each != sized[0] for each in sized):
        raise ConfigError(
            "this stage's layers have KV caches of several sizes; those of the one before it had one size"
        )
    return group if sized[0] == spec else replace(group, kv_cache_spec=sized[0])


def _sized(spec: KVCacheSpec, own: KVCacheSpec) -> KVCacheSpec:
    """``spec``, which may be of a whole group of layers, with the sizes of ``own``."""
    changed = _differing(_DECIDED, spec, own)
    if getattr(spec, "page_size_padded", None) is None:
        changed |= _differing(_DERIVED, spec, own)
    elif changed:
        raise ConfigError(
            f"this stage's KV cache differs from that of the one before it in {', '.join(changed)}, and the pages of "
            "this model's kinds of layers are padded to one size: start it with the settings of the one before it"
        )
    return replace(spec, **changed)


def _differing(names: Sequence[str], spec: KVCacheSpec, own: KVCacheSpec) -> dict[str, Any]:
    """The values of ``own``, where both have the field and they differ."""
    both = [name for name in names if hasattr(spec, name) and hasattr(own, name)]
    return {name: getattr(own, name) for name in both if getattr(spec, name) != getattr(own, name)}
