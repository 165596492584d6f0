"""In a head without an API, calls that wait for a killed EngineCore get vLLM's EngineDeadError."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from typing import Any

from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCH", "end_waits_for_dead_engine"]

PATCH = Patch(
    "vllm.v1.engine.core_client:MPClient.shutdown",
    "vLLM's monitor calls it when EngineCore has been killed: it ends the thread that takes answers in, and "
    "`LLM.generate` and every other call wait for ever; only in a head's process without an API",
    "vLLM raises EngineDeadError where an `LLM` waits for a killed EngineCore",
)


def end_waits_for_dead_engine(tell: Callable[[Any], None]) -> None:
    """In a head's process without an API: calls that wait for EngineCore when it dies get vLLM's EngineDeadError.

    Args:
        tell: called before that, with EngineCore's `multiprocessing` process.
    """
    from vllm.v1.engine.core_client import MPClient, SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def shutdown(self: Any, timeout: float | None = None) -> None:
            is_dead, manager = self.resources.engine_dead, self.resources.engine_manager
            try:
                original(self, timeout)
            finally:
                # A client that is still being made has no queue. vLLM itself refuses later calls.
                if is_dead and isinstance(self, SyncMPClient) and hasattr(self, "outputs_queue"):
                    for process in manager.processes if manager is not None else ():
                        tell(process)
                    self.outputs_queue.put_nowait(EngineDeadError())
                    for future in list(self.utility_results.values()):
                        with contextlib.suppress(InvalidStateError):  # its answer has just come
                            future.set_exception(EngineDeadError())

        return shutdown

    wrap(MPClient, "shutdown", make)
