"""One stage's end of the ring: runs the rules over a transport, on a thread of its own.

Feeds the transport's events to the rules (ring/rules) and performs the actions that come out. Decides nothing itself.

The ring's thread owns every socket. The model's thread only touches queues, so a forward pass delays no heartbeat and a
blocked send delays no forward pass. A test calls `turn` itself instead of `start`, with a transport in memory and a
clock of its own.
"""

from __future__ import annotations

import contextlib
import math
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from stagewire.config import Address, StageConfig
from stagewire.errors import InternalError, PeerError, ProtocolError, StageLost, StagewireError
from stagewire.ring.observer import Broken, Delivery, Item, Observer
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import (
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
from stagewire.ring.rules.state import RingState
from stagewire.ring.transport import hosts
from stagewire.ring.transport.interface import (
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
from stagewire.wire.codec import Frame, decode, encode
from stagewire.wire.messages import Report, StageIdentity, StageReport

__all__ = ["Ring", "new_incarnation"]


def new_incarnation() -> str:
    """Tells this process from an earlier one with the same index."""
    return secrets.token_hex(8)


class Ring:
    """See the module.

    Args:
        config: this stage's place.
        identity: what it tells the others.
        transport: how frames travel; handed over to the ring's thread.
        observer: told about the ring's life, from the ring's thread.
        watch: called a few times a second; a reason that it returns ends the ring, for instance a parent's death.
        max_unread_bytes: of deliveries that the model's thread has not taken; more ends this stage.
        clock_ns: monotonic, in nanoseconds.
        first_epoch: the head counts epochs from here; default: random, so that a restarted head never repeats one.
    """

    def __init__(
        self,
        config: StageConfig,
        identity: StageIdentity,
        transport: Transport,
        observer: Observer,
        watch: Callable[[], str | None] = lambda: None,
        max_unread_bytes: float = math.inf,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        first_epoch: int | None = None,
    ) -> None:
        self.config = config
        self.transport = transport
        self.inbox: queue.SimpleQueue[Item | StagewireError | None] = queue.SimpleQueue()
        self.identities: tuple[StageIdentity, ...] = ()
        self.error: StagewireError | None = None
        self._clock_ns = clock_ns
        self.state = RingState(config, identity, self._now(), first_epoch or secrets.randbelow(1 << 30) + 1)
        self._observer = observer
        self._watch = watch
        self._outbox: deque[tuple[Data, Sequence[Frame]]] = deque()
        self._requests: deque[Callable[[], list[Action]]] = deque()
        self._is_settled = threading.Event()  # open, failed or stopped
        self._thread = threading.Thread(target=self._run, name="stagewire-ring", daemon=True)
        self._host = ""  # the address that this stage listens on
        self._max_unread_bytes = max_unread_bytes
        self._message_bytes = 0  # of the message that is being handled
        self._delivered_bytes = 0  # counted by the ring's thread
        self._taken_bytes = 0  # counted by the model's thread
        self._has_started = False
        self._has_reported_failure = False
        self._predecessor = ""  # the process that was last in the ring, by its incarnation
        self._silent = ""  # the process that was lost because it did not answer, by its incarnation
        self._replaced: set[Side] = set()  # within one turn: later events of its old connection do not count

    def __repr__(self) -> str:
        return f"Ring({self.state!r}, {self.transport!r})"

    # ---- from the model's thread -----------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def wait_open(self, timeout_s: float) -> None:
        """Blocks until the ring has been whole once.

        Raises:
            StagewireError: why it never will be.
        """
        if not self._is_settled.wait(timeout_s):
            raise PeerError(f"waited {timeout_s:.0f} s for {self.state.waits_for()}")
        if self.error is not None:
            self._join()
            raise self.error

    def receive(self, timeout_s: float | None) -> Item | None:
        """The next message or news for the model's thread; None once the ring was stopped in order.

        Raises:
            StagewireError: the ring has failed.
            queue.Empty: nothing came within ``timeout_s``.
        """
        item = self.take(timeout_s)
        if item is None or isinstance(item, StagewireError):
            self._join()
            self.inbox.put(item)  # for the next call
            if item is not None:
                raise item
            return None
        return item

    def take(self, timeout_s: float | None) -> Item | StagewireError | None:
        """As `receive`, but the end of the ring is an item, too."""
        item = self.inbox.get(timeout=timeout_s)
        if isinstance(item, Delivery):
            self._taken_bytes += item.num_bytes
        return item

    def stop(self, text: str) -> None:
        """Ends the ring in order: tells the others, flushes, closes. Returns when the thread has ended."""
        self.request_stop(text)
        self._join()

    def fail(self, error: StagewireError) -> None:
        """Ends the ring because this stage cannot go on; the others learn why. Returns when the thread has ended."""
        self.request_fail(error)
        self._join()

    def _join(self) -> None:
        """Waits until the ring's thread has ended.

        The observer may end the process then. Without this wait the model's thread could end it first, with a
        traceback.
        """
        if self._thread.ident is not None:  # a ring that was never started has ended
            self._thread.join(timeouts.END_S)

    # ---- from any thread -------------------------------------------------------------------------------------------

    def send(self, message: Data, payloads: Sequence[Frame] = ()) -> None:
        """To the successor, in order. A message whose epoch ends before it can leave is dropped."""
        self._outbox.append((message, payloads))
        self.wake()

    def request_stop(self, text: str) -> None:
        """As `stop`, without waiting."""
        self._request(lambda: self.state.stop(text))

    def request_fail(self, error: StagewireError) -> None:
        """As `fail`, without waiting."""
        self._request(lambda: self.state.fail(error))

    def end_epoch(self, epoch: int, error: StageLost) -> None:
        """Gives up everything in flight in ``epoch``, because a step failed. The ring comes back by itself."""
        self._request(lambda: self.state.end_epoch(epoch, error, self._now()))

    def _request(self, decide: Callable[[], list[Action]]) -> None:
        self._requests.append(decide)
        self.wake()

    def wake(self) -> None:
        """Makes the ring's thread look around now."""
        self.transport.wake()

    @property
    def hop_ns(self) -> int:
        """One-way time to the predecessor: half of the last ping; 0 while unknown."""
        return self.state.hop_ns

    # ---- the ring's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self.turn(timeouts.TURN_S):
                reason = self._watch()
                if reason:
                    self.request_stop(reason)
        except Exception as error:  # noqa: BLE001  the top of this thread: report, never vanish
            self._failed(InternalError(f"the ring's thread ended: {type(error).__name__}: {error}"))
        finally:
            self.transport.close()
            self._is_settled.set()
            self._observer.on_ended()

    def turn(self, timeout_s: float) -> bool:
        """Waits up to ``timeout_s`` for something to happen and handles it. False once the ring is over."""
        if not self._has_started:
            self._has_started = True
            self._perform(self.state.start(self._now()))
        self._replaced.clear()
        for event in self.transport.poll(timeout_s):
            self._perform(self._handle(event))
        self._flush_outbox()  # before the requests: what was sent before a stop leaves before it
        while self._requests:
            self._perform(self._requests.popleft()())
        self._perform(self.state.tick(self._now()))
        return not self.state.is_over

    def _now(self) -> float:
        return self._clock_ns() / 1e9

    def _flush_outbox(self) -> None:
        """Sends what waits, while there is a successor, and drops what is of another epoch."""
        while self._outbox:
            message, payloads = self._outbox[0]
            if message.epoch == self.state.epoch and self.state.is_open:
                if self.state.successor_peer is None:
                    return
                if not self._transmit(Side.SUCCESSOR, self.state.successor_peer, encode(message, payloads)):
                    return
                self.state.began_serving()
            self._outbox.popleft()

    # ---- events to the rules ---------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> list[Action]:
        match event:
            case Moved(address):
                self._set_address(address)
                return []
            case AddressGone(text):
                self.state.waiting.place_note = text
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
                return self._received(side, peer, frames, now)

    def _received(self, side: Side, peer: bytes, frames: Sequence[Frame], now: float) -> list[Action]:
        # About what it takes as objects: eight times its header, and one object for each frame.
        self._message_bytes = sum(map(len, frames)) + 8 * len(frames[0]) + 1024 * len(frames) if frames else 0
        try:
            message, payloads = decode(frames)
        except ProtocolError as error:
            return self.state.bad_message(side, peer, error, now)
        return self.state.received(side, peer, message, payloads, now)

    # ---- actions of the rules --------------------------------------------------------------------------------------

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
                self._connect(Side.PREDECESSOR, target if port is None else Address(target.host, port))
            case ConnectOwner():
                self._connect(Side.OWNER, Address(self._host, self.config.bind_port))
            case Bind(public):
                return self._bind(public)
            case SetOpen(epoch, identities):
                self._opened(epoch, identities)
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
                self._failed(error)
            case Stop(text):
                self._stopped(text)
        return []

    def _opened(self, epoch: int, identities: tuple[StageIdentity, ...]) -> None:
        self._meet_predecessor(identities[self.config.stage - 1])
        self.identities = identities
        self._is_settled.set()
        self._observer.on_open(epoch, identities)

    def _failed(self, error: StagewireError) -> None:
        self.error = error
        self._is_settled.set()
        self._observer.on_failed(error)
        self.inbox.put(error)

    def _stopped(self, text: str) -> None:
        self.error = self.error or PeerError(f"the ring was stopped: {text}")
        self._is_settled.set()
        self._observer.on_stopped(text)
        self.inbox.put(None)

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
        """If this process was lost for its silence, it had only been slow. Then peers get more time from now on."""
        self._predecessor = identity.incarnation
        if self._silent == self._predecessor:
            patience_s = self.transport.be_more_patient()
            text = f"Stage {self.config.stage}: stage {identity.stage} had only been slow: silence counts as a loss"
            self._observer.on_log(f"{text} after {patience_s:.1f} s beyond the heartbeats from now on", True)
        self._silent = ""

    def _connect(self, side: Side, address: Address) -> None:
        self._replaced.add(side)
        self.transport.connect(side, address)

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
        waiting = self.state.waiting
        waiting.listens_at, waiting.place_note = f"{address.host} port {address.port}", ""
        is_chosen = bool(self.config.bind_host) or hosts.is_loopback(address.host)
        waiting.other_addresses = [] if is_chosen else hosts.other_addresses(address.host)
        self._observer.on_bound(address)

    def _transmit(self, side: Side, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Sends. False: nobody is connected there. The rules hear of it if that is the successor."""
        try:
            self.transport.send(side, peer, frames)
        except UnreachableError:
            if side is Side.SUCCESSOR and peer == self.state.successor_peer:
                self.state.successor_unreachable(self._now())
            return False
        return True

    def _pass_report(self, earlier: Sequence[StageReport]) -> None:
        """Sends a report, unless the successor is gone or its queue is full. The next one comes soon."""
        peer = self.state.successor_peer
        if peer is None:
            return
        with contextlib.suppress(UnreachableError):
            reports = [*earlier, *self._own_report()]
            self.transport.send(Side.SUCCESSOR, peer, encode(Report(self.state.epoch, reports)))

    def _own_report(self) -> list[StageReport]:
        """One report, or none: a stage whose report fails, or does not decode, goes on all the same."""
        try:
            report = self._observer.report()
            if report is not None:
                # One that does not decode would end the ring elsewhere.
                decode(encode(Report(self.state.epoch, [report])))
                return [report]
        except Exception as error:  # noqa: BLE001  reports are for people, steps are not to fail for them
            if not self._has_reported_failure:
                self._observer.on_log(f"Stage {self.config.stage}: cannot report on itself: {error!r}", True)
            self._has_reported_failure = True
        return []
