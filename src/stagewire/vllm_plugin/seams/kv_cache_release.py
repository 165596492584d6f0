"""A KV cache that was initialised can be taken back."""

from __future__ import annotations

from typing import Any
from unittest import mock

__all__ = ["release_kv_cache"]


def release_kv_cache(runner: Any) -> None:
    """Takes back `initialize_kv_cache`, so that another configuration may follow.

    vLLM's runner has this for the cache that it profiles with. Its calls of the accelerator mean nothing on a CPU, and
    fail there.
    """
    import torch

    if torch.accelerator.is_available():
        runner._cleanup_profiling_kv_cache()
        return
    with (
        mock.patch.object(torch.accelerator, "synchronize"),
        mock.patch.object(torch.accelerator, "empty_cache"),
    ):
        runner._cleanup_profiling_kv_cache()
