"""How a stage's process ends before its ring can end it, and how the head's API server ends at any time.

    phase                      first signal                          second signal
    until the ring runs        ends at once
    the head's engine starts   EngineCore has `ENGINE_END_S`, then   ends at once
                               the process ends
    the head serves            graceful shutdown by vLLM, ends at    ends at once
                               once when it takes too long
    the head failed            as above, while it still answers 503 with the reason (head/api_server.py)

The launcher's end counts as a signal until the ring runs, and as a failure of the head after that. Nothing here polls
whether a process lives: `observe.processes` says when one ends.
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
# How long EngineCore may take to stop the ring in order. A whole graceful shutdown may take three seconds.
ENGINE_END_S = 1.5
ENGINE_END_AT_ONCE_S = 0.5
# How long vLLM's own shutdown may take, besides the time for open requests.
STOP_S = 2.3
# How long vLLM may take to give up a start after EngineCore has ended. It may be reading or compiling.
GIVE_UP_S = 5.0
# A killed EngineCore ends once its memory is given back. Until then it owns its folder, which cannot be removed.
KILLED_S = 1.5
# EngineCore's report of its failure may arrive this long after its process has ended.
ENGINE_REPORT_S = 0.3


def begin(stage: int) -> SignalWatch:
    """From here on a signal or the launcher's end ends this process at once.

    Called in the main thread, as early as a stage can. `SignalWatch.direct` gives the returned watch other ends later.
    """
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
    """One sentence: which EngineCore ended, and how, if its exit code is there within `ENGINE_REPORT_S`."""
    process.join(ENGINE_REPORT_S)
    how = "has ended" if process.exitcode is None else describe_exit(process.exitcode)
    return f"stage 0's EngineCore (pid {process.pid}) {how}"


class HeadEnd:
    """The end of the head's API server, which must leave no EngineCore behind.

    Args:
        health: told when EngineCore or the launcher has ended; gives the reason and the exit code.
        clean_up: removes what this process has made, at an end that does not unwind the stack.
    """

    def __init__(self, health: HeadHealth, clean_up: Callable[[], None]) -> None:
        self._health = health
        self._clean_up = clean_up
        self._engine: BaseProcess | None = None
        self._engine_watch: Watched | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_engine_to_end = False  # EngineCore was told to end, so its end is no failure
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
        """Watches EngineCore, which has just been started. Its exit code is multiprocessing's alone to take."""
        assert process.pid is not None
        self._engine, self._engine_watch = process, Watched(process.pid)
        Guard(self._engine_watch, self._engine_ended)

    def _engine_ended(self) -> None:
        """vLLM sees the end too, and its stop sets `is_engine_to_end`. So only the value from before that counts."""
        is_told, process = self.is_engine_to_end, self._engine
        if self._health.wait_for_failure(ENGINE_REPORT_S) is not None or is_told:
            return
        assert process is not None
        text = describe_engine_end(process)
        if process.exitcode == 0 and self.is_engine_to_end:  # somebody else told it; `ring_stopped` came meanwhile
            return
        self._health.fail(text, 1)

    def ring_stopped(self) -> None:
        """EngineCore has ended the ring in order: this process or somebody else told it to, or the launcher ended.

        Tells vLLM to stop too, unless this process was asked before: a second signal would end EngineCore at once.
        """
        self.is_engine_to_end = True
        if not self._is_asked:
            os.kill(os.getpid(), signal.SIGTERM)

    # ---- while the engine starts -----------------------------------------------------------------------------------

    def take_signals(self) -> None:
        """Installs handlers in the interpreter: an event loop has taken over the descriptor that `SignalWatch` reads.

        Called in the main thread, after vLLM has set its handlers.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        is_first, self._is_asked = not self._is_asked, True
        self.end_now(ENGINE_END_S if is_first else ENGINE_END_AT_ONCE_S)

    def give_up_start(self) -> None:
        """EngineCore has failed while it started. Ends this process if the main thread has not in `GIVE_UP_S`."""
        threading.Event().wait(GIVE_UP_S)
        self.end_now()

    # ---- while it serves -------------------------------------------------------------------------------------------

    def serve_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """vLLM takes signals in this loop, and ignores all but the first. From here on a second one ends it at once."""
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
        """vLLM has begun to stop. It may take ``drain_s`` for open requests, and `STOP_S` besides. From any thread."""
        with self._lock:
            if self._loop is None or self._has_deadline:
                return
            self._is_asked = self._has_deadline = self.is_engine_to_end = True
        timer = threading.Timer(drain_s + STOP_S, self.end_now)
        timer.daemon = True
        timer.start()

    def leave(self) -> None:
        """Ends the process after a graceful shutdown. Runs its exit handlers, and skips the seconds of teardown."""
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
        """Ends EngineCore and this process. EngineCore has ``engine_s`` seconds to tell the ring, then is killed."""
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
