"""SIGINT and SIGTERM as messages to a thread, whatever the main thread does; and an end that comes in any case.

    first signal ──> ask: drains for so many seconds, or none ──> stop: in order ──> the process ends by itself
                          │ a second signal, or they are over ────^     │ END_S, or another signal
                                                                        └──> end: at once

Python runs a signal's handler in the main thread, between two of its instructions: not while that thread reads
weights, compiles, or waits in a collective. The handler in C writes the signal to a descriptor at once, and the thread
here reads it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

__all__ = ["END_S", "STOP_SIGNALS", "Interrupted", "SignalWatch", "stop_signals_interrupt"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# An end in order takes milliseconds, and a second where a queue is not read (ring/transport/interface.py).
END_S = 2.0
# Between two reminders of a signal that the main thread has not handled.
REMIND_S = 0.1


class SignalWatch:
    """Takes this process's stop signals from now on; made in the main thread.

    Args:
        ask: told the signal; returns for how many seconds the process may go on before it stops.
        stop: begins an end in order.
        end: ends the process at once.
        numbers: those that count.
        installs: False keeps the handlers that are there; they run too, whenever the main thread gets to it.
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


class Interrupted(KeyboardInterrupt):
    """``number``: the signal that it stands for."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextlib.contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """In the main thread a stop signal raises `Interrupted`, until other handlers are installed.

    A signal that was ignored when this process was started stays ignored.

    Python's own handler misses one moment: a signal that comes just before the main thread enters a system call waits
    until that call returns, and a read from a dead disk never returns. So a thread sends the signal again until the
    handler has run: the second one interrupts the call, and Python then looks for signals.
    """
    is_heard = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        is_heard.set()
        raise Interrupted(number)

    main = threading.get_ident()
    reader, writer = os.pipe2(os.O_CLOEXEC)

    def remind() -> None:
        for number in iter(lambda: os.read(reader, 1), b""):
            while not is_heard.wait(REMIND_S) and signal.getsignal(number[0]) is interrupt:
                signal.pthread_kill(main, number[0])
        os.close(reader)

    os.set_blocking(writer, False)
    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=remind, name="stagewire-signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread
