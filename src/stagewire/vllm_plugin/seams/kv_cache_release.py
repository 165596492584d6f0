"""Releases a KV cache, so that another one can be initialised.

vLLM's runner has a method that releases the cache of its profiling run. It calls the accelerator, so it fails on a
CPU; there this module does the same by itself.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

__all__ = ["release_kv_cache"]


def release_kv_cache(runner: Any) -> None:
    """Undoes `initialize_kv_cache`, so that it can be called with another configuration.

    Args:
        runner: vLLM's GPUModelRunner, or its subclass for CPUs.
    """
    if torch.accelerator.is_available():
        runner._cleanup_profiling_kv_cache()
        return
    runner.kv_caches.clear()
    runner.attn_groups.clear()
    del runner.kv_cache_config
    runner.cache_config.num_gpu_blocks = None
    runner._init_block_sizes = []
    for layer in runner.compilation_config.static_forward_context.values():
        if hasattr(layer, "kv_cache"):
            layer.kv_cache = torch.tensor([]) if isinstance(layer.kv_cache, torch.Tensor) else []
        for name in ("_k_scale_cache", "_v_scale_cache"):
            if hasattr(getattr(layer, "impl", None), name):
                setattr(layer.impl, name, None)
    gc.collect()
