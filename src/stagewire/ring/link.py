"""What the ring needs of a transport, and the one that lives in memory.

`Transport` is the contract that ring/zmq_link.py and `MemoryTransport` both pass (tests/unit/test_ring_link.py).
A transport moves frames and reports connections; it decides nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stagewire.config import Address
from stagewire.errors import StagewireError
from stagewire.ring.actions import STRAIGHT, Side, Stall, Way
from stagewire.wire.codec import Frame

__all__ = [
    "AddressGone",
    "BadHandshake",
    "Connected",
    "Disconnected",
    "Event",
    "LinkEvent",
    "ListenFailed",
    "MemoryNetwork",
    "MemoryTransport",
    "Moved",
    "NoAddressError",
    "Notice",
    "PortTakenError",
    "Received",
    "Stalled",
    "Transport",
    "UnreachableError",
]


# Where memory transports are, as they say.
MEMORY_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Connected:
    side: Side
    way: Way = STRAIGHT


@dataclass(frozen=True)
class Disconnected:
    """The connection ended or could not be made; the transport does not retry by itself.

    ``is_silent``: it did not end, but the peer stopped answering. It may be frozen, or only slow.
    """

    side: Side
    note: str
    is_silent: bool = False


@dataclass(frozen=True)
class BadHandshake:
    """What answers there is not a peer of this transport (or, on the successor side, what called).

    ``note`` says what it is, for people, if that is known.
    """

    side: Side
    note: str = ""


@dataclass(frozen=True)
class Received:
    side: Side
    peer: bytes
    frames: Sequence[Frame]


@dataclass(frozen=True)
class Stalled:
    """What was sent to a peer on the successor side did not arrive, and its connection was ended for it."""

    side: Side
    peer: bytes
    stall: Stall


@dataclass(frozen=True)
class AddressGone:
    """The address that was listened on is gone from this machine, and none is there in its place; "": it is back."""

    text: str


@dataclass(frozen=True)
class Moved:
    """The address that was listened on is gone from this machine; now it is this one."""

    address: Address


@dataclass(frozen=True)
class ListenFailed:
    """What was listened on is gone, for good."""

    error: StagewireError


@dataclass(frozen=True)
class Notice:
    """For people: what happened to this end."""

    text: str
    is_warning: bool = False


LinkEvent = Connected | Disconnected | BadHandshake | Received | Stalled
Event = LinkEvent | AddressGone | Moved | ListenFailed | Notice


class PortTakenError(Exception):
    """`Transport.bind`: the port is in use."""


class NoAddressError(Exception):
    """`Transport.bind`: which address to listen on cannot be known yet."""


class UnreachableError(Exception):
    """`Transport.send`: nobody is connected there."""


class Transport(Protocol):
    """One stage's connections. Only `wake` may be called from another thread."""

    def bind(self, port: int) -> Address:
        """Listens on ``port`` (0: any free one) besides what it listens on already; returns where.

        Raises:
            PortTakenError: somebody else listens there.
            NoAddressError: ask again later.
            ConfigError: there is no listening on that address.
        """

    def connect(self, side: Side, address: Address) -> None:
        """Starts a new connection and forgets the old one of that side, with its events; the outcome is an event."""

    def send(self, side: Side, peer: bytes, frames: Sequence[Frame]) -> None:
        """Queues frames, without blocking; ``peer`` chooses the connection on the successor side.

        Raises:
            UnreachableError: there is no such connection.
        """

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened, oldest first; waits up to ``timeout_s`` for the first event or a `wake`."""

    def wake(self) -> None:
        """Makes a `poll` that is waiting return; safe in a signal handler, harmless after `close`."""

    def be_more_patient(self) -> float:
        """A silent peer was only slow: from now on peers get more time to answer. Returns how much, in seconds."""

    def close(self, linger_s: float = 1.0) -> None:
        """Once or more often: ends all connections; frames already queued have ``linger_s`` to leave."""


@dataclass
class MemoryNetwork:
    """The wires between memory transports: who listens where. Deterministic, single-threaded but for `wake`."""

    listeners: dict[int, MemoryTransport] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)  # by programs that are no transports and refuse connections
    next_port: int = 50000
    next_peer: int = 0

    def free_port(self) -> int:
        self.next_port += 1
        return self.next_port


class MemoryTransport:
    """A transport within one process. Ports are numbers of a `MemoryNetwork`; hosts are ignored."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._events: deque[LinkEvent] = deque()
        self._ports: list[int] = []
        self._outgoing: dict[Side, tuple[MemoryTransport, bytes]] = {}
        self._incoming: dict[bytes, tuple[MemoryTransport, Side]] = {}
        self._woken = threading.Event()
        self.patience_s = 1.0
        self.closed = False

    def __repr__(self) -> str:
        return f"MemoryTransport(ports={self._ports}, outgoing={[side.value for side in self._outgoing]})"

    def bind(self, port: int) -> Address:
        port = port or self._network.free_port()
        if port in self._network.listeners or port in self._network.taken:
            raise PortTakenError(port)
        self._network.listeners[port] = self
        self._ports.append(port)
        return Address(MEMORY_HOST, port)

    def connect(self, side: Side, address: Address) -> None:
        self._drop(side)
        listener = self._network.listeners.get(address.port)
        if listener is None:
            self._push(Disconnected(side, "connection refused"))
            return
        self._network.next_peer += 1
        peer = self._network.next_peer.to_bytes(4, "big")
        self._outgoing[side] = (listener, peer)
        listener._incoming[peer] = (self, side)
        self._push(Connected(side))

    def send(self, side: Side, peer: bytes, frames: Sequence[Frame]) -> None:
        copies = [bytes(frame) for frame in frames]
        if side is Side.SUCCESSOR:
            if peer not in self._incoming:
                raise UnreachableError(peer)
            receiver, their_side = self._incoming[peer]
            receiver._push(Received(their_side, b"", copies))
            return
        if side not in self._outgoing:
            raise UnreachableError(side.value)
        receiver, my_peer = self._outgoing[side]
        receiver._push(Received(Side.SUCCESSOR, my_peer, copies))

    def poll(self, timeout_s: float) -> list[Event]:
        if not self._events and timeout_s > 0:
            self._woken.wait(timeout_s)
        self._woken.clear()
        events: list[Event] = list(self._events)
        self._events.clear()
        return events

    def wake(self) -> None:
        self._woken.set()

    def be_more_patient(self) -> float:
        self.patience_s *= 2
        return self.patience_s

    def close(self, linger_s: float = 1.0) -> None:
        self.closed = True
        for port in self._ports:
            del self._network.listeners[port]
        self._ports.clear()
        for side in list(self._outgoing):
            self._drop(side)
        for receiver, side in list(self._incoming.values()):
            receiver._outgoing.pop(side, None)
            receiver._push(Disconnected(side, "connection closed"))
        self._incoming.clear()

    def _push(self, event: LinkEvent) -> None:
        self._events.append(event)
        self._woken.set()

    def _drop(self, side: Side) -> None:
        if side is not Side.SUCCESSOR:
            self._events = deque(event for event in self._events if event.side is not side)
        if side in self._outgoing:
            listener, peer = self._outgoing.pop(side)
            listener._incoming.pop(peer, None)
