"""SIGINT and SIGTERM as messages to a thread, whatever the main thread computes, and an end that comes in any case.

    first signal ──> ask: drains for so many seconds, or none ──> stop: in order ──> the process ends by itself
                          │ a second signal, or they are over ────^     │ END_S, or another signal
                                                                        └──> end: at once

Python runs a signal's handler in the main thread, between two of its instructions: not while it reads weights,
compiles, or waits in a collective. What the kernel's handler writes to a descriptor is read here at once.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

__all__ = ["END_S", "STOP_SIGNALS", "SignalWatch"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# An end in order takes milliseconds, and a second where a queue is not read (ring/link.py).
END_S = 2.0


class SignalWatch:
    """Takes this process's stop signals from now on; made in the main thread.

    Args:
        ask: told the signal; for how many seconds the process may go on before it is to stop.
        stop: begins an end in order.
        end: ends the process at once.
        numbers: those that count.
        installs: False where somebody else's handlers are to stay; they run too, whenever the main thread gets to it.
    """

    def __init__(
        self,
        ask: Callable[[int], float],
        stop: Callable[[], None],
        end: Callable[[], None],
        *,
        installs: bool = True,
        numbers: Sequence[int] = STOP_SIGNALS,
    ) -> None:
        self._ask, self._stop, self._end = ask, stop, end
        self._numbers = numbers
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if installs:
            for number in numbers:
                signal.signal(number, _leave_it_to_the_thread)
        threading.Thread(target=self._run, name="stagewire-signals", daemon=True).start()

    def direct(self, ask: Callable[[int], float], stop: Callable[[], None], end: Callable[[], None]) -> None:
        """From the next signal on: another way to end."""
        self._ask, self._stop, self._end = ask, stop, end

    def _run(self) -> None:
        number = self._next(None) or 0
        allowed_s = self._ask(number)  # looked up now: `direct` may have changed it meanwhile
        if allowed_s:
            self._next(allowed_s)
        self._stop()
        self._next(END_S)
        self._end()

    def _next(self, timeout_s: float | None) -> int | None:
        """The next stop signal; None when there was none for so long."""
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        while True:
            left_s = None if ends_at is None else max(0.0, ends_at - time.monotonic())
            if not poll.poll(None if left_s is None else left_s * 1000):
                return None
            (number,) = os.read(self._reader, 1)
            if number in self._numbers:
                return int(number)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    pass
