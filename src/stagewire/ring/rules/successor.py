"""The link from the successor: which connection of all that call here it is, and who may take it over.

    NOBODY ──its Hello──> CURRENT ──a send finds nobody──> NOBODY
                            └──another process with its index, and the current one is silent──> CURRENT: the newcomer

Knows one index and the process that answers for it. The phase of the ring, and what a change of successor means for it,
are not known here (ring/rules/epochs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import Action, Send, Side, Stall
from stagewire.ring.rules.admission import Holder, Verdict, duplicate_refusal
from stagewire.wire.codec import Frame
from stagewire.wire.messages import Message, NotHere, Pong, Refused, StageIdentity, Welcome

__all__ = ["SuccessorLink"]

# Bounds what strangers can make this stage remember.
MAX_EARLIER = 8


@dataclass
class _Current(Holder):
    """``earlier``: its other connections. Most have ended, but something that came by them may still be unread."""

    peer: bytes
    earlier: tuple[bytes, ...] = ()


@dataclass
class SuccessorLink:
    """See the module. ``identity`` is this stage's own."""

    identity: StageIdentity

    _current: _Current | None = None
    _gone: tuple[bytes, ...] = ()  # connections of successors that a send found gone, the last ones first
    _lost_at: float = 0.0

    @property
    def peer(self) -> bytes | None:
        return self._current.peer if self._current else None

    def is_lost(self, now: float) -> bool:
        """Whether it is gone for so long that no other stage will say why."""
        return self._current is None and now - self._lost_at >= timeouts.LOST_SUCCESSOR_S

    def silent_s(self, now: float) -> float:
        """For how long nothing has come from it."""
        return now - (self._current.heard_at if self._current else self._lost_at)

    def heard(self, peer: bytes, now: float) -> None:
        if self._current is not None and self._current.peer == peer:
            self._current.heard_at = now

    def is_or_was(self, peer: bytes) -> bool:
        """Whether this is a connection of the successor, or was one.

        Its last messages may be read only after a send has found it gone, or after Hellos of older connections.
        """
        return peer in (*self._connections(), *self._gone)

    def _connections(self) -> tuple[bytes, ...]:
        return (self._current.peer, *self._current.earlier) if self._current else ()

    def unreachable(self, now: float) -> None:
        # Not in place of the earlier ones: an ended connection's greetings, read one by one, are each found gone.
        found = self._connections()
        self._gone = (*found, *(peer for peer in self._gone if peer not in found))[:MAX_EARLIER]
        self._current = None
        self._lost_at = now

    def describe_stall(self, stall: Stall, now: float) -> str:
        """Why the successor counts as lost though its connection did not end, for people."""
        own = self.identity.stage
        other = (own + 1) % self.identity.num_stages
        text = (
            f"stage {other} is lost: {stall.num_bytes} bytes on link {own} -> {other} ({stall.ends}) were not "
            f"acknowledged for {stall.seconds:.0f} s"
        )
        if self.silent_s(now) >= timeouts.SMALL_TALK_S:
            return text
        return text + (
            f", while small messages pass: the path swallows packets of {stall.packet_bytes} bytes. Give the "
            f"interface of stage {own} the path's MTU (ip link set dev NAME mtu 1400), let ICMP pass, or set "
            "net.ipv4.tcp_mtu_probing=1"
        )

    def send(self, message: Message, payloads: Sequence[Frame] = ()) -> list[Action]:
        """Sends to the successor, if there is one."""
        if self._current is None:
            return []
        return [Send(Side.SUCCESSOR, message, self._current.peer, payloads)]

    def claimed(self, peer: bytes, caller: StageIdentity, now: float) -> list[Action] | Refused:
        """The caller says that it is the successor. It is, unless another process with its index answers."""
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
            # The Pong finds out whether the first one's connection still exists. An answer would be ignored.
            return [Send(Side.SUCCESSOR, Pong(0), current.peer), Send(Side.SUCCESSOR, NotHere(caller.stage), peer)]
        self._current = _Current(caller, now, peer)
        return [
            Send(Side.SUCCESSOR, duplicate_refusal(caller.stage), current.peer),
            Send(Side.SUCCESSOR, Welcome(self.identity), peer),
        ]
