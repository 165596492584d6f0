"""Gives EngineCore time to tell the ring that the head stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCH", "give_engine_time_to_stop"]

PATCH = Patch(
    "vllm.v1.engine.utils:get_engine_process_shutdown_timeout",
    "without a drain vLLM kills EngineCore right after SIGTERM, before the ring could stop in order; only in a "
    "head's process, where it gets the grace that ROCm gets",
    "the grace is not for ROCm alone",
)

# Stopping the ring takes milliseconds. vLLM's own teardown after that spends seconds in the garbage collector, and
# stock vLLM never waits for it.
ENGINE_STOP_GRACE_S = 2.0


def give_engine_time_to_stop() -> None:
    """In the process that started EngineCore: without a drain, EngineCore gets ``ENGINE_STOP_GRACE_S`` to stop."""
    from vllm.v1.engine import utils

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_engine_process_shutdown_timeout(request_timeout: Any, process_timeout: Any) -> Any:
            timeout = original(request_timeout, process_timeout)
            return ENGINE_STOP_GRACE_S if request_timeout == 0 and timeout == 0 else timeout

        return get_engine_process_shutdown_timeout

    wrap(utils, "get_engine_process_shutdown_timeout", make)
