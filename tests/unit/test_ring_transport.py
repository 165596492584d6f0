"""What every transport must do: one suite, run on the one in memory and on ZeroMQ."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stagewire.config import Address
from stagewire.errors import ConfigError
from stagewire.ring.ring import Ring
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import Side
from stagewire.ring.rules.phases import Phase
from stagewire.ring.transport.callers import MAX_BACKWARD_BYTES
from stagewire.ring.transport.greeting import Greeting, read_greeting
from stagewire.ring.transport.interface import (
    BadHandshake,
    Connected,
    Disconnected,
    Event,
    PortTakenError,
    Received,
    Transport,
    UnreachableError,
)
from stagewire.ring.transport.memory import MemoryNetwork, MemoryTransport
from stagewire.ring.transport.security import OPEN, RingKey, Security
from stagewire.ring.transport.zmq_transport import ZmqTransport
from stagewire.wire.messages import Call
from unit.ring_harness import OWN_PORTS, QUICKSTART_PORTS, Record, make_config, make_identity

HOST = "127.0.0.1"
MAX_FRAME_BYTES = 4 << 20
DEADLINE_S = 20.0
P, S = Side.PREDECESSOR, Side.SUCCESSOR


@dataclass
class End:
    """A transport and everything that happened to it."""

    transport: Transport
    events: list[Event] = field(default_factory=list)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def received(self) -> list[tuple[bytes, ...]]:
        return [tuple(bytes(f) for f in event.frames) for event in self.events if isinstance(event, Received)]

    @property
    def peers(self) -> list[bytes]:
        return [event.peer for event in self.events if isinstance(event, Received)]


class Network:
    """Makes transports that reach each other; closes what is left."""

    def __init__(self, make: Callable[[], Transport]) -> None:
        self.make = make
        self.ends: list[End] = []

    def end(self) -> End:
        self.ends.append(End(self.make()))
        return self.ends[-1]

    def poll(self, timeout_s: float = 0.01) -> None:
        for end in self.ends:
            end.events += end.transport.poll(timeout_s)

    def until(self, condition: Callable[[], object], limit_s: float = DEADLINE_S) -> None:
        """Turns everything until ``condition``; fails with what happened instead."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, [end.events for end in self.ends]
            self.poll()

    def pair(self) -> tuple[End, End, int]:
        """A predecessor that listens, a successor connected to it, and the port."""
        before, after = self.end(), self.end()
        port = before.transport.bind(0).port
        self.connect(after, port)
        return before, after, port

    def connect(self, end: End, port: int) -> None:
        end.transport.connect(P, Address(HOST, port))
        self.until(lambda: end.of(Connected))

    def close(self) -> None:
        for end in self.ends:
            end.transport.close(0)


def memory() -> Callable[[], Transport]:
    network = MemoryNetwork()
    return lambda: MemoryTransport(network)


def over_zmq(security: Security = OPEN) -> Callable[[], Transport]:
    return lambda: ZmqTransport(HOST, MAX_FRAME_BYTES, security)


# How a ring's connections can be protected, given a folder for local sockets.
SECURITIES: dict[str, Callable[[Path], Security]] = {
    "plain": lambda folder: OPEN,
    "local": lambda folder: Security.of_folder(folder),
    "key": lambda folder: Security(RingKey(b"l" * 32, b"c" * 32)),
}


@pytest.fixture(params=["memory", *SECURITIES])
def network(request: pytest.FixtureRequest, socket_folder: Path) -> Iterator[Network]:
    network = Network(memory() if request.param == "memory" else over_zmq(SECURITIES[request.param](socket_folder)))
    yield network
    network.close()


@pytest.fixture
def zmq_network() -> Iterator[Network]:
    network = Network(over_zmq())
    yield network
    network.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


class TestContract:
    def test_bind_to_any_port_and_to_a_second_one(self, network: Network) -> None:
        end = network.end()
        ports = {end.transport.bind(0).port, end.transport.bind(0).port}
        assert len(ports) == 2
        for port in ports:
            network.connect(network.end(), port)

    def test_a_port_that_is_taken(self, network: Network) -> None:
        port = network.end().transport.bind(0).port
        late = network.end()
        with pytest.raises(PortTakenError):
            late.transport.bind(port)
        assert late.transport.bind(0).port != port

    def test_a_port_is_free_again_after_close(self, network: Network) -> None:
        first, second = network.end(), network.end()
        port = first.transport.bind(0).port
        first.transport.close(0)
        network.ends.remove(first)
        assert second.transport.bind(port).port == port

    def test_nobody_listens(self, network: Network) -> None:
        end = network.end()
        end.transport.connect(P, Address(HOST, free_port()))
        network.until(lambda: end.of(Disconnected))
        with pytest.raises(UnreachableError):
            end.transport.send(P, b"", [b"x"])

    def test_connected_only_once_it_can_send(self, network: Network) -> None:
        before, after = network.end(), network.end()
        port = before.transport.bind(0).port
        with pytest.raises(UnreachableError):
            after.transport.send(P, b"", [b"x"])
        network.connect(after, port)
        after.transport.send(P, b"", [b"x"])
        network.until(lambda: before.received == [(b"x",)])

    def test_both_ways_with_several_peers(self, network: Network) -> None:
        before, first, port = network.pair()
        second = network.end()
        network.connect(second, port)
        first.transport.send(P, b"", [b"from", b"first"])
        second.transport.send(P, b"", [b"from", b"second", b""])
        network.until(lambda: len(before.received) == 2)
        assert set(before.received) == {(b"from", b"first"), (b"from", b"second", b"")}
        for event in before.take():
            assert isinstance(event, Received)
            before.transport.send(S, event.peer, [b"to", event.frames[1]])
        network.until(lambda: first.received and second.received)
        assert first.received == [(b"to", b"first")]
        assert second.received == [(b"to", b"second")]
        assert {peer for end in (first, second) for peer in end.peers} == {b""}

    def test_two_sides_at_once(self, network: Network) -> None:
        """A worker on a shared port: a predecessor and the port's owner, both outgoing."""
        before, after, _ = network.pair()
        owner = network.end()
        after.transport.connect(Side.OWNER, owner.transport.bind(0))
        network.until(
            lambda: any(event.side is Side.OWNER for event in after.of(Connected) if isinstance(event, Connected))
        )
        after.transport.send(Side.OWNER, b"", [b"register"])
        after.transport.send(P, b"", [b"hello"])
        network.until(lambda: before.received == [(b"hello",)] and owner.received == [(b"register",)])
        owner.transport.send(S, owner.peers[0], [b"registered"])
        network.until(lambda: after.of(Received))
        (event,) = after.of(Received)
        assert isinstance(event, Received)
        assert event.side is Side.OWNER

    def test_order_is_kept(self, network: Network) -> None:
        before, after, _ = network.pair()
        for number in range(300):
            after.transport.send(P, b"", [str(number).encode()])
        network.until(lambda: len(before.received) == 300)
        assert before.received == [(str(number).encode(),) for number in range(300)]

    @pytest.mark.parametrize("num_bytes", [0, 1, 65535, 65536, 3 << 20])
    def test_frames_of_any_size(self, network: Network, num_bytes: int) -> None:
        before, after, _ = network.pair()
        after.transport.send(P, b"", [b"hello"])
        network.until(lambda: before.received)
        frame = os.urandom(num_bytes)
        before.transport.send(S, before.peers[0], [b"header", memoryview(frame), bytearray(frame)])
        network.until(lambda: after.received)
        assert after.received == [(b"header", frame, frame)]

    def test_loss_of_the_predecessor_is_seen(self, network: Network) -> None:
        before, after, _ = network.pair()
        before.transport.close(0)
        network.ends.remove(before)
        network.until(lambda: after.of(Disconnected))
        with pytest.raises(UnreachableError):
            after.transport.send(P, b"", [b"x"])

    def test_what_was_sent_before_the_end_arrives_before_it(self, network: Network) -> None:
        before, after, _ = network.pair()
        after.transport.send(P, b"", [b"hello"])
        network.until(lambda: before.received)
        after.take()
        for number in range(20):
            before.transport.send(S, before.peers[0], [b"bye", str(number).encode()])
        before.transport.close()
        network.ends.remove(before)
        network.until(lambda: after.of(Disconnected))
        assert [type(event) for event in after.events] == [Received] * 20 + [Disconnected]

    def test_what_is_queued_at_the_end_has_time_to_leave(self, network: Network) -> None:
        """More than the system's buffers hold: a step's tensors, and the Bye behind them."""
        before, after, _ = network.pair()
        after.transport.send(P, b"", [b"hello"])
        network.until(lambda: before.received)
        sizes = [MAX_FRAME_BYTES // 2] * 16 + [3]
        for size in sizes:
            before.transport.send(S, before.peers[0], [bytes(size)])
        closing = threading.Thread(target=before.transport.close, args=(DEADLINE_S,))
        network.ends.remove(before)
        closing.start()
        network.until(lambda: after.of(Disconnected))
        closing.join()
        assert [len(frame) for (frame,) in after.received] == sizes

    def test_a_leaving_successors_last_words_arrive(self, network: Network) -> None:
        before, after, _ = network.pair()
        for number in range(20):
            after.transport.send(P, b"", [b"refused", str(number).encode()])
        after.transport.close()
        network.ends.remove(after)
        network.until(lambda: len(before.received) == 20)

    def test_sending_to_a_gone_successor(self, network: Network) -> None:
        before, after, _ = network.pair()
        after.transport.send(P, b"", [b"hello"])
        network.until(lambda: before.received)
        peer = before.peers[0]
        after.transport.close(0)
        network.ends.remove(after)

        def is_unreachable() -> bool:
            try:
                before.transport.send(S, peer, [b"x"])
            except UnreachableError:
                return True
            return False

        network.until(is_unreachable)

    def test_sending_to_somebody_who_never_was(self, network: Network) -> None:
        end = network.end()
        end.transport.bind(0)
        with pytest.raises(UnreachableError):
            end.transport.send(S, b"nobody", [b"x"])

    def test_a_new_connection_replaces_the_old_one(self, network: Network) -> None:
        before, after, port = network.pair()
        after.transport.send(P, b"", [b"one"])
        network.until(lambda: before.received)
        after.take()
        network.connect(after, port)
        after.transport.send(P, b"", [b"two"])
        network.until(lambda: len(before.received) == 2)
        assert len(set(before.peers)) == 2
        assert not after.of(Disconnected)
        before.transport.send(S, before.peers[1], [b"answer"])
        network.until(lambda: after.received == [(b"answer",)])

    def test_wake_ends_a_poll_of_another_thread(self, network: Network) -> None:
        end = network.end()
        polls: list[float] = []

        def wait() -> None:
            began = time.monotonic()
            end.transport.poll(DEADLINE_S)
            polls.append(time.monotonic() - began)

        thread = threading.Thread(target=wait)
        thread.start()
        while thread.is_alive():  # whether it waits already or not yet, one wake is enough
            end.transport.wake()
            thread.join(0.05)
        assert polls[0] < DEADLINE_S / 2

    def test_close_is_idempotent_and_wake_after_it_harmless(self, network: Network) -> None:
        end = network.end()
        end.transport.bind(0)
        for _ in range(2):
            end.transport.close()
        end.transport.wake()
        network.ends.remove(end)

    def test_close_is_quick_with_frames_that_cannot_leave(self, network: Network) -> None:
        before, after, _ = network.pair()
        after.transport.send(P, b"", [b"hello"])
        network.until(lambda: before.received)
        for _ in range(50):  # nobody reads them
            before.transport.send(S, before.peers[0], [bytes(1 << 20)])
        began = time.monotonic()
        before.transport.close()
        assert time.monotonic() - began < 2
        network.ends.remove(before)

    def test_nothing_is_left_behind(self, network: Network) -> None:
        def count() -> tuple[int, int]:
            return threading.active_count(), len(os.listdir("/proc/self/fd"))

        self._open_and_close(network)  # whatever is opened once per process
        at_first = count()
        for _ in range(3):
            self._open_and_close(network)
        assert count() == at_first

    def _open_and_close(self, network: Network) -> None:
        before, after, port = network.pair()
        for _ in range(3):
            after.take()
            network.connect(after, port)
        for end in (before, after):
            end.transport.close(0)
            network.ends.remove(end)


class Listener:
    """A plain TCP server that is no stage: accepts, sends ``greeting``, then perhaps hangs up."""

    def __init__(self, greeting: bytes = b"", hangs_up: bool = False) -> None:
        self._server = socket.create_server((HOST, 0))
        self.port = int(self._server.getsockname()[1])
        self._connections: list[socket.socket] = []
        self._greeting = greeting
        self._hangs_up = hangs_up
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._connections.append(connection)
            if self._greeting:
                connection.recv(10)
                connection.sendall(self._greeting)
            if self._hangs_up:
                connection.close()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self._connections:
            connection.close()
        self._thread.join(5)


class TestZmq:
    """What only real sockets can meet."""

    def test_large_frames_are_not_copied_and_stay_valid(self, zmq_network: Network) -> None:
        before, after, _ = zmq_network.pair()
        after.transport.send(P, b"", [b"hello"])
        zmq_network.until(lambda: before.received)
        after.take()
        frame = bytearray(os.urandom(2 << 20))
        before.transport.send(S, before.peers[0], [frame])
        zmq_network.until(lambda: after.of(Received))
        (event,) = after.of(Received)
        assert isinstance(event, Received)
        assert isinstance(event.frames[0], memoryview)
        after.transport.close(0)
        zmq_network.ends.remove(after)
        assert event.frames[0] == frame

    @pytest.mark.parametrize("garbage", [b"\xff" * 64, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, b"SSH-2.0"])
    def test_garbage_on_the_port(self, zmq_network: Network, garbage: bytes) -> None:
        """Seen as a bad handshake or as frames that do not decode; the connections of others go on."""
        before, after, port = zmq_network.pair()
        with socket.create_connection((HOST, port)) as stranger:
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            zmq_network.until(lambda: before.events)
        assert all(isinstance(event, (BadHandshake, Received)) for event in before.events)
        assert before.events[0] == BadHandshake(S) or before.received
        before.take()
        after.transport.send(P, b"", [b"still there"])
        zmq_network.until(lambda: (b"still there",) in before.received)

    def test_a_predecessor_that_says_nothing(self, zmq_network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("stagewire.ring.rules.timeouts.HANDSHAKE_TIMEOUT_MS", 300)
        listener, end = Listener(), zmq_network.end()
        end.transport.connect(P, Address(HOST, listener.port))
        zmq_network.until(lambda: end.events)
        assert end.events == [BadHandshake(P)]
        listener.close()

    @pytest.mark.parametrize(
        "greeting",
        [b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", b"220 mail.example ESMTP\r\n", b"\xff" * 64],
    )
    def test_a_predecessor_that_is_another_server(
        self, zmq_network: Network, greeting: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stagewire.ring.rules.timeouts.HANDSHAKE_TIMEOUT_MS", 300)
        listener, end = Listener(greeting, hangs_up=True), zmq_network.end()
        end.transport.connect(P, Address(HOST, listener.port))
        zmq_network.until(lambda: end.of(BadHandshake) or end.of(Received) or end.of(Disconnected))
        assert end.of(BadHandshake)
        listener.close()

    def test_a_server_that_speaks_slowly_holds_nobody_up(self) -> None:
        """A byte at a time, each well within the limit of one read."""
        with socket.create_server((HOST, 0)) as server:
            said = threading.Event()

            def drip() -> None:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    while not said.wait(0.1):
                        connection.sendall(b"\xff")

            speaker = threading.Thread(target=drip)
            speaker.start()
            began_at = time.monotonic()
            assert read_greeting(HOST, server.getsockname()[1]) is Greeting.SILENT
            took_s = time.monotonic() - began_at
            said.set()
            speaker.join()
        assert took_s < 3 * timeouts.GREETING_TIMEOUT_S + 0.5

    def test_bound_to_all_addresses_and_called_on_loopback(self, tmp_path: Path) -> None:
        """Callers of loopback look for a Unix socket, whatever address the listener was given."""
        (tmp_path / "s").mkdir(mode=0o700)
        security = Security.of_folder(tmp_path / "s", allows_insecure=True)
        hosts = iter(("0.0.0.0", HOST))
        network = Network(lambda: ZmqTransport(next(hosts), MAX_FRAME_BYTES, security))
        network.pair()
        network.close()

    def test_a_proxy_without_a_backend_is_not_another_program(self, zmq_network: Network) -> None:
        listener, end = Listener(hangs_up=True), zmq_network.end()
        end.transport.connect(P, Address(HOST, listener.port))
        zmq_network.until(lambda: end.events)
        assert end.of(Disconnected)
        listener.close()

    def test_a_frame_too_large_ends_its_own_connection_only(self, zmq_network: Network) -> None:
        before, after, port = zmq_network.pair()
        rude = zmq_network.end()
        zmq_network.connect(rude, port)
        rude.transport.send(P, b"", [bytes(MAX_BACKWARD_BYTES + 1)])
        zmq_network.until(lambda: rude.of(Disconnected))
        after.transport.send(P, b"", [b"still there"])
        zmq_network.until(lambda: before.received == [(b"still there",)])
        before.transport.send(S, before.peers[0], [bytes(MAX_FRAME_BYTES + 1)])
        zmq_network.until(lambda: after.of(Disconnected))

    def test_ipv6(self) -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 on this machine")
        network = Network(lambda: ZmqTransport("::1", MAX_FRAME_BYTES, OPEN))
        before, after = network.end(), network.end()
        after.transport.connect(P, before.transport.bind(0))
        network.until(lambda: Connected(P) in after.events)
        after.transport.send(P, b"", [b"six"])
        network.until(lambda: before.received == [(b"six",)])
        network.close()

    def test_a_name_that_does_not_resolve(self, zmq_network: Network) -> None:
        end = zmq_network.end()
        for name in ("no-such-host.invalid", "x" * 80 + ".invalid", "a..b"):
            end.transport.connect(P, Address(name, 1))
            zmq_network.until(lambda: end.of(Disconnected))
            (event,) = end.take()
            assert isinstance(event, Disconnected)
            assert name in event.note

    def test_binding_to_an_address_of_another_machine(self) -> None:
        transport = ZmqTransport("192.0.2.1", MAX_FRAME_BYTES, OPEN)
        with pytest.raises(ConfigError, match="--pipeline-local-bind-host"):
            transport.bind(0)
        transport.close()


@pytest.mark.parametrize("ports", [QUICKSTART_PORTS, OWN_PORTS], ids=["one port", "own ports"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize("kind", list(SECURITIES))
def test_a_ring_over_sockets(
    ports: tuple[tuple[int, int], ...], order: tuple[int, ...], kind: str, socket_folder: Path
) -> None:
    """Four nodes over ZeroMQ: whole, a call goes round, one dies, the others name it, it comes back."""
    real = {port: free_port() for port in {port for pair in ports for port in pair}}
    layout = [(real[own], real[before]) for own, before in ports]
    nodes: dict[int, Ring] = {}
    records = {index: Record() for index in range(4)}
    transports: dict[int, Transport] = {}

    def start(index: int, incarnation: str) -> None:
        transports[index] = over_zmq(SECURITIES[kind](socket_folder))()
        config = make_config(index, layout)
        nodes[index] = Ring(config, make_identity(config, incarnation), transports[index], records[index])
        nodes[index].turn(0.05)

    def turn_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, nodes
            for index, node in list(nodes.items()):
                if not node.turn(0.01):
                    transports[index].close()
                    del nodes[index]

    for index in order:
        start(index, f"process {index}")
    turn_until(lambda: all(node.state.phase is Phase.OPEN for node in nodes.values()))
    nodes[0].send(Call(nodes[0].state.epoch, 1, "check_health"), [b"args"])
    turn_until(lambda: all(not nodes[index].inbox.empty() for index in (1, 2, 3)))
    transports[2].close(0)
    del nodes[2]
    turn_until(lambda: all(node.state.phase is Phase.LINKING for node in nodes.values()))
    for index in (0, 1, 3):
        assert "stage 2 is lost" in str(records[index].broken[0][1])
    start(2, "another process")
    turn_until(lambda: all(node.state.phase is Phase.OPEN for node in nodes.values()))
    assert len({node.state.epoch for node in nodes.values()}) == 1
    for transport in transports.values():
        transport.close(0)
