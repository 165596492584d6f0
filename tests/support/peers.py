"""One end of a link in a process of its own (process/zmq_peer.py): what it says, and signals to it."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PEER = Path(__file__).parent.with_name("process") / "zmq_peer.py"
DEADLINE_S = 10.0


class Peer:
    """``prefix``: before the command; it may start the process elsewhere."""

    def __init__(self, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(PEER), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self.process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ)
        self._unread = b""

    def line(self, timeout_s: float = DEADLINE_S) -> str | None:
        """The next line that it prints; None: nothing within the time."""
        assert self.process.stdout is not None
        ends_at = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if not self._selector.select(max(0.0, ends_at - time.monotonic())):
                return None
            data = os.read(self.process.stdout.fileno(), 4096)
            assert data, "it ended"
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\n")
        return text.decode()

    def write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
