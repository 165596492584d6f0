"""Makes vLLM count a container's memory as `machine` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagewire import machine
from stagewire.vllm_plugin.seams.patching import Patch, wrap
from stagewire.vllm_plugin.seams.versions import is_at_least

__all__ = ["PATCH", "count_page_cache_as_free"]

PATCH = Patch(
    "vllm.v1.worker.cpu_worker:get_memory_node_info",
    "of a container's memory vLLM counts the page cache as taken, which is full of the checkpoint after loading, "
    "and refuses a KV cache for which there is room; it does not see limits of outer groups, or mounted elsewhere; "
    "only where a stage's layers run on a CPU",
    "vLLM leaves the page cache out and looks at every group above its own",
)


def count_page_cache_as_free() -> None:
    """In a process that runs layers: vLLM takes a container's limit and free memory from `machine`.

    vLLM itself counts the page cache as taken, which is full of the checkpoint, and reads the limit at one place only.
    """
    if not is_at_least(0, 32):
        return
    from vllm.v1.worker import cpu_worker

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_memory_node_info(node_id: int = 0) -> Any:
            found = original(node_id)
            limit = machine.memory_limit_bytes()
            if limit is not None:
                found.total_memory = min(found.total_memory, limit)
                found.available_memory = machine.available_bytes()
            return found

        return get_memory_node_info

    wrap(cpu_worker, "get_memory_node_info", make)
