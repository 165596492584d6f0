"""How a stage's own process ends: before its ring can end it, and how the head's API server does at any time.

    until the ring runs        a signal, or the launcher's end: at once
    the head's engine starts   a signal: EngineCore is told, and has a moment; a second one: at once
    the head serves            vLLM stops in order; a second signal, or too much time: at once
    the head failed            503 with the reason for a while (head.py), then as above

Nothing here asks whether somebody lives: `observe.processes` says when somebody ends.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from stagewire.observe.processes import ORPHAN_EXIT_CODE, Guard, Watched, begin_stage, describe_exit
from stagewire.observe.signals import STOP_SIGNALS, SignalWatch
from stagewire.vllm_plugin.head.health import HeadHealth

__all__ = ["LAUNCHER_ENDED", "HeadEnd", "begin", "describe_engine_end"]

LAUNCHER_ENDED = "the launcher is gone"
# For EngineCore to stop the ring in order, of the three seconds that a whole stop may take.
ENGINE_END_S = 1.5
ENGINE_END_AT_ONCE_S = 0.5
# For vLLM's own way to stop, beside what open requests may take.
STOP_S = 2.3
# For vLLM to give up a start after EngineCore has ended: it looks up from what it reads or compiles.
GIVE_UP_S = 5.0
# A killed EngineCore has ended when its memory is given back. Until then its folder has an owner and cannot be removed.
KILLED_S = 1.5
# EngineCore's report of its failure may arrive after its process has ended.
ENGINE_REPORT_S = 0.3


def begin(stage: int) -> SignalWatch:
    """In the main thread, as early as a stage can: signals and the launcher's end count from here on."""
    told = partial(_end, f"Stage {stage}: stopped (stage {stage} was told to stop)", 0)
    begin_stage(partial(_end, f"Stage {stage}: stopped ({LAUNCHER_ENDED})", ORPHAN_EXIT_CODE))
    return SignalWatch(lambda _: 0.0, told, told)


def _end(text: str, exit_code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    os._exit(exit_code)


def describe_engine_end(process: BaseProcess) -> str:
    """One sentence: which EngineCore, and how it ended, if its exit code can be had within a moment."""
    process.join(ENGINE_REPORT_S)
    how = "has ended" if process.exitcode is None else describe_exit(process.exitcode)
    return f"stage 0's EngineCore (pid {process.pid}) {how}"


class HeadEnd:
    """The end of the head's API server, which must not leave an EngineCore.

    Args:
        health: what the ring and this process know; told when EngineCore has ended.
        clean_up: removes what this process has made, at an end that does not unwind.
    """

    def __init__(self, health: HeadHealth, clean_up: Callable[[], None]) -> None:
        self._health = health
        self._clean_up = clean_up
        self._engine: BaseProcess | None = None
        self._engine_watch: Watched | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_engine_to_end = False  # its end is no failure
        self._is_asked = False
        self._has_deadline = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"HeadEnd({self._engine_watch!r}, asked={self._is_asked})"

    def launcher_ended(self) -> None:
        self._health.fail(LAUNCHER_ENDED, ORPHAN_EXIT_CODE)
        if not self._health.is_serving:
            self.end_now()

    # ---- EngineCore ------------------------------------------------------------------------------------------------

    def meet_engine(self, process: BaseProcess) -> None:
        """EngineCore has been started; multiprocessing asks for its exit code, and so knows it first or never."""
        assert process.pid is not None
        self._engine, self._engine_watch = process, Watched(process.pid)
        Guard(self._engine_watch, self._engine_ended)

    def _engine_ended(self) -> None:
        """Also vLLM sees it, and begins to stop because of it: only what was told before it counts."""
        is_told, process = self.is_engine_to_end, self._engine
        if self._health.wait_for_failure(ENGINE_REPORT_S) is not None or is_told:
            return
        assert process is not None
        text = describe_engine_end(process)
        if process.exitcode == 0 and self.is_engine_to_end:  # it was told by somebody else, as we have heard meanwhile
            return
        self._health.fail(text, 1)

    def ring_stopped(self) -> None:
        """EngineCore has ended the ring in order: as we told it, or somebody else did, or because the launcher ended.

        Unless we did, vLLM is told to stop as well. A second signal would leave EngineCore no time to stop the ring.
        """
        self.is_engine_to_end = True
        if not self._is_asked:
            os.kill(os.getpid(), signal.SIGTERM)

    # ---- while the engine starts -----------------------------------------------------------------------------------

    def take_signals(self) -> None:
        """In the main thread, after vLLM has set its own handlers: an event loop has the descriptor of signals now."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        is_first, self._is_asked = not self._is_asked, True
        self.end_now(ENGINE_END_S if is_first else ENGINE_END_AT_ONCE_S)

    def give_up_start(self) -> None:
        """EngineCore has failed: the main thread ends by itself, or is ended."""
        threading.Event().wait(GIVE_UP_S)
        self.end_now()

    # ---- while it serves -------------------------------------------------------------------------------------------

    def serve_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """vLLM takes signals in this loop, and passes over all but the first. Here a second one ends it at once."""
        self._loop = loop
        add = loop.add_signal_handler

        def add_signal_handler(number: int, act: Callable[..., object], *args: Any) -> None:
            add(number, self._heed, partial(act, *args))

        loop.add_signal_handler = add_signal_handler  # type: ignore[assignment]

    def _heed(self, act: Callable[[], object]) -> None:
        is_first, self._is_asked = not self._is_asked, True
        if is_first:
            act()
        else:
            self.end_now()

    def begin_stop(self, drain_s: float) -> None:
        """vLLM has begun to stop, in any thread: it has so much time for requests, and some for itself."""
        with self._lock:
            if self._loop is None or self._has_deadline:
                return
            self._is_asked = self._has_deadline = self.is_engine_to_end = True
        timer = threading.Timer(drain_s + STOP_S, self.end_now)
        timer.daemon = True
        timer.start()

    def leave(self) -> None:
        """The end of an orderly stop: what is registered for it is done, and the seconds that follow it are saved."""
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(self._exit_code)

    @property
    def _exit_code(self) -> int:
        return self._health.exit_code if self._health.failure else 0

    # ---- at once ---------------------------------------------------------------------------------------------------

    def end_now(self, engine_s: float = ENGINE_END_AT_ONCE_S) -> None:
        """EngineCore has ``engine_s`` to tell the ring; then both are over."""
        self.is_engine_to_end = True
        self._end_engine(engine_s)
        if self._engine is not None:
            self._engine.kill()
        if self._engine_watch is not None:
            self._engine_watch.wait(KILLED_S)
        self._clean_up()
        text = self._health.failure or "stopped (stage 0 was told to stop)"
        _end(f"Stage 0: {text}", self._exit_code)

    def _end_engine(self, timeout_s: float) -> None:
        if self._engine is not None and self._engine_watch is not None:
            self._engine.terminate()
            self._engine_watch.wait(timeout_s)
