"""The ring's connections over ZeroMQ. Beside ring/zmq_listener.py the only file that imports zmq.

A stage has one ROUTER socket that it binds (successors and strangers come in there), one DEALER to its predecessor
and, if it shares a port with another stage of its host, one DEALER to that port's owner. Every socket is touched by
one thread only; `wake` goes through an eventfd.

Connections are never retried by ZeroMQ: a lost one is an event, and the ring's state decides where to connect next
(names are resolved again, a Redirect may have expired).

Whether a peer is still there is asked on a connection of its own, the probe, which carries nothing. ZeroMQ's I/O
threads alone keep it up, so a forward pass does not delay it and a frozen process is told from a busy one. It may be
impatient because losing it costs nothing: it is made anew, and only a peer that does not answer that either is lost.
The link itself could not be: after a stall of this machine libzmq's timers expire before it reads what came meanwhile.
But a probe that is made anew may reach another process than the link does: a link that nothing comes by is lost, too.

How connections are protected is decided in ring/security.py. Where that says a Unix socket, the TCP port is held as
well, without an answer, so that a port has one owner in either case. With a key every connection speaks CURVE: a caller
needs the listener's public half to begin (it is nowhere but in the key file), and pyzmq's authenticator, served by the
thread that owns the sockets, looks at its own half.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from stagewire.config import KEY_FILE_FLAG, Address
from stagewire.errors import ConfigError
from stagewire.ring import hosts
from stagewire.ring.actions import Side, Way
from stagewire.ring.greeting import Greeting, describe_absence, read_greeting
from stagewire.ring.intake import Intake, Outflow
from stagewire.ring.link import (
    BadHandshake,
    Connected,
    Disconnected,
    Event,
    Received,
    Stalled,
    UnreachableError,
)
from stagewire.ring.security import RingKey, Security
from stagewire.ring.zmq_listener import Listener
from stagewire.wire.codec import MAX_HEADER_BYTES, Frame

__all__ = ["PROBE_PATIENCE_ENV", "ZmqTransport"]

# A link has no heartbeats of ZeroMQ's: libzmq 4.3.5 aborts ("Assertion failed: !_io_error") when one is due on a
# connection that has ended while what came by it could not be queued. Neither may the queue of received messages be
# bounded by their number for that reason; bytes are counted instead (ring/intake.py).
# A stage says something about once a second on every connection that it has accepted. After this time without a word,
# of the peer or of its kernel, a link is lost: long, because Python may hold a stage's ring up.
SILENT_LINK_S = 90
# The same once the probe had to be made anew. Both are besides the patience with the probe, during which nothing comes.
DOUBTED_LINK_S = 10
# Of probes. With the patience below, a frozen peer is lost within 2 s.
PROBE_HEARTBEAT_INTERVAL_MS = 250
PROBE_HEARTBEAT_TIMEOUT_MS = 700
PROBE_HANDSHAKE_TIMEOUT_MS = 2000
PROBE_RETRY_MS = 100
PROBE_MAX_BYTES = 1024  # ZeroMQ's own commands; nothing else comes
# For how long a probe may be down. Only time in which this thread ran counts: a stall of ours is not the peer's.
# Virtual machines were seen that hold one core up for ten seconds: each time that a peer was lost and had only been
# slow, the patience doubles; who has to live on such a machine can ask for more from the beginning.
PROBE_PATIENCE_ENV = "STAGEWIRE_PEER_PATIENCE_S"
PROBE_PATIENCE_S = 0.6
MAX_LEARNT_PATIENCE_S = 10.0
MAX_PROBE_PATIENCE_S = 60.0
# For a probe that was never up yet: with a key the peer's ring thread answers, which may be deep in imports.
FIRST_PROBE_PATIENCE_S = 5.0
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
# Greetings, pings and refusals come from successors, nothing larger. Strangers get as far too, before they are known.
MAX_BACKWARD_BYTES = MAX_HEADER_BYTES
# A caller says some kilobytes a second. This much at once besides, and more is no stage's.
CALLER_BURST_BYTES = 4 * MAX_BACKWARD_BYTES
CALLER_BYTES_PER_S = MAX_BACKWARD_BYTES / 4
CALLERS_BURST_BYTES = 16 * CALLER_BURST_BYTES  # of all together
OUTFLOW_INTERVAL_S = 1.0
# TCP has sent a lost packet again five times by then, and nothing at all was acknowledged.
STALL_S = 6.0
# Of the ring's thread's time. Many connections are looked at less often.
MAX_SHARE_OF_LOOKS = 0.1
MAX_EVENTS_PER_READ = 256
ZAP_DOMAIN = b"stagewire"
# Frames below this size are copied, which is cheaper than keeping a Python buffer alive across threads.
COPY_THRESHOLD_BYTES = 65536
# A peer that never stops sending does not keep the ring from its other work.
MAX_MESSAGES_PER_READ = 64
# Of other stages on this machine, in a message.
MAX_NAMED = 4
# A link by which so many come that there is always one more to take is no stage's.
MAX_UNREAD_MESSAGES = 10_000

_BAD_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_LISTEN_EVENTS = _BAD_HANDSHAKES | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_CONNECT_EVENTS = (
    zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _BAD_HANDSHAKES | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
)
_KEY_HANDSHAKES = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_PROBE_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

_NEEDS_KEY = f"the stage there has a key: start this one with the same {KEY_FILE_FLAG}"
_HAS_NO_KEY = f"the stage there has no key: start it, like all stages of the ring, with the same {KEY_FILE_FLAG}"
_OTHER_KEY = f"the stage there has another key: copy one {KEY_FILE_FLAG} to all hosts of the ring"
_NOT_OURS = (
    "the port is not of a stage of this user on this host: it is another program's, another user's, or leads into a "
    f"container or through a tunnel, for which all stages need {KEY_FILE_FLAG}"
)


def _public(secret: bytes) -> bytes:
    return z85.decode(zmq.curve_public(z85.encode(secret)))


def _secure_caller(sock: zmq.Socket[bytes], key: RingKey) -> None:
    sock.setsockopt(zmq.CURVE_SERVERKEY, _public(key.listener))
    sock.setsockopt(zmq.CURVE_PUBLICKEY, _public(key.caller))
    sock.setsockopt(zmq.CURVE_SECRETKEY, key.caller)


def _secure_listener(sock: zmq.Socket[bytes], key: RingKey) -> None:
    sock.setsockopt(zmq.CURVE_SERVER, 1)
    sock.setsockopt(zmq.CURVE_SECRETKEY, key.listener)
    sock.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


class _Authenticator(zmq.auth.Authenticator):
    """Lets in whoever calls with the ring's own key. No thread: call `answer` when ``zap_socket`` is readable."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: RingKey) -> None:
        super().__init__(context)
        self._caller = z85.encode(_public(key.caller))
        self.configure_curve_callback(ZAP_DOMAIN.decode(), self)
        self.start()

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._caller

    def answer(self) -> None:
        with contextlib.suppress(zmq.Again):
            handling = self.handle_zap_message(self.zap_socket.recv_multipart(zmq.NOBLOCK))
            with contextlib.suppress(StopIteration):  # it awaits nothing, so one push runs it to its end
                handling.send(None)


def endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class _Connection:
    """A DEALER socket with its monitor, connecting from the start."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        target: str,
        key: RingKey | None,
        max_frame_bytes: int,
        options: Mapping[zmq.SocketOption, int],
        events: int,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        _set_common(self.socket, max_frame_bytes)
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        if key is not None:
            _secure_caller(self.socket, key)
        if target.startswith("tcp://["):
            self.socket.setsockopt(zmq.IPV6, 1)
        self.monitor = self.socket.get_monitor_socket(events)
        self.socket.connect(target)

    def close(self, linger_ms: int) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)  # or the context's end waits for it for ever
        self.socket.close(linger_ms)


class _Probe(_Connection):
    """See the module. ZeroMQ reconnects it by itself."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], target: str, key: RingKey | None, patience_s: float
    ) -> None:
        options = {
            zmq.HEARTBEAT_IVL: PROBE_HEARTBEAT_INTERVAL_MS,
            zmq.HEARTBEAT_TIMEOUT: PROBE_HEARTBEAT_TIMEOUT_MS,
            zmq.RECONNECT_IVL: PROBE_RETRY_MS,
            zmq.HANDSHAKE_IVL: PROBE_HANDSHAKE_TIMEOUT_MS,
        }
        super().__init__(context, target, key, PROBE_MAX_BYTES, options, _PROBE_EVENTS)
        self.patience_s = patience_s
        self.num_connections = 0
        self._is_up = False
        self._down_s = 0.0

    def is_unanswered(self, turn_s: float) -> bool:
        """Whether the peer's I/O thread has been silent for too long. ``turn_s``: since this was last asked."""
        while self.monitor.poll(0):
            self._is_up = recv_monitor_message(self.monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.num_connections += self._is_up
        self._down_s = 0.0 if self._is_up else self._down_s + turn_s
        return self._down_s >= (
            self.patience_s if self.num_connections else max(self.patience_s, FIRST_PROBE_PATIENCE_S)
        )

    @property
    def is_spoken_to(self) -> bool:
        """No stage does that. Nobody reads it, and a full queue is what libzmq aborts for at the next heartbeat."""
        return self.socket.poll(0) != 0


class _Fault(Enum):
    """Why a link counts as lost though its connection has not ended, for people."""

    UNANSWERED = "it has stopped answering"
    SILENT = "nothing comes by its connection any more"
    SPEAKS_TO_PROBE = "it says something where a stage says nothing"
    FLOOD = "it sends more than can be read"


@dataclass(frozen=True)
class _Route:
    """One of the ways to an address: its host and port, numeric, and the Unix socket that stands for them, if any.

    ``instead_of``: the host that was asked for, if this is another address of this machine; a stage may be reached
    under any. ``is_here``: on this machine, where there may be more routes, now or later.
    """

    host: str
    port: int
    local_path: str | None = None
    instead_of: str = ""
    is_here: bool = False

    def describe(self) -> Way:
        if not self.instead_of:
            return Way(has_others=self.is_here)
        # Loopback has many spellings. An address on a network may be of another ring of this user, with the same port.
        is_doubtful = not (hosts.is_loopback(self.instead_of) and _is_loopback_name(self.host))
        return Way(f"{self.host} port {self.port}", is_doubtful, self.is_here)


def _is_loopback_name(host: str) -> bool:
    try:
        return hosts.is_loopback(host)
    except ValueError:  # the digest of a long one, which loopback's are not
        return False


class _Dealer(_Connection):
    """One outgoing link; replaced, never reconnected."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        route: _Route,
        key: RingKey | None,
        max_frame_bytes: int,
    ) -> None:
        options = {zmq.RECONNECT_IVL: NEVER_MS, zmq.CONNECT_TIMEOUT: CONNECT_TIMEOUT_MS}
        self.route = route
        self._target = f"ipc://{route.local_path}" if route.local_path else endpoint(route.host, route.port)
        self._key = key
        super().__init__(context, self._target, self._key, max_frame_bytes, options, _CONNECT_EVENTS)
        self.intake: Intake | None = None
        self.is_up = False
        self.began_at = time.monotonic()
        self.probe: _Probe | None = None
        self._context = context
        self.num_unbroken = 0  # messages that were taken since there was none to take
        self._silent_s = 0.0
        self._seen_at = self.began_at

    def came_up(self, patience_s: float) -> None:
        self.is_up = True
        self.probe = _Probe(self._context, self._target, self._key, patience_s)
        self._seen_at = time.monotonic()

    def took_message(self) -> None:
        self.num_unbroken += 1
        self._silent_s = 0.0
        if self.intake is not None:
            self.intake.took_message()

    def find_fault(self, now: float) -> _Fault | None:
        """Call it several times a second while it is up."""
        assert self.probe is not None
        turn_s = min(now - self._seen_at, MAX_COUNTED_TURN_S)
        self._seen_at = now
        self._silent_s += turn_s
        if self.probe.is_unanswered(turn_s):
            return _Fault.UNANSWERED
        if self.probe.is_spoken_to:
            return _Fault.SPEAKS_TO_PROBE
        if self.num_unbroken >= MAX_UNREAD_MESSAGES:
            return _Fault.FLOOD
        limit_s = SILENT_LINK_S if self.probe.num_connections <= 1 else DOUBTED_LINK_S
        return _Fault.SILENT if self._silent_s >= limit_s + self.probe.patience_s else None

    def unfinished_bytes(self, now: float) -> int:
        """Of a message that is not whole yet, about; 0 over a Unix socket, where nobody counts."""
        return 0 if self.intake is None else self.intake.look(now)

    def close(self, linger_ms: int) -> None:
        if self.probe is not None:
            self.probe.close(0)
        super().close(linger_ms)


def _watch_listener(context: zmq.Context[zmq.Socket[bytes]], listener: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """Its monitor, whose queue has no end: ZeroMQ's own thread would wait for who does not read, and answer nobody."""
    address = f"inproc://stagewire-monitor-{id(listener)}"
    listener.monitor(address, _LISTEN_EVENTS)
    monitor = context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.connect(address)
    return monitor


def _set_common(sock: zmq.Socket[bytes], max_frame_bytes: int) -> None:
    sock.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    sock.setsockopt(zmq.RCVHWM, 0)  # see SILENT_LINK_S
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    # The kernel ends a connection whose other end is gone without a word: asked after a third, and then four times.
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, SILENT_LINK_S // 3)
    sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, SILENT_LINK_S // 6)
    sock.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
    sock.setsockopt(zmq.TCP_MAXRT, SILENT_LINK_S * 1000)
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
        bind_host: numeric local address to listen on; None: not known yet.
        max_frame_bytes: larger frames from a predecessor end the connection before memory is taken for them; from a
            successor, those above `MAX_BACKWARD_BYTES`.
        security: how connections are protected.
        max_message_bytes: the same of all frames of a message; default: four of the largest.
        find_host: the address to listen on as things are now, when it was not known or is gone; may raise OSError.
    """

    def __init__(
        self,
        bind_host: str | None,
        max_frame_bytes: int,
        security: Security,
        max_message_bytes: int | None = None,
        find_host: Callable[[], str] | None = None,
    ) -> None:
        self._security = security
        self._max_frame_bytes = max_frame_bytes
        self._max_message_bytes = max_message_bytes or 4 * max_frame_bytes
        self._patience_s = _read_patience()
        self._next_look_at = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        _set_common(self._router, min(max_frame_bytes, MAX_BACKWARD_BYTES))
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._listener = Listener(self._router, security, bind_host, find_host)
        self._router_monitor = _watch_listener(self._context, self._router)
        self._callers: dict[int, Intake] = {}  # by descriptor
        self._descriptors: dict[bytes, int] = {}  # of callers over TCP that have said something
        self._outflows: dict[bytes, Outflow] = {}  # to those that were answered
        self._next_look_at_outflows = 0.0
        self._next_look_at_callers = 0.0
        self._dealers: dict[Side, _Dealer] = {}
        self._pending: dict[Side, tuple[float, Address]] = {}  # connections to begin: when, where
        self._events: deque[Event] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._router_monitor, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._authenticator: _Authenticator | None = None
        if security.key is not None:
            _secure_listener(self._router, security.key)
            self._authenticator = _Authenticator(self._context, security.key)
            self._poller.register(self._authenticator.zap_socket, zmq.POLLIN)
        self._foreign_since: dict[Side, float] = {}  # ports that something holds which cannot be told yet
        self._attempted: set[Side] = set()
        self._aims: dict[Side, tuple[Address, int]] = {}  # the last address, and which of its routes is to be tried
        self._notes: dict[Side, str] = {}  # why the route that was asked for failed last
        self._closed = False
        self._wake_lock = threading.RLock()  # a signal handler may interrupt `wake` and call it again

    def __repr__(self) -> str:
        return f"ZmqTransport({self._listener!r}, connections={[side.value for side in self._dealers]})"

    def bind(self, port: int) -> Address:
        return self._listener.bind(port)

    def connect(self, side: Side, address: Address) -> None:
        if side in self._dealers and self._dealers[side].is_up:
            self._try_another_route(side)  # whoever is there is not who is looked for
        self._drop(side, linger_ms=0)
        if self._aims.get(side, (None, 0))[0] != address:
            self._aims[side] = (address, 0)
        # The first attempt at once; later ones after a pause, so that a refused connection does not spin.
        delay = RECONNECT_DELAY_S if side in self._attempted else 0.0
        self._attempted.add(side)
        self._pending[side] = (time.monotonic() + delay, address)

    def send(self, side: Side, peer: bytes, frames: Sequence[Frame]) -> None:
        sock = self._router if side is Side.SUCCESSOR else self._dealer_socket(side)
        parts: list[Frame] = [peer, *frames] if side is Side.SUCCESSOR else list(frames)
        if peer and peer not in self._outflows:
            self._watch_outflow(peer)
        try:
            sock.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise UnreachableError(side.value) from error
            raise

    def _watch_outflow(self, peer: bytes) -> None:
        descriptor = self._descriptors.get(peer)
        caller = self._callers.get(descriptor) if descriptor is not None else None
        if caller is not None:
            self._outflows[peer] = Outflow(caller.descriptor, caller.ports)

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

    def be_more_patient(self) -> float:
        self._patience_s = max(self._patience_s, min(2 * self._patience_s, MAX_LEARNT_PATIENCE_S))
        for dealer in self._dealers.values():
            if dealer.probe is not None:
                dealer.probe.patience_s = self._patience_s
        return self._patience_s

    def close(self, linger_s: float = 1.0) -> None:
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_fd)
        self._listener.hide()
        linger_ms = int(linger_s * 1000)
        for side in list(self._dealers):
            self._drop(side, linger_ms)
        self._router.disable_monitor()
        self._router_monitor.close(0)
        self._router.close(linger_ms)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
        self._listener.close()

    def _dealer_socket(self, side: Side) -> zmq.Socket[bytes]:
        dealer = self._dealers.get(side)
        if dealer is None or not dealer.is_up:
            raise UnreachableError(side.value)
        return dealer.socket

    def _begin(self, side: Side, address: Address) -> None:
        try:
            host = hosts.resolve(address)
            problem = self._security.problem(host)
            routes = [] if problem else self._find_routes(side, host, address.port)
        except (OSError, ConfigError) as error:
            problem, routes = str(error), []
        if not routes:
            self._events.append(Disconnected(side, str(problem)))
            return
        route = routes[self._aims[side][1] % len(routes)]
        dealer = _Dealer(self._context, route, self._security.key, self._max_frame_bytes)
        self._dealers[side] = dealer
        self._poller.register(dealer.socket, zmq.POLLIN)
        self._poller.register(dealer.monitor, zmq.POLLIN)

    def _find_routes(self, side: Side, host: str, port: int) -> list[_Route]:
        """To a numeric address, the best first: on this machine also to who listens on another of its addresses."""
        if not self._security.has_local_sockets or not hosts.is_own(host):
            return [_Route(host, port)]
        path = self._security.socket_path(host, port)
        plain, local = _Route(host, port, is_here=True), _Route(host, port, path, is_here=True)
        routes = [local] if self._security.is_local(host) else [*([local] if os.path.exists(path) else []), plain]
        if side is not Side.OWNER:  # a port's owner has this very address
            others = self._security.other_paths(host, port).items()
            routes += [_Route(other, port, path, host, is_here=True) for path, other in others]
        routes = [route for route in routes if not self._listener.is_own_path(route.local_path or "")] or [local]
        routes.sort(key=lambda route: route.local_path is not None and not os.path.exists(route.local_path))
        return routes

    def _try_another_route(self, side: Side) -> None:
        if side in self._aims:
            address, number = self._aims[side]
            self._aims[side] = (address, number + 1)

    def _give_up(self, now: float) -> None:
        """On peers that do not answer the probe, and on attempts whose end the monitor did not report."""
        if now < self._next_look_at:
            return
        self._next_look_at = now + LOOK_INTERVAL_S
        self._events.extend(self._listener.mind(now))
        limit_s = (CONNECT_TIMEOUT_MS + HANDSHAKE_TIMEOUT_MS) / 1000 + 1
        for side, dealer in list(self._dealers.items()):
            if dealer.is_up and (fault := dealer.find_fault(now)) is not None:
                self._read_frames(dealer.socket, side)  # what arrived before the end still counts
                self._lose(side, fault.value, is_silent=fault is _Fault.UNANSWERED)
            elif dealer.is_up and dealer.unfinished_bytes(now) > self._max_message_bytes:
                if not self._read_frames(dealer.socket, side):
                    self._lose(side, "it sends a message that does not end")
            elif not dealer.is_up and now - dealer.began_at > limit_s:
                self._try_another_route(side)
                self._lose(side, "no answer")
        if now >= self._next_look_at_outflows:
            self._end_stalled(now)
        if now >= self._next_look_at_callers:
            began_s = time.thread_time()
            self._hang_up_on_floods(now)
            self._next_look_at_callers = now + (time.thread_time() - began_s) / MAX_SHARE_OF_LOOKS

    def _hang_up_on_floods(self, now: float) -> None:
        """On whoever sends too much alone, and, while all of them do together, on whoever sends the most."""
        brought = sorted(((caller.look(now), caller) for caller in self._callers.values()), key=lambda pair: -pair[0])
        total = sum(num_bytes for num_bytes, _ in brought)
        for num_bytes, caller in brought:
            if num_bytes > CALLER_BURST_BYTES or total > CALLERS_BURST_BYTES:
                if not caller.hang_up():
                    continue
                total -= num_bytes
                note = "a connection that sends more than a stage has to say"
                self._events.append(BadHandshake(Side.SUCCESSOR, note))
            elif not caller.is_gone:
                continue
            self._callers.pop(caller.descriptor, None)

    def _end_stalled(self, now: float) -> None:
        """Connections by which something large does not arrive: they are ended, whoever is there connects anew."""
        self._next_look_at_outflows = now + OUTFLOW_INTERVAL_S
        for peer, outflow in list(self._outflows.items()):
            stall = outflow.look(now)
            if stall is not None and stall.seconds >= STALL_S and outflow.hang_up():
                self._events.append(Stalled(Side.SUCCESSOR, peer, stall))
            elif not outflow.is_gone:
                continue
            del self._outflows[peer]

    def _lose(self, side: Side, note: str, *, is_silent: bool = False) -> None:
        self._drop(side, linger_ms=0)
        self._events.append(Disconnected(side, note, is_silent))

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
            self._read_listener_monitor()
        elif self._authenticator is not None and item is self._authenticator.zap_socket:
            self._authenticator.answer()
        else:
            for side, dealer in list(self._dealers.items()):
                if item is dealer.socket:
                    self._read_frames(dealer.socket, side, MAX_MESSAGES_PER_READ)
                elif item is dealer.monitor:
                    self._read_monitor(side, dealer)

    def _read_listener_monitor(self) -> None:
        for _ in range(MAX_EVENTS_PER_READ):
            if not self._router_monitor.poll(0):
                return
            news = recv_monitor_message(self._router_monitor)
            event, descriptor, where = news["event"], news["value"], news["endpoint"]
            if event == zmq.EVENT_DISCONNECTED:
                self._forget_caller(descriptor)
            elif event != zmq.EVENT_ACCEPTED:
                self._events.append(BadHandshake(Side.SUCCESSOR, self._describe_caller(event)))
            elif where.startswith(b"tcp://"):
                port = int(where.rpartition(b":")[2])
                self._callers[descriptor] = Intake(descriptor, (port, None), CALLER_BYTES_PER_S)

    def _note_descriptor(self, peer: bytes, frame: zmq.Frame) -> None:
        """Which connection a caller has, as its message says: one that a stranger made up may not."""
        if peer in self._descriptors:
            return
        with contextlib.suppress(zmq.ZMQError):
            descriptor = int(frame.get(zmq.SRCFD))
            if descriptor in self._callers:
                self._descriptors[peer] = descriptor

    def _forget_caller(self, descriptor: int) -> None:
        self._callers.pop(descriptor, None)
        for peer in [peer for peer, other in self._descriptors.items() if other == descriptor]:
            del self._descriptors[peer]
            self._outflows.pop(peer, None)

    def _read_frames(self, sock: zmq.Socket[bytes], side: Side, most: int = MAX_UNREAD_MESSAGES) -> int:
        """How many messages there were; ``most``: there may be more."""
        dealer = None if side is Side.SUCCESSOR else self._dealers[side]
        for num_read in range(most):
            try:
                frames = sock.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                if dealer is not None:
                    dealer.num_unbroken = 0
                return num_read
            buffers: list[Frame] = [frame.buffer for frame in frames]
            peer = b""
            if dealer is None:
                peer, buffers = bytes(buffers[0]), buffers[1:]
                self._note_descriptor(peer, frames[-1])
            else:
                dealer.took_message()
            self._events.append(Received(side, peer, buffers))
        return most

    def _read_monitor(self, side: Side, dealer: _Dealer) -> None:
        news = recv_monitor_message(dealer.monitor)
        event = news["event"]
        if event == zmq.EVENT_CONNECTED:
            if dealer.route.local_path is None:
                dealer.intake = Intake(news["value"], (None, dealer.route.port))
            return
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            dealer.came_up(self._patience_s)
            self._foreign_since.pop(side, None)
            self._events.append(Connected(side, dealer.route.describe()))
            return
        if dealer.is_up:
            self._read_frames(dealer.socket, side)  # what arrived before the end still counts
            self._lose(side, "the connection was lost")
            return
        self._drop(side, linger_ms=0)
        self._try_another_route(side)
        self._events.append(self._judge_route(side, event, dealer))

    def _judge_route(self, side: Side, event: int, dealer: _Dealer) -> BadHandshake | Disconnected:
        """Why a connection did not come up. What became of the way that was asked for counts more than the others."""
        route = dealer.route
        if route.instead_of or (route.local_path and not self._security.is_local(route.host)):
            return Disconnected(side, self._notes.get(side, "nothing listens there yet"))
        verdict = self._judge_local(side, dealer) if route.local_path else self._judge(side, event, dealer)
        self._notes[side] = verdict.note
        return verdict

    def _describe_caller(self, event: int) -> str:
        if self._security.key is None or not event & _KEY_HANDSHAKES:
            return ""
        return f"a connection without the key in this stage's {KEY_FILE_FLAG}"

    def _judge(self, side: Side, event: int, dealer: _Dealer) -> BadHandshake | Disconnected:
        """Why a TCP connection did not come up."""
        if not event & _BAD_HANDSHAKES:
            return Disconnected(side, describe_absence(dealer.route.host, dealer.route.port))
        greeting = read_greeting(dealer.route.host, dealer.route.port)
        note = self._compare_keys(greeting, event, dealer)
        is_protocol = event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        if note or is_protocol or greeting is Greeting.OTHER or _was_mute(dealer):
            return BadHandshake(side, note)
        # A proxy whose stage is not up yet accepts and hangs up; that is not yet another program.
        note = "something accepts connections there and ends them at once: a proxy, or a stage that is not up yet"
        return Disconnected(side, note)

    def _compare_keys(self, greeting: Greeting, event: int, dealer: _Dealer) -> str:
        """What keys have to do with a handshake that failed; empty: nothing."""
        if self._security.key is None:
            return _NEEDS_KEY if greeting is Greeting.CURVE else ""
        if greeting is Greeting.NULL or self._is_listening_locally(dealer.route):
            return _HAS_NO_KEY
        return _OTHER_KEY if greeting is Greeting.CURVE and not _was_mute(dealer) else ""

    def _judge_local(self, side: Side, dealer: _Dealer) -> BadHandshake | Disconnected:
        """Why a Unix socket's connection did not come up: whoever holds the TCP port may be no stage of this user."""
        if _was_mute(dealer):
            return BadHandshake(side)
        route = dealer.route
        greeting = read_greeting(route.host, route.port)
        now = time.monotonic()
        if greeting is Greeting.REFUSED:
            self._foreign_since.pop(side, None)
            return Disconnected(side, f"nothing listens there yet: {_describe_local_absence(route)}")
        if greeting in (Greeting.OTHER, Greeting.CURVE):
            return BadHandshake(side, _NEEDS_KEY if greeting is Greeting.CURVE else "")
        # A stage that has just taken its port, or is just leaving it, has no socket for a moment.
        if now - self._foreign_since.setdefault(side, now) < HANDSHAKE_TIMEOUT_MS / 1000:
            return Disconnected(side, "its port is taken, but no stage of this user answers there yet")
        return BadHandshake(side, f"{_NOT_OURS} (looked for {route.local_path})")

    def _is_listening_locally(self, route: _Route) -> bool:
        """Whether a stage of this user that has no key is there."""
        if self._security.find_folder is None or not hosts.is_loopback(route.host):
            return False
        with contextlib.suppress(ConfigError), socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self._security.socket_path(route.host, route.port)) == 0
        return False


def _was_mute(dealer: _Dealer) -> bool:
    """Whether its handshake ended because of the time that it took."""
    return time.monotonic() - dealer.began_at >= HANDSHAKE_TIMEOUT_MS / 1000 * 0.9


def _describe_local_absence(route: _Route) -> str:
    folder = os.path.dirname(str(route.local_path))
    here = sorted(name.rpartition("-")[0].replace("-", " port ") for name in _living_sockets(folder))
    seen = f"; stages here listen on {', '.join(here[:MAX_NAMED])}" if here else ""
    return f"{route.host} port {route.port} refused the connection, and {folder} has no socket for it{seen}"


def _living_sockets(folder: str) -> set[str]:
    """The names of the sockets in a folder that a process of this network namespace listens on."""
    try:
        lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {line.rpartition("/")[2] for line in lines if line.rpartition("/")[0].endswith(f" {folder}")}
