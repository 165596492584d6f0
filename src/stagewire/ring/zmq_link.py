"""The ring's connections over ZeroMQ. The only file that imports zmq.

A stage has one ROUTER socket that it binds (successors and strangers come in there), one DEALER to its predecessor
and, if it shares a port with another stage of its host, one DEALER to that port's owner. Every socket is touched by
one thread only; `wake` goes through an eventfd.

Connections are never retried by ZeroMQ: a lost one is an event, and the ring's state decides where to connect next
(names are resolved again, a Redirect may have expired).

Whether a peer is still there is asked on a connection of its own, the probe, which carries nothing. ZeroMQ's I/O
threads alone keep it up, so a forward pass does not delay it and a frozen process is told from a busy one. It may be
impatient because losing it costs nothing: it is made anew, and only a peer that does not answer that either is lost.
The link itself could not be: after a stall of this machine libzmq's timers expire before it reads what came meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from stagewire.config import Address
from stagewire.errors import ConfigError
from stagewire.ring.actions import Side
from stagewire.ring.link import (
    BadHandshake,
    Connected,
    Disconnected,
    Event,
    PortTakenError,
    Received,
    UnreachableError,
)
from stagewire.wire.codec import Frame

__all__ = ["PROBE_PATIENCE_ENV", "ZmqTransport", "local_host_towards"]

HEARTBEAT_INTERVAL_MS = 500
# Of links: long, see the module.
HEARTBEAT_TIMEOUT_MS = 90_000
# Of probes. A frozen peer is lost after 3.5 to 4.1 s, below the 5 s within which open requests must end.
PROBE_HEARTBEAT_TIMEOUT_MS = 2000
PROBE_RETRY_MS = 100
PROBE_MAX_BYTES = 1024  # ZeroMQ's own commands; nothing else comes
# For how long a probe may be down. Only time in which this thread ran counts: a stall of ours is not the peer's.
# Virtual machines were seen that hold one core up for ten seconds; who has to live on one can ask for more.
PROBE_PATIENCE_ENV = "STAGEWIRE_PEER_PATIENCE_S"
PROBE_PATIENCE_S = 1.5
MAX_PROBE_PATIENCE_S = 60.0
MAX_COUNTED_TURN_S = 0.3
# Looking at the probes costs as much as a small message: not at every one.
LOOK_INTERVAL_S = 0.1
# A port that accepts and says nothing is given up after this time; ZeroMQ's default is 30 s.
HANDSHAKE_TIMEOUT_MS = 5000
CONNECT_TIMEOUT_MS = 5000
RECONNECT_DELAY_S = 0.2
# ZeroMQ must not reconnect by itself. Its own "never" (-1) ends the pipe with the connection and drops what was not
# read yet, which is where the last words of a stage are (libzmq 4.3.5: term_endpoint does not wait for the reader).
NEVER_MS = 24 * 3600 * 1000
OTHER_PROGRAM_TIMEOUT_S = 0.3
# Frames below this size are copied, which is cheaper than keeping a Python buffer alive across threads.
COPY_THRESHOLD_BYTES = 65536
# A peer that never stops sending does not keep the ring from its other work.
MAX_MESSAGES_PER_READ = 64

_BAD_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_CONNECT_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | _BAD_HANDSHAKES | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_PROBE_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def resolve(address: Address) -> str:
    """The numeric form of a host, IPv4 first. Raises OSError when the name does not resolve."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # an empty or overlong label; the codec's own message names no host
        raise OSError(f"{address.host!r} is not a host name") from error
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def local_host_towards(address: Address) -> str:
    """The local address of the interface that reaches ``address``: where a stage binds by default.

    Loopback only when the address is loopback. Nothing is sent.

    Raises:
        ConfigError: the name does not resolve or there is no route.
    """
    try:
        host = resolve(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, address.port))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"the predecessor's address {address} cannot be reached from here ({error}): "
            "correct it, or give --pipeline-local-bind-host if the route comes up later"
        ) from error


def is_other_program(host: str, port: int) -> bool:
    """Whether what listens there answers a ZeroMQ greeting with something else. Hanging up or silence is no answer."""
    try:
        with socket.create_connection((host, port), OTHER_PROGRAM_TIMEOUT_S) as probe:
            probe.settimeout(OTHER_PROGRAM_TIMEOUT_S)
            probe.sendall(b"\xff" + bytes(8) + b"\x7f")
            answer = probe.recv(1)
    except OSError:
        return False
    return answer not in (b"", b"\xff")


def endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class _Connection:
    """A DEALER socket with its monitor, connecting from the start."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        port: int,
        max_frame_bytes: int,
        options: Mapping[zmq.SocketOption, int],
        events: int,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        _set_common(self.socket, max_frame_bytes)
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        if ":" in host:
            self.socket.setsockopt(zmq.IPV6, 1)
        self.monitor = self.socket.get_monitor_socket(events)
        self.socket.connect(endpoint(host, port))

    def close(self, linger_ms: int) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)  # or the context's end waits for it for ever
        self.socket.close(linger_ms)


class _Probe(_Connection):
    """See the module. ZeroMQ reconnects it by itself."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, port: int, patience_s: float) -> None:
        options = {
            zmq.HEARTBEAT_TIMEOUT: PROBE_HEARTBEAT_TIMEOUT_MS,
            zmq.RECONNECT_IVL: PROBE_RETRY_MS,
            zmq.HANDSHAKE_IVL: PROBE_HEARTBEAT_TIMEOUT_MS,
        }
        super().__init__(context, host, port, PROBE_MAX_BYTES, options, _PROBE_EVENTS)
        self._is_up = False
        self._down_s = 0.0
        self._patience_s = patience_s
        self._seen_at = time.monotonic()

    def is_unanswered(self, now: float) -> bool:
        """Call it a few times a second. Whether the peer's I/O thread has been silent for too long."""
        while self.monitor.poll(0):
            self._is_up = recv_monitor_message(self.monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        turn_s = min(now - self._seen_at, MAX_COUNTED_TURN_S)
        self._seen_at = now
        self._down_s = 0.0 if self._is_up else self._down_s + turn_s
        return self._down_s >= self._patience_s


class _Dealer(_Connection):
    """One outgoing link; replaced, never reconnected."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, port: int, max_frame_bytes: int) -> None:
        options = {zmq.RECONNECT_IVL: NEVER_MS, zmq.CONNECT_TIMEOUT: CONNECT_TIMEOUT_MS}
        super().__init__(context, host, port, max_frame_bytes, options, _CONNECT_EVENTS)
        self.host, self.port = host, port
        self.is_up = False
        self.began_at = time.monotonic()
        self.probe: _Probe | None = None
        self._context = context

    def came_up(self, patience_s: float) -> None:
        self.is_up = True
        self.probe = _Probe(self._context, self.host, self.port, patience_s)

    def is_lost(self, now: float) -> bool:
        return self.probe is not None and self.probe.is_unanswered(now)

    def close(self, linger_ms: int) -> None:
        if self.probe is not None:
            self.probe.close(0)
        super().close(linger_ms)


def _set_common(sock: zmq.Socket[bytes], max_frame_bytes: int) -> None:
    sock.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    sock.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.copy_threshold = COPY_THRESHOLD_BYTES


def _read_patience() -> float:
    text = os.environ.get(PROBE_PATIENCE_ENV)
    if not text:
        return PROBE_PATIENCE_S
    try:
        patience_s = float(text)
    except ValueError:
        patience_s = math.nan
    if not 0 < patience_s <= MAX_PROBE_PATIENCE_S:
        raise ConfigError(
            f"{PROBE_PATIENCE_ENV}={text}: expected seconds, above 0 and at most {MAX_PROBE_PATIENCE_S:g}; "
            f"unset, it is {PROBE_PATIENCE_S:g}"
        )
    return patience_s


class ZmqTransport:
    """See `stagewire.ring.link.Transport`.

    Args:
        bind_host: numeric local address to listen on.
        max_frame_bytes: larger frames end their connection before memory is taken for them.
    """

    def __init__(self, bind_host: str, max_frame_bytes: int) -> None:
        self._bind_host = bind_host
        self._max_frame_bytes = max_frame_bytes
        self._patience_s = _read_patience()
        self._next_look_at = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        _set_common(self._router, max_frame_bytes)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if ":" in bind_host:
            self._router.setsockopt(zmq.IPV6, 1)
        self._router_monitor = self._router.get_monitor_socket(_BAD_HANDSHAKES)
        self._dealers: dict[Side, _Dealer] = {}
        self._pending: dict[Side, tuple[float, Address]] = {}  # connections to begin: when, where
        self._events: deque[Event] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._router_monitor, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._attempted: set[Side] = set()
        self._closed = False
        self._wake_lock = threading.RLock()  # a signal handler may interrupt `wake` and call it again

    def __repr__(self) -> str:
        return f"ZmqTransport(host={self._bind_host}, connections={[side.value for side in self._dealers]})"

    def bind(self, port: int) -> int:
        try:
            self._router.bind(endpoint(self._bind_host, port))
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTakenError(port) from error
            raise ConfigError(
                f"cannot listen on {self._bind_host} port {port} ({error}): "
                "give --pipeline-local-bind-host an address of this machine"
            ) from error
        bound = self._router.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return int(bound.rstrip(b"\0").rpartition(b":")[2])

    def connect(self, side: Side, address: Address) -> None:
        self._drop(side, linger_ms=0)
        # The first attempt at once; later ones after a pause, so that a refused connection does not spin.
        delay = RECONNECT_DELAY_S if side in self._attempted else 0.0
        self._attempted.add(side)
        self._pending[side] = (time.monotonic() + delay, address)

    def send(self, side: Side, peer: bytes, frames: Sequence[Frame]) -> None:
        sock = self._router if side is Side.SUCCESSOR else self._dealer_socket(side)
        parts: list[Frame] = [peer, *frames] if side is Side.SUCCESSOR else list(frames)
        try:
            sock.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise UnreachableError(side.value) from error
            raise

    def poll(self, timeout_s: float) -> list[Event]:
        now = time.monotonic()
        for side, (when, address) in list(self._pending.items()):
            if when <= now:
                del self._pending[side]
                self._begin(side, address)
            else:
                timeout_s = min(timeout_s, when - now)
        if self._events:
            timeout_s = 0
        for item, _ in self._poller.poll(math.ceil(timeout_s * 1000)):
            self._read(item)
        self._give_up(time.monotonic())
        events = list(self._events)
        self._events.clear()
        return events

    def wake(self) -> None:
        with self._wake_lock:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self._wake_fd, 1)

    def close(self, linger_s: float = 1.0) -> None:
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_fd)
        linger_ms = int(linger_s * 1000)
        for side in list(self._dealers):
            self._drop(side, linger_ms)
        self._router.disable_monitor()
        self._router_monitor.close(0)
        self._router.close(linger_ms)
        self._context.term()

    def _dealer_socket(self, side: Side) -> zmq.Socket[bytes]:
        dealer = self._dealers.get(side)
        if dealer is None or not dealer.is_up:
            raise UnreachableError(side.value)
        return dealer.socket

    def _begin(self, side: Side, address: Address) -> None:
        try:
            host = resolve(address)
        except OSError as error:
            self._events.append(Disconnected(side, f"{address.host} does not resolve: {error}"))
            return
        dealer = _Dealer(self._context, host, address.port, self._max_frame_bytes)
        self._dealers[side] = dealer
        self._poller.register(dealer.socket, zmq.POLLIN)
        self._poller.register(dealer.monitor, zmq.POLLIN)

    def _give_up(self, now: float) -> None:
        """On peers that do not answer the probe, and on attempts whose end the monitor did not report."""
        if now < self._next_look_at:
            return
        self._next_look_at = now + LOOK_INTERVAL_S
        limit_s = (CONNECT_TIMEOUT_MS + HANDSHAKE_TIMEOUT_MS) / 1000 + 1
        for side, dealer in list(self._dealers.items()):
            if dealer.is_up and dealer.is_lost(now):
                self._read_frames(dealer.socket, side)  # what arrived before the end still counts
                self._lose(side, "it has stopped answering")
            elif not dealer.is_up and now - dealer.began_at > limit_s:
                self._lose(side, "no answer")

    def _lose(self, side: Side, note: str) -> None:
        self._drop(side, linger_ms=0)
        self._events.append(Disconnected(side, note))

    def _drop(self, side: Side, linger_ms: int) -> None:
        self._pending.pop(side, None)
        dealer = self._dealers.pop(side, None)
        if dealer is None:
            return
        self._poller.unregister(dealer.socket)
        self._poller.unregister(dealer.monitor)
        dealer.close(linger_ms)

    def _read(self, item: object) -> None:
        if item is self._router:
            self._read_frames(self._router, Side.SUCCESSOR, MAX_MESSAGES_PER_READ)
        elif item == self._wake_fd:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        elif item is self._router_monitor:
            recv_monitor_message(self._router_monitor)
            self._events.append(BadHandshake(Side.SUCCESSOR))
        else:
            for side, dealer in list(self._dealers.items()):
                if item is dealer.socket:
                    self._read_frames(dealer.socket, side, MAX_MESSAGES_PER_READ)
                elif item is dealer.monitor:
                    self._read_monitor(side, dealer)

    def _read_frames(self, sock: zmq.Socket[bytes], side: Side, most: int | None = None) -> None:
        for _ in itertools.count() if most is None else range(most):
            try:
                frames = sock.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            buffers: list[Frame] = [frame.buffer for frame in frames]
            peer = b""
            if side is Side.SUCCESSOR:
                peer, buffers = bytes(buffers[0]), buffers[1:]
            self._events.append(Received(side, peer, buffers))

    def _read_monitor(self, side: Side, dealer: _Dealer) -> None:
        event = recv_monitor_message(dealer.monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            dealer.came_up(self._patience_s)
            self._events.append(Connected(side))
            return
        was_up = dealer.is_up
        if was_up:
            self._read_frames(dealer.socket, side)  # what arrived before the end still counts
        self._drop(side, linger_ms=0)
        if not event & _BAD_HANDSHAKES:
            note = "the connection was lost" if was_up else "nothing listens there yet"
            self._events.append(Disconnected(side, note))
        elif self._is_certain(event, dealer):
            self._events.append(BadHandshake(side))
        else:
            note = "something accepts connections there and ends them at once: a proxy, or a stage that is not up yet"
            self._events.append(Disconnected(side, note))

    def _is_certain(self, event: int, dealer: _Dealer) -> bool:
        """A proxy whose stage is not up yet accepts and hangs up; that is not yet another program."""
        if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            return True
        was_mute = time.monotonic() - dealer.began_at >= HANDSHAKE_TIMEOUT_MS / 1000 * 0.9
        return was_mute or is_other_program(dealer.host, dealer.port)
