"""The process that starts EngineCore watches it, and EngineCore ends with that process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagewire.observe.processes import watch_spawned
from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCH", "watch_engine"]

PATCH = Patch(
    "vllm.v1.engine.utils:CoreEngineProcManager.__init__",
    "EngineCore imports for seconds before it can notice that its parent was killed, and a killed EngineCore is "
    "noticed by vLLM but told to nobody; only in a process that starts EngineCore",
    "vLLM's EngineCore ends with its parent from the start, and its API server with EngineCore",
)


def watch_engine(act: Callable[[Any], None] | None = None) -> None:
    """In the process that starts EngineCore: EngineCore ends when this process ends, also while it still imports.

    Args:
        act: called with EngineCore's `multiprocessing` process once it is started.
    """
    from vllm.v1.engine.utils import CoreEngineProcManager

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            with watch_spawned("EngineCore"):
                original(self, *args, **kwargs)
            if act is not None:
                for process in self.processes:
                    act(process)

        return init

    wrap(CoreEngineProcManager, "__init__", make)
