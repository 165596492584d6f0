"""What a stage tells the process that started it: small datagrams on a Unix socket.

Owns the vocabulary (`Phase`, `StatusEvent`) and the one-way channel. Knows nothing about rings, vLLM or terminals.

Two listeners exist: the launcher (`LAUNCHER_SOCKET_ENV`), which draws progress, and the head's API server
(`HEAD_SOCKET_ENV`), which turns the ring's state into /ready and 503s. The API server also listens for news of the
ring once a second (`NEWS_SOCKET_ENV`), on a socket of its own: a queue that is full of news has room for an event. A
sender never blocks and never raises: a listener that went away is no reason for a stage to stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from enum import StrEnum

__all__ = [
    "HEAD_SOCKET_ENV",
    "LAUNCHER_SOCKET_ENV",
    "MAX_DATAGRAM_BYTES",
    "NEWS_SOCKET_ENV",
    "DatagramReceiver",
    "DatagramSender",
    "Phase",
    "StatusEvent",
    "StatusReceiver",
    "StatusSender",
]

LAUNCHER_SOCKET_ENV = "STAGEWIRE_LAUNCHER_SOCKET"
HEAD_SOCKET_ENV = "STAGEWIRE_HEAD_SOCKET"
NEWS_SOCKET_ENV = "STAGEWIRE_NEWS_SOCKET"

# Far below what a Unix socket takes by default (net.core.wmem_default, 212992). A longer one would arrive cut.
MAX_DATAGRAM_BYTES = 32768


class Phase(StrEnum):
    """Where a stage is in its life. The order is the order in which a healthy stage passes them."""

    IMPORTING = "importing"  # the process runs; Python and vLLM are being imported
    LOADING = "loading"  # text: "layers 0-6 (0.11 GB)"
    LOADED = "loaded"
    LINKED = "linked"  # the whole ring is linked; start-up calls can travel
    KV_CACHE = "kv_cache"  # the KV cache is allocated; text: "512 blocks"
    READY = "ready"  # a worker can run steps; the head accepts requests
    FAILED = "failed"  # text: the reason, for people; exit_code: what the process will return
    STOPPED = "stopped"


@dataclass(frozen=True)
class StatusEvent:
    """``share``: how much of a phase is done, where that is known; 0 at its beginning."""

    stage: int
    phase: Phase
    text: str = ""
    exit_code: int = 0
    pid: int = 0
    share: float = 0.0


class DatagramSender:
    """Sends to Unix datagram sockets, without waiting: what does not fit into a queue is lost."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def __repr__(self) -> str:
        return f"DatagramSender({self._paths})"

    def send(self, data: bytes) -> None:
        for path in self._paths:
            with contextlib.suppress(OSError):
                self._socket.sendto(data, path)

    def close(self) -> None:
        self._socket.close()


class DatagramReceiver:
    """The listening end; `fileno` makes it selectable.

    Args:
        path: where to create the socket; its directory should be private to the user.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive_all(self) -> list[bytes]:
        """Everything that has arrived, oldest first; empty when there is nothing."""
        found: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(MAX_DATAGRAM_BYTES))
        return found

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class StatusSender:
    """Sends events to every listener named in the environment.

    Args:
        stage: index of the stage that speaks.
        paths: Unix datagram sockets; by default those that the environment names.
    """

    def __init__(self, stage: int, paths: list[str] | None = None) -> None:
        if paths is None:
            paths = [p for p in (os.environ.get(LAUNCHER_SOCKET_ENV), os.environ.get(HEAD_SOCKET_ENV)) if p]
        self._stage = stage
        self._phase = Phase.LOADING
        self._sender = DatagramSender(paths)

    def __repr__(self) -> str:
        return f"StatusSender(stage={self._stage}, {self._sender!r})"

    def send(self, phase: Phase, text: str = "", exit_code: int = 0, share: float = 0.0) -> None:
        self._phase = phase
        event = StatusEvent(self._stage, phase, text[: MAX_DATAGRAM_BYTES // 4], exit_code, os.getpid(), share)
        self._sender.send(json.dumps(asdict(event)).encode())

    def note(self, text: str) -> None:
        """The same phase as before, with news: whom the stage waits for."""
        self.send(self._phase, text)

    def close(self) -> None:
        self._sender.close()


class StatusReceiver(DatagramReceiver):
    def receive(self) -> list[StatusEvent]:
        """All events that have arrived, oldest first; empty when there are none. Malformed datagrams are dropped."""
        events: list[StatusEvent] = []
        for data in self.receive_all():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                fields = json.loads(data)
                events.append(StatusEvent(**{**fields, "phase": Phase(fields["phase"])}))
        return events
