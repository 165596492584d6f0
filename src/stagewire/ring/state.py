"""The ring as one stage sees it: a pure state machine.

Events go in (one method each: `connected`, `received`, `tick`, ...), actions come out, in order; ring/node.py performs
them. It knows stages, links, epochs and failures, and no socket, clock, thread, torch or vLLM: the time is an argument.

    link to the predecessor    IDLE ──connected──> GREETING ──Welcome──> LINKED
                                 ^                     │                    │
                                 └──── disconnected, Redirect, no stage ────┘

    the head        LINKING ──its Roll came round──> OPENING ──its Open came round──> OPEN ──first call sent──> SERVING
    other stages    LINKING ─────────────Open came from the predecessor─────────────> OPEN ──first call came──> SERVING

    back to LINKING      from OPENING or OPEN, never from SERVING: a neighbour's connection ended or was made anew, a
                         Fault came, a new Roll came (at the head it leads to OPENING of the next epoch)
    any ──> FAILED       a refusal or a deadline; from SERVING also a Fault, or the predecessor's loss
    any ──> STOPPED      `stop` here, or the head's Bye

Who is wrong when two stages differ: between neighbours the higher index (order, gap, overlap); in shared settings
whoever differs from the head, which is why those are compared when the head's identity arrives with the Roll. A stage
judges a caller's total or pipeline id only once it knows the head; until then it says "ask again".

A loss before SERVING only unlinks: the others wait for the corrected stage until their start deadline. Whoever leaves
OPEN because its predecessor is gone sends a Fault forward, which reaches the head before the Roll that repairs the
ring can, so that a head that has just begun to serve fails instead of waiting for an answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from stagewire.config import StageConfig
from stagewire.errors import ConfigError, PeerError, ProtocolError, StageLost, StagewireError, WireVersionError
from stagewire.plan.ranges import LayerRange, check_adjacent
from stagewire.wire.codec import Frame
from stagewire.wire.messages import (
    Bye,
    Call,
    Fault,
    Hello,
    Message,
    NotHere,
    Open,
    Ping,
    Pong,
    Redirect,
    Refused,
    Register,
    Registered,
    Reply,
    Result,
    Roll,
    Sample,
    StageIdentity,
    Step,
    Welcome,
)

__all__ = [
    "Action",
    "Bind",
    "Connect",
    "ConnectOwner",
    "Deliver",
    "Fail",
    "Log",
    "Phase",
    "RingState",
    "Send",
    "SetOpen",
    "Side",
    "Stop",
]

HELLO_INTERVAL_S = 1.0
WAIT_LINE_INTERVAL_S = 10.0
# A stage that says nothing for this time may be replaced by a newcomer with its index.
ALIVE_S = 5.0
# With a successor gone while serving, word of it comes round the ring (Fault or Bye); without, we fail by ourselves.
LOST_SUCCESSOR_S = 2.0
# Something that accepts connections but never answers like a stage is not one, after this time.
MUTE_PEER_S = 30.0
# The owner of a shared port answers at once unless it is no stage at all; Python may hold it up while it imports.
MUTE_OWNER_S = 10.0
# Handshakes that ZeroMQ itself gives up on, in a row, before an address counts as another program's.
MAX_BAD_HANDSHAKES = 3
# Bounds on what strangers can make us remember, and on how much text one message carries.
MAX_REMEMBERED = 1000
MAX_CLAIMS = 16
MAX_UNREPORTED = 16
MAX_TEXT = 2000


class Side(Enum):
    """Which connection: to the predecessor, from successors (and strangers), to the owner of a shared port."""

    PREDECESSOR = "predecessor"
    SUCCESSOR = "successor"
    OWNER = "owner"


class Phase(Enum):
    LINKING = "linking"
    OPENING = "opening"
    OPEN = "open"
    SERVING = "serving"
    FAILED = "failed"
    STOPPED = "stopped"


class Link(Enum):
    IDLE = "idle"
    GREETING = "greeting"
    LINKED = "linked"


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
    """``peer`` is the successor-side address of one connection; None for the other sides."""

    side: Side
    message: Message
    peer: bytes | None = None
    payloads: Sequence[Frame] = ()


@dataclass(frozen=True)
class Deliver:
    """For the thread that runs the model."""

    message: Message
    payloads: Sequence[Frame]


@dataclass(frozen=True)
class SetOpen:
    """The ring is whole. ``identities`` is every stage's, in order, at the head; empty elsewhere."""

    epoch: int
    identities: tuple[StageIdentity, ...]


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


Action = Bind | Connect | ConnectOwner | Send | Deliver | SetOpen | Fail | Stop | Log

_FOR_HEAD = (Reply, Result)
_FOR_WORKER = (Call, Reply, Step, Sample)


class _Verdict(Enum):
    """About a newcomer with an index that somebody else holds."""

    REFUSED = "the holder answers"
    WAITS = "too early to tell"
    TAKES_OVER = "the holder is silent"


@dataclass
class _Holder:
    """Who has an index so far, and since when which incarnations claim it too."""

    identity: StageIdentity
    heard_at: float
    claims: dict[str, float] = field(default_factory=dict, kw_only=True)

    def judge(self, claimant: str, now: float) -> _Verdict:
        """Refused as soon as the holder has been heard after the claim; takes over after `ALIVE_S` of silence."""
        if len(self.claims) >= MAX_CLAIMS:
            self.claims.clear()
        since = self.claims.setdefault(claimant, now)
        if self.heard_at > since:
            del self.claims[claimant]
            return _Verdict.REFUSED
        return _Verdict.TAKES_OVER if now - since >= ALIVE_S else _Verdict.WAITS


@dataclass
class _Registration(_Holder):
    port: int


@dataclass
class _Successor(_Holder):
    peer: bytes


@dataclass
class RingState:
    """See the module. ``started_at`` and every ``now`` are seconds of one monotonic clock.

    Args:
        config: this stage's place.
        identity: what it tells the others.
        started_at: when the start deadline begins; it begins anew when an open ring falls apart before serving.
        first_epoch: the head counts epochs from here; random, so that a restarted head never repeats one.
    """

    config: StageConfig
    identity: StageIdentity
    started_at: float
    first_epoch: int = 1

    phase: Phase = Phase.LINKING
    epoch: int = 0
    hop_ns: int = 0
    num_stale_frames: int = 0
    num_bad_messages: int = 0

    _link: Link = Link.IDLE
    _link_note: str = "not tried yet"
    _heard_predecessor_at: float = 0.0
    _redirected: bool = False
    _bad_handshakes: int = 0
    _ping_ns: int = -1
    _successor: _Successor | None = None
    _successor_lost_at: float = 0.0
    _roll: tuple[StageIdentity, ...] | None = None
    _owns_port: bool = False
    _private_port: int | None = None
    _owner_registered: bool = False
    _owner_since: float = 0.0
    _owner_tries: int = 0
    _registry: dict[int, _Registration] = field(default_factory=dict)
    _unreported: list[Refused] = field(default_factory=list)
    _next_hello_at: float = 0.0
    _next_register_at: float = 0.0
    _next_line_at: float = 0.0
    _told: set[Hashable] = field(default_factory=set)

    def __repr__(self) -> str:
        return (
            f"RingState(stage={self.config.stage}/{self.config.num_stages}, phase={self.phase.value}, "
            f"epoch={self.epoch}, predecessor={self._link.value}, successor={self.successor_peer is not None})"
        )

    # ---- what others ask -------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        return self.phase in (Phase.FAILED, Phase.STOPPED)

    @property
    def is_open(self) -> bool:
        return self.phase in (Phase.OPEN, Phase.SERVING)

    @property
    def successor_peer(self) -> bytes | None:
        return self._successor.peer if self._successor else None

    def waits_for(self) -> str:
        """Whom this stage waits for, for people."""
        config = self.config
        predecessor = f"stage {config.predecessor_stage} at {config.predecessor}"
        if self._link is not Link.LINKED:
            return f"{predecessor} ({self._link_note})"
        if self._successor is None:
            return f"stage {config.successor_stage} to connect to port {config.bind_port}"
        if config.is_head:
            return f"the stages between 1 and {config.num_stages - 1} to link to each other"
        return "the head to open the ring: some other stage is not linked yet"

    # ---- life ------------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        self._next_line_at = now + WAIT_LINE_INTERVAL_S
        return [Bind(public=True), Connect()]

    def bound(self, public: bool, port: int, now: float) -> list[Action]:
        """The outcome of Bind: on the configured port, or (it was taken) on a private one."""
        if public:
            self._owns_port = True
            return []
        self._private_port = port
        self._owner_since = now
        return [ConnectOwner()]

    def port_taken(self) -> list[Action]:
        """Bind(public=True) found the port in use: by a stage of this pipeline on this host, or by something else."""
        if self._private_port is None:
            return [Bind(public=False)]
        return [ConnectOwner()] if not self._owner_registered else []

    def stop(self, text: str) -> list[Action]:
        """This stage was asked to stop. The head takes the others along; a worker tells them that it is gone."""
        if self.is_over:
            return []
        stage = self.config.stage
        text = _clip(text)
        message: Message = Bye(text) if self.config.is_head else Fault(stage, 3, f"stage {stage} stopped: {text}")
        self.phase = Phase.STOPPED
        return [*self._to_successor(message), Stop(text)]

    def fail(self, error: StagewireError) -> list[Action]:
        """This stage cannot go on: tells the others once, then reports."""
        if self.is_over:
            return []
        self.phase = Phase.FAILED
        if isinstance(error, StageLost):
            fault = Fault(error.stage, error.exit_code, _clip(str(error)))
        else:
            text = f"stage {self.config.stage} failed: {_clip(str(error))}"
            fault = Fault(self.config.stage, error.exit_code, text)
        return [*self._to_successor(fault), Fail(error)]

    def tick(self, now: float) -> list[Action]:
        """Call it a few times a second: repeats what may have been lost and checks deadlines."""
        if self.is_over:
            return []
        actions: list[Action] = []
        if self._link is Link.GREETING and now >= self._next_hello_at:
            actions += self._say_hello(now)
        if self._link is Link.LINKED and now >= self._next_hello_at:
            self._next_hello_at = now + HELLO_INTERVAL_S
            self._ping_ns = int(now * 1e9)
            actions.append(Send(Side.PREDECESSOR, Ping(self._ping_ns)))
        actions += self._tick_owner(now)
        if self.is_over:
            return actions
        if self.phase is Phase.SERVING:
            actions += self._tick_serving(now)
        elif not self.is_open:
            actions += self._tick_waiting(now)
        return actions

    def _tick_waiting(self, now: float) -> list[Action]:
        waited = now - self.started_at
        limit = self.config.start_timeout_s
        if waited >= limit:
            return self.fail(PeerError(f"stage {self.config.stage} waited {limit:.0f} s for {self.waits_for()}"))
        if self._link is Link.GREETING and now - self._heard_predecessor_at >= MUTE_PEER_S:
            return self.fail(self._not_a_stage("answers nothing a stage would answer"))
        if now >= self._next_line_at:
            self._next_line_at = now + WAIT_LINE_INTERVAL_S
            return [Log(f"Stage {self.config.stage}: waiting for {self.waits_for()}, {waited:.0f} of {limit:.0f} s")]
        return []

    def _tick_serving(self, now: float) -> list[Action]:
        if self._successor is not None or now - self._successor_lost_at < LOST_SUCCESSOR_S:
            return []
        lost = self.config.successor_stage
        text = f"stage {lost} is lost: its connection to stage {self.config.stage} is gone"
        return self.fail(StageLost(lost, text))

    def _tick_owner(self, now: float) -> list[Action]:
        if self._owns_port or self._private_port is None or now < self._next_register_at:
            return []
        self._next_register_at = now + HELLO_INTERVAL_S
        if not self._owner_registered and not self.is_open and now - self._owner_since >= MUTE_OWNER_S:
            return self.fail(self._port_is_foreign())
        return [Send(Side.OWNER, Register(self.identity, self._private_port))]

    # ---- connections -----------------------------------------------------------------------------------------------

    def connected(self, side: Side, now: float) -> list[Action]:
        if self.is_over:
            return []
        if side is Side.OWNER:
            self._next_register_at = 0.0
            return self._tick_owner(now)
        self._link = Link.GREETING
        self._link_note = "connected, no answer yet"
        self._heard_predecessor_at = now
        return self._say_hello(now)

    def disconnected(self, side: Side, note: str, now: float) -> list[Action]:
        """``note`` says why, for people. Whether and where to connect again is among the actions."""
        if self.is_over:
            return []
        if side is Side.OWNER:
            if self._owner_registered:
                self._owner_since = now
            self._owner_registered = False
            return [Bind(public=True)]
        self._link = Link.IDLE
        self._link_note = note
        lost = self._lost_predecessor(note)
        if self.phase is Phase.SERVING:
            return self.fail(lost)
        self._redirected = False
        self._roll = None
        was_open = self.is_open
        self._unopen(now)
        fault = Fault(lost.stage, lost.exit_code, _clip(str(lost)))
        # Not from the tail of a ring that was never open, and not from the head: it is the one who must know.
        notice = self._to_successor(fault) if was_open and not self.config.is_head else []
        return [*notice, Connect()]

    def bad_handshake(self, side: Side) -> list[Action]:
        """Something accepted the connection and then did not speak our protocol."""
        if self.is_over or side is Side.SUCCESSOR:
            return []
        if side is Side.OWNER:
            self._owner_tries += 1
            if self._owner_tries >= MAX_BAD_HANDSHAKES and not self.is_open:
                return self.fail(self._port_is_foreign())
            return [Bind(public=True)]
        self._link = Link.IDLE
        if self._redirected:  # the private port has another owner now; the shared one knows better
            self._redirected = False
            return [Connect()]
        self._bad_handshakes += 1
        self._link_note = "something answers there, but not a Stagewire stage"
        if self._bad_handshakes >= MAX_BAD_HANDSHAKES:
            return self.fail(self._not_a_stage("does not speak Stagewire's protocol"))
        return [Connect()]

    def successor_unreachable(self, now: float) -> list[Action]:
        """A send found nobody. The stage after it sees the loss first and tells; we unlink and, if serving, wait for
        that word: after the head's Bye it is no loss at all."""
        self._successor = None
        self._successor_lost_at = now
        if self.phase in (Phase.OPENING, Phase.OPEN):
            self._unopen(now)
        return []

    def bad_message(self, side: Side, peer: bytes, error: ProtocolError, now: float) -> list[Action]:
        """Undecodable bytes. From a stranger: logged once, dropped. From the linked predecessor: the ring is broken."""
        if self.is_over:
            return []
        self.num_bad_messages += 1
        if side is Side.SUCCESSOR:
            return self._bad_stranger(peer, error)
        is_version = isinstance(error, WireVersionError)
        if side is Side.OWNER:
            is_mine = is_version and not self.is_open
            return self.fail(ConfigError(f"port {self.config.bind_port}: {error}")) if is_mine else []
        predecessor = f"stage {self.config.predecessor_stage} at {self.config.predecessor}"
        if self.phase is Phase.SERVING:
            return self.fail(PeerError(f"{predecessor} sent an invalid message: {error}"))
        if is_version and not self.config.is_head:
            return self.fail(ConfigError(f"{predecessor}: {error}"))
        if not is_version and self._link is Link.GREETING:
            return self.bad_handshake(side)
        self._heard_predecessor_at = now
        self._link_note = str(error)
        return self._tell_once(side, Log(f"Stage {self.config.stage}: {predecessor}: {error}", is_warning=True))

    def _bad_stranger(self, peer: bytes, error: ProtocolError) -> list[Action]:
        text = f"Stage {self.config.stage}: dropped an invalid message on its port: {error}"
        actions = self._tell_once((Side.SUCCESSOR, peer), Log(text, is_warning=True))
        if isinstance(error, WireVersionError) and self._head is not None:
            # Any answer of ours shows a stage of another version that it differs from the head.
            actions.append(Send(Side.SUCCESSOR, NotHere(self.config.stage), peer))
        return actions

    # ---- messages --------------------------------------------------------------------------------------------------

    def received(
        self, side: Side, peer: bytes, message: Message, payloads: Sequence[Frame], now: float
    ) -> list[Action]:
        """``peer`` identifies the connection on the successor side; empty elsewhere."""
        if self.is_over:
            return []
        if side is Side.PREDECESSOR:
            self._heard_predecessor_at = now
            return self._from_predecessor(message, payloads, now)
        if side is Side.OWNER:
            return self._from_owner(message, now)
        return self._from_successor(peer, message, now)

    def _from_predecessor(self, message: Message, payloads: Sequence[Frame], now: float) -> list[Action]:
        match message:
            case Welcome(identity):
                return self._welcomed(identity)
            case Redirect(_, port):
                return self._redirect(port)
            case NotHere(stage):
                self._link_note = f"the port is up, stage {stage} has not registered there yet"
                return self._redirect(None) if self._redirected else []
            case Refused():
                return self._refused(message)
            case Call() | Reply() | Step() | Sample() | Result():
                return self._data(message, payloads)
        if self._link is not Link.LINKED:
            return []
        match message:
            case Pong(sent_ns):
                if sent_ns == self._ping_ns:
                    self.hop_ns = max(0, int(now * 1e9) - sent_ns) // 2
                return []
            case Roll(identities):
                return self._rolled(tuple(identities), now)
            case Open(epoch):
                return self._opened(epoch)
            case Fault():
                return self._faulted(message, now)
            case Bye(text) if not self.config.is_head:
                self.phase = Phase.STOPPED
                onward = [] if self.config.is_tail else self._to_successor(message)
                return [*onward, Stop(text)]
        return self._unexpected()

    def _from_owner(self, message: Message, now: float) -> list[Action]:
        match message:
            case Registered():
                self._owner_registered = True
                self._owner_tries = 0
                return []
            case NotHere():
                self._owner_since = now
                return []
            case Refused():
                return self._refused(message)
        return self._unexpected()

    def _from_successor(self, peer: bytes, message: Message, now: float) -> list[Action]:
        if self._successor is not None and self._successor.peer == peer:
            self._successor.heard_at = now
        match message:
            case Hello():
                return self._hello(peer, message, now)
            case Register():
                return self._register(peer, message, now)
            case Ping(sent_ns):
                return [Send(Side.SUCCESSOR, Pong(sent_ns), peer)]
            case Refused() if self.successor_peer == peer:
                return self._report(message)
        return self._unexpected()

    def _unexpected(self) -> list[Action]:
        self.num_bad_messages += 1
        return []

    # ---- linking ---------------------------------------------------------------------------------------------------

    @property
    def _head(self) -> StageIdentity | None:
        """The head's identity, once it is known here."""
        if self.config.is_head:
            return self.identity
        return self._roll[0] if self._roll else None

    def _say_hello(self, now: float) -> list[Action]:
        self._next_hello_at = now + HELLO_INTERVAL_S
        return [Send(Side.PREDECESSOR, Hello(self.identity, self.config.predecessor_stage))]

    def _redirect(self, port: int | None) -> list[Action]:
        """To the port that the shared port's owner named; None: back to the configured one."""
        if self._link is not Link.GREETING:
            return []
        self._redirected = port is not None and not self._redirected
        self._link = Link.IDLE
        return [Connect(port if self._redirected else None)]

    def _welcomed(self, predecessor: StageIdentity) -> list[Action]:
        if self._link is not Link.GREETING:
            return []
        if predecessor.stage != self.config.predecessor_stage:
            return self._unexpected()
        self._link = Link.LINKED
        self._link_note = "linked"
        self._bad_handshakes = 0
        reports: list[Action] = [Send(Side.PREDECESSOR, refusal) for refusal in self._unreported]
        self._unreported.clear()
        if self.config.is_head:
            return []  # the tail's end and our start are each checked against the model, by their own stage
        problem = check_adjacent(predecessor.stage, _layers(predecessor), self.config.stage, self.config.layers)
        if problem is None:
            return reports
        wanted = f"a range that starts at {predecessor.layer_end}"
        refusal = Refused(self.config.stage, "--pipeline-layer-range", wanted, str(self.config.layers), problem)
        return [*reports, *self._refuse_myself(refusal)]

    def _hello(self, peer: bytes, hello: Hello, now: float) -> list[Action]:
        caller = hello.identity
        ask_again: list[Action] = [Send(Side.SUCCESSOR, NotHere(hello.want), peer)]
        if hello.want != self.config.stage:
            entry = self._registry.get(hello.want)
            if entry is None or now - entry.heard_at >= ALIVE_S:
                return ask_again
            return [Send(Side.SUCCESSOR, Redirect(hello.want, entry.port), peer)]
        if self._head is not None and caller.stage != 0:
            refusal = _misplaced(self._head, caller)
            if refusal:
                return self._refuse(peer, caller, refusal)
        if caller.stage != self.config.successor_stage or caller.pipeline_id != self.identity.pipeline_id:
            return ask_again
        return self._claim_succession(peer, caller, now) or ask_again

    def _claim_succession(self, peer: bytes, caller: StageIdentity, now: float) -> list[Action]:
        """Who comes after us: the caller, unless another process with its index answers. Nothing: too early to tell."""
        current = self._successor
        farewell: list[Action] = []
        if current is not None and current.identity.incarnation != caller.incarnation:
            verdict = current.judge(caller.incarnation, now)
            if verdict is _Verdict.REFUSED:
                return self._refuse(peer, caller, _duplicate(caller.stage))
            if verdict is _Verdict.WAITS or self.phase is Phase.SERVING:
                # Finds out whether the first one's connection still is: an answer would be ignored.
                return [Send(Side.SUCCESSOR, Pong(0), current.peer), Send(Side.SUCCESSOR, NotHere(caller.stage), peer)]
            farewell = [Send(Side.SUCCESSOR, _duplicate(caller.stage), current.peer)]
        is_new = current is None or current.peer != peer
        claims = current.claims if current is not None and not farewell else {}
        self._successor = _Successor(caller, now, peer, claims=claims)
        actions: list[Action] = [*farewell, Send(Side.SUCCESSOR, Welcome(self.identity), peer)]
        if is_new and self.phase is not Phase.SERVING:
            self._unopen(now)
            actions += self._pass_roll()
        return actions

    def _register(self, peer: bytes, register: Register, now: float) -> list[Action]:
        caller = register.identity
        refusal = self._other_pipeline(caller)
        if refusal:
            return self._refuse(peer, caller, refusal)
        if caller.stage == self.config.stage:
            return self._refuse(peer, caller, _duplicate(caller.stage))
        entry = self._registry.get(caller.stage)
        if entry is not None and entry.identity.incarnation != caller.incarnation:
            verdict = entry.judge(caller.incarnation, now)
            if verdict is _Verdict.REFUSED:
                return self._refuse(peer, caller, _duplicate(caller.stage))
            if verdict is _Verdict.WAITS:
                return [Send(Side.SUCCESSOR, NotHere(caller.stage), peer)]
        claims = entry.claims if entry else {}
        self._registry[caller.stage] = _Registration(caller, now, register.port, claims=claims)
        return [Send(Side.SUCCESSOR, Registered(self.config.stage), peer)]

    def _rolled(self, roll: tuple[StageIdentity, ...], now: float) -> list[Action]:
        if self.phase is Phase.SERVING:
            return []
        if not roll or roll[0].stage != 0:
            return self._unexpected()
        if self.config.is_head and roll[0].incarnation != self.identity.incarnation:
            return []  # from before our restart; ours is on its way
        difference = _difference(roll[0], self.identity)
        if difference:
            return self._refuse_myself(difference)
        expected = range(self.config.num_stages if self.config.is_head else self.config.stage)
        if [identity.stage for identity in roll] != list(expected):
            return self._unexpected()
        self._roll = roll
        if self.config.is_head:
            return self._check_and_open(roll)
        self._unopen(now)
        return self._pass_roll()

    def _check_and_open(self, roll: tuple[StageIdentity, ...]) -> list[Action]:
        """At the head: the whole pipeline is known. Every stage has checked itself; this is the last gate."""
        for earlier, later in itertools.pairwise(roll):
            problem = check_adjacent(earlier.stage, _layers(earlier), later.stage, _layers(later))
            if problem:
                return [Log(f"Stage 0: the ring is linked but not right, waiting: {problem}", is_warning=True)]
        if any(_difference(self.identity, identity) for identity in roll):
            return []  # it has refused itself and is leaving
        self.epoch = max(self.epoch + 1, self.first_epoch)
        self.phase = Phase.OPENING
        return self._to_successor(Open(self.epoch))

    def _opened(self, epoch: int) -> list[Action]:
        if self.phase is Phase.SERVING or self._successor is None or self._roll is None:
            return []  # a neighbour went away meanwhile; its return brings a new Roll and a new epoch
        if self.config.is_head:
            if self.phase is not Phase.OPENING or epoch != self.epoch:
                return []
            self.phase = Phase.OPEN
            return [SetOpen(epoch, self._roll)]
        self.epoch = epoch
        self.phase = Phase.OPEN
        return [*self._to_successor(Open(epoch)), SetOpen(epoch, ())]

    def _pass_roll(self) -> list[Action]:
        if self.config.is_head:
            return self._to_successor(Roll([self.identity]))
        if self._roll is None:
            return []
        return self._to_successor(Roll([*self._roll, self.identity]))

    def _unopen(self, now: float) -> None:
        """Back to linking from OPENING or OPEN: the ring is not whole, and nothing has run."""
        if self.is_open:
            self.started_at = now
            self._next_line_at = now + WAIT_LINE_INTERVAL_S
        self.phase = Phase.LINKING

    # ---- serving ---------------------------------------------------------------------------------------------------

    def _data(self, message: Call | Reply | Step | Sample | Result, payloads: Sequence[Frame]) -> list[Action]:
        if not self.is_open or message.epoch != self.epoch or self._link is not Link.LINKED:
            self.num_stale_frames += 1
            return []
        if not isinstance(message, _FOR_HEAD if self.config.is_head else _FOR_WORKER):
            return self._unexpected()
        self.phase = Phase.SERVING
        actions: list[Action] = []
        if isinstance(message, Call) and not self.config.is_tail:
            # Passed on before it is run, so that all stages work at once.
            actions += self._to_successor(message, payloads)
        return [*actions, Deliver(message, payloads)]

    def began_serving(self) -> None:
        """A message of this stage's own has left on the open ring."""
        self.phase = Phase.SERVING

    def _faulted(self, fault: Fault, now: float) -> list[Action]:
        """Once round: whoever is serving fails with it; before that it is news for the head, where it ends."""
        if self.phase is Phase.SERVING:
            self.phase = Phase.FAILED
            return [*self._to_successor(fault), Fail(StageLost(fault.stage, fault.text))]
        self._unopen(now)
        line = Log(f"Stage {self.config.stage}: {fault.text}", is_warning=True)
        relay = [] if self.config.is_head else self._to_successor(fault)
        return [line, *relay]

    def _lost_predecessor(self, note: str) -> StageLost:
        lost = self.config.predecessor_stage
        return StageLost(lost, f"stage {lost} is lost: stage {self.config.stage} no longer reaches it ({note})")

    # ---- refusals --------------------------------------------------------------------------------------------------

    def _refuse(self, peer: bytes, caller: StageIdentity, refusal: Refused) -> list[Action]:
        """The caller cannot take part: it is told, and so is everyone from here to the head, once."""
        answer = Send(Side.SUCCESSOR, refusal, peer)
        return [answer, *(self._report(refusal) if self._is_news(caller.incarnation) else [])]

    def _refuse_myself(self, refusal: Refused) -> list[Action]:
        self.phase = Phase.FAILED
        return [Send(Side.PREDECESSOR, refusal), Fail(ConfigError(refusal.text))]

    def _report(self, refusal: Refused) -> list[Action]:
        """A refusal on its way to the head, so that both ends say why; it waits here until there is a way."""
        text = f"Stage {self.config.stage}: stage {refusal.stage} was refused: {_clip(refusal.text)}"
        line = Log(text, is_warning=True)
        if self.config.is_head:
            return [line]
        if self._link is Link.LINKED:
            return [line, Send(Side.PREDECESSOR, refusal)]
        if len(self._unreported) < MAX_UNREPORTED:
            self._unreported.append(refusal)
        return [line]

    def _refused(self, refusal: Refused) -> list[Action]:
        """Whoever we asked says that we cannot take part. A serving ring does not end because of that."""
        if self.phase is Phase.SERVING:
            return self._unexpected()
        self.phase = Phase.FAILED
        return [Fail(ConfigError(refusal.text))]

    def _other_pipeline(self, caller: StageIdentity) -> Refused | None:
        mine, theirs = self.identity.pipeline_id, caller.pipeline_id
        if mine == theirs:
            return None
        text = (
            f"port {self.config.bind_port} belongs to pipeline {mine!r} (stage {self.config.stage}), "
            f"not to {_clip(theirs)!r}: use another port, or the same --pipeline-id on all stages"
        )
        return Refused(caller.stage, "--pipeline-id", mine, theirs, text)

    def _not_a_stage(self, what: str) -> ConfigError:
        flag = "--pipeline-prev-stage-addr" if self.config.is_head else "--pipeline-prev-stage-service-addr"
        return ConfigError(
            f"{flag} {self.config.predecessor}: something listens there but {what}; "
            f"give the address that stage {self.config.predecessor_stage} printed as bound"
        )

    def _port_is_foreign(self) -> ConfigError:
        port = self.config.bind_port
        return ConfigError(
            f"port {port} is taken by another program: choose another --pipeline-local-bind-port for stage "
            f"{self.config.stage} (and the same in its successor's address), or end that program"
        )

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _to_successor(self, message: Message, payloads: Sequence[Frame] = ()) -> list[Action]:
        if self._successor is None:
            return []
        return [Send(Side.SUCCESSOR, message, self._successor.peer, payloads)]

    def _is_news(self, what: Hashable) -> bool:
        """Whether this was not said before; a stranger cannot make us remember, or say, any number of things."""
        if what in self._told or len(self._told) >= MAX_REMEMBERED:
            return False
        self._told.add(what)
        return True

    def _tell_once(self, what: Hashable, line: Log) -> list[Action]:
        return [line] if self._is_news(what) else []


def _layers(identity: StageIdentity) -> LayerRange:
    return LayerRange(identity.layer_start, identity.layer_end)


def _misplaced(head: StageIdentity, other: StageIdentity) -> Refused | None:
    """A stage of another pipeline than the head's: another number of stages, another id."""
    return _first_difference(
        other.stage,
        [
            ("--pipeline-total-stages", str(head.num_stages), str(other.num_stages)),
            ("--pipeline-id", head.pipeline_id or "(not set)", other.pipeline_id or "(not set)"),
        ],
    )


def _difference(head: StageIdentity, other: StageIdentity) -> Refused | None:
    """The first thing in which a stage differs from the head, which is right by definition."""
    names = [*head.shared, *(name for name in other.shared if name not in head.shared)]
    pairs = [(name, head.shared.get(name, "(not set)"), other.shared.get(name, "(not set)")) for name in names]
    return _misplaced(head, other) or _first_difference(other.stage, pairs)


def _first_difference(stage: int, pairs: Sequence[tuple[str, str, str]]) -> Refused | None:
    for name, expected, found in pairs:
        if expected != found:
            text = (
                f"{name} is {_clip(found)} on stage {stage} but {_clip(expected)} on stage 0: "
                f"all stages need the same; start stage {stage} with stage 0's value"
            )
            return Refused(stage, name, expected, found, text)
    return None


def _duplicate(stage: int) -> Refused:
    text = (
        f"there is already a stage {stage} in this pipeline and it answers: "
        f"give this one another --pipeline-stage-idx, or stop the other"
    )
    return Refused(stage, "--pipeline-stage-idx", "one process per index", str(stage), text)


def _clip(text: str) -> str:
    """Text that always fits into a message: bounded, and without what UTF-8 cannot carry."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode("utf-8")
