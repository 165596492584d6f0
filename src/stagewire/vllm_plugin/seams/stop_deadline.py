"""Tells the head when vLLM's API server begins to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCH", "on_engine_shutdown"]

PATCH = Patch(
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown",
    "the first thing that vLLM's API server does when it is told to stop while it serves: from here on there is a "
    "deadline, and EngineCore's end is no error any more, which vLLM prints a traceback for now and then; only in "
    "a head's process",
    "vLLM ends within a time and without a traceback",
)


def on_engine_shutdown(act: Callable[[float], None]) -> None:
    """In an API server: calls ``act`` when it begins to stop, with the seconds that open requests may take.

    From then on EngineCore's end is no error, and its EngineDeadError is not logged. vLLM logs one now and then,
    because `AsyncLLM` takes the end of its connection for a death unless its task was cancelled before.
    """
    from vllm.v1.engine import async_llm
    from vllm.v1.engine.exceptions import EngineDeadError

    def is_news(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], EngineDeadError))

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def shutdown(self: Any, timeout: float | None = None) -> None:
            act(timeout or 0.0)
            async_llm.logger.addFilter(is_news)
            original(self, timeout)

        return shutdown

    wrap(async_llm.AsyncLLM, "shutdown", make)
