"""A ring with its thread: what the model's thread sees of the ring's life."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from stagewire.config import Address
from stagewire.errors import InternalError, PeerError
from stagewire.ring.observer import Broken, Delivery
from stagewire.ring.ring import Ring, new_incarnation
from stagewire.ring.rules.actions import Side
from stagewire.ring.transport.interface import Event
from stagewire.ring.transport.memory import MemoryNetwork, MemoryTransport
from stagewire.wire.codec import Frame
from stagewire.wire.messages import Call
from unit.ring_harness import Record, make_config, make_identity

WAIT_S = 10.0
PORTS = ((15550, 15551), (15551, 15550))


class LockedTransport(MemoryTransport):
    """The memory network is for one thread; here every stage has its own."""

    lock = threading.RLock()

    def bind(self, port: int) -> Address:
        with self.lock:
            return super().bind(port)

    def connect(self, side: Side, address: Address) -> None:
        with self.lock:
            super().connect(side, address)

    def send(self, side: Side, peer: bytes, frames: Sequence[Frame]) -> None:
        with self.lock:
            super().send(side, peer, frames)

    def poll(self, timeout_s: float) -> list[Event]:
        self._woken.wait(min(timeout_s, 0.05))
        with self.lock:
            return super().poll(0)

    def close(self, linger_s: float = 1.0) -> None:
        with self.lock:
            super().close(linger_s)


class Ended(Record):
    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def on_ended(self) -> None:
        self.ended.set()


def make(stage: int, network: MemoryNetwork, watch: Callable[[], str | None] = lambda: None) -> tuple[Ring, Ended]:
    config = make_config(stage, PORTS, layers=(stage, stage + 1), num_stages=2)
    record = Ended()
    identity = make_identity(config, new_incarnation())
    return Ring(config, identity, LockedTransport(network), record, watch), record


@pytest.fixture
def pair() -> Iterator[tuple[Ring, Ring]]:
    network = MemoryNetwork()
    head, tail = make(0, network)[0], make(1, network)[0]
    for ring in (head, tail):
        ring.start()
    yield head, tail
    for ring in (head, tail):
        ring.stop("the test is over")


def test_open_send_receive_stop(pair: tuple[Ring, Ring]) -> None:
    head, tail = pair
    head.wait_open(WAIT_S)
    assert [identity.stage for identity in head.identities] == [0, 1]
    head.send(Call(head.state.epoch, 1, "check_health"), [b"args"])
    delivery = tail.receive(WAIT_S)
    assert isinstance(delivery, Delivery)
    assert isinstance(delivery.message, Call)
    assert [bytes(frame) for frame in delivery.payloads] == [b"args"]
    with pytest.raises(queue.Empty):
        tail.receive(0.01)
    head.stop("done")
    assert tail.receive(WAIT_S) is None
    assert tail.receive(WAIT_S) is None  # and for whoever asks next


def test_a_failure_reaches_the_others_thread(pair: tuple[Ring, Ring]) -> None:
    head, tail = pair
    head.wait_open(WAIT_S)
    epoch = head.state.epoch
    head.send(Call(epoch, 1, "check_health"), [b""])
    assert tail.receive(WAIT_S) is not None
    tail.fail(InternalError("bad step"))
    news = head.receive(WAIT_S)
    assert isinstance(news, Broken)
    assert (news.epoch, news.error.stage, str(news.error)) == (epoch, 1, "stage 1 failed: bad step")
    for _ in range(2):
        with pytest.raises(InternalError, match="bad step"):
            tail.receive(WAIT_S)


def test_who_waits_learns_why_it_never_opens() -> None:
    head, record = make(0, MemoryNetwork())
    head.start()
    with pytest.raises(PeerError, match="waited 0 s for stage 1"):
        head.wait_open(0.05)
    head.fail(PeerError("the model does not load"))
    with pytest.raises(PeerError, match="does not load"):
        head.wait_open(WAIT_S)
    assert record.ended.wait(WAIT_S)


def test_who_waits_hears_of_an_end_when_the_ring_has_told_everybody_and_may_have_ended_the_process() -> None:
    """Else a stage that is told to stop would die of a traceback, now and then."""
    head, record = make(0, MemoryNetwork())
    told: list[bool] = []

    def take_long(linger_s: float = 1.0) -> None:
        threading.Event().wait(0.1)

    head.transport.close = take_long  # type: ignore[method-assign]
    head.start()
    threading.Timer(0.05, lambda: head.request_stop("told to")).start()
    with pytest.raises(PeerError, match="told to"):
        head.wait_open(WAIT_S)
    told.append(record.ended.is_set())
    assert head.receive(WAIT_S) is None
    told.append(record.ended.is_set())
    assert told == [True, True]


def test_what_the_process_depends_on_is_watched() -> None:
    head, record = make(0, MemoryNetwork(), lambda: "the launcher is gone")
    head.start()
    assert record.ended.wait(WAIT_S)
    assert record.stops == ["the launcher is gone"]


def test_a_ring_that_was_never_started_can_be_stopped() -> None:
    head, _ = make(0, MemoryNetwork())
    head.stop("changed my mind")
    head.fail(PeerError("too"))


def test_incarnations_differ() -> None:
    assert new_incarnation() != new_incarnation()
