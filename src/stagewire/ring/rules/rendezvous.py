"""One port shared by several stages of a host: who owns it, and where the others are found.

The first stage that binds the configured port owns it. A later stage listens on a private port and registers that with
the owner once a second, which also proves that it lives. The owner redirects whoever asks for that stage. When the
owner is gone, the others try to bind the port: one becomes the owner, the rest register with it.

    (start)                    ──the port is free──> OWNER
    (start)                    ──the port is taken──> REGISTERING ──Registered──> REGISTERED
    REGISTERING or REGISTERED  ──the owner is gone──> OWNER if the port is free, else REGISTERING with the new owner
    REGISTERING                ──the owner does not answer like a stage──> this stage fails

A stage that stands by stays in REGISTERING as long as another process of its stage has the port or is registered.

Knows the port, its owner and the stages registered there. The ring is not known here: its phase comes as ``is_open``.
An open ring does not need the port and does not end for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagewire.config import StageConfig
from stagewire.errors import ConfigError
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import Action, Bind, ConnectOwner, Outcome, Send, Side, clip
from stagewire.ring.rules.admission import MAX_BAD_HANDSHAKES, Holder, Verdict, duplicate_refusal
from stagewire.wire.messages import NotHere, Redirect, Refused, Register, Registered, StageIdentity

__all__ = ["Rendezvous"]


@dataclass
class _Registration(Holder):
    port: int


@dataclass
class Rendezvous:
    """See the module. ``identity`` is this stage's own."""

    config: StageConfig
    identity: StageIdentity

    _is_owner: bool = False
    _is_known_stage: bool = False  # whether the port's owner has answered as a stage
    _is_other_stage: bool = False  # whether the owner is not the stage that this one waits to replace
    _owner_since: float = 0.0
    _has_place: bool = False  # stays true once it is
    _private_port: int | None = None
    _is_registered: bool = False
    _unanswered_since: float = 0.0
    _bad_handshakes: int = 0
    _next_register_at: float = 0.0
    _registry: dict[int, _Registration] = field(default_factory=dict)

    # ---- on a port that is taken -----------------------------------------------------------------------------------

    def bound(self, public: bool, port: int, now: float) -> list[Action]:
        """``public``: on the configured port, else on a private one."""
        if public:
            self._is_owner = self._has_place = True
            self._owner_since = now
            return []
        self._private_port = port
        self._unanswered_since = now
        return [ConnectOwner()]

    def port_taken(self) -> list[Action]:
        return [Bind(public=False)] if self._private_port is None else [ConnectOwner()]

    @property
    def stands_by(self) -> bool:
        """Whether another process has this stage's place: the port, or the entry with the port's owner."""
        return self.config.stands_by and not self._has_place

    def connected(self, is_open: bool, now: float) -> Outcome:
        self._next_register_at = now
        return self.tick(is_open, now)

    def disconnected(self, now: float) -> list[Action]:
        if self._is_registered:
            self._unanswered_since = now
        self._is_registered = False
        if self.stands_by and self._is_other_stage and now - self._unanswered_since < timeouts.ALIVE_S:
            return [
                ConnectOwner()
            ]  # the stage that this one waits to replace may live, and then binds the port at once
        return [Bind(public=True)]

    def bad_handshake(self, is_open: bool, note: str = "") -> Outcome:
        self._bad_handshakes += 1
        is_patient = is_open or (self.stands_by and self._is_known_stage)
        if self._bad_handshakes >= MAX_BAD_HANDSHAKES and not is_patient:
            return self._port_is_foreign(note)
        return [Bind(public=True)]

    def answered(self, message: Registered | NotHere, now: float) -> None:
        """``NotHere`` says that the owner is a stage and will decide later."""
        if isinstance(message, NotHere):
            self._unanswered_since = now
            self._is_known_stage = True
            self._is_other_stage = message.stage != self.config.stage
            return
        self._is_registered = self._has_place = True
        self._bad_handshakes = 0

    def tick(self, is_open: bool, now: float) -> Outcome:
        if self._is_owner or self._private_port is None or now < self._next_register_at:
            return []
        self._next_register_at = now + timeouts.REGISTER_INTERVAL_S
        is_patient = is_open or (self.stands_by and self._is_known_stage)
        if not self._is_registered and not is_patient and now - self._unanswered_since >= timeouts.MUTE_OWNER_S:
            return self._port_is_foreign()
        return [Send(Side.OWNER, Register(self.identity, self._private_port, self.stands_by))]

    def _port_is_foreign(self, note: str = "") -> ConfigError:
        what = f"another program ({note})" if note else "another program"
        return ConfigError(
            f"port {self.config.bind_port} is taken by {what}: choose another --pipeline-local-bind-port for "
            f"stage {self.config.stage} (and the same in its successor's address), or end that program"
        )

    # ---- as its owner ----------------------------------------------------------------------------------------------

    def register(self, register: Register, now: float) -> Registered | NotHere | Refused:
        """The answer to a stage that wants to be found here. ``NotHere`` says that it is too early to tell."""
        caller = register.identity
        if caller.pipeline_id != self.identity.pipeline_id:
            return self._other_pipeline(caller)
        if caller.stage == self.config.stage:
            return NotHere(caller.stage) if register.stands_by else duplicate_refusal(caller.stage)
        if caller.stage >= self.config.num_stages:
            return NotHere(caller.stage)  # nobody looks for it; bounds what strangers can make this stage remember
        entry = self._registry.get(caller.stage)
        heard_at = entry.heard_at if entry is not None else self._owner_since
        if register.stands_by and now - heard_at < timeouts.ALIVE_S:  # a new owner has not heard of everybody yet
            return NotHere(self.config.stage)
        if entry is not None and not register.stands_by and entry.identity.incarnation != caller.incarnation:
            verdict = entry.judge(caller.incarnation, now)
            if verdict is Verdict.REFUSED:
                return duplicate_refusal(caller.stage)
            if verdict is Verdict.WAITS:
                return NotHere(caller.stage)
        claims = entry.claims if entry else {}
        self._registry[caller.stage] = _Registration(caller, now, register.port, claims=claims)
        return Registered(self.config.stage)

    def direct(self, stage: int, now: float) -> Redirect | NotHere:
        """The answer to a Hello that looks for another stage than this one."""
        entry = self._registry.get(stage)
        if entry is None or now - entry.heard_at >= timeouts.ALIVE_S:
            return NotHere(stage)
        return Redirect(stage, entry.port)

    def _other_pipeline(self, caller: StageIdentity) -> Refused:
        mine, theirs = self.identity.pipeline_id, caller.pipeline_id
        text = (
            f"port {self.config.bind_port} belongs to pipeline {mine!r} (stage {self.config.stage}), "
            f"not to {clip(theirs)!r}: use another port, or the same --pipeline-id on all stages"
        )
        return Refused(caller.stage, "--pipeline-id", mine, theirs, text)
