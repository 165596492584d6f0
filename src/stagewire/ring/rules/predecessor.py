"""The link to the predecessor: finding it, greeting it, measuring the hop, and sending news to the head by it.

    IDLE ──connected──> GREETING ──Welcome──> LINKED
      ^                    │                    │
      └── disconnected, Redirect, no stage ─────┘

Knows one connection. The phase of the ring, and what the loss of this link means for it, are not known here
(ring/rules/epochs.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from stagewire.config import StageConfig
from stagewire.errors import ConfigError
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import STRAIGHT, Action, Connect, Log, Outcome, Send, Side, Way
from stagewire.ring.rules.admission import MAX_BAD_HANDSHAKES
from stagewire.wire.messages import Hello, Message, Ping, Refused, StageIdentity

__all__ = ["LinkState", "PredecessorLink"]

# Bounds what strangers can make this stage remember.
MAX_UNREPORTED = 16


class LinkState(Enum):
    IDLE = "idle"
    GREETING = "greeting"
    LINKED = "linked"


@dataclass
class PredecessorLink:
    """See the module.

    Args:
        note: the state of the link, for people.
        hop_ns: one-way time to the predecessor: half of the last ping; 0 while unknown.
    """

    config: StageConfig
    identity: StageIdentity

    state: LinkState = LinkState.IDLE
    note: str = "not tried yet"
    hop_ns: int = 0

    _way: Way = STRAIGHT
    _connected_at: float = 0.0
    _heard_at: float = 0.0
    _unlinked_at: float = 0.0
    _is_redirected: bool = False
    _redirect_port: int = 0
    _unredirected_since: float | None = None  # since when nobody has answered on that port
    _redirect_note: str = ""
    _was_linked: bool = False
    _bad_handshakes: int = 0
    _ping_ns: int = -1
    _next_send_at: float = 0.0
    _unreported: list[Refused] = field(default_factory=list)

    def __str__(self) -> str:
        return f"stage {self.config.predecessor_stage} at {self.config.predecessor}"

    @property
    def is_doubtful(self) -> bool:
        """Whether it was found under another address than its own and has not yet shown that it is of this ring."""
        return self.is_greeting and self._way.is_doubtful

    @property
    def is_greeting(self) -> bool:
        return self.state is LinkState.GREETING

    @property
    def is_linked(self) -> bool:
        return self.state is LinkState.LINKED

    @property
    def why(self) -> str:
        """Why it is not linked, for people."""
        return self._redirect_note or self.note

    def unlinked_s(self, now: float) -> float:
        """For how long it has not been linked."""
        return 0.0 if self.is_linked else now - self._unlinked_at

    def is_mute(self, now: float) -> bool:
        """Whether the other end had time to answer like a stage and never has."""
        return self.is_greeting and not self._was_linked and now - self._heard_at >= timeouts.MUTE_PEER_S

    def heard(self, now: float) -> None:
        self._heard_at = now
        self._bad_handshakes = 0

    # ---- the connection --------------------------------------------------------------------------------------------

    def connected(self, now: float, way: Way = STRAIGHT) -> list[Action]:
        self.state = LinkState.GREETING
        self._way = way
        self.note = f"connected{self._describe_way()}, no answer yet"
        self._heard_at = self._connected_at = now
        self._next_send_at = now
        return self.tick(now)

    def disconnected(self, note: str, now: float) -> None:
        if self.is_linked:
            self._unlinked_at = now
        if self._is_redirected and self.state is LinkState.IDLE:
            self._redirect_failed(note, now)
        self.state = LinkState.IDLE
        self.note = note
        self._is_redirected = False

    def _redirect_failed(self, note: str, now: float) -> None:
        """At first the stage may just have ended, and the port's owner forgets it soon. Later this stage says why."""
        if self._unredirected_since is None:
            self._unredirected_since = now
        if now - self._unredirected_since < timeouts.FORWARDING_S:
            return
        stage = self.config.predecessor_stage
        self._redirect_note = (
            f"{self.config.predecessor} sends this stage on to port {self._redirect_port}, where stage {stage} "
            f"listens: {note}. A stage that shares a port listens on one that the system picks: forward that port too, "
            f"or give stage {stage} a --pipeline-local-bind-port of its own"
        )

    def bad_handshake(self, note: str = "") -> Outcome:
        """Something accepted the connection and then did not speak our protocol, or (``note``) not with our key."""
        self.state = LinkState.IDLE
        if self._is_redirected:  # another program has the private port now: ask at the shared port again
            self._is_redirected = False
            return [Connect()]
        self._bad_handshakes += 1
        self.note = note or "something answers there, but not a Stagewire stage"
        if self._bad_handshakes >= MAX_BAD_HANDSHAKES and not self._was_linked:  # a frozen stage fails so, too
            return self._refused(note) if note else self.not_a_stage("does not speak Stagewire's protocol")
        return [Connect()]

    def _describe_way(self) -> str:
        return f" at {self._way.instead}, another address of this machine" if self._way.instead else ""

    def tick(self, now: float) -> list[Action]:
        """Says Hello until it is answered, then pings."""
        if self.state is LinkState.IDLE or now < self._next_send_at:
            return []
        self._next_send_at = now + (timeouts.HELLO_INTERVAL_S if self.is_greeting else timeouts.PING_INTERVAL_S)
        # Also after the Welcome: if the predecessor reads the Hello of an older connection late, it takes that
        # connection for ours, finds it ended, and waits for another Hello.
        hello = self._send(Hello(self.identity, self.config.predecessor_stage))
        if self.is_greeting:
            return hello
        self._ping_ns = int(now * 1e9)
        return [*hello, *self._send(Ping(self._ping_ns))]

    # ---- messages --------------------------------------------------------------------------------------------------

    def welcomed(self) -> list[Action]:
        self.state = LinkState.LINKED
        self._was_linked = True
        self.note = "linked"
        self._unredirected_since, self._redirect_note = None, ""
        reports: list[Action] = [Send(Side.PREDECESSOR, refusal) for refusal in self._unreported]
        self._unreported.clear()
        if self._way.instead:
            reports.append(Log(f"Stage {self.config.stage}: linked to {self} by {self._way.instead}: the same machine"))
        return reports

    def redirected(self, port: int) -> list[Action]:
        """Connects to the port that the shared port's owner has named.

        A Redirect from there leads back to the shared port, so that there are no chains.
        """
        if port != self._redirect_port:
            self._redirect_port, self._unredirected_since, self._redirect_note = port, None, ""
        return self._reconnect(None if self._is_redirected else port)

    def not_here(self, stage: int, now: float) -> list[Action]:
        self.note = f"the port is up{self._describe_way()}, stage {stage} has not registered there yet"
        tries_others = self._way.has_others and now - self._connected_at >= timeouts.OTHER_WAY_INTERVAL_S
        return self._reconnect(None) if self._is_redirected or tries_others else []

    def is_another_ring(self, why: str) -> list[Action]:
        """A stage of another ring was found in its place: this stage goes on waiting, at the address that was given."""
        self.note = f"nothing listens there yet; {self._way.instead}, on this machine too, is of another ring: {why}"
        return self._reconnect(None)

    def ponged(self, sent_ns: int, now: float) -> None:
        if sent_ns == self._ping_ns:
            self.hop_ns = max(0, int(now * 1e9) - sent_ns) // 2

    def report(self, refusal: Refused) -> list[Action]:
        """Sends a refusal towards the head, or keeps it until the link is up."""
        if self.is_linked:
            return self._send(refusal)
        if len(self._unreported) < MAX_UNREPORTED:
            self._unreported.append(refusal)
        return []

    def not_a_stage(self, what: str) -> ConfigError:
        return self._refused(
            f"something listens there but {what}; "
            f"give the address that stage {self.config.predecessor_stage} printed as bound"
        )

    def _refused(self, why: str) -> ConfigError:
        flag = "--pipeline-prev-stage-addr" if self.config.is_head else "--pipeline-prev-stage-service-addr"
        return ConfigError(f"{flag} {self.config.predecessor}: {why}")

    def _reconnect(self, port: int | None) -> list[Action]:
        if not self.is_greeting:
            return []
        self._is_redirected = port is not None
        self.state = LinkState.IDLE
        return [Connect(port)]

    def _send(self, message: Message) -> list[Action]:
        return [Send(Side.PREDECESSOR, message)]
