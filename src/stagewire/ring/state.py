"""The ring as one stage sees it: a pure state machine.

Events go in (`handle`, `tick`), actions come out, in order; ring/node.py performs them. It knows stages, links,
epochs and failures, and no socket, clock, thread, torch or vLLM: the time is an argument.

    link to the predecessor    IDLE ──connected──> GREETING ──Welcome──> LINKED
                                 ^ disconnected / Redirect     │
                                 └─────────────────────────────┘
    stage                      LINKING ──Roll came round──> OPENING ──Open came round──> OPEN ──first call──> SERVING
                               (only the head passes OPENING)         any ──Fault, refusal, deadline──> FAILED
                                                                      any ──Bye, stop──> STOPPED

Who is wrong when two stages differ: between neighbours the higher index (order, gap, overlap); in shared settings
whoever differs from the head, which is why those are compared when the head's identity arrives with the Roll.
A loss before SERVING only unlinks: the others wait for the corrected stage until their start deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from stagewire.config import StageConfig
from stagewire.errors import ConfigError, InternalError, PeerError, StageLost, StagewireError
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
# A newcomer with a connected index is refused while the first has been heard within this time.
ALIVE_S = 5.0
# Something that accepts connections but never answers like a stage is not one, after this time.
MUTE_PEER_S = 30.0
# The owner of a shared port answers at once unless it is no stage at all; Python may hold it up while it imports.
MUTE_OWNER_S = 10.0
# Handshakes that ZeroMQ itself gives up on, in a row, before an address counts as another program's.
MAX_BAD_HANDSHAKES = 3


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

_DATA = (Call, Reply, Step, Sample, Result)


@dataclass
class _Registration:
    identity: StageIdentity
    port: int
    heard_at: float


@dataclass
class _Successor:
    peer: bytes
    identity: StageIdentity
    heard_at: float


@dataclass
class RingState:
    """See the module. ``started_at`` and every ``now`` are seconds of one monotonic clock.

    Args:
        config: this stage's place.
        identity: what it tells the others.
        started_at: when the start deadline begins.
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
    _connected_at: float = 0.0
    _redirected: bool = False
    _bad_handshakes: int = 0
    _successor: _Successor | None = None
    _roll: tuple[StageIdentity, ...] | None = None
    _owns_port: bool = False
    _private_port: int | None = None
    _owner_registered: bool = False
    _owner_since: float = 0.0
    _owner_tries: int = 0
    _registry: dict[int, _Registration] = field(default_factory=dict)
    _next_hello_at: float = 0.0
    _next_register_at: float = 0.0
    _next_line_at: float = 0.0
    _warned_peers: set[bytes] = field(default_factory=set)

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

    def port_taken(self, now: float) -> list[Action]:
        """Bind(public=True) found the port in use: by a stage of this pipeline on this host, or by something else."""
        if self._private_port is None:
            return [Bind(public=False)]
        return [ConnectOwner()] if not self._owner_registered else []

    def stop(self, text: str) -> list[Action]:
        """This stage was asked to stop. The head takes the others along; a worker tells them that it is gone."""
        if self.is_over:
            return []
        message: Message = Bye(text) if self.config.is_head else Fault(self.config.stage, 3, text)
        self.phase = Phase.STOPPED
        return [*self._to_successor(message), Stop(text)]

    def fail(self, error: StagewireError) -> list[Action]:
        """This stage cannot go on: tells the others once, then reports."""
        if self.is_over:
            return []
        self.phase = Phase.FAILED
        stage = error.stage if isinstance(error, StageLost) else self.config.stage
        return [*self._to_successor(Fault(stage, error.exit_code, str(error))), Fail(error)]

    def tick(self, now: float) -> list[Action]:
        """Call it a few times a second: repeats what may have been lost and checks deadlines."""
        if self.is_over:
            return []
        actions: list[Action] = []
        if self._link is Link.GREETING and now >= self._next_hello_at:
            actions += self._say_hello(now)
        if self._link is Link.LINKED and now >= self._next_hello_at:
            self._next_hello_at = now + HELLO_INTERVAL_S
            actions.append(Send(Side.PREDECESSOR, Ping(int(now * 1e9))))
        actions += self._tick_owner(now)
        if not self.is_open:
            actions += self._tick_waiting(now)
        return actions

    def _tick_waiting(self, now: float) -> list[Action]:
        waited = now - self.started_at
        limit = self.config.start_timeout_s
        if waited >= limit:
            return self.fail(PeerError(f"stage {self.config.stage} waited {limit:.0f} s for {self.waits_for()}"))
        if self._link is Link.GREETING and now - self._connected_at >= MUTE_PEER_S:
            return self.fail(self._not_a_stage("answers nothing a stage would answer"))
        if now >= self._next_line_at:
            self._next_line_at = now + WAIT_LINE_INTERVAL_S
            return [Log(f"Stage {self.config.stage}: waiting for {self.waits_for()}, {waited:.0f} of {limit:.0f} s")]
        return []

    def _tick_owner(self, now: float) -> list[Action]:
        if self._owns_port or self._private_port is None or now < self._next_register_at:
            return []
        self._next_register_at = now + HELLO_INTERVAL_S
        actions: list[Action] = [Send(Side.OWNER, Register(self.identity, self._private_port))]
        if not self._owner_registered and now - self._owner_since >= MUTE_OWNER_S:
            return self.fail(self._port_is_foreign())
        return actions

    # ---- connections -----------------------------------------------------------------------------------------------

    def connected(self, side: Side, now: float) -> list[Action]:
        if self.is_over:
            return []
        if side is Side.OWNER:
            self._next_register_at = 0.0
            return self._tick_owner(now)
        self._link = Link.GREETING
        self._link_note = "connected, no answer yet"
        self._connected_at = now
        return self._say_hello(now)

    def disconnected(self, side: Side, note: str, now: float) -> list[Action]:
        """``note`` says why, for people. The node reconnects by itself when the state asks for it."""
        if self.is_over:
            return []
        if side is Side.OWNER:
            self._owner_registered = False
            self._owner_since = now
            return [Bind(public=True)]
        was_linked = self._link is Link.LINKED
        self._link = Link.IDLE
        self._link_note = note
        if self.phase is Phase.SERVING and was_linked:
            return self.fail(self._lost_predecessor(note))
        self._redirected = False
        self._roll = None
        return [*self._unopen(str(self._lost_predecessor(note))), Connect()]

    def bad_handshake(self, side: Side, now: float) -> list[Action]:
        """Something accepted the connection and then did not speak ZeroMQ."""
        if self.is_over or side is Side.SUCCESSOR:
            return []
        if side is Side.OWNER:
            self._owner_tries += 1
            if self._owner_tries >= MAX_BAD_HANDSHAKES:
                return self.fail(self._port_is_foreign())
            return [Bind(public=True)]
        self._bad_handshakes += 1
        self._link = Link.IDLE
        self._link_note = "something answers there, but not a Stagewire stage"
        if self._bad_handshakes >= MAX_BAD_HANDSHAKES and self.phase is Phase.LINKING:
            return self.fail(self._not_a_stage("does not speak Stagewire's protocol"))
        return [Connect()]

    def successor_unreachable(self) -> list[Action]:
        """A send found nobody: the successor's connection is gone. The stage after it sees that first; we only unlink."""
        self._successor = None
        return []

    def bad_message(self, side: Side, peer: bytes, reason: str) -> list[Action]:
        """Undecodable bytes. From a stranger: logged once, dropped. From the linked predecessor: the ring is broken."""
        self.num_bad_messages += 1
        if side is Side.PREDECESSOR and self._link is Link.LINKED and self.phase is Phase.SERVING:
            return self.fail(PeerError(f"stage {self.config.predecessor_stage} sent an invalid message: {reason}"))
        if side is Side.PREDECESSOR and "wire version" in reason:
            return self.fail(ConfigError(f"stage {self.config.predecessor_stage} at {self.config.predecessor}: {reason}"))
        if peer in self._warned_peers:
            return []
        if len(self._warned_peers) < 1000:
            self._warned_peers.add(peer)
        return [Log(f"Stage {self.config.stage}: dropped an invalid message on its port: {reason}", is_warning=True)]

    # ---- messages --------------------------------------------------------------------------------------------------

    def received(
        self, side: Side, peer: bytes, message: Message, payloads: Sequence[Frame], now: float
    ) -> list[Action]:
        """``peer`` identifies the connection on the successor side; empty elsewhere."""
        if self.is_over:
            return []
        if side is Side.PREDECESSOR:
            return self._from_predecessor(message, payloads, now)
        if side is Side.OWNER:
            return self._from_owner(message)
        return self._from_successor(peer, message, now)

    def _from_predecessor(self, message: Message, payloads: Sequence[Frame], now: float) -> list[Action]:
        if isinstance(message, _DATA):
            return self._data(message, payloads)
        if isinstance(message, Pong):
            self.hop_ns = max(0, int(now * 1e9) - message.sent_ns) // 2
            return []
        if isinstance(message, Welcome):
            return self._welcomed(message.identity)
        if isinstance(message, Redirect):
            return self._redirect(message.port)
        if isinstance(message, NotHere):
            self._connected_at = now
            self._link_note = f"the port is up, stage {message.stage} has not registered there yet"
            return self._redirect(None) if self._redirected else []
        if isinstance(message, Refused):
            return self._refused(message)
        if self._link is not Link.LINKED:
            return []
        if isinstance(message, Roll):
            return self._rolled(tuple(message.identities))
        if isinstance(message, Open):
            return self._opened(message.epoch)
        if isinstance(message, Fault):
            return self._faulted(message)
        if isinstance(message, Bye):
            self.phase = Phase.STOPPED
            return [*self._to_successor(message, stop_at_head=True), Stop(message.text)]
        return self._unexpected(message)

    def _from_owner(self, message: Message) -> list[Action]:
        if isinstance(message, Registered):
            self._owner_registered = True
            self._owner_tries = 0
            return []
        if isinstance(message, Refused):
            return self._refused(message)
        return self._unexpected(message)

    def _from_successor(self, peer: bytes, message: Message, now: float) -> list[Action]:
        if self._successor is not None and self._successor.peer == peer:
            self._successor.heard_at = now
        if isinstance(message, Hello):
            return self._hello(peer, message, now)
        if isinstance(message, Register):
            return self._register(peer, message, now)
        if isinstance(message, Ping):
            return [Send(Side.SUCCESSOR, Pong(message.sent_ns), peer)]
        if isinstance(message, Refused) and self.successor_peer == peer:
            text = f"Stage {self.config.stage}: stage {message.stage} was refused: {message.text}"
            relay = [] if self.config.is_head else [Send(Side.PREDECESSOR, message)]
            return [Log(text, is_warning=True), *relay]
        return self._unexpected(message)

    def _unexpected(self, message: Message) -> list[Action]:
        self.num_bad_messages += 1
        return []

    # ---- linking ---------------------------------------------------------------------------------------------------

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
        if self._link is Link.LINKED:
            return []
        self._link = Link.LINKED
        self._link_note = "linked"
        self._bad_handshakes = 0
        if self.config.is_head:
            return []  # the tail's end and our start are each checked against the model, by their own stage
        problem = check_adjacent(
            predecessor.stage,
            LayerRange(predecessor.layer_start, predecessor.layer_end),
            self.config.stage,
            self.config.layers,
        )
        if problem is None:
            return []
        wanted = f"a range that starts at {predecessor.layer_end}"
        return self._refuse_myself("--pipeline-layer-range", wanted, str(self.config.layers), problem)

    def _hello(self, peer: bytes, hello: Hello, now: float) -> list[Action]:
        caller = hello.identity
        if hello.want != self.config.stage:
            entry = self._registry.get(hello.want)
            if entry is None or now - entry.heard_at >= ALIVE_S:
                return [Send(Side.SUCCESSOR, NotHere(hello.want), peer)]
            return [Send(Side.SUCCESSOR, Redirect(hello.want, entry.port), peer)]
        if caller.stage != self.config.successor_stage:
            # Another number of stages: the Roll tells whichever differs from the head; until then it waits.
            return [Send(Side.SUCCESSOR, NotHere(hello.want), peer)]
        foreign = self._other_pipeline(caller)
        if foreign:
            return [Send(Side.SUCCESSOR, foreign, peer)]
        current = self._successor
        if current is not None and current.identity.incarnation != caller.incarnation:
            if now - current.heard_at < ALIVE_S:
                return [Send(Side.SUCCESSOR, self._duplicate(caller.stage), peer)]
            if self.phase is Phase.SERVING:
                return []
        is_new = current is None or current.identity.incarnation != caller.incarnation or current.peer != peer
        self._successor = _Successor(peer, caller, now)
        actions: list[Action] = [Send(Side.SUCCESSOR, Welcome(self.identity), peer)]
        if is_new and self.phase is not Phase.SERVING:
            actions += self._pass_roll()
        return actions

    def _register(self, peer: bytes, register: Register, now: float) -> list[Action]:
        caller = register.identity
        foreign = self._other_pipeline(caller)
        if foreign:
            return [Send(Side.SUCCESSOR, foreign, peer)]
        entry = self._registry.get(caller.stage)
        is_mine = caller.stage == self.config.stage and caller.incarnation != self.identity.incarnation
        is_taken = (
            entry is not None
            and entry.identity.incarnation != caller.incarnation
            and now - entry.heard_at < ALIVE_S
        )
        if is_mine or is_taken:
            return [Send(Side.SUCCESSOR, self._duplicate(caller.stage), peer)]
        self._registry[caller.stage] = _Registration(caller, register.port, now)
        return [Send(Side.SUCCESSOR, Registered(self.config.stage), peer)]

    def _rolled(self, roll: tuple[StageIdentity, ...]) -> list[Action]:
        if self.phase is Phase.SERVING:
            return []
        expected = list(range(self.config.num_stages if self.config.is_head else self.config.stage))
        if [identity.stage for identity in roll] != expected:
            return [] if roll and roll[0].num_stages == self.config.num_stages else self._compare_with_head(roll[:1])
        mismatch = self._compare_with_head(roll[:1])
        if mismatch:
            return mismatch
        self._roll = roll
        if not self.config.is_head:
            if self.phase is Phase.OPEN:
                self.phase = Phase.LINKING
            return self._pass_roll()
        return self._check_and_open(roll)

    def _check_and_open(self, roll: tuple[StageIdentity, ...]) -> list[Action]:
        """At the head: the whole pipeline is known. Every stage has checked itself; this is the last gate."""
        for earlier, later in zip(roll, roll[1:], strict=False):
            problem = check_adjacent(
                earlier.stage,
                LayerRange(earlier.layer_start, earlier.layer_end),
                later.stage,
                LayerRange(later.layer_start, later.layer_end),
            )
            if problem:
                return [Log(f"Stage 0: the ring is linked but not right, waiting: {problem}", is_warning=True)]
        for identity in roll:
            if identity.shared != self.identity.shared or identity.num_stages != self.config.num_stages:
                return []  # it has refused itself and is leaving
        self.epoch = max(self.epoch + 1, self.first_epoch)
        self.first_epoch = self.epoch
        self.phase = Phase.OPENING
        return self._to_successor(Open(self.epoch))

    def _opened(self, epoch: int) -> list[Action]:
        if self.phase is Phase.SERVING:
            return []
        if self.config.is_head:
            if self.phase is not Phase.OPENING or epoch != self.epoch or self._roll is None:
                return []
            self.phase = Phase.OPEN
            return [SetOpen(epoch, self._roll)]
        if self._successor is None or self._roll is None:
            return []  # our successor went away meanwhile; its return brings a new Roll and a new epoch
        self.epoch = epoch
        self.phase = Phase.OPEN
        return [*self._to_successor(Open(epoch)), SetOpen(epoch, ())]

    def _pass_roll(self) -> list[Action]:
        if self.config.is_head:
            if self.phase is Phase.OPENING:
                self.phase = Phase.LINKING
            return self._to_successor(Roll([self.identity]))
        if self._roll is None:
            return []
        return self._to_successor(Roll([*self._roll, self.identity]))

    # ---- serving ---------------------------------------------------------------------------------------------------

    def _data(self, message: Call | Reply | Step | Sample | Result, payloads: Sequence[Frame]) -> list[Action]:
        if not self.is_open or message.epoch != self.epoch or self._link is not Link.LINKED:
            self.num_stale_frames += 1
            return []
        self.phase = Phase.SERVING
        actions: list[Action] = []
        if isinstance(message, Call) and not self.config.is_tail:
            # Passed on before it is run, so that all stages work at once.
            actions += self._to_successor(message, payloads)
        return [*actions, Deliver(message, payloads)]

    def began_serving(self) -> None:
        """The head sent its first call."""
        if self.phase is not Phase.OPEN:
            raise InternalError(f"a call in phase {self.phase.value}")
        self.phase = Phase.SERVING

    def _unopen(self, text: str) -> list[Action]:
        """The ring was open and nothing had run: back to linking, and the head must know before it begins."""
        if not self.is_open:
            return []
        self.phase = Phase.LINKING
        self.epoch = 0
        return self._to_successor(Fault(self.config.predecessor_stage, 3, text), stop_at_head=True)

    def _faulted(self, fault: Fault) -> list[Action]:
        if self.phase is not Phase.SERVING:
            if self.is_open or self.phase is Phase.OPENING:
                self.phase = Phase.LINKING
            line = Log(f"Stage {self.config.stage}: stage {fault.stage} failed: {fault.text}", is_warning=True)
            relay = [] if self.config.is_head else self._to_successor(fault)
            return [line, *relay]
        self.phase = Phase.FAILED
        return [*self._to_successor(fault), Fail(StageLost(fault.stage, fault.text))]

    def _lost_predecessor(self, note: str) -> StageLost:
        lost = self.config.predecessor_stage
        return StageLost(lost, f"stage {lost} is lost: stage {self.config.stage} no longer reaches it ({note})")

    # ---- refusals --------------------------------------------------------------------------------------------------

    def _compare_with_head(self, roll: Sequence[StageIdentity]) -> list[Action]:
        """Whoever differs from the head is wrong; at the head itself there is nothing to compare."""
        if self.config.is_head or not roll:
            return []
        head = roll[0]
        pairs = [("--pipeline-total-stages", str(head.num_stages), str(self.config.num_stages))]
        names = [*head.shared, *(name for name in self.identity.shared if name not in head.shared)]
        pairs += [
            (name, head.shared.get(name, "(not set)"), self.identity.shared.get(name, "(not set)")) for name in names
        ]
        for name, expected, found in pairs:
            if expected != found:
                text = (
                    f"{name} is {found} on stage {self.config.stage} but {expected} on stage 0: "
                    f"all stages need the same; start stage {self.config.stage} with stage 0's value"
                )
                return self._refuse_myself(name, expected, found, text)
        return []

    def _refuse_myself(self, name: str, expected: str, found: str, text: str) -> list[Action]:
        self.phase = Phase.FAILED
        notice = Refused(self.config.stage, name, expected, found, text)
        return [Send(Side.PREDECESSOR, notice), Fail(ConfigError(text))]

    def _refused(self, refusal: Refused) -> list[Action]:
        self.phase = Phase.FAILED
        return [Fail(ConfigError(refusal.text))]

    def _duplicate(self, stage: int) -> Refused:
        text = (
            f"there is already a stage {stage} in this pipeline and it answers: "
            f"give this one another --pipeline-stage-idx, or stop the other"
        )
        return Refused(stage, "--pipeline-stage-idx", "one process per index", str(stage), text)

    def _other_pipeline(self, caller: StageIdentity) -> Refused | None:
        mine, theirs = self.identity.pipeline_id, caller.pipeline_id
        if mine == theirs:
            return None
        text = (
            f"port {self.config.bind_port} belongs to pipeline {mine!r} (stage {self.config.stage}), not to {theirs!r}: "
            "use another port, or the same --pipeline-id on all stages"
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

    def _to_successor(
        self, message: Message, payloads: Sequence[Frame] = (), stop_at_head: bool = False
    ) -> list[Action]:
        if self._successor is None or (stop_at_head and self.config.is_tail):
            return []
        return [Send(Side.SUCCESSOR, message, self._successor.peer, payloads)]

