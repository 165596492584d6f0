"""The link from the successor: which connection of all that call here it is, and who may take it over.

    NOBODY ──its Hello──> CURRENT ──a send finds nobody──> NOBODY
                            └──another process with its index, and the current one is silent──> CURRENT: the newcomer

Knows one index and who answers for it; not the phase of the ring, nor what a change of successor means for it
(ring/state.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagewire.ring.actions import Action, Send, Side
from stagewire.ring.admission import Holder, Verdict, duplicate_refusal
from stagewire.wire.codec import Frame
from stagewire.wire.messages import Message, NotHere, Pong, Refused, StageIdentity, Welcome

__all__ = ["SuccessorLink"]

# With a successor gone, word of it comes round the ring (Fault or Bye); without, it is lost by our own account.
LOST_SUCCESSOR_S = 2.0
# Bounds what strangers can make us remember.
MAX_EARLIER = 8


@dataclass
class _Current(Holder):
    """``earlier``: its other connections, most of them ended, of which something may still be unread."""

    peer: bytes
    earlier: tuple[bytes, ...] = ()


@dataclass
class SuccessorLink:
    """See the module. ``identity`` is this stage's own."""

    identity: StageIdentity

    _current: _Current | None = None
    _gone: tuple[bytes, ...] = ()  # the connections of one that a send found gone
    _lost_at: float = 0.0

    @property
    def peer(self) -> bytes | None:
        return self._current.peer if self._current else None

    def is_lost(self, now: float) -> bool:
        """Whether it is gone for so long that no other stage will tell us why."""
        return self._current is None and now - self._lost_at >= LOST_SUCCESSOR_S

    def silent_s(self, now: float) -> float:
        """For how long nothing has come from it."""
        return now - (self._current.heard_at if self._current else self._lost_at)

    def heard(self, peer: bytes, now: float) -> None:
        if self._current is not None and self._current.peer == peer:
            self._current.heard_at = now

    def is_or_was(self, peer: bytes) -> bool:
        """Its last words may be read after a send has found it gone, or after the greeting of an older connection."""
        return peer in (*self._connections(), *self._gone)

    def _connections(self) -> tuple[bytes, ...]:
        return (self._current.peer, *self._current.earlier) if self._current else ()

    def unreachable(self, now: float) -> None:
        self._gone = self._connections() or self._gone
        self._current = None
        self._lost_at = now

    def send(self, message: Message, payloads: Sequence[Frame] = ()) -> list[Action]:
        """To the successor, if there is one."""
        if self._current is None:
            return []
        return [Send(Side.SUCCESSOR, message, self._current.peer, payloads)]

    def claimed(self, peer: bytes, caller: StageIdentity, now: float) -> list[Action] | Refused:
        """The caller says it is our successor. It is, unless another process with its index answers."""
        current = self._current
        if current is None or current.identity.incarnation == caller.incarnation:
            claims = current.claims if current else {}
            earlier = tuple(each for each in self._connections() if each != peer)[:MAX_EARLIER]
            self._current = _Current(caller, now, peer, earlier, claims=claims)
            return [Send(Side.SUCCESSOR, Welcome(self.identity), peer)]
        verdict = current.judge(caller.incarnation, now)
        if verdict is Verdict.REFUSED:
            return duplicate_refusal(caller.stage)
        if verdict is Verdict.WAITS:
            # Finds out whether the first one's connection still is: an answer would be ignored.
            return [Send(Side.SUCCESSOR, Pong(0), current.peer), Send(Side.SUCCESSOR, NotHere(caller.stage), peer)]
        self._current = _Current(caller, now, peer)
        return [
            Send(Side.SUCCESSOR, duplicate_refusal(caller.stage), current.peer),
            Send(Side.SUCCESSOR, Welcome(self.identity), peer),
        ]
