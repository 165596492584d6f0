"""The ring as one stage sees it: a pure state machine.

Events go in, one method each (`connected`, `received`, `tick`, ...). Actions come out, in order; ring/ring.py performs
them. The tables in ring/rules/phases.py say which message counts when and which phase follows. This module looks
there first and then asks the part that decides: the two links, a shared port, the epoch, the wait for a whole ring.

Two stages compare their settings when the head's identity arrives with the Roll. Until a stage knows the head, it
judges neither a caller's total nor its pipeline id, and says "ask again".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

from stagewire.config import StageConfig
from stagewire.errors import ConfigError, PeerError, ProtocolError, StageLost, StagewireError, WireVersionError
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import (
    STRAIGHT,
    Action,
    Bind,
    Connect,
    Data,
    Deliver,
    Fail,
    Log,
    PassReport,
    Send,
    SetReports,
    Side,
    Stall,
    Stop,
    Way,
    clip,
)
from stagewire.ring.rules.epochs import Epochs
from stagewire.ring.rules.linking import Linking
from stagewire.ring.rules.notices import Notices
from stagewire.ring.rules.phases import Change, Phase, Reception, receive
from stagewire.ring.rules.predecessor import PredecessorLink
from stagewire.ring.rules.rendezvous import Rendezvous
from stagewire.ring.rules.successor import SuccessorLink
from stagewire.ring.rules.waiting import Waiting
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

__all__ = ["RingState"]

# What follows from an event: actions, the end of this stage, or one more bad message.
_Outcome = list[Action] | StagewireError | Reception


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
    started_at: InitVar[float]
    first_epoch: int = 1

    num_stale_frames: int = 0
    num_bad_messages: int = 0

    waiting: Waiting = field(init=False)
    _predecessor: PredecessorLink = field(init=False)
    _successor: SuccessorLink = field(init=False)
    _rendezvous: Rendezvous = field(init=False)
    _epochs: Epochs = field(init=False)
    _linking: Linking = field(init=False)
    _notices: Notices = field(default_factory=Notices)
    _next_report_at: float = 0.0
    _bind_again: Bind | None = None  # what could not be done yet
    _bind_again_at: float = 0.0

    def __post_init__(self, started_at: float) -> None:
        self._predecessor = PredecessorLink(self.config, self.identity)
        self._successor = SuccessorLink(self.identity)
        self._rendezvous = Rendezvous(self.config, self.identity)
        self.waiting = Waiting(
            self.config, self._predecessor, self._successor, self._rendezvous, self._notices, started_at
        )
        self._epochs = Epochs(
            self.config, self.identity, self._successor, self.waiting, self._notices, self.first_epoch
        )
        self._linking = Linking(
            self.config,
            self.identity,
            self._predecessor,
            self._successor,
            self._rendezvous,
            self._epochs,
            self._notices,
        )

    def __repr__(self) -> str:
        return (
            f"RingState(stage={self.config.stage}/{self.config.num_stages}, phase={self.phase.value}, "
            f"epoch={self.epoch}, predecessor={self._predecessor.state.value}, "
            f"successor={self.successor_peer is not None})"
        )

    # ---- what others ask -------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        return self._epochs.phase

    @property
    def epoch(self) -> int:
        return self._epochs.number

    @property
    def is_over(self) -> bool:
        return self.phase.is_over

    @property
    def is_open(self) -> bool:
        return self.phase.is_open

    @property
    def successor_peer(self) -> bytes | None:
        return self._successor.peer

    @property
    def hop_ns(self) -> int:
        """One-way time to the predecessor: half of the last ping; 0 while unknown."""
        return self._predecessor.hop_ns

    @property
    def linked_stages(self) -> tuple[int, ...]:
        """The stages that take part as far as this one knows: all in an open ring, else its linked neighbours."""
        if self.is_open:
            return tuple(range(self.config.num_stages))
        neighbours = (
            (self._predecessor.is_linked, self.config.predecessor_stage),
            (self._successor.peer is not None, self.config.successor_stage),
        )
        return tuple(sorted({stage for is_linked, stage in neighbours if is_linked}))

    def waits_for(self) -> str:
        """Whom this stage waits for, for people."""
        return self.waiting.describe()

    # ---- life ------------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        self.waiting.start(now)
        return [Bind(public=True)] if self.config.stands_by else [Bind(public=True), Connect()]

    def bound(self, public: bool, port: int, now: float) -> list[Action]:
        """The outcome of Bind: this stage listens on the configured port, or (it was taken) on a private one."""
        stood_by = self._rendezvous.stands_by
        return [*self._rendezvous.bound(public, port, now), *self._take_place(stood_by, now)]

    def _take_place(self, stood_by: bool, now: float) -> list[Action]:
        """What a stage that has stood by does once nobody else has its place."""
        if not stood_by or self._rendezvous.stands_by:
            return []
        self.waiting.since = now
        return [Log(f"Stage {self.config.stage}: takes the place for which it has stood by"), Connect()]

    def bind_later(self, public: bool, why: str, now: float) -> list[Action]:
        """The outcome of Bind while this stage's address cannot be known, because a name does not resolve yet."""
        self._bind_again, self._bind_again_at = Bind(public), now + timeouts.BIND_INTERVAL_S
        text = f"Stage {self.config.stage}: listens nowhere yet: {why}; it tries again"
        return self._notices.warn_once(("bind", why), text)

    def port_taken(self) -> list[Action]:
        """The outcome of Bind on the configured port: another stage of this host, or another program, has it."""
        return self._rendezvous.port_taken()

    def began_serving(self) -> None:
        """A message of this stage's own has left on the open ring."""
        self._epochs.data_moved()

    def stop(self, text: str) -> list[Action]:
        """This stage was asked to stop. The head takes the others along; a worker tells them that it is gone."""
        if not self._epochs.move(Change.STOP):
            return []
        stage = self.config.stage
        text = clip(text)
        gone = self._epochs.fault_of(StageLost(stage, f"stage {stage} stopped: {text}"))
        message: Message = Bye(text) if self.config.is_head else gone
        return [*self._successor.send(message), Stop(text)]

    def fail(self, error: StagewireError) -> list[Action]:
        """This stage cannot go on: it tells the others once, then reports."""
        if not self._epochs.move(Change.FAILURE):
            return []
        stage = self.config.stage
        lost = error if isinstance(error, StageLost) else StageLost(stage, f"stage {stage} failed: {error}")
        return [*self._successor.send(self._epochs.fault_of(lost)), Fail(error)]

    def end_epoch(self, epoch: int, error: StageLost, now: float) -> list[Action]:
        """A step of ``epoch`` failed here, or the head gives one up: that epoch is over, this stage stays."""
        return self._epochs.lose(error, now) if self.is_open and epoch == self.epoch else []

    def tick(self, now: float) -> list[Action]:
        """Call it a few times a second: repeats what may have been lost and checks deadlines."""
        if self.is_over:
            return []
        actions = self._predecessor.tick(now)
        if self._bind_again is not None and now >= self._bind_again_at:
            actions.append(self._bind_again)
            self._bind_again = None
        actions += self._settle(self._rendezvous.tick(self._is_settled, now))
        if self.is_open:
            actions += self._tick_open(now)
        elif not self.is_over:
            actions += self._tick_waiting(now)
        if self.config.is_head and self.is_open and now >= self._next_report_at:
            self._next_report_at = now + timeouts.REPORT_INTERVAL_S
            actions.append(PassReport(()))
        return actions

    def _tick_open(self, now: float) -> list[Action]:
        if not self._successor.is_lost(now):
            return []
        lost = self.config.successor_stage
        text = f"stage {lost} is lost: its connection to stage {self.config.stage} is gone"
        return self._epochs.lose(StageLost(lost, text), now)

    def _tick_waiting(self, now: float) -> list[Action]:
        error = self.waiting.check_deadline(now)
        if error is not None:
            return self.fail(error)
        if self._predecessor.is_mute(now):
            return self.fail(self._predecessor.not_a_stage("answers nothing a stage would answer"))
        return [*self._epochs.tick(now), *self.waiting.say_line(now)]

    @property
    def _is_settled(self) -> bool:
        """Whether this stage was part of a ring: then the owner of its port is a stage, even if it is silent."""
        return self.is_open or self.waiting.has_served

    def _settle(self, outcome: _Outcome) -> list[Action]:
        """Carries out what a part has decided: returns its actions, ends this stage, or counts a message."""
        if isinstance(outcome, StagewireError):
            return self.fail(outcome)
        if isinstance(outcome, Reception):
            self.num_bad_messages += outcome is Reception.BAD
            self.num_stale_frames += outcome is Reception.STALE
            return []
        return outcome

    # ---- connections -----------------------------------------------------------------------------------------------

    def connected(self, side: Side, now: float, way: Way = STRAIGHT) -> list[Action]:
        """``way``: how the address was reached."""
        if self.is_over:
            return []
        if side is Side.OWNER:
            return self._settle(self._rendezvous.connected(self._is_settled, now))
        return self._predecessor.connected(now, way)

    def disconnected(self, side: Side, note: str, now: float) -> list[Action]:
        """``note`` says why, for people. The actions say whether and where to connect again."""
        if self.is_over:
            return []
        if side is Side.OWNER:
            return self._rendezvous.disconnected(now)
        self._predecessor.disconnected(note, now)
        if not self.config.is_head:
            self._epochs.roll = None
        stage = self.config.predecessor_stage
        lost = StageLost(stage, f"stage {stage} is lost: stage {self.config.stage} no longer reaches it ({note})")
        return [*self._epochs.lose(lost, now), Connect()]

    def bad_handshake(self, side: Side, now: float, note: str = "") -> list[Action]:
        """Whoever answers (or, on the successor side, whoever called) does not speak the transport's protocol."""
        if self.is_over:
            return []
        if side is Side.SUCCESSOR:
            text = note or "a connection that does not speak ZeroMQ"
            return self.bad_message(side, text.encode(), ProtocolError(text), now)
        if side is Side.OWNER:
            return self._settle(self._rendezvous.bad_handshake(self._is_settled, note))
        return self._settle(self._predecessor.bad_handshake(note))

    def successor_unreachable(self, now: float) -> None:
        """A send found no connection to the successor. This stage unlinks and waits to hear why.

        The stage after the successor sees the loss first and says so. After the head's Bye it is no loss at all.
        """
        self._successor.unreachable(now)
        self._epochs.move(Change.OPEN_LOST)

    def stalled(self, peer: bytes, stall: Stall, now: float) -> list[Action]:
        """What was sent by a connection did not arrive, so the transport has ended the connection.

        The successor may have left that connection long ago.
        """
        if self.is_over or peer != self._successor.peer:
            return []
        text = self._successor.describe_stall(stall, now)
        self._successor.unreachable(now)
        if not self.is_open:
            return [Log(f"Stage {self.config.stage}: {text}", is_warning=True)]
        return self._epochs.lose_unsent(StageLost(self.config.successor_stage, text), now)

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
        actions = self._notices.warn_once((Side.SUCCESSOR, peer), text)
        if isinstance(error, WireVersionError) and self._epochs.head is not None:
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
        return self._notices.warn_once(Side.PREDECESSOR, f"Stage {self.config.stage}: {link}: {error}")

    # ---- messages --------------------------------------------------------------------------------------------------

    def received(
        self, side: Side, peer: bytes, message: Message, payloads: Sequence[Frame], now: float
    ) -> list[Action]:
        """``peer`` identifies the connection on the successor side; empty elsewhere."""
        if self.is_over:
            return []
        if side is Side.PREDECESSOR:
            self._predecessor.heard(now)
        elif side is Side.SUCCESSOR:
            self._successor.heard(peer, now)
        is_linked = self._predecessor.is_linked
        role, phase = self._epochs.role, self.phase
        reception = receive(side, message, role, phase, epoch=self.epoch, is_linked=is_linked)
        if reception is not Reception.TAKEN:
            return self._settle(reception)
        if side is Side.PREDECESSOR:
            return self._settle(self._from_predecessor(message, payloads, now))
        if side is Side.SUCCESSOR:
            return self._settle(self._from_successor(peer, message, now))
        return self._settle(self._from_owner(message, now))

    def _from_predecessor(self, message: Message, payloads: Sequence[Frame], now: float) -> _Outcome:
        link = self._predecessor
        match message:
            case Welcome(identity):
                return self._linking.welcomed(identity)
            case Redirect(_, port):
                return link.redirected(port)
            case NotHere(stage):
                return link.not_here(stage, now)
            case Refused(text=text):
                return link.is_another_ring(text) if link.is_doubtful else self._refused(message)
            case Pong(sent_ns):
                link.ponged(sent_ns, now)
                return []
            case Roll():
                return self._epochs.rolled(message, now)
            case Open():
                return self._epochs.opened(message)
            case Fault():
                return self._epochs.faulted(message, now)
            case Report():
                return self._reported(message)
            case Bye(text):
                self._epochs.move(Change.STOP)
                onward = [] if self.config.is_tail else self._successor.send(message)
                return [*onward, Stop(text)]
            case Call() | Reply() | Step() | Sample() | Result():
                return self._deliver(message, payloads)
        return Reception.BAD

    def _from_successor(self, peer: bytes, message: Message, now: float) -> _Outcome:
        match message:
            case Hello():
                return self._linking.greeted(peer, message, now)
            case Register():
                return self._linking.registered(peer, message, now)
            case Ping(sent_ns):
                return [Send(Side.SUCCESSOR, Pong(sent_ns), peer)]
            case Refused() if self._successor.is_or_was(peer):
                return self._linking.report(message)
        return Reception.BAD

    def _from_owner(self, message: Message, now: float) -> _Outcome:
        match message:
            case Registered() | NotHere():
                stood_by = self._rendezvous.stands_by
                self._rendezvous.answered(message, now)
                return self._take_place(stood_by, now)
            case Refused():
                return self._refused(message)
        return Reception.BAD

    def _deliver(self, message: Data, payloads: Sequence[Frame]) -> list[Action]:
        self._epochs.data_moved()
        # A call is passed on before it is run, so that all stages work at once.
        is_passed_on = isinstance(message, Call) and not self.config.is_tail
        onward = self._successor.send(message, payloads) if is_passed_on else []
        return [*onward, Deliver(message, payloads)]

    def _reported(self, report: Report) -> _Outcome:
        """A report on its way round. Nothing depends on it, so a wrong one is counted and ends nothing."""
        stages = [each.stage for each in report.stages]
        end = self.config.num_stages if self.config.is_head else self.config.stage
        if stages != sorted(set(stages)) or any(stage >= end for stage in stages):
            return Reception.BAD
        return [SetReports(report.stages) if self.config.is_head else PassReport(report.stages)]

    def _refused(self, refusal: Refused) -> list[Action]:
        """The stage that was asked says that this one cannot take part."""
        self._epochs.move(Change.FAILURE)
        return [Fail(ConfigError(refusal.text))]
