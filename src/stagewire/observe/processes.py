"""Processes that this one depends on, watched by descriptor (pidfd): the kernel tells of their end, however they end.

Owns which processes are watched, and from when on. A process id alone is not enough: another process may have it by
now. Knows nothing about rings, vLLM or what follows from an end. Standard library only: a spawned process imports it
first.

    launcher ──> stage          a mark in the environment; until the stage has read it, the kernel ends it with us
    API server ──> EngineCore   multiprocessing; the new interpreter watches its parent before it imports anything
    leader ──> follower         the same
    parent of any of them       a descriptor of the child, opened while it cannot have been reaped
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.spawn
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stagewire.observe.status_events import LAUNCHER_PID_ENV

__all__ = [
    "ORPHAN_EXIT_CODE",
    "Guard",
    "Watched",
    "begin_spawned",
    "begin_stage",
    "describe_exit",
    "die_with",
    "find_launcher",
    "mark_of",
    "take_launcher",
    "take_parent",
    "watch_spawned",
]

# Of a process whose parent, leader or launcher has ended: another process failed.
ORPHAN_EXIT_CODE = 3

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # here: between fork and exec nothing may be loaded


class Watched:
    """One process, told apart from a later one with the same id.

    Args:
        pid: its process id.
        started: when it began, as `mark_of` says. If the process of that id began at another time, this one has ended.
    """

    def __init__(self, pid: int, started: str = "") -> None:
        self.pid = pid
        self._descriptor: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._descriptor = os.pidfd_open(pid)
        if self._descriptor is not None and started and _started(pid) != started:
            self.close()

    def __repr__(self) -> str:
        return f"Watched({self.pid}, {'ended' if self.has_ended() else 'running'})"

    def has_ended(self) -> bool:
        """True also of a zombie, whose exit code nobody has taken."""
        return self.wait(0)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended, after at most ``timeout_s``; None: as long as it takes."""
        if self._descriptor is None:
            return True
        poll = select.poll()  # select would refuse a descriptor above 1023
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))

    def close(self) -> None:
        """From here on it counts as ended."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class Guard:
    """Calls ``act`` from a thread of its own when ``process`` ends, unless the process was taken before."""

    def __init__(self, process: Watched, act: Callable[[], None]) -> None:
        self._process = process
        self._act = act
        self._lock = threading.Lock()
        self._is_on = True
        threading.Thread(target=self._run, name="stagewire-guard", daemon=True).start()

    def __repr__(self) -> str:
        return f"Guard({self._process!r}, on={self._is_on})"

    def _run(self) -> None:
        self._process.wait()
        with self._lock:
            if self._is_on:
                self._act()

    def take(self) -> Watched:
        """The process; from here on the caller acts on its end."""
        with self._lock:
            self._is_on = False
        return self._process


def describe_exit(returncode: int) -> str:
    """``-9`` -> ``was killed by SIGKILL``."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


# ---- a launcher and its stages ---------------------------------------------------------------------------------------


def mark_of(pid: int) -> str:
    """``PID:START``, which no other process has had since the machine started."""
    return f"{pid}:{_started(pid)}"


def _started(pid: int) -> str:
    """In clock ticks since the machine started; empty of a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def find_launcher() -> Watched | None:
    """The launcher that started this stage, if one did: the environment has its mark, or its process id alone."""
    pid, _, started = os.environ.get(LAUNCHER_PID_ENV, "").partition(":")
    return Watched(int(pid), started) if pid.isdecimal() and int(pid) else None


def die_with(parent: int) -> None:
    """Between fork and exec: the kernel kills this process when the thread that forked it ends, also while it imports.

    Survives exec. `begin_stage` takes it back, as soon as the launcher is watched.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os._exit(ORPHAN_EXIT_CODE)


_launcher: Guard | None = None


def begin_stage(act: Callable[[], None]) -> None:
    """In a stage, as early as possible: ``act`` is called when the launcher ends, until the launcher is taken."""
    global _launcher
    launcher = find_launcher()
    if launcher is not None:
        _launcher = Guard(launcher, act)
    _LIBC.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


def take_launcher() -> Watched | None:
    """The launcher; from here on the caller acts on its end. None in a stage that was started by hand."""
    return find_launcher() if _launcher is None else _launcher.take()


# ---- a process and what it spawns ------------------------------------------------------------------------------------

_parent: Guard | None = None


@contextlib.contextmanager
def watch_spawned(name: str) -> Iterator[None]:
    """A process that this thread spawns meanwhile, over multiprocessing, ends with this process from its first line on.

    Does not use the kernel's signal: that comes with the end of a thread, and a short-lived thread may spawn a process.

    Args:
        name: what the new process is called in its last line.
    """
    original = multiprocessing.spawn.get_command_line
    thread = threading.get_ident()

    def get_command_line(**kwargs: Any) -> list[str]:
        line = original(**kwargs)
        if threading.get_ident() == thread:
            program = line.index("-c") + 1
            begin = f"from stagewire.observe.processes import begin_spawned; begin_spawned({os.getpid()}, {name!r})"
            line[program] = f"{begin}; {line[program]}"
        return line

    multiprocessing.spawn.get_command_line = get_command_line
    try:
        yield
    finally:
        multiprocessing.spawn.get_command_line = original


def begin_spawned(parent: int, name: str) -> None:
    """The first call of a spawned process. Its parent decides what a terminal's Ctrl-C means."""
    global _parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watched = Watched(parent)
    if os.getppid() != parent:
        watched.close()
    _parent = Guard(watched, lambda: _end_as_orphan(f"{name}: its parent process has ended"))


def _end_as_orphan(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    os._exit(ORPHAN_EXIT_CODE)


def take_parent() -> Watched | None:
    """In a process of multiprocessing: its parent; from here on the caller acts on its end. None elsewhere."""
    if _parent is not None:
        return _parent.take()
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return None
    watched = Watched(parent.pid)
    if os.getppid() != parent.pid:  # another process may have its id by now
        watched.close()
    return watched
