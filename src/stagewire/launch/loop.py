"""Which signals ask a launcher to stop, and an event loop that one of them may come before."""

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
    """Ctrl-C, SIGTERM and the end of the terminal; asked before any of them is handled.

    A SIGHUP that was ignored when this process was started (nohup) stays ignored, here and in the stages.
    """
    is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_deaf else [signal.SIGHUP])]


def run_loop(work: Coroutine[Any, Any, _T], new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> _T:
    """`asyncio.run`, in which `take_signals` is called before anything is started.

    A signal that comes before that is kept for it: raised in the middle of a loop's making, it would leave warnings.
    ``new_loop``: default: asyncio's own.
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
    """In the running loop: ``act`` is told each signal that asks to stop, from now on, and those that were kept."""
    loop = asyncio.get_running_loop()
    for number in stop_signals():
        loop.add_signal_handler(number, act, number)
    for kept in _kept:
        loop.call_soon(act, kept)


_kept: list[int] = []


def _keep(number: int, frame: FrameType | None) -> None:
    _kept.append(number)
