"""What a stage tells the process that started it: small datagrams on a Unix socket.

Owns the vocabulary (`Phase`, `StatusEvent`) and the one-way channel. Knows nothing about rings, vLLM or terminals.

    LAUNCHER_SOCKET_ENV  the launcher listens, and draws progress
    HEAD_SOCKET_ENV      the head's API server listens, and turns the ring's state into /ready and 503s
    NEWS_SOCKET_ENV      it listens here too, for news of the ring once a second; a queue that is full of news has
                         then still room for an event

A sender never raises: a stage does not stop because a listener has gone. If a listener's queue is full, the sender
waits for it for a few seconds at most, and only with an event that the listener needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from dataclasses import asdict, dataclass, field
from enum import StrEnum

__all__ = [
    "HEAD_SOCKET_ENV",
    "LAUNCHER_PID_ENV",
    "LAUNCHER_SOCKET_ENV",
    "MAX_DATAGRAM_BYTES",
    "NEWS_SOCKET_ENV",
    "DatagramReceiver",
    "DatagramSender",
    "HeadApi",
    "Phase",
    "StatusEvent",
    "StatusReceiver",
    "StatusSender",
]

LAUNCHER_PID_ENV = "STAGEWIRE_LAUNCHER_PID"  # a stage ends itself when this process is gone (observe/processes.py)
LAUNCHER_SOCKET_ENV = "STAGEWIRE_LAUNCHER_SOCKET"
HEAD_SOCKET_ENV = "STAGEWIRE_HEAD_SOCKET"
NEWS_SOCKET_ENV = "STAGEWIRE_NEWS_SOCKET"

# Far below what a Unix socket takes by default (net.core.wmem_default, 212992). A longer one would arrive cut.
MAX_DATAGRAM_BYTES = 32768
SEND_TIMEOUT_S = 5


class Phase(StrEnum):
    """Where a stage is in its life, in the order in which a healthy stage passes the phases."""

    IMPORTING = "importing"  # the process runs; Python and vLLM are being imported
    LOADING = "loading"  # text: "layers 0-6 (0.11 GB)"
    LOADED = "loaded"
    LINKED = "linked"  # the whole ring is linked; start-up calls can travel
    KV_CACHE = "kv_cache"  # the KV cache is allocated; text: "512 blocks"
    READY = "ready"  # a worker can run steps; the head accepts requests
    RECOVERING = "recovering"  # the head waits for a lost stage; text: which. READY follows
    GIVEN_UP = "given_up"  # the head has waited for too long and refuses requests. READY may still follow
    FAILED = "failed"  # text: the reason, for people; exit_code: what the process will return
    STOPPED = "stopped"


@dataclass(frozen=True)
class HeadApi:
    """Where and how the head answers HTTP, as vLLM's parser has read its arguments, files and environment.

    ``host`` is empty for every interface; ``uds`` is a Unix socket's path, and then host and port mean nothing.
    ``drain_s``: how long it may take to answer what it has accepted, once it is told to stop.
    """

    host: str = ""
    port: int = 8000
    uds: str = ""
    is_tls: bool = False
    needs_client_certificate: bool = False
    api_key: str = field(default="", repr=False)
    has_chat_template: bool = False  # one that was given; the model's own is not looked for
    drain_s: float = 0.0


@dataclass(frozen=True)
class StatusEvent:
    """A stage has entered a phase, or is further in it.

    Args:
        share: how much of the phase is done, where that is known; 0 at its beginning.
        done_bytes, total_bytes: of the stage's weights, while it reads them.
        api: told by the head, once, to the launcher alone.
    """

    stage: int
    phase: Phase
    text: str = ""
    exit_code: int = 0
    pid: int = 0
    share: float = 0.0
    done_bytes: int = 0
    total_bytes: int = 0
    api: HeadApi | None = None


class DatagramSender:
    """Sends to Unix datagram sockets. Their queues are short (net.unix.max_dgram_qlen, 10 by default)."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # Python's own timeout does not know of the other end's queue; the kernel's does.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))

    def __repr__(self) -> str:
        return f"DatagramSender({self._paths})"

    def send(self, data: bytes, *, is_droppable: bool) -> None:
        """A full queue loses what is droppable; the rest waits a moment for the listener to read."""
        flags = socket.MSG_DONTWAIT if is_droppable else 0
        for path in self._paths:
            with contextlib.suppress(OSError):
                self._socket.sendto(data, flags, path)

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
            # The API server first: clients depend on it, and a launcher that does not read would delay its event.
            paths = [p for p in (os.environ.get(HEAD_SOCKET_ENV), os.environ.get(LAUNCHER_SOCKET_ENV)) if p]
        self._stage = stage
        self._phase = Phase.LOADING
        self._sender = DatagramSender(paths)

    def __repr__(self) -> str:
        return f"StatusSender(stage={self._stage}, {self._sender!r})"

    def send(self, phase: Phase, text: str = "", exit_code: int = 0) -> None:
        """The stage enters a phase."""
        self._phase = phase
        self._send(StatusEvent(self._stage, phase, _clip(text), exit_code, os.getpid()), is_droppable=False)

    def advance(self, phase: Phase, text: str, done_bytes: int, total_bytes: int) -> None:
        """The stage is further in a phase, which it may have entered in another process."""
        share = done_bytes / total_bytes
        event = StatusEvent(self._stage, phase, _clip(text), 0, os.getpid(), share, done_bytes, total_bytes)
        self._send(event, is_droppable=True)

    def note(self, text: str) -> None:
        """The same phase as before, with another text: which stage this one waits for."""
        self._send(StatusEvent(self._stage, self._phase, _clip(text), 0, os.getpid()), is_droppable=True)

    def tell_api(self, api: HeadApi) -> None:
        """Of the head, to its launcher; nothing without one."""
        path = os.environ.get(LAUNCHER_SOCKET_ENV)
        if path is not None:
            event = StatusEvent(self._stage, self._phase, pid=os.getpid(), api=api)
            sender = DatagramSender([path])
            sender.send(_encode(event), is_droppable=False)
            sender.close()

    def _send(self, event: StatusEvent, *, is_droppable: bool) -> None:
        self._sender.send(_encode(event), is_droppable=is_droppable)

    def close(self) -> None:
        self._sender.close()


def _encode(event: StatusEvent) -> bytes:
    return json.dumps(asdict(event)).encode()


def _decode(data: bytes) -> StatusEvent:
    fields = json.loads(data)
    api = HeadApi(**fields["api"]) if fields.get("api") else None
    return StatusEvent(**{**fields, "phase": Phase(fields["phase"]), "api": api})


def _clip(text: str) -> str:
    return text[: MAX_DATAGRAM_BYTES // 4]


class StatusReceiver(DatagramReceiver):
    def receive(self) -> list[StatusEvent]:
        """All events that have arrived, oldest first; empty when there are none. Malformed datagrams are dropped."""
        events: list[StatusEvent] = []
        for data in self.receive_all():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                events.append(_decode(data))
        return events
