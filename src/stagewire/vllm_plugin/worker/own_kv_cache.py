"""The KV cache configuration of one rank, made from the configuration that the head made for all ranks.

The head makes its configuration once, from what the stages reported at its start. A stage that replaces another one
may have other settings: another number of ranks, another type of KV cache. The scheduler decides the number of blocks
and which layers share them, so these stay. The stage decides the bytes of a block, so vLLM's own code plans them anew.
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

# Fields of a layer's cache that the stage's own settings decide. The others (block size, window) hold for the model.
_DECIDED = ("num_kv_heads", "head_size", "head_size_v", "dtype", "kv_quant_mode", "cache_dtype_str", "shapes", "dtypes")
# Fields that the stage's attention backend derives from those.
_DERIVED = ("max_tp_shards", "num_head_slots", "state_content_bytes", "tokens_per_state", "block_stride_alignment")


def own_kv_cache_config(
    configs: Sequence[KVCacheConfig], worker: int, specs: Mapping[str, KVCacheSpec], vllm_config: VllmConfig
) -> KVCacheConfig:
    """The configuration of this rank: as the head made it, or with this stage's sizes when ``specs`` differs.

    Args:
        configs: one for each worker of all stages, as the stages were when the head started.
        worker: the position of this rank among all workers now.
        specs: the caches of this rank's layers, from vLLM's worker.
        vllm_config: this stage's, with the KV cache layout that all stages agreed on.

    Raises:
        ConfigError: no configuration has these layers, this stage plans another number of blocks than the ring, or its
            sizes do not fit the model's other layers.
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
    """The configuration at the worker's position, or else the first one with the same layers."""
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
    """``spec`` with the sizes of ``own``. ``spec`` may stand for a whole group of layers."""
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
    """The values of ``own`` in the fields that both have and that differ."""
    both = [name for name in names if hasattr(spec, name) and hasattr(own, name)]
    return {name: getattr(own, name) for name in both if getattr(spec, name) != getattr(own, name)}
