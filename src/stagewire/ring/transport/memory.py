"""A transport within one process, for tests: deterministic, and as fast as a method call.

Keeps the contract of transport/interface.py. Ports are numbers of a `MemoryNetwork`; hosts are ignored.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from stagewire.config import Address
from stagewire.ring.rules.actions import Side
from stagewire.ring.transport.interface import (
    Connected,
    Disconnected,
    Event,
    LinkEvent,
    PortTakenError,
    Received,
    UnreachableError,
)
from stagewire.wire.codec import Frame

__all__ = ["MemoryNetwork", "MemoryTransport"]

# The host of every address that a memory transport listens on.
MEMORY_HOST = "127.0.0.1"


@dataclass
class MemoryNetwork:
    """Which memory transport listens on which port. For one thread; only `MemoryTransport.wake` is for others."""

    listeners: dict[int, MemoryTransport] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)  # by programs that refuse connections
    next_port: int = 50000
    next_peer: int = 0

    def free_port(self) -> int:
        self.next_port += 1
        return self.next_port


class MemoryTransport:
    """See `stagewire.ring.transport.interface.Transport`."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._events: deque[LinkEvent] = deque()
        self._ports: list[int] = []
        self._outgoing: dict[Side, tuple[MemoryTransport, bytes]] = {}
        self._incoming: dict[bytes, tuple[MemoryTransport, Side]] = {}
        self._woken = threading.Event()
        self.patience_s = 1.0

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
