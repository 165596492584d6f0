"""Makes Ctrl-C work while an `LLM` starts its EngineCore."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCH", "interrupt_engine_start"]

PATCH = Patch(
    "vllm.v1.engine.utils:zmq_socket_ctx",
    "it swallows Ctrl-C while EngineCore starts, and an `LLM` then waits ten minutes for an engine that may itself "
    "wait for other stages; only in a head's process without an API",
    "vLLM passes KeyboardInterrupt on",
)


def interrupt_engine_start() -> None:
    """In a head's process without an API: Ctrl-C while EngineCore starts raises KeyboardInterrupt for the user."""
    from vllm.v1.engine import utils

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def zmq_socket_ctx(*args: Any, **kwargs: Any) -> Iterator[Any]:
            interrupt = None
            with original(*args, **kwargs) as socket:
                try:
                    yield socket
                except KeyboardInterrupt as error:
                    interrupt = error
                    raise
            if interrupt is not None:
                raise interrupt

        return zmq_socket_ctx

    wrap(utils, "zmq_socket_ctx", make)
