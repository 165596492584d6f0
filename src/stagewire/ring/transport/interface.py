"""What the ring needs of a transport.

`Transport` is the contract, which transport/memory.py and transport/zmq_transport.py both keep
(tests/unit/test_ring_transport.py). A transport moves frames and reports connections as events; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stagewire.config import Address
from stagewire.errors import StagewireError
from stagewire.ring.rules.actions import STRAIGHT, Side, Stall, Way
from stagewire.wire.codec import Frame

__all__ = [
    "AddressGone",
    "BadHandshake",
    "Connected",
    "Disconnected",
    "Event",
    "LinkEvent",
    "ListenFailed",
    "Moved",
    "NoAddressError",
    "Notice",
    "PortTakenError",
    "Received",
    "Stalled",
    "Transport",
    "UnreachableError",
]


@dataclass(frozen=True)
class Connected:
    side: Side
    way: Way = STRAIGHT


@dataclass(frozen=True)
class Disconnected:
    """The connection ended or could not be made. The transport does not retry by itself.

    ``is_silent``: the connection did not end, but the peer stopped answering. It may be frozen, or only slow.
    """

    side: Side
    note: str
    is_silent: bool = False


@dataclass(frozen=True)
class BadHandshake:
    """The other end is no peer of this transport: whoever answers, or on the successor side whoever called.

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
    """What was sent to a peer on the successor side did not arrive, so the transport has ended the connection."""

    side: Side
    peer: bytes
    stall: Stall


@dataclass(frozen=True)
class AddressGone:
    """The address that this stage listens on is gone from the machine, without another in its place; "": it is back."""

    text: str


@dataclass(frozen=True)
class Moved:
    """The address that this stage listened on is gone from the machine. Now it listens on this one."""

    address: Address


@dataclass(frozen=True)
class ListenFailed:
    """The address that this stage listened on is gone, and it cannot listen on another."""

    error: StagewireError


@dataclass(frozen=True)
class Notice:
    """For people: something that happened to this stage's own end."""

    text: str
    is_warning: bool = False


LinkEvent = Connected | Disconnected | BadHandshake | Received | Stalled
Event = LinkEvent | AddressGone | Moved | ListenFailed | Notice


class PortTakenError(Exception):
    """`Transport.bind`: the port is in use."""


class NoAddressError(Exception):
    """`Transport.bind`: the address to listen on is not known yet."""


class UnreachableError(Exception):
    """`Transport.send`: nobody is connected there."""


class Transport(Protocol):
    """One stage's connections. Only `wake` may be called from another thread."""

    def bind(self, port: int) -> Address:
        """Listens on ``port`` (0: any free one), besides those that it listens on already; returns where.

        Raises:
            PortTakenError: another program listens there.
            NoAddressError: ask again later.
            ConfigError: this machine cannot listen on that address.
        """

    def connect(self, side: Side, address: Address) -> None:
        """Starts a new connection and forgets the old one of that side, with its events. The outcome is an event."""

    def send(self, side: Side, peer: bytes, frames: Sequence[Frame]) -> None:
        """Queues frames without blocking. ``peer`` chooses the connection on the successor side.

        Raises:
            UnreachableError: there is no such connection.
        """

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened, oldest first. Waits up to ``timeout_s`` for the first event or a `wake`."""

    def wake(self) -> None:
        """Makes a waiting `poll` return. Safe in a signal handler, harmless after `close`."""

    def be_more_patient(self) -> float:
        """A silent peer was only slow, so from now on peers get more time to answer. Returns how much, in seconds."""

    def close(self, linger_s: float = 1.0) -> None:
        """Ends all connections. Frames already queued have ``linger_s`` to leave. May be called again."""
