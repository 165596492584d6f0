"""What the ring's rules decide, as values.

Owns the names of a stage's connections, and of every action. The rules return actions; ring/ring.py performs them. This
module decides and performs nothing.
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

# What the stages' model threads say to each other. All other messages are between their ring threads.
Data = Call | Reply | Step | Sample | Result


class Side(Enum):
    """Which connection: to the predecessor, from successors (and strangers), to the owner of a shared port."""

    PREDECESSOR = "predecessor"
    SUCCESSOR = "successor"
    OWNER = "owner"


@dataclass(frozen=True)
class Way:
    """How an address was reached.

    Args:
        instead: the address that was used instead, another one of this machine; empty: the address itself.
        is_doubtful: whether a stage of another ring may listen there.
        has_others: whether there are more ways. Connecting again takes the next one.
    """

    instead: str = ""
    is_doubtful: bool = False
    has_others: bool = False


STRAIGHT = Way()


@dataclass(frozen=True)
class Stall:
    """What was sent by a connection does not arrive.

    Args:
        num_bytes: sent and not acknowledged.
        seconds: for how long nothing at all was acknowledged.
        ends: of the connection, as "HOST:PORT -> HOST:PORT".
        packet_bytes: the most that one packet carries.
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
    """Hand a message to the thread that runs the model."""

    message: Data
    payloads: Sequence[Frame]


@dataclass(frozen=True)
class SetOpen:
    """The ring is whole. ``identities``, in order: all stages' at the head, the earlier stages' elsewhere."""

    epoch: int
    identities: tuple[StageIdentity, ...]


@dataclass(frozen=True)
class SetBroken:
    """The ring of ``epoch`` is no longer whole. It may come back, with another epoch."""

    epoch: int
    error: StageLost


@dataclass(frozen=True)
class PassReport:
    """Add this stage's report to the ``earlier`` ones and send them on, if that is possible without waiting."""

    earlier: Sequence[StageReport]


@dataclass(frozen=True)
class SetReports:
    """At the head: what the stages have reported this time round, in order. Some may be missing."""

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

# What one part of the rules decides: what to do, or why this stage cannot go on. RingState then tells the others.
Outcome = list[Action] | StagewireError


def clip(text: str) -> str:
    """Text that always fits into a message: of bounded length, and without characters that UTF-8 cannot carry."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode("utf-8")
