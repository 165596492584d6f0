"""One end of a link in a process of its own (process/zmq_peer.py): what it says, and signals to it."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PROCESSES = Path(__file__).parent.with_name("process")
PEER = PROCESSES / "zmq_peer.py"
STAGE = PROCESSES / "ring_stage.py"
DEADLINE_S = 10.0


class Peer:
    """``prefix``: before the command; it may start the process elsewhere."""

    program = PEER

    def __init__(self, *arguments: str, prefix: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> None:
        paths = os.pathsep.join(filter(None, (str(PROCESSES.parent), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(self.program), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": paths, **(environ or {})},
        )
        assert self.process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ)
        self._unread = b""
        self.said: list[str] = []

    def line(self, timeout_s: float = DEADLINE_S) -> str | None:
        """The next line that it prints; None: nothing within the time."""
        assert self.process.stdout is not None
        ends_at = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if not self._selector.select(max(0.0, ends_at - time.monotonic())):
                return None
            data = os.read(self.process.stdout.fileno(), 4096)
            assert data, f"it ended with code {self.process.wait()}: {self.said}"
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\n")
        self.said.append(text.decode())
        return self.said[-1]

    def write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class StagePeer(Peer):
    """A stage without a model (process/ring_stage.py)."""

    program = STAGE

    def until(self, pattern: str, timeout_s: float = DEADLINE_S) -> str:
        """The first line from here on in which ``pattern`` is found; fails with those that came instead."""
        ends_at = time.monotonic() + timeout_s
        while (line := self.line(max(0.0, ends_at - time.monotonic()))) is not None:
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no {pattern!r} in {self.said}")


@contextlib.contextmanager
def stages(*commands: str, prefixes: Sequence[Sequence[str]] = (), **environ: str) -> Iterator[list[StagePeer]]:
    """Stages 0, 1, ... of one ring: of each its bind port, its predecessor's address, and further flags, as text."""
    with contextlib.ExitStack() as stack:
        started = []
        for stage, command in enumerate(commands):
            prefix = prefixes[stage] if prefixes else ()
            words = (str(stage), str(len(commands)), *command.split())
            started.append(StagePeer(*words, prefix=prefix, environ=environ))
            stack.callback(started[-1].end)
        yield started
