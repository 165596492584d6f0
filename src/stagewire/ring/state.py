"""The ring as one stage sees it: a pure state machine.

Events go in (one method each: `connected`, `received`, `tick`, ...), actions come out, in order; ring/node.py performs
them. It knows stages, links, epochs and failures, and no socket, clock, thread, torch or vLLM: the time is an argument.

    the head        LINKING ──its Roll came round──> OPENING ──its Open came round──> OPEN ──first call sent──> SERVING
    other stages    LINKING ─────────────Open came from the predecessor─────────────> OPEN ──first call came──> SERVING

    back to LINKING      from all of these: a neighbour's connection ended or was made anew, a Fault of this epoch came,
                         a Roll of another one; from OPENING also after a while
    any ──> FAILED       a refusal or a deadline, or this stage cannot go on
    any ──> STOPPED      `stop` here, or the head's Bye

Its parts have rules of their own: ring/predecessor.py and ring/successor.py the two links, ring/rendezvous.py a port
that several stages share, ring/admission.py who is wrong when two stages differ. Settings are compared when the head's
identity arrives with the Roll; a stage judges a caller's total or pipeline id only once it knows the head, until then
it says "ask again".

An epoch ends once, for everybody: whoever sees that it cannot go on leaves it and sends a Fault forward, whoever hears
a Fault of its own epoch does the same, and it ends where the epoch is over already. The head then calls the roll for
the next epoch, once a second until it has come round; a stage that missed the Fault learns from the Roll. Data of
another epoch is dropped wherever it is. So any loss mends itself as soon as every stage is linked again; how long to
wait for that is the only difference between a ring that has served and one that has not.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from stagewire.config import StageConfig
from stagewire.errors import ConfigError, PeerError, ProtocolError, StageLost, StagewireError, WireVersionError
from stagewire.ring.actions import (
    STRAIGHT,
    Action,
    Bind,
    Connect,
    Data,
    Deliver,
    Fail,
    Log,
    Outcome,
    PassReport,
    Send,
    SetBroken,
    SetOpen,
    SetReports,
    Side,
    Stall,
    Stop,
    Way,
    clip,
)
from stagewire.ring.admission import folder_refusal, pipeline_refusal, range_refusal, settings_refusal
from stagewire.ring.predecessor import PredecessorLink
from stagewire.ring.rendezvous import Rendezvous
from stagewire.ring.successor import SuccessorLink
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
    Report,
    Result,
    Roll,
    Sample,
    StageIdentity,
    Step,
    Welcome,
)

__all__ = ["Phase", "RingState"]

WAIT_LINE_INTERVAL_S = 10.0
REPORT_INTERVAL_S = 1.0
ROLL_INTERVAL_S = 1.0
BIND_INTERVAL_S = 1.0
# An Open that has not come round by then was lost.
OPENING_TIMEOUT_S = 5.0
# A successor pings once a second: one that was heard within this time is there.
SMALL_TALK_S = 3.0
# Bounds what strangers can make us remember, and say.
MAX_REMEMBERED = 1000

_FOR_HEAD = (Reply, Result)
_FOR_WORKER = (Call, Reply, Step, Sample)


class Phase(Enum):
    LINKING = "linking"
    OPENING = "opening"
    OPEN = "open"
    SERVING = "serving"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass
class RingState:
    """See the module. ``started_at`` and every ``now`` are seconds of one monotonic clock.

    Args:
        config: this stage's place.
        identity: what it tells the others.
        started_at: when the start deadline begins; it begins anew when an open ring falls apart.
        first_epoch: the head counts epochs from here; random, so that a restarted head never repeats one.
    """

    config: StageConfig
    identity: StageIdentity
    started_at: float
    first_epoch: int = 1

    phase: Phase = Phase.LINKING
    epoch: int = 0
    num_stale_frames: int = 0
    num_bad_messages: int = 0
    # For people: where it listens, and where it could besides. A note about that place.
    listens_at: str = ""
    other_addresses: Sequence[str] = ()
    place_note: str = ""

    _predecessor: PredecessorLink = field(init=False)
    _successor: SuccessorLink = field(init=False)
    _rendezvous: Rendezvous = field(init=False)
    _roll: tuple[StageIdentity, ...] | None = None
    _roll_epoch: int = 0
    _has_served: bool = False
    _lost: StageLost | None = None  # why the last epoch ended
    _last_fault: Fault | None = None
    _opening_since: float = 0.0
    _next_roll_at: float = 0.0
    _next_line_at: float = 0.0
    _next_report_at: float = 0.0
    _told: set[Hashable] = field(default_factory=set)
    _unsent: Fault | None = None  # news for the head that had no way to it
    _bind_at: tuple[float, Bind] | None = None  # when and how to listen, which could not be done yet

    def __post_init__(self) -> None:
        self._predecessor = PredecessorLink(self.config, self.identity)
        self._successor = SuccessorLink(self.identity)
        self._rendezvous = Rendezvous(self.config, self.identity)

    def __repr__(self) -> str:
        return (
            f"RingState(stage={self.config.stage}/{self.config.num_stages}, phase={self.phase.value}, "
            f"epoch={self.epoch}, predecessor={self._predecessor.state.value}, "
            f"successor={self.successor_peer is not None})"
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
        return self._successor.peer

    @property
    def hop_ns(self) -> int:
        """One-way time to the predecessor: half of the last ping; 0 while unknown."""
        return self._predecessor.hop_ns

    @property
    def linked_stages(self) -> tuple[int, ...]:
        """Who takes part as far as is known here: everybody in an open ring, else whoever is linked to this stage."""
        if self.is_open:
            return tuple(range(self.config.num_stages))
        neighbours = (
            (self._predecessor.is_linked, self.config.predecessor_stage),
            (self._successor.peer is not None, self.config.successor_stage),
        )
        return tuple(sorted({stage for is_linked, stage in neighbours if is_linked}))

    def waits_for(self) -> str:
        """Whom this stage waits for, for people."""
        return f"{self._waits_for()}; {self.place_note}" if self.place_note else self._waits_for()

    def _waits_for(self) -> str:
        config = self.config
        if self._rendezvous.stands_by:
            return f"the end of the stage {config.stage} that has port {config.bind_port}: it stands by"
        if not self._predecessor.is_linked:
            return f"{self._predecessor} ({self._predecessor.why})"
        if self._successor.peer is None:
            place = self.listens_at or f"port {config.bind_port}"
            return f"stage {config.successor_stage} to connect to {place}"
        if config.is_head:
            return f"the stages between 1 and {config.num_stages - 1} to link to each other"
        return "the head to open the ring: some other stage is not linked yet"

    # ---- life ------------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        self._next_line_at = now + WAIT_LINE_INTERVAL_S
        return [Bind(public=True)] if self.config.stands_by else [Bind(public=True), Connect()]

    def bound(self, public: bool, port: int, now: float) -> list[Action]:
        """The outcome of Bind: on the configured port, or (it was taken) on a private one."""
        stood_by = self._rendezvous.stands_by
        return [*self._rendezvous.bound(public, port, now), *self._take_place(stood_by, now)]

    def _take_place(self, stood_by: bool, now: float) -> list[Action]:
        """What a stage that has stood by does when nobody else has its place any more."""
        if not stood_by or self._rendezvous.stands_by:
            return []
        self.started_at = now
        return [Log(f"Stage {self.config.stage}: takes the place for which it has stood by"), Connect()]

    def bind_later(self, public: bool, why: str, now: float) -> list[Action]:
        """The outcome of Bind while nobody can say which address this stage will have: of its predecessor's name."""
        self._bind_at = (now + BIND_INTERVAL_S, Bind(public))
        return self._warn_once(("bind", why), f"Stage {self.config.stage}: listens nowhere yet: {why}; it tries again")

    def port_taken(self) -> list[Action]:
        """Bind(public=True) found the port in use: by a stage of this pipeline on this host, or by something else."""
        return self._rendezvous.port_taken()

    def began_serving(self) -> None:
        """A message of this stage's own has left on the open ring."""
        self.phase = Phase.SERVING
        self._has_served = True

    def stop(self, text: str) -> list[Action]:
        """This stage was asked to stop. The head takes the others along; a worker tells them that it is gone."""
        if self.is_over:
            return []
        stage = self.config.stage
        text = clip(text)
        gone = Fault(self.epoch, stage, -1, clip(f"stage {stage} stopped: {text}"))
        message: Message = Bye(text) if self.config.is_head else gone
        self.phase = Phase.STOPPED
        return [*self._successor.send(message), Stop(text)]

    def fail(self, error: StagewireError) -> list[Action]:
        """This stage cannot go on: tells the others once, then reports."""
        if self.is_over:
            return []
        self.phase = Phase.FAILED
        return [*self._successor.send(self._fault_of(error)), Fail(error)]

    def end_epoch(self, epoch: int, error: StageLost, now: float) -> list[Action]:
        """A step of ``epoch`` failed here, or the head gives one up: that epoch is over, this stage stays."""
        return self._broke(error, now) if self.is_open and epoch == self.epoch else []

    def tick(self, now: float) -> list[Action]:
        """Call it a few times a second: repeats what may have been lost and checks deadlines."""
        if self.is_over:
            return []
        actions = self._predecessor.tick(now)
        if self._bind_at is not None and now >= self._bind_at[0]:
            actions.append(self._bind_at[1])
            self._bind_at = None
        actions += self._settle(self._rendezvous.tick(self._is_settled, now))
        if self.is_open:
            actions += self._tick_open(now)
        elif self.phase in (Phase.LINKING, Phase.OPENING):
            actions += self._tick_waiting(now)
        if self.config.is_head and self.is_open and now >= self._next_report_at:
            self._next_report_at = now + REPORT_INTERVAL_S
            actions.append(PassReport(()))
        return actions

    def _tick_waiting(self, now: float) -> list[Action]:
        waited = now - self.started_at
        limit = self._limit_s(now)
        if limit is not None and waited >= limit:
            return self.fail(PeerError(f"stage {self.config.stage} waited {limit:.0f} s for {self.waits_for()}"))
        if self._predecessor.is_mute(now):
            return self.fail(self._predecessor.not_a_stage("answers nothing a stage would answer"))
        if self.phase is Phase.OPENING and now - self._opening_since >= OPENING_TIMEOUT_S:
            self._unopen(now)
        actions: list[Action] = []
        if self.config.is_head and self.phase is Phase.LINKING and now >= self._next_roll_at:
            self._next_roll_at = now + ROLL_INTERVAL_S
            actions += self._pass_roll()
        if now >= self._next_line_at:
            self._next_line_at = now + WAIT_LINE_INTERVAL_S
            how_long = f"{waited:.0f} s" if limit is None else f"{waited:.0f} of {limit:.0f} s"
            actions.append(Log(f"Stage {self.config.stage}: waiting for {self.waits_for()}, {how_long}"))
            actions += self._mention_addresses()
        return actions

    def _mention_addresses(self) -> list[Action]:
        """Its successor may call an address that this stage does not listen on: nothing of that arrives here."""
        if self._has_served or self._successor.peer is not None or not self.other_addresses:
            return []
        text = (
            f"Stage {self.config.stage}: listens on {self.listens_at} only. This machine also has "
            f"{', '.join(self.other_addresses)}: if stage {self.config.successor_stage} calls that, give this stage "
            "--pipeline-local-bind-host with it"
        )
        return self._warn_once("addresses", text)

    def _limit_s(self, now: float) -> float | None:
        """How long a ring that is not whole is waited for, in seconds; None: as long as the process lives.

        A ring that has served waits for a stage without limit: the head refuses requests meanwhile (its own deadline),
        and serves again when the stage is back. Without a head there is nothing to wait for.
        """
        if self._rendezvous.stands_by:
            return None
        if not self._has_served:
            return self.config.start_timeout_s
        # A step that failed on the head is no loss of it.
        is_headless = self._lost is not None and self._lost.stage == 0 and self._lost.step < 0
        # The head greets and pings the tail, and so on backwards: who hears nobody has nobody to wait for.
        is_quiet = self._successor.silent_s(now) >= self.config.recovery_timeout_s
        # From when it went: by then the ring may have been broken for long, by the loss of another stage.
        is_gone = self._predecessor.unlinked_s(now) >= self.config.recovery_timeout_s
        is_headless |= is_quiet and (self.config.is_tail or is_gone)
        is_headless |= is_gone and self.config.predecessor_stage == 0
        return self.config.recovery_timeout_s if is_headless and not self.config.is_head else None

    @property
    def _is_settled(self) -> bool:
        """Whether this stage was part of a ring: what it shares a port with is a stage then, even if it is silent."""
        return self.is_open or self._has_served

    def _tick_open(self, now: float) -> list[Action]:
        if not self._successor.is_lost(now):
            return []
        lost = self.config.successor_stage
        text = f"stage {lost} is lost: its connection to stage {self.config.stage} is gone"
        return self._broke(StageLost(lost, text), now)

    def _settle(self, outcome: Outcome) -> list[Action]:
        """What a part decided, or the end of this stage."""
        return self.fail(outcome) if isinstance(outcome, StagewireError) else outcome

    # ---- connections -----------------------------------------------------------------------------------------------

    def connected(self, side: Side, now: float, way: Way = STRAIGHT) -> list[Action]:
        """``way``: how the address was reached."""
        if self.is_over:
            return []
        if side is Side.OWNER:
            return self._settle(self._rendezvous.connected(self._is_settled, now))
        return self._predecessor.connected(now, way)

    def disconnected(self, side: Side, note: str, now: float) -> list[Action]:
        """``note`` says why, for people. Whether and where to connect again is among the actions."""
        if self.is_over:
            return []
        if side is Side.OWNER:
            return self._rendezvous.disconnected(now)
        self._predecessor.disconnected(note, now)
        if not self.config.is_head:
            self._roll = None
        stage = self.config.predecessor_stage
        lost = StageLost(stage, f"stage {stage} is lost: stage {self.config.stage} no longer reaches it ({note})")
        return [*self._broke(lost, now), Connect()]

    def bad_handshake(self, side: Side, now: float, note: str = "") -> list[Action]:
        """What was connected to (or, on the successor side, what called) does not speak our transport's protocol."""
        if self.is_over:
            return []
        if side is Side.SUCCESSOR:
            text = note or "a connection that does not speak ZeroMQ"
            return self.bad_message(side, text.encode(), ProtocolError(text), now)
        if side is Side.OWNER:
            return self._settle(self._rendezvous.bad_handshake(self._is_settled, note))
        return self._settle(self._predecessor.bad_handshake(note))

    def successor_unreachable(self, now: float) -> None:
        """A send found nobody. The stage after it sees the loss first and tells; we unlink and wait for that word:
        after the head's Bye it is no loss at all."""
        self._successor.unreachable(now)
        if self.phase is Phase.OPENING:
            self._unopen(now)

    def stalled(self, peer: bytes, stall: Stall, now: float) -> list[Action]:
        """What was sent by a connection did not arrive, and the connection was ended: the link to the successor, or one
        that it has left long since."""
        if self.is_over or peer != self._successor.peer:
            return []
        own, other = self.config.stage, self.config.successor_stage
        does_speak = self._successor.silent_s(now) < SMALL_TALK_S
        text = (
            f"stage {other} is lost: {stall.num_bytes} bytes on link {own} -> {other} ({stall.ends}) were not "
            f"acknowledged for {stall.seconds:.0f} s"
        )
        if does_speak:
            text += (
                f", while small messages pass: the path swallows packets of {stall.packet_bytes} bytes. Give the "
                f"interface of stage {own} the path's MTU (ip link set dev NAME mtu 1400), let ICMP pass, or set "
                "net.ipv4.tcp_mtu_probing=1"
            )
        lost = StageLost(other, text)
        self._successor.unreachable(now)
        if not self.is_open:
            return [Log(f"Stage {own}: {text}", is_warning=True)]
        actions = self._broke(lost, now)
        self._unsent = self._last_fault
        return actions

    def bad_message(self, side: Side, peer: bytes, error: ProtocolError, now: float) -> list[Action]:
        """Undecodable bytes. From a stranger: logged once, dropped. From the linked predecessor: the ring is broken."""
        if self.is_over:
            return []
        self.num_bad_messages += 1
        if side is Side.SUCCESSOR:
            return self._bad_from_stranger(peer, error)
        if side is Side.OWNER:
            return self._bad_from_owner(error)
        return self._bad_from_predecessor(error, now)

    def _bad_from_stranger(self, peer: bytes, error: ProtocolError) -> list[Action]:
        text = f"Stage {self.config.stage}: dropped an invalid message on its port: {error}"
        actions = self._warn_once((Side.SUCCESSOR, peer), text)
        if isinstance(error, WireVersionError) and self._head is not None:
            # Any answer of ours shows a stage of another version that it differs from the head.
            actions.append(Send(Side.SUCCESSOR, NotHere(self.config.stage), peer))
        return actions

    def _bad_from_owner(self, error: ProtocolError) -> list[Action]:
        if isinstance(error, WireVersionError) and not self.is_open:
            return self.fail(ConfigError(f"port {self.config.bind_port}: {error}"))
        return []

    def _bad_from_predecessor(self, error: ProtocolError, now: float) -> list[Action]:
        link = self._predecessor
        is_version = isinstance(error, WireVersionError)
        if self.phase is Phase.SERVING:
            return self.fail(PeerError(f"{link} sent an invalid message: {error}"))
        if is_version and not self.config.is_head:
            return self.fail(ConfigError(f"{link}: {error}"))
        if not is_version and link.is_greeting:
            return self._settle(link.bad_handshake())
        link.heard(now)
        link.note = str(error)
        return self._warn_once(Side.PREDECESSOR, f"Stage {self.config.stage}: {link}: {error}")

    # ---- messages --------------------------------------------------------------------------------------------------

    def received(
        self, side: Side, peer: bytes, message: Message, payloads: Sequence[Frame], now: float
    ) -> list[Action]:
        """``peer`` identifies the connection on the successor side; empty elsewhere."""
        if self.is_over:
            return []
        if side is Side.PREDECESSOR:
            self._predecessor.heard(now)
            return self._from_predecessor(message, payloads, now)
        if side is Side.OWNER:
            return self._from_owner(message, now)
        return self._from_successor(peer, message, now)

    def _from_predecessor(self, message: Message, payloads: Sequence[Frame], now: float) -> list[Action]:
        match message:
            case Welcome(identity):
                return self._welcomed(identity)
            case Redirect(_, port):
                return self._predecessor.redirected(port)
            case NotHere(stage):
                return self._predecessor.not_here(stage, now)
            case Refused(text=text) if self._predecessor.is_doubtful:
                return self._predecessor.is_another_ring(text)
            case Refused():
                return self._refused(message)
            case Call() | Reply() | Step() | Sample() | Result():
                return self._data(message, payloads)
        return self._from_linked(message, now) if self._predecessor.is_linked else []

    def _from_linked(self, message: Message, now: float) -> list[Action]:
        match message:
            case Pong(sent_ns):
                self._predecessor.ponged(sent_ns, now)
                return []
            case Roll(epoch, identities):
                return self._rolled(epoch, tuple(identities), now)
            case Open(epoch):
                return self._opened(epoch)
            case Fault():
                return self._faulted(message, now)
            case Report():
                return self._reported(message)
            case Bye(text) if not self.config.is_head:
                self.phase = Phase.STOPPED
                onward = [] if self.config.is_tail else self._successor.send(message)
                return [*onward, Stop(text)]
        return self._unexpected()

    def _from_owner(self, message: Message, now: float) -> list[Action]:
        match message:
            case Registered() | NotHere():
                stood_by = self._rendezvous.stands_by
                self._rendezvous.answered(message, now)
                return self._take_place(stood_by, now)
            case Refused():
                return self._refused(message)
        return self._unexpected()

    def _from_successor(self, peer: bytes, message: Message, now: float) -> list[Action]:
        self._successor.heard(peer, now)
        match message:
            case Hello():
                return self._hello(peer, message, now)
            case Register():
                return self._answer(peer, message.identity, self._rendezvous.register(message, now))
            case Ping(sent_ns):
                return [Send(Side.SUCCESSOR, Pong(sent_ns), peer)]
            case Refused() if self._successor.is_or_was(peer):
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

    def _welcomed(self, predecessor: StageIdentity) -> list[Action]:
        if not self._predecessor.is_greeting:
            return []
        if predecessor.stage != self.config.predecessor_stage:
            return self._unexpected()
        if self._predecessor.is_doubtful:
            other = range_refusal(predecessor, self.identity) if not self.config.is_head else None
            other = settings_refusal(predecessor, self.identity) or other
            if other is not None:
                return self._predecessor.is_another_ring(other.text)
        reports = self._predecessor.welcomed()
        # The tail's end and the head's start are each checked against the model, by their own stage.
        refusal = None if self.config.is_head else range_refusal(predecessor, self.identity)
        return [*reports, *self._refuse_myself(refusal)] if refusal else reports

    def _hello(self, peer: bytes, hello: Hello, now: float) -> list[Action]:
        caller = hello.identity
        if hello.want != self.config.stage:
            return self._answer(peer, caller, self._rendezvous.direct(hello.want, now))
        if self._head is not None and caller.stage != 0:
            refusal = pipeline_refusal(self._head, caller)
            if refusal:
                return self._answer(peer, caller, refusal)
        if caller.stage != self.config.successor_stage or caller.pipeline_id != self.identity.pipeline_id:
            return self._answer(peer, caller, NotHere(self.config.stage))
        return self._succeeded(peer, caller, now)

    def _succeeded(self, peer: bytes, caller: StageIdentity, now: float) -> list[Action]:
        before = self._successor.peer
        actions = self._successor.claimed(peer, caller, now)
        if isinstance(actions, Refused):
            return self._answer(peer, caller, actions)
        if self._successor.peer != before:
            lost = StageLost(caller.stage, f"stage {caller.stage} has connected anew to stage {self.config.stage}")
            if before is not None and self.is_open:
                # Whoever had this place may still serve the epoch, and those after it with it: before all else.
                fault = Fault(self.epoch, lost.stage, -1, clip(str(lost)))
                actions.insert(0, Send(Side.SUCCESSOR, fault, before))
            actions += self._broke(lost, now)
            if self._unsent is not None:
                actions += self._successor.send(self._unsent)
                self._unsent = None
            actions += self._pass_roll()
        return actions

    # ---- opening ---------------------------------------------------------------------------------------------------

    def _pass_roll(self) -> list[Action]:
        if self.config.is_head:
            return self._successor.send(Roll(self._next_epoch, [self.identity]))
        if self._roll is None:
            return []
        return self._successor.send(Roll(self._roll_epoch, [*self._roll, self.identity]))

    @property
    def _next_epoch(self) -> int:
        """At the head: of the roll that it calls."""
        return max(self.epoch + 1, self.first_epoch)

    def _rolled(self, epoch: int, roll: tuple[StageIdentity, ...], now: float) -> list[Action]:
        if self.is_open and epoch == self.epoch:
            return []  # repeated meanwhile
        if not roll or roll[0].stage != 0:
            return self._unexpected()
        if self.config.is_head and (
            roll[0].incarnation != self.identity.incarnation
            or epoch != self._next_epoch
            or self.phase is not Phase.LINKING
        ):
            return []  # from before our restart, or of another epoch
        refusal = settings_refusal(roll[0], self.identity) or folder_refusal(roll, self.identity)
        if refusal:
            return self._refuse_myself(refusal)
        expected = range(self.config.num_stages if self.config.is_head else self.config.stage)
        if [identity.stage for identity in roll] != list(expected):
            return self._unexpected()
        self._roll, self._roll_epoch = roll, epoch
        if self.config.is_head:
            return self._check_and_open(roll, now)
        actions = [*self._broke(StageLost(0, "the head calls the roll anew"), now), *self._pass_roll()]
        self._lost = None  # the head is there, whatever ended the epoch
        return actions

    def _check_and_open(self, roll: tuple[StageIdentity, ...], now: float) -> list[Action]:
        """At the head: the whole pipeline is known. Every stage has checked itself; this is the last gate."""
        for earlier, later in itertools.pairwise(roll):
            refusal = range_refusal(earlier, later)
            if refusal:
                text = f"Stage 0: the ring is linked but not right, waiting: {refusal.text}"
                return self._warn_once(("range", refusal.text), text)
        if any(settings_refusal(roll[0], each) or folder_refusal(roll, each) for each in roll):
            return []  # it has refused itself and is leaving
        self.epoch = self._next_epoch
        self.phase = Phase.OPENING
        self._opening_since = now
        return self._successor.send(Open(self.epoch))

    def _opened(self, epoch: int) -> list[Action]:
        if self.is_open or self._successor.peer is None or self._roll is None or self._roll_epoch != epoch:
            return []  # a neighbour went away meanwhile; the head calls the roll again
        if self.config.is_head:
            if self.phase is not Phase.OPENING or epoch != self.epoch:
                return []
            self.phase = Phase.OPEN
            self._lost = None
            return [SetOpen(epoch, self._roll)]
        self.epoch = epoch
        self.phase = Phase.OPEN
        self._lost = None
        return [*self._successor.send(Open(epoch)), SetOpen(epoch, self._roll)]

    def _unopen(self, now: float) -> None:
        """Back to linking: the ring is not whole."""
        if self.is_open:
            self.started_at = now
            self._next_line_at = now + WAIT_LINE_INTERVAL_S
        self.phase = Phase.LINKING

    def _broke(self, lost: StageLost, now: float) -> list[Action]:
        """The end of the epoch, unless it is over already: everybody hears of it, and the head calls the next roll."""
        if self.phase is Phase.OPENING:
            self._unopen(now)
        if not self.is_open:
            return []
        self._unopen(now)
        self._lost = lost
        fault = self._last_fault = Fault(self.epoch, lost.stage, lost.step, clip(str(lost)))
        line = Log(f"Stage {self.config.stage}: {clip(str(lost))}", is_warning=True)
        actions = [line, SetBroken(self.epoch, lost), *self._successor.send(fault)]
        if self.config.is_head:
            self._next_roll_at = now + ROLL_INTERVAL_S
            actions += self._pass_roll()
        return actions

    # ---- serving ---------------------------------------------------------------------------------------------------

    def _data(self, message: Data, payloads: Sequence[Frame]) -> list[Action]:
        if not self.is_open or message.epoch != self.epoch or not self._predecessor.is_linked:
            self.num_stale_frames += 1
            return []
        if not isinstance(message, _FOR_HEAD if self.config.is_head else _FOR_WORKER):
            return self._unexpected()
        self.phase = Phase.SERVING
        self._has_served = True
        # A call is passed on before it is run, so that all stages work at once.
        is_passed_on = isinstance(message, Call) and not self.config.is_tail
        onward = self._successor.send(message, payloads) if is_passed_on else []
        return [*onward, Deliver(message, payloads)]

    def _reported(self, report: Report) -> list[Action]:
        """On its way round. Nothing depends on it, so what is wrong with it is counted and ends nothing."""
        if not self.is_open or report.epoch != self.epoch:
            self.num_stale_frames += 1
            return []
        stages = [each.stage for each in report.stages]
        end = self.config.num_stages if self.config.is_head else self.config.stage
        if stages != sorted(set(stages)) or any(stage >= end for stage in stages):
            return self._unexpected()
        return [SetReports(report.stages) if self.config.is_head else PassReport(report.stages)]

    def _faulted(self, fault: Fault, now: float) -> list[Action]:
        """Of this epoch, its end. Of none or an earlier one, news on its way to the head."""
        if fault.epoch == self.epoch and (self.is_open or self.phase is Phase.OPENING):
            actions = self._broke(StageLost(fault.stage, fault.text, fault.step), now)
            if fault.step >= 0 and fault.stage == self.config.stage and not self.config.is_head:
                # A step that failed here we would know of: the head has waited for this stage too long.
                self.phase = Phase.FAILED
                actions.append(Fail(PeerError(f"stage 0 has ended this stage: {fault.text}")))
            return actions
        if self.is_open or fault == self._last_fault:
            return []
        self._last_fault = fault
        line = Log(f"Stage {self.config.stage}: {clip(fault.text)}", is_warning=True)
        return [line] if self.config.is_head else [line, *self._successor.send(fault)]

    def _fault_of(self, error: StagewireError) -> Fault:
        """What the others learn: of a loss, whose it is; of any other error, that this stage failed."""
        if isinstance(error, StageLost):
            return Fault(self.epoch, error.stage, error.step, clip(str(error)))
        stage = self.config.stage
        return Fault(self.epoch, stage, -1, clip(f"stage {stage} failed: {error}"))

    # ---- refusals --------------------------------------------------------------------------------------------------

    def _answer(self, peer: bytes, caller: StageIdentity, answer: Message) -> list[Action]:
        """A refusal is also for everyone from here to the head, once per process."""
        sent: list[Action] = [Send(Side.SUCCESSOR, answer, peer)]
        if isinstance(answer, Refused) and self._is_news(caller.incarnation):
            return [*sent, *self._report(answer)]
        return sent

    def _report(self, refusal: Refused) -> list[Action]:
        """A refusal on its way to the head, so that both ends say why."""
        text = f"Stage {self.config.stage}: stage {refusal.stage} was refused: {clip(refusal.text)}"
        line = Log(text, is_warning=True)
        return [line] if self.config.is_head else [line, *self._predecessor.report(refusal)]

    def _refuse_myself(self, refusal: Refused) -> list[Action]:
        self.phase = Phase.FAILED
        return [Send(Side.PREDECESSOR, refusal), Fail(ConfigError(refusal.text))]

    def _refused(self, refusal: Refused) -> list[Action]:
        """Whoever we asked says that we cannot take part. A serving ring does not end because of that."""
        if self.phase is Phase.SERVING:
            return self._unexpected()
        self.phase = Phase.FAILED
        return [Fail(ConfigError(refusal.text))]

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _is_news(self, what: Hashable) -> bool:
        """Whether this was not said before; a stranger cannot make us remember, or say, any number of things."""
        if what in self._told or len(self._told) >= MAX_REMEMBERED:
            return False
        self._told.add(what)
        return True

    def _warn_once(self, what: Hashable, text: str) -> list[Action]:
        return [Log(text, is_warning=True)] if self._is_news(what) else []
