"""Runs a ring state over a transport: performs actions, feeds events. One `turn` at a time, by one thread.

The model's thread talks to it through `send` (outbox) and `inbox`; both are queues. A node needs no thread of its own
to be tested: call `turn` with a memory transport and a fake clock. ring/runtime.py adds the thread.
"""

from __future__ import annotations

import contextlib
import math
import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagewire.config import Address, StageConfig
from stagewire.errors import PeerError, ProtocolError, StageLost, StagewireError
from stagewire.ring import hosts
from stagewire.ring.actions import (
    Action,
    Bind,
    Connect,
    ConnectOwner,
    Data,
    Deliver,
    Fail,
    Log,
    PassReport,
    Send,
    SetBroken,
    SetOpen,
    SetReports,
    Side,
    Stop,
)
from stagewire.ring.link import (
    AddressGone,
    BadHandshake,
    Connected,
    Disconnected,
    Event,
    LinkEvent,
    ListenFailed,
    Moved,
    NoAddressError,
    Notice,
    PortTakenError,
    Received,
    Stalled,
    Transport,
    UnreachableError,
)
from stagewire.ring.state import RingState
from stagewire.wire.codec import Frame, decode, encode
from stagewire.wire.messages import Report, StageIdentity, StageReport

__all__ = ["Broken", "Delivery", "Item", "Observer", "RingNode", "Whole"]


@dataclass(frozen=True)
class Delivery:
    """A message for the model's thread. ``received_ns``: this stage's monotonic clock."""

    message: Data
    payloads: Sequence[Frame]
    received_ns: int
    num_bytes: int = 0  # about what it takes here


class Observer:
    """What happens to the ring; override what you want to know. Called from the ring's thread."""

    def on_log(self, text: str, is_warning: bool) -> None: ...

    def on_bound(self, address: Address) -> None:
        """Where this stage listens; again when that has changed."""

    def on_open(self, epoch: int, identities: tuple[StageIdentity, ...]) -> None: ...

    def on_broken(self, epoch: int, error: StageLost) -> None:
        """The ring of ``epoch`` is not whole any more; `on_open` follows when it is again, with another epoch."""

    def takes(self, delivery: Delivery) -> bool:
        """Whether this message is for the observer, and not for the model's thread."""
        return False

    def report(self) -> StageReport | None:
        """What this stage says of itself, about once a second while the ring is open. None: nothing."""
        return None

    def on_reports(self, reports: Sequence[StageReport]) -> None:
        """At the head: what the stages said this time round, in order; some may be missing."""

    def on_failed(self, error: StagewireError) -> None: ...

    def on_stopped(self, text: str) -> None: ...

    def on_ended(self) -> None:
        """The last call: everything queued has left and the transport is closed."""


@dataclass(frozen=True)
class Broken:
    """For the model's thread: what was sent in ``epoch`` and has not come back never will."""

    epoch: int
    error: StageLost


@dataclass(frozen=True)
class Whole:
    """For the model's thread of the head: what is sent from now on is of ``epoch``."""

    epoch: int


Item = Delivery | Broken | Whole


class RingNode:
    """One stage's end of the ring.

    Args:
        config: this stage's place.
        state: where the ring stands.
        transport: how frames travel.
        clock_ns: monotonic, in nanoseconds.
        observer: told about the ring's life.
        max_unread_bytes: of deliveries that the model's thread has not taken; more ends this stage.
    """

    def __init__(
        self,
        config: StageConfig,
        state: RingState,
        transport: Transport,
        clock_ns: Callable[[], int],
        observer: Observer,
        max_unread_bytes: float = math.inf,
    ) -> None:
        self.config = config
        self.state = state
        self.transport = transport
        self.inbox: queue.SimpleQueue[Item | StagewireError | None] = queue.SimpleQueue()
        self._outbox: deque[tuple[Data, Sequence[Frame]]] = deque()
        self._requests: deque[Callable[[], list[Action]]] = deque()
        self._clock_ns = clock_ns
        self._observer = observer
        self._host = ""  # that it listens on, once it does
        self._max_unread_bytes = max_unread_bytes
        self._message_bytes = 0  # of the message that is being handled
        self._delivered_bytes = 0  # the ring's thread counts
        self._taken_bytes = 0  # the model's thread counts
        self._started = False
        self._is_report_missing = False
        self._predecessor = ""  # the process that was last in the ring, by its incarnation
        self._silent = ""  # one that counts as lost because it did not answer
        self._replaced: set[Side] = set()  # within one turn: what its old connection still reported counts no more

    def __repr__(self) -> str:
        return f"RingNode({self.state!r}, {self.transport!r})"

    # ---- from any thread -------------------------------------------------------------------------------------------

    def send(self, message: Data, payloads: Sequence[Frame] = ()) -> None:
        """To the successor, in order. One of an epoch that is over by the time it could leave is dropped."""
        self._outbox.append((message, payloads))
        self.transport.wake()

    def take(self, timeout_s: float | None) -> Item | StagewireError | None:
        """The next of the inbox, for the model's thread. Raises queue.Empty after ``timeout_s``."""
        item = self.inbox.get(timeout=timeout_s)
        if isinstance(item, Delivery):
            self._taken_bytes += item.num_bytes
        return item

    def request_stop(self, text: str) -> None:
        self._requests.append(lambda: self.state.stop(text))
        self.transport.wake()

    def request_fail(self, error: StagewireError) -> None:
        self._requests.append(lambda: self.state.fail(error))
        self.transport.wake()

    def request_end_of_epoch(self, epoch: int, error: StageLost) -> None:
        self._requests.append(lambda: self.state.end_epoch(epoch, error, self._now()))
        self.transport.wake()

    # ---- the ring's thread -----------------------------------------------------------------------------------------

    def turn(self, timeout_s: float) -> bool:
        """Waits up to ``timeout_s`` for something to happen and handles it. False once the ring is over."""
        if not self._started:
            self._started = True
            self._perform(self.state.start(self._now()))
        self._replaced.clear()
        for event in self.transport.poll(timeout_s):
            self._perform(self._handle(event))
        self._flush_outbox()  # before a stop: what was sent before it leaves before it
        while self._requests:
            self._perform(self._requests.popleft()())
        self._perform(self.state.tick(self._now()))
        return not self.state.is_over

    def _now(self) -> float:
        return self._clock_ns() / 1e9

    def _handle(self, event: Event) -> list[Action]:
        match event:
            case Moved(address):
                self._set_address(address)
                return []
            case AddressGone(text):
                self.state.place_note = text
                return [Log(f"Stage {self.config.stage}: {text}", is_warning=True)] if text else []
            case ListenFailed(error):
                return self.state.fail(error)
            case Notice(text, is_warning):
                return [Log(f"Stage {self.config.stage}: {text}", is_warning)]
            case _:
                return [] if event.side in self._replaced else self._handle_link(event)

    def _handle_link(self, event: LinkEvent) -> list[Action]:
        now = self._now()
        match event:
            case Connected(side, way):
                return self.state.connected(side, now, way)
            case Disconnected(side, note, is_silent):
                if is_silent and side is Side.PREDECESSOR:
                    self._silent = self._predecessor
                return self.state.disconnected(side, note, now)
            case BadHandshake(side, note):
                return self.state.bad_handshake(side, now, note)
            case Stalled(_, peer, stall):
                return self.state.stalled(peer, stall, now)
            case Received(side, peer, frames):
                # A header becomes objects, each frame is one.
                self._message_bytes = sum(map(len, frames)) + 8 * len(frames[0]) + 1024 * len(frames) if frames else 0
                try:
                    message, payloads = decode(frames)
                except ProtocolError as error:
                    return self.state.bad_message(side, peer, error, now)
                return self.state.received(side, peer, message, payloads, now)

    def _perform(self, actions: list[Action]) -> None:
        pending = deque(actions)
        while pending:
            pending.extend(self._perform_one(pending.popleft()))

    def _perform_one(self, action: Action) -> list[Action]:
        match action:
            case Send(side, message, peer, payloads):
                self._transmit(side, peer, encode(message, payloads))
            case Deliver(message, payloads):
                return self._deliver(Delivery(message, payloads, self._clock_ns(), self._message_bytes))
            case Connect(port):
                target = self.config.predecessor
                self._replaced.add(Side.PREDECESSOR)
                self.transport.connect(Side.PREDECESSOR, target if port is None else Address(target.host, port))
            case ConnectOwner():
                self._replaced.add(Side.OWNER)
                self.transport.connect(Side.OWNER, Address(self._host, self.config.bind_port))
            case Bind(public):
                return self._bind(public)
            case SetOpen(epoch, identities):
                self._meet_predecessor(identities[self.config.stage - 1])
                self._observer.on_open(epoch, identities)
            case SetBroken(epoch, error):
                self._observer.on_broken(epoch, error)
                self.inbox.put(Broken(epoch, error))
            case PassReport(earlier):
                self._pass_report(earlier)
            case SetReports(reports):
                self._observer.on_reports(reports)
            case Log(text, is_warning):
                self._observer.on_log(text, is_warning)
            case Fail(error):
                self._observer.on_failed(error)
                self.inbox.put(error)
            case Stop(text):
                self._observer.on_stopped(text)
                self.inbox.put(None)
        return []

    def _deliver(self, delivery: Delivery) -> list[Action]:
        if self._observer.takes(delivery):
            return []
        unread_bytes = self._delivered_bytes - self._taken_bytes + delivery.num_bytes
        if unread_bytes > self._max_unread_bytes:
            sender = self.config.predecessor_stage
            text = f"stage {sender} sends what no head asks for: {unread_bytes / 1e6:.0f} MB wait here to be run"
            return self.state.fail(PeerError(text))
        self._delivered_bytes += delivery.num_bytes
        self.inbox.put(delivery)
        return []

    def _meet_predecessor(self, identity: StageIdentity) -> None:
        """One that was lost because it was silent, and is the same process, was only slow: it will be again."""
        self._predecessor = identity.incarnation
        if self._silent == self._predecessor:
            patience_s = self.transport.be_more_patient()
            text = f"Stage {self.config.stage}: stage {identity.stage} had only been slow: silence counts as a loss"
            self._observer.on_log(f"{text} after {patience_s:.1f} s beyond the heartbeats from now on", True)
        self._silent = ""

    def _bind(self, public: bool) -> list[Action]:
        try:
            address = self.transport.bind(self.config.bind_port if public else 0)
        except PortTakenError:
            return self.state.port_taken()
        except NoAddressError as error:
            return self.state.bind_later(public, str(error), self._now())
        except StagewireError as error:
            return self.state.fail(error)
        self._set_address(address)
        return self.state.bound(public, address.port, self._now())

    def _set_address(self, address: Address) -> None:
        self._host = address.host
        self.state.listens_at, self.state.place_note = f"{address.host} port {address.port}", ""
        is_chosen = bool(self.config.bind_host) or hosts.is_loopback(address.host)
        self.state.other_addresses = [] if is_chosen else hosts.other_addresses(address.host)
        self._observer.on_bound(address)

    def _transmit(self, side: Side, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Whether somebody is there to get it; a successor that is not there is news for the state."""
        try:
            self.transport.send(side, peer, frames)
        except UnreachableError:
            if side is Side.SUCCESSOR and peer == self.state.successor_peer:
                self.state.successor_unreachable(self._now())
            return False
        return True

    def _pass_report(self, earlier: Sequence[StageReport]) -> None:
        """A successor that is gone or whose queue is full gets none: steps find that out, and the next comes soon."""
        peer = self.state.successor_peer
        if peer is None:
            return
        with contextlib.suppress(UnreachableError):
            reports = [*earlier, *self._own_report()]
            self.transport.send(Side.SUCCESSOR, peer, encode(Report(self.state.epoch, reports)))

    def _own_report(self) -> list[StageReport]:
        """One, or none: a stage that cannot tell how it is, or tells nonsense, goes on all the same."""
        try:
            report = self._observer.report()
            if report is not None:
                decode(encode(Report(self.state.epoch, [report])))  # what does not decode would end the ring elsewhere
                return [report]
        except Exception as error:  # noqa: BLE001  reports are for people, steps are not to fail for them
            if not self._is_report_missing:
                self._observer.on_log(f"Stage {self.config.stage}: cannot report on itself: {error!r}", True)
            self._is_report_missing = True
        return []

    def _flush_outbox(self) -> None:
        """Sends what waits, while there is somebody to send it to, and drops what is of another epoch."""
        while self._outbox:
            message, payloads = self._outbox[0]
            if message.epoch == self.state.epoch and self.state.is_open:
                if self.state.successor_peer is None:
                    return
                if not self._transmit(Side.SUCCESSOR, self.state.successor_peer, encode(message, payloads)):
                    return
                self.state.began_serving()
            self._outbox.popleft()
