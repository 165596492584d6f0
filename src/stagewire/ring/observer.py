"""What the rest of the process learns of the ring: an observer's calls, and items for the model's thread.

Owns both vocabularies. Does not know how a ring runs (ring/ring.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagewire.config import Address
from stagewire.errors import StageLost, StagewireError
from stagewire.ring.rules.actions import Data
from stagewire.wire.codec import Frame
from stagewire.wire.messages import StageIdentity, StageReport

__all__ = ["Broken", "Delivery", "Item", "Observer", "Whole"]


@dataclass(frozen=True)
class Delivery:
    """A message for the model's thread. ``received_ns``: this stage's monotonic clock."""

    message: Data
    payloads: Sequence[Frame]
    received_ns: int
    num_bytes: int = 0  # about what it takes here


@dataclass(frozen=True)
class Broken:
    """For the model's thread: whatever was sent in ``epoch`` and has not come back never will."""

    epoch: int
    error: StageLost


@dataclass(frozen=True)
class Whole:
    """For the model's thread of the head: messages that are sent from now on are of ``epoch``."""

    epoch: int


Item = Delivery | Broken | Whole


class Observer:
    """Learns what happens to the ring. Override what you want to know. The ring's thread calls it."""

    def on_log(self, text: str, is_warning: bool) -> None: ...

    def on_bound(self, address: Address) -> None:
        """This stage listens there. Called again when that has changed."""

    def on_open(self, epoch: int, identities: tuple[StageIdentity, ...]) -> None: ...

    def on_broken(self, epoch: int, error: StageLost) -> None:
        """The ring of ``epoch`` is no longer whole. `on_open` follows when it is again, with another epoch."""

    def takes(self, delivery: Delivery) -> bool:
        """Whether this message is for the observer, and not for the model's thread."""
        return False

    def report(self) -> StageReport | None:
        """What this stage says of itself, about once a second while the ring is open. None: nothing."""
        return None

    def on_reports(self, reports: Sequence[StageReport]) -> None:
        """At the head: what the stages have said this time round, in order. Some may be missing."""

    def on_failed(self, error: StagewireError) -> None: ...

    def on_stopped(self, text: str) -> None: ...

    def on_ended(self) -> None:
        """The last call: everything queued has left and the transport is closed."""
