"""Strangers at a stage's port, over real sockets: who is let in, who is told why not, and what a ring does."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq

from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError
from stagewire.ring.observer import Delivery
from stagewire.ring.ring import Ring
from stagewire.ring.rules.actions import Side
from stagewire.ring.rules.phases import Phase
from stagewire.ring.transport.callers import MAX_BACKWARD_BYTES
from stagewire.ring.transport.interface import BadHandshake, Connected, Disconnected, Event, Received
from stagewire.ring.transport.security import OPEN, RingKey, Security
from stagewire.ring.transport.zmq_transport import ZmqTransport
from stagewire.wire.codec import Frame, decode, encode
from stagewire.wire.messages import Call, Hello, NotHere, Open, Register, Result, Step, TensorSpec
from support.zmtp import READY, frame, greeting, until_ready
from unit.ring_harness import Record, make_config, make_identity

pytestmark = pytest.mark.process

HOST = "127.0.0.1"
MAX_FRAME_BYTES = 4 << 20
DEADLINE_S = 30.0
P, S = Side.PREDECESSOR, Side.SUCCESSOR
KEY = RingKey(b"l" * 32, b"c" * 32)
OTHER_KEY = RingKey(b"m" * 32, b"d" * 32)
# As of somebody who has got hold of the listeners' public half, and of nothing else.
HALF_A_KEY = RingKey(KEY.listener, OTHER_KEY.caller)

NEEDS_KEY, HAS_NO_KEY, OTHER = "the stage there has a key", "the stage there has no key", "has another key"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [int(server.getsockname()[1]) for server in servers]


# ---- two ends ------------------------------------------------------------------------------------------------------


def meet(listener: Security, caller: Security) -> tuple[Event, list[Event]]:
    """The caller's first certain word about the listener, and everything that the listener saw."""
    ends = [ZmqTransport(HOST, MAX_FRAME_BYTES, security) for security in (listener, caller)]
    before, after = ends
    seen: list[Event] = []
    try:
        address = before.bind(0)
        after.connect(P, address)
        ends_at = time.monotonic() + DEADLINE_S
        while time.monotonic() < ends_at:
            seen += before.poll(0.01)
            for event in after.poll(0.01):
                if isinstance(event, Connected):
                    after.send(P, b"", [b"let me in"])
                elif isinstance(event, BadHandshake):
                    seen += before.poll(0.1)
                    return event, seen
                else:
                    after.connect(P, address)
            if any(isinstance(event, Received) for event in seen):
                return Connected(P), seen
    finally:
        for end in ends:
            end.close(0)
    raise AssertionError(seen)


@pytest.fixture
def folders(socket_folder: Path) -> tuple[Path, Path]:
    """Of this user, and of another one."""
    found = (socket_folder / "a", socket_folder / "b")
    for folder in found:
        folder.mkdir(mode=0o700)
    return found


def test_stages_of_one_ring_meet(folders: tuple[Path, Path]) -> None:
    for security in (OPEN, Security(KEY), Security.of_folder(folders[0])):
        event, seen = meet(security, security)
        assert event == Connected(P)
        assert [event.frames[0] for event in seen if isinstance(event, Received)] == [b"let me in"]


@pytest.mark.parametrize(
    ("listener", "caller", "says"),
    [
        (Security(KEY), OPEN, NEEDS_KEY),
        (OPEN, Security(KEY), HAS_NO_KEY),
        (Security(KEY), Security(OTHER_KEY), OTHER),
        (Security(KEY), Security(HALF_A_KEY), OTHER),
        (Security(HALF_A_KEY), Security(KEY), OTHER),
    ],
    ids=["no key", "their lack of a key", "another key", "half a key", "half a key at the listener"],
)
def test_who_has_not_the_key_is_told_so(listener: Security, caller: Security, says: str) -> None:
    event, seen = meet(listener, caller)
    assert isinstance(event, BadHandshake)
    assert says in event.note
    assert "--pipeline-key-file" in event.note
    assert not any(isinstance(event, Received) for event in seen)
    if listener.key is not None and caller.key is not None:
        notes = {event.note for event in seen if isinstance(event, BadHandshake)}
        assert "a connection without the key in this stage's --pipeline-key-file" in notes


def test_another_user_on_this_host_is_refused(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two users have two folders. Neither gets through to the other, whoever listens first."""
    monkeypatch.setattr("stagewire.ring.rules.timeouts.HANDSHAKE_TIMEOUT_MS", 300)
    mine, theirs = (Security.of_folder(folder) for folder in folders)
    for listener, caller in ((mine, theirs), (theirs, mine), (OPEN, mine)):
        event, seen = meet(listener, caller)
        assert isinstance(event, BadHandshake)
        assert "another user's" in event.note
        assert not any(isinstance(event, Received) for event in seen)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_the_kernel_keeps_another_user_out(folders: tuple[Path, Path]) -> None:
    transport = ZmqTransport(HOST, MAX_FRAME_BYTES, security := Security.of_folder(folders[0]))
    path = security.socket_path(HOST, transport.bind(0).port)
    assert path is not None
    folders[0].parent.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setresuid(12345, 12345, 12345)
        with socket.socket(socket.AF_UNIX) as sock:
            os._exit(sock.connect_ex(path) != 13)  # EACCES
    assert os.waitpid(child, 0)[1] == 0
    transport.close(0)


def test_a_key_and_none_on_loopback(folders: tuple[Path, Path]) -> None:
    local = Security.of_folder(folders[0])
    event, _ = meet(Security(KEY), local)
    assert isinstance(event, BadHandshake)
    assert NEEDS_KEY in event.note
    event, _ = meet(local, Security.of_folder(folders[0], KEY))
    assert isinstance(event, BadHandshake)
    assert HAS_NO_KEY in event.note


def test_a_killed_stages_socket_is_replaced(folders: tuple[Path, Path]) -> None:
    security = Security.of_folder(folders[0])
    (port,) = free_ports(1)
    path = security.socket_path(HOST, port)
    assert path is not None
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    transport = ZmqTransport(HOST, MAX_FRAME_BYTES, security)
    assert transport.bind(port).port == port
    transport.close(0)
    assert not Path(path).exists()


# ---- a ring --------------------------------------------------------------------------------------------------------


@dataclass
class LiveRing:
    """Nodes over real sockets, turned by the test's thread. Steps go round while it is `run`."""

    security: Security
    num_stages: int = 3
    nodes: list[Ring] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    num_sent: int = 0
    num_back: int = 0

    def __post_init__(self) -> None:
        self.ports = free_ports(self.num_stages)
        for index in range(self.num_stages):
            self.nodes.append(self._make(self.config(index)))

    def config(self, index: int) -> StageConfig:
        layout = [(port, self.ports[index - 1]) for index, port in enumerate(self.ports)]
        return make_config(index, layout, num_stages=self.num_stages)

    def _make(self, config: StageConfig) -> Ring:
        transport = ZmqTransport(HOST, MAX_FRAME_BYTES, self.security)
        self.records.append(Record())
        return Ring(config, make_identity(config, f"process {config.stage}"), transport, self.records[-1])

    def turn(self) -> None:
        for node in self.nodes:
            assert node.turn(0.002), self.records
        for node in self.nodes:
            while not node.inbox.empty():
                self._work(node, node.take(0))

    def _work(self, node: Ring, item: object) -> None:
        assert isinstance(item, Delivery), item
        message = item.message
        if isinstance(message, Result):
            assert message.step == self.num_back
            assert bytes(item.payloads[0]) == _answer(message.step)
            self.num_back += 1
        elif isinstance(message, Step) and node.config.is_tail:
            node.send(Result(message.epoch, message.step, []), [_answer(message.step)])
        elif isinstance(message, Step):
            node.send(message, item.payloads)

    def until(self, condition: Callable[[], bool]) -> None:
        ends_at = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < ends_at, self.nodes
            self.turn()

    def open(self) -> None:
        self.until(lambda: all(node.state.phase is Phase.OPEN for node in self.nodes))
        self.nodes[0].send(Call(self.nodes[0].state.epoch, 1, "check_health"), [b"args"])
        self.until(lambda: all(node.state.phase is Phase.SERVING for node in self.nodes))

    def step(self) -> None:
        rows = 64
        specs = [TensorSpec("hidden_states", "float32", [rows, 256])]
        step = Step(self.nodes[0].state.epoch, self.num_sent, rows, 7, False, specs, [])
        self.nodes[0].send(step, [b"schedule", bytes(rows * 256 * 4)])
        self.num_sent += 1

    def run(self, condition: Callable[[], bool]) -> None:
        """Steps go round, two at a time, until ``condition``, and then until all of them are back."""
        before = self.num_back

        def is_done() -> bool:
            while self.num_sent - self.num_back < 2:
                self.step()
            return condition() and self.num_back - before >= 20

        self.until(is_done)
        self.until(lambda: self.num_back == self.num_sent)

    def close(self) -> None:
        for node in self.nodes:
            node.transport.close(0)


def _answer(step: int) -> bytes:
    return f"token of step {step}".encode()


SECURITIES: dict[str, Callable[[Path], Security]] = {
    "plain": lambda folder: OPEN,
    "local": lambda folder: Security.of_folder(folder),
    "key": lambda folder: Security(KEY),
}


@pytest.fixture(params=list(SECURITIES))
def ring(request: pytest.FixtureRequest, socket_folder: Path) -> Iterator[LiveRing]:
    ring = LiveRing(SECURITIES[request.param](socket_folder))
    ring.open()
    yield ring
    ring.close()


def connect(port: int) -> socket.socket:
    sock = socket.create_connection((HOST, port), DEADLINE_S)
    sock.settimeout(DEADLINE_S)
    return sock


def throw(port: int, chunks: Sequence[bytes]) -> None:
    """Sends what the stage is willing to take, and hangs up. A port with a local socket takes no connection at all."""
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), 0.2) as sock:
        for chunk in chunks:
            sock.sendall(chunk)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def under_fire(ring: LiveRing, attack: Callable[[int], None]) -> None:
    """Attacks every stage's port from a thread, while steps go round; all of them come back and nobody fails."""
    failed: list[BaseException] = []

    def fire() -> None:
        try:
            for port in ring.ports:
                attack(port)
        except BaseException as error:
            failed.append(error)
            raise

    phases = [node.state.epoch for node in ring.nodes]
    before = resident_bytes()
    thread = threading.Thread(target=fire)
    thread.start()
    ring.run(lambda: not thread.is_alive())
    thread.join()
    assert not failed
    assert [node.state.epoch for node in ring.nodes] == phases
    assert not any(record.errors for record in ring.records)
    assert resident_bytes() - before < 256 << 20  # what comes between two looks at the connections counts too


@pytest.mark.parametrize("mechanism", [b"NULL", b"CURVE", b"PLAIN", b"GSSAPI", b"\xff" * 20])
def test_garbage(ring: LiveRing, mechanism: bytes) -> None:
    rng = random.Random(mechanism)

    def attack(port: int) -> None:
        throw(port, [rng.randbytes(rng.randrange(1, 5000))])
        for _ in range(0 if ring.security.has_local_sockets else 30):
            throw(port, [greeting(mechanism), rng.randbytes(rng.randrange(1, 5000))])

    under_fire(ring, attack)


@pytest.mark.parametrize("mechanism", [b"NULL", b"CURVE"])
@pytest.mark.parametrize("size", [MAX_BACKWARD_BYTES + 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_frames_that_claim_to_be_large(ring: LiveRing, mechanism: bytes, size: int) -> None:
    """As the first command, before anybody is known, and as a message after a handshake without keys."""

    def attack(port: int) -> None:
        throw(port, [greeting(mechanism), frame(4, size, bytes(1 << 20))])
        throw(port, [greeting(mechanism), READY[b"DEALER"], frame(0, size, bytes(1 << 20))])

    under_fire(ring, attack)


PART = frame(1, 1 << 19, bytes(1 << 19))  # of a message that goes on
MESSAGES = frame(0, 1, b"x") * 1000


def pour(sock: socket.socket, piece: bytes) -> int:
    """The same again and again, until the other side hangs up: how many bytes it let in."""
    num_bytes = 0
    ends_at = time.monotonic() + DEADLINE_S
    with contextlib.suppress(OSError):
        while time.monotonic() < ends_at:
            num_bytes += sock.send(piece[num_bytes % len(piece) :])
    assert time.monotonic() < ends_at, f"{num_bytes} bytes and still no end"
    return num_bytes


def test_a_caller_whose_message_does_not_end(socket_folder: Path) -> None:
    ring = LiveRing(OPEN)

    def attack(port: int) -> None:
        with connect(port) as sock:
            sock.sendall(greeting(b"NULL") + READY[b"DEALER"])
            assert pour(sock, PART) < 1 << 30

    try:
        ring.open()
        under_fire(ring, attack)
        assert any("more than a stage has to say" in line for record in ring.records for line in record.logs)
    finally:
        ring.close()


@pytest.mark.parametrize(
    ("piece", "note"),
    [(PART, "it sends a message that does not end"), (MESSAGES, "it sends more than can be read")],
    ids=["one message", "messages"],
)
def test_a_predecessor_that_does_not_end(piece: bytes, note: str) -> None:
    ends = ZmqTransport(HOST, 1 << 20, OPEN)
    poured: list[int] = []

    def listen() -> None:
        sock, _ = server.accept()
        with sock:
            sock.sendall(greeting(b"NULL") + READY[b"ROUTER"])
            until_ready(sock)
            poured.append(pour(sock, piece))

    with socket.create_server((HOST, 0)) as server:
        thread = threading.Thread(target=listen)
        thread.start()
        before = resident_bytes()
        ends.connect(P, Address(HOST, server.getsockname()[1]))
        seen: list[Event] = []
        most = 0
        until = time.monotonic() + DEADLINE_S
        while not any(isinstance(event, Disconnected) for event in seen):
            seen += (event for event in ends.poll(0.01) if not isinstance(event, Received))
            most = max(most, resident_bytes() - before)
            assert time.monotonic() < until
        ends.close(0)
        thread.join()
    assert seen == [Connected(P), Disconnected(P, note)]
    assert poured[0] < 1 << 30
    assert most < 1 << 30


def test_many_large_messages_are_no_flood() -> None:
    before, after = (ZmqTransport(HOST, 1 << 20, OPEN) for _ in range(2))
    parts = [b"step", bytes(1 << 20), bytes(1 << 20), bytes(1 << 20)]
    num_back = num_sent = 0
    try:
        after.connect(P, before.bind(0))
        until = time.monotonic() + DEADLINE_S
        peer = b""
        while num_back < 100:
            assert time.monotonic() < until
            for event in after.poll(0.001):
                assert not isinstance(event, Disconnected)
                if isinstance(event, Connected):
                    after.send(P, b"", [b"hello"])
                else:
                    num_back += 1
            for event in before.poll(0.001):
                assert isinstance(event, Received)
                peer = event.peer
            while peer and num_sent < 100 and num_sent - num_back < 4:
                before.send(S, peer, parts)
                num_sent += 1
    finally:
        before.close(0)
        after.close(0)


def test_steps_that_nobody_asked_for_end_the_stage_that_would_have_to_keep_them() -> None:
    """Faster than the model's thread takes them, which here takes none."""
    ring = LiveRing(OPEN)
    one, identity = ring.nodes[1], make_identity(ring.config(1), "process 1")
    ring.nodes[1] = Ring(ring.config(1), identity, one.transport, ring.records[1], max_unread_bytes=1 << 20)
    try:
        ring.open()
        for _ in range(20):
            ring.step()
        until = time.monotonic() + DEADLINE_S
        while not ring.records[1].errors:
            assert time.monotonic() < until
            for node in ring.nodes:
                node.turn(0.002)
        assert "stage 0 sends what no head asks for: 1 MB wait here" in str(ring.records[1].errors[0])
    finally:
        ring.close()


def test_a_thousand_connections_that_never_speak(ring: LiveRing) -> None:
    with contextlib.ExitStack() as stack:

        def attack(port: int) -> None:
            for _ in range(1000 // len(ring.ports) + 1):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex((HOST, port))

        under_fire(ring, attack)


@pytest.mark.parametrize("kind", ["plain", "key"])
def test_connections_that_speak_very_slowly(kind: str, socket_folder: Path) -> None:
    """A byte now and then, or nothing more after the first few: ended when a handshake's time is over."""
    ring = LiveRing(SECURITIES[kind](socket_folder))
    words = greeting(b"NULL" if kind == "plain" else b"CURVE")

    def is_ended(sock: socket.socket, timeout_s: float) -> bool:
        sock.settimeout(timeout_s)
        try:
            return not sock.recv(1000)
        except TimeoutError:
            return False
        except OSError:
            return True

    def attack(port: int) -> None:
        mute = [connect(port) for _ in words]
        for index, sock in enumerate(mute):
            sock.sendall(words[:index])
        with connect(port) as slow:
            for index in itertools.count():
                if is_ended(slow, 0.1):
                    break
                with contextlib.suppress(OSError):
                    slow.send((words + bytes(1000))[index : index + 1])
                assert index < 100
        for sock in mute:
            while not is_ended(sock, DEADLINE_S):
                pass
            sock.close()

    try:
        ring.open()
        under_fire(ring, attack)
    finally:
        ring.close()


class Tap:
    """A relay that keeps what a caller sends, in pieces as they came."""

    def __init__(self, port: int) -> None:
        self.pieces: list[bytes] = []
        self._server = socket.create_server((HOST, 0))
        self.port = int(self._server.getsockname()[1])
        self._target = port
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        caller, _ = self._server.accept()
        target = connect(self._target)
        threading.Thread(target=self._copy, args=(target, caller, None), daemon=True).start()
        self._copy(caller, target, self.pieces)

    def _copy(self, source: socket.socket, target: socket.socket, pieces: list[bytes] | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if pieces is not None:
                    pieces.append(data)
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def record(ring: LiveRing) -> list[bytes]:
    """What a stage that belongs to the ring sends to another: its handshake, then a Hello and a Register."""
    tap = Tap(ring.ports[0])
    security = Security(ring.security.key) if ring.security.key else OPEN
    caller = ZmqTransport(HOST, MAX_FRAME_BYTES, security)
    caller.connect(P, Address(HOST, tap.port))
    events: list[Event] = []

    def has(kind: type[Event]) -> bool:
        events.extend(caller.poll(0.002))
        return any(isinstance(event, kind) for event in events)

    ring.until(lambda: has(Connected))
    twin = make_identity(ring.config(1), "a newcomer")
    for message in (Hello(twin, 0), Register(twin, 1, False)):
        caller.send(P, b"", encode(message))
    ring.until(lambda: has(Received))
    caller.close(0)
    return tap.pieces


@pytest.mark.parametrize("kind", ["plain", "key"])
def test_recorded_words_replayed(kind: str, socket_folder: Path) -> None:
    """As they were, cut, in another order, and with bytes changed. With a key none of it is a message."""
    ring = LiveRing(SECURITIES[kind](socket_folder))
    try:
        ring.open()
        pieces = record(ring)
        ring.run(lambda: True)
        num_before = sum(node.state.num_bad_messages for node in ring.nodes)
        whole = b"".join(pieces)
        rng = random.Random(1)

        def attack(port: int) -> None:
            throw(port, pieces)
            for _ in range(40):
                throw(port, [whole[: rng.randrange(len(whole))]])
                throw(port, rng.sample(pieces, len(pieces)))
                changed = bytearray(whole)
                for _ in range(rng.randrange(1, 5)):
                    changed[rng.randrange(64, len(changed))] ^= 1 << rng.randrange(8)
                throw(port, [bytes(changed)])

        under_fire(ring, attack)
        if kind == "key":
            logs = "\n".join(record.log for record in ring.records)
            assert "without the key" in logs or sum(n.state.num_bad_messages for n in ring.nodes) > num_before
    finally:
        ring.close()


def test_messages_of_a_stranger_change_nothing() -> None:
    """Without keys a stranger can speak. Steps and calls are not taken from that side, nor answers given."""
    ring = LiveRing(OPEN)
    ring.open()
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(f"tcp://{HOST}:{ring.ports[1]}")
    epoch = ring.nodes[0].state.epoch
    step = Step(epoch, 0, 1, 7, False, [TensorSpec("hidden_states", "float32", [1, 1])], [])
    messages: list[list[Frame]] = [
        encode(step, [b"schedule", bytes(4)]),
        encode(Call(epoch, 9, "shutdown"), [b"args"]),
        encode(Result(epoch, 0, []), [b"tokens"]),
        encode(Open(epoch + 1)),
        [b"SW" + bytes(100)],
        [bytes(1000)] * 1000,
    ]

    def attack(port: int) -> None:
        for message in messages * 20:
            stranger.send_multipart(message)

    try:
        under_fire(ring, attack)
        while stranger.poll(0):  # to another wire version, that it is not welcome
            assert decode(stranger.recv_multipart())[0] == NotHere(1)
    finally:
        stranger.close(0)
        context.term()
        ring.close()


@pytest.mark.parametrize("is_keyed", [True, False])
def test_a_stage_without_the_rings_key_ends_with_the_flags_name(is_keyed: bool, socket_folder: Path) -> None:
    """At its predecessor, and at the owner of a port that it shares; the ring goes on."""
    ring = LiveRing(Security(KEY))
    try:
        ring.open()
        security = Security(OTHER_KEY) if is_keyed else Security.of_folder(socket_folder)
        config = make_config(1, [(0, 0), (ring.ports[1], ring.ports[0])], num_stages=3)
        transport = ZmqTransport(HOST, MAX_FRAME_BYTES, security)
        node = Ring(config, make_identity(config, "stranger"), transport, record := Record())
        ring.run(lambda: not node.turn(0.002))
        transport.close(0)
        (error,) = record.errors
        assert isinstance(error, ConfigError)
        assert "--pipeline-key-file" in str(error)
    finally:
        ring.close()


@pytest.mark.parametrize("is_keyed", [True, False])
def test_ports_of_another_program(is_keyed: bool, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A web server where the predecessor should be, and on this stage's own port."""
    monkeypatch.setattr("stagewire.ring.rules.timeouts.HANDSHAKE_TIMEOUT_MS", 300)
    security = Security(KEY) if is_keyed else Security.of_folder(socket_folder)
    server = http.server.ThreadingHTTPServer((HOST, 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    port = int(server.server_address[1])
    expected = {
        (free_ports(1)[0], port): f"--pipeline-prev-stage-service-addr {HOST}:{port}: ",
        (port, free_ports(1)[0]): f"port {port} is taken by another program",
    }
    for layout, text in expected.items():
        config = make_config(1, [(0, 0), layout], num_stages=3)
        transport = ZmqTransport(HOST, MAX_FRAME_BYTES, security)
        node = Ring(config, make_identity(config), transport, record := Record())
        ends_at = time.monotonic() + DEADLINE_S
        while node.turn(0.05):
            assert time.monotonic() < ends_at, node
        transport.close(0)
        (error,) = record.errors
        assert text in str(error)
    server.shutdown()
    server.server_close()


def test_disconnected_is_no_refusal(folders: tuple[Path, Path]) -> None:
    """A stage that is not up yet is waited for, with and without a key."""
    (port,) = free_ports(1)
    for security in (Security(KEY), Security.of_folder(folders[0])):
        transport = ZmqTransport(HOST, MAX_FRAME_BYTES, security)
        transport.connect(P, Address(HOST, port))
        events: list[Event] = []
        while not events:
            events = transport.poll(0.1)
        (event,) = events
        assert isinstance(event, Disconnected)
        assert event.note.startswith(f"nothing listens there yet: {HOST} port {port} refused the connection")
        assert (str(folders[0]) in event.note) == (security.key is None)
        transport.close(0)
