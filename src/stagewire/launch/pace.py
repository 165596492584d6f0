"""Progress of a stage that starts: when the last was, and how fast the stage reads. Pure but for `io_bytes`.

Three things are progress: the stage enters a phase, it says that it has read more of its weights, or its processes read
or write files. Imports, downloads, vLLM's own loaders and a compiler do the third and say nothing. A stage that waits
for others makes no progress, and need not.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Pace", "deadline", "io_bytes"]

WINDOW_S = 60.0
# In a second. A stage that waits writes a line of its log now and then.
BUSY_BYTES = 4 << 10
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Pace:
    """The progress of one stage. Times are seconds of one monotonic clock.

    Args:
        now: when it was started.
    """

    def __init__(self, now: float) -> None:
        self.last_at = now
        self._done_bytes = 0
        self._total_bytes = 0
        self._history: deque[tuple[float, int]] = deque()
        self._io_at, self._io_bytes = now, 0

    def __repr__(self) -> str:
        return f"Pace(last={self.last_at:.1f}, read={self._done_bytes} of {self._total_bytes})"

    def step(self, now: float) -> None:
        """It has entered a phase."""
        self.last_at = now

    def read(self, now: float, done_bytes: int, total_bytes: int) -> None:
        """It says how much of its weights it has read."""
        if done_bytes > self._done_bytes:
            self.last_at = now
        self._done_bytes, self._total_bytes = done_bytes, total_bytes
        self._history.append((now, done_bytes))
        self._forget(now)

    def see_io(self, now: float, num_bytes: int) -> None:
        """Takes what its processes have read and written so far, about once a second or more often."""
        since_s = now - self._io_at
        if since_s < 1.0:
            return
        if num_bytes - self._io_bytes >= BUSY_BYTES * since_s:
            self.last_at = now
        self._io_at, self._io_bytes = now, num_bytes

    def describe(self, now: float) -> str:
        """``0.80 of 4.20 GB read, 3.1 MB/s in the last minute, no progress for 20 s``."""
        words = []
        if self._total_bytes:
            size, unit = _unit(self._total_bytes)
            words.append(f"{self._done_bytes / size:.2f} of {self._total_bytes / size:.2f} {unit} read")
            words += self._describe_rate(now)
        return ", ".join([*words, f"no progress for {now - self.last_at:.0f} s"])

    def _describe_rate(self, now: float) -> list[str]:
        self._forget(now)
        began_at, done_bytes = self._history[0]
        span_s = now - began_at
        if span_s < 1.0:
            return []
        rate = (self._done_bytes - done_bytes) / min(span_s, WINDOW_S)
        size, unit = _unit(rate)
        last = "minute" if span_s >= WINDOW_S else f"{span_s:.0f} s"
        return [f"{rate / size:.1f} {unit}/s in the last {last}"]

    def _forget(self, now: float) -> None:
        """Keeps one entry that is as old as the window."""
        while len(self._history) > 1 and self._history[1][0] <= now - WINDOW_S:
            self._history.popleft()


def deadline(loading: Sequence[Pace], waiting: Sequence[Pace], limit_s: float) -> float:
    """When a start has failed, unless there is progress before.

    Args:
        loading: the stages that have not loaded; each of them has to make progress.
        waiting: the others, which may wait for those; progress of one of them is enough.
        limit_s: how long a stage may make no progress.
    """
    return limit_s + (min(pace.last_at for pace in loading) if loading else max(pace.last_at for pace in waiting))


def _unit(num_bytes: float) -> tuple[float, str]:
    return next((each for each in _UNITS if num_bytes >= each[0]), (1.0, "B"))


def io_bytes(pid: int) -> int:
    """What a process and its descendants have read and written, in files and pipes; 0 of one that has ended."""
    folder = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError, ValueError):
        counts = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
        own = sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes"))
        children = (folder / "task" / str(pid) / "children").read_text().split()
        return own + sum(io_bytes(int(child)) for child in children)
    return 0
