"""An event loop for a launcher or a front, which takes the signals that ask it to stop, even those before it runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from contextlib import closing
from types import FrameType
from typing import Any, TypeVar

__all__ = ["run_loop", "stop_signals", "take_signals"]

_T = TypeVar("_T")


def stop_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM and the end of the terminal. Call this before a handler is installed for any of them.

    A SIGHUP that was ignored when this process was started (nohup) stays ignored, here and in the stages.
    """
    is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_deaf else [signal.SIGHUP])]


def run_loop(work: Coroutine[Any, Any, _T], new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> _T:
    """`asyncio.run` for ``work`` that calls `take_signals` before it starts anything.

    A signal that comes earlier is kept for `take_signals`. An exception while the loop is being made would leave
    warnings.

    Args:
        new_loop: makes the loop; default: asyncio's own.
    """
    _kept.clear()
    before = {number: signal.signal(number, _keep) for number in stop_signals()}
    try:
        with closing(work), asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(work)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take_signals(act: Callable[[int], None]) -> None:
    """In the running loop: tells ``act`` each signal that asks to stop, beginning with those that were kept."""
    loop = asyncio.get_running_loop()
    for number in stop_signals():
        loop.add_signal_handler(number, act, number)
    for kept in _kept:
        loop.call_soon(act, kept)


_kept: list[int] = []


def _keep(number: int, frame: FrameType | None) -> None:
    _kept.append(number)
