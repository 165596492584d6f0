"""What the ring's rules decide, as values: the vocabulary that the rules and whoever performs them share.

Owns the names of a stage's connections and of everything that can be done about them. Decides and performs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from stagewire.errors import StageLost, StagewireError
from stagewire.wire.codec import Frame
from stagewire.wire.messages import Call, Message, Reply, Result, Sample, StageIdentity, StageReport, Step

__all__ = [
    "Action",
    "Bind",
    "Connect",
    "ConnectOwner",
    "Data",
    "Deliver",
    "Fail",
    "Log",
    "Outcome",
    "PassReport",
    "Send",
    "SetBroken",
    "SetOpen",
    "SetReports",
    "Side",
    "Stop",
    "clip",
]

MAX_TEXT = 2000

# What the threads that run the model say to each other; everything else is between the rings.
Data = Call | Reply | Step | Sample | Result


class Side(Enum):
    """Which connection: to the predecessor, from successors (and strangers), to the owner of a shared port."""

    PREDECESSOR = "predecessor"
    SUCCESSOR = "successor"
    OWNER = "owner"


@dataclass(frozen=True)
class Way:
    """How an address was reached.

    ``instead``: where somebody listens who was found in its place, under another address of this machine;
    ``is_doubtful``: it may be a stage of another ring. ``has_others``: there are more ways, and to connect again takes
    the next one.
    """

    instead: str = ""
    is_doubtful: bool = False
    has_others: bool = False


STRAIGHT = Way()


@dataclass(frozen=True)
class Stall:
    """Of what was sent by a connection, ``num_bytes`` were not acknowledged, nor anything else, for ``seconds``.

    ``ends``: of the connection, "HOST:PORT -> HOST:PORT"; ``packet_bytes``: the most that a packet carries.
    """

    num_bytes: int
    seconds: float
    ends: str
    packet_bytes: int


@dataclass(frozen=True)
class Bind:
    """Listen: on the configured port (``public``), or on one that the system picks."""

    public: bool


@dataclass(frozen=True)
class Connect:
    """(Re)connect to the predecessor; ``port`` replaces the configured one after a Redirect."""

    port: int | None = None


@dataclass(frozen=True)
class ConnectOwner:
    """(Re)connect to whoever owns the configured bind port."""


@dataclass(frozen=True)
class Send:
    """``peer`` is one connection of the successor side; empty for the other sides."""

    side: Side
    message: Message
    peer: bytes = b""
    payloads: Sequence[Frame] = ()


@dataclass(frozen=True)
class Deliver:
    """For the thread that runs the model."""

    message: Data
    payloads: Sequence[Frame]


@dataclass(frozen=True)
class SetOpen:
    """The ring is whole. ``identities``, in order: every stage's at the head, those of earlier stages elsewhere."""

    epoch: int
    identities: tuple[StageIdentity, ...]


@dataclass(frozen=True)
class SetBroken:
    """The ring of ``epoch`` is not whole any more; it may come back, with another epoch."""

    epoch: int
    error: StageLost


@dataclass(frozen=True)
class PassReport:
    """Add this stage's report to ``earlier`` ones and send them on, if that goes without waiting."""

    earlier: Sequence[StageReport]


@dataclass(frozen=True)
class SetReports:
    """At the head: what the stages said of themselves this time round, in order; some may be missing."""

    reports: Sequence[StageReport]


@dataclass(frozen=True)
class Fail:
    error: StagewireError


@dataclass(frozen=True)
class Stop:
    text: str


@dataclass(frozen=True)
class Log:
    text: str
    is_warning: bool = False


Action = (
    Bind | Connect | ConnectOwner | Send | Deliver | SetOpen | SetBroken | PassReport | SetReports | Fail | Stop | Log
)

# Of one part of the rules: what to do, or why this stage cannot go on (ring/state.py tells the others then).
Outcome = list[Action] | StagewireError


def clip(text: str) -> str:
    """Text that always fits into a message: bounded, and without what UTF-8 cannot carry."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode("utf-8")
