"""The ring's connections over ZeroMQ.

A stage has one ROUTER socket that it binds, where successors and strangers come in. It has one DEALER to its
predecessor and, if it shares a port with another stage of its host, one DEALER to that port's owner. One thread touches
every socket; `wake` goes through an eventfd.

ZeroMQ never reconnects a link by itself. A lost link is an event, and the ring's rules decide where to connect next.
Whether a peer is still there is asked on a connection of its own beside each link (transport/probe.py). How connections
are protected is decided in transport/security.py.

Owns the sockets and the events. What a socket's options are, why a connection failed and when one is lost is in the
other files of this package; what a message means is not known here.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from stagewire.config import Address
from stagewire.errors import ConfigError
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import Side
from stagewire.ring.transport import callers
from stagewire.ring.transport.curve import KeyCheck, secure_listener
from stagewire.ring.transport.diagnosis import Diagnosis
from stagewire.ring.transport.interface import Connected, Disconnected, Event, Received, UnreachableError
from stagewire.ring.transport.link import MAX_UNREAD_MESSAGES, Link, Loss
from stagewire.ring.transport.listener import Listener
from stagewire.ring.transport.probe import read_patience
from stagewire.ring.transport.routes import Routes
from stagewire.ring.transport.security import Security
from stagewire.ring.transport.sockets import Context, Socket, set_common
from stagewire.wire.codec import Frame

__all__ = ["ZmqTransport"]

# Bounds one read, so that a peer that never stops sending does not keep the ring from its other work.
MAX_MESSAGES_PER_READ = 64


class ZmqTransport:
    """See `stagewire.ring.transport.interface.Transport`.

    Args:
        bind_host: numeric local address to listen on; None: not known yet.
        max_frame_bytes: a larger frame from a predecessor ends the connection before memory is taken for it; from a
            successor, one above `callers.MAX_BACKWARD_BYTES`.
        security: how connections are protected.
        max_message_bytes: the same for all frames of a message; default: four of the largest.
        find_host: the address to listen on as things are now, when it was not known or is gone; may raise OSError.

    Raises:
        ConfigError: the environment's patience is no number of seconds.
    """

    def __init__(
        self,
        bind_host: str | None,
        max_frame_bytes: int,
        security: Security,
        max_message_bytes: int | None = None,
        find_host: Callable[[], str] | None = None,
    ) -> None:
        self._key = security.key
        self._max_frame_bytes = max_frame_bytes
        self._max_message_bytes = max_message_bytes or 4 * max_frame_bytes
        self._patience_s = read_patience()
        self._next_look_at = 0.0
        self._context: Context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        set_common(self._router, min(max_frame_bytes, callers.MAX_BACKWARD_BYTES))
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._listener = Listener(self._router, security, bind_host, find_host)
        self._callers = callers.Callers(self._context, self._router, has_key=security.key is not None)
        self._routes = Routes(security, self._listener)
        self._diagnosis = Diagnosis(security)
        self._links: dict[Side, Link] = {}
        self._begin_at: dict[Side, float] = {}  # when to begin a connection
        self._attempted: set[Side] = set()
        self._events: deque[Event] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._callers.monitor, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._key_check: KeyCheck | None = None
        if security.key is not None:
            secure_listener(self._router, security.key)
            self._key_check = KeyCheck(self._context, security.key)
            self._poller.register(self._key_check.socket, zmq.POLLIN)
        self._closed = False
        self._wake_lock = threading.RLock()  # a signal handler may interrupt `wake` and call it again

    def __repr__(self) -> str:
        return f"ZmqTransport({self._listener!r}, connections={[side.value for side in self._links]})"

    # ---- what the ring asks for ------------------------------------------------------------------------------------

    def bind(self, port: int) -> Address:
        return self._listener.bind(port)

    def connect(self, side: Side, address: Address) -> None:
        if side in self._links and self._links[side].is_up:
            self._routes.try_another(side)  # another stage is there than the one that is looked for
        self._drop(side, linger_ms=0)
        self._routes.aim(side, address)
        # The first attempt is made at once. Later ones wait, so that a refused connection does not spin.
        delay_s = timeouts.RECONNECT_DELAY_S if side in self._attempted else 0.0
        self._attempted.add(side)
        self._begin_at[side] = time.monotonic() + delay_s

    def send(self, side: Side, peer: bytes, frames: Sequence[Frame]) -> None:
        sock = self._router if side is Side.SUCCESSOR else self._socket_of(side)
        parts: list[Frame] = [peer, *frames] if side is Side.SUCCESSOR else list(frames)
        if peer:
            self._callers.is_answered(peer)
        try:
            sock.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise UnreachableError(side.value) from error
            raise

    def _socket_of(self, side: Side) -> Socket:
        link = self._links.get(side)
        if link is None or not link.is_up:
            raise UnreachableError(side.value)
        return link.socket

    def poll(self, timeout_s: float) -> list[Event]:
        now = time.monotonic()
        for side, when in list(self._begin_at.items()):
            if when <= now:
                del self._begin_at[side]
                self._begin(side)
            else:
                timeout_s = min(timeout_s, when - now)
        if self._events:
            timeout_s = 0
        for item, _ in self._poller.poll(math.ceil(timeout_s * 1000)):
            self._read(item)
        self._look(time.monotonic())
        events = list(self._events)
        self._events.clear()
        return events

    def wake(self) -> None:
        with self._wake_lock:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self._wake_fd, 1)

    def be_more_patient(self) -> float:
        learnt_s = min(2 * self._patience_s, timeouts.MAX_LEARNT_PATIENCE_S)
        self._patience_s = max(self._patience_s, learnt_s)
        for link in self._links.values():
            link.set_patience(self._patience_s)
        return self._patience_s

    def close(self, linger_s: float = 1.0) -> None:
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_fd)
        self._listener.hide()
        linger_ms = int(linger_s * 1000)
        for side in list(self._links):
            self._drop(side, linger_ms)
        self._callers.close()
        self._router.close(linger_ms)
        if self._key_check is not None:
            self._key_check.close()
        self._context.term()
        self._listener.close()

    # ---- links that begin and end ----------------------------------------------------------------------------------

    def _begin(self, side: Side) -> None:
        try:
            route = self._routes.choose(side)
        except (OSError, ConfigError) as error:
            self._events.append(Disconnected(side, str(error)))
            return
        link = Link(self._context, route, self._key, self._max_frame_bytes)
        self._links[side] = link
        self._poller.register(link.socket, zmq.POLLIN)
        self._poller.register(link.monitor, zmq.POLLIN)

    def _lose(self, side: Side, note: str, *, is_silent: bool = False) -> None:
        self._drop(side, linger_ms=0)
        self._events.append(Disconnected(side, note, is_silent))

    def _drop(self, side: Side, linger_ms: int) -> None:
        self._begin_at.pop(side, None)
        link = self._links.pop(side, None)
        if link is None:
            return
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        link.close(linger_ms)

    def _look(self, now: float) -> None:
        """Looks at what no socket reports: silence, floods, and the address that this stage listens on."""
        if now < self._next_look_at:
            return
        self._next_look_at = now + timeouts.CONNECTIONS_LOOK_INTERVAL_S
        self._events.extend(self._listener.mind(now))
        for side, link in list(self._links.items()):
            if link.is_up:
                self._look_at_link(side, link, now)
            elif link.is_overdue(now):
                self._routes.try_another(side)
                self._lose(side, "no answer")
        self._events.extend(self._callers.look(now))

    def _look_at_link(self, side: Side, link: Link, now: float) -> None:
        loss = link.find_loss(now)
        if loss is not None:
            self._read_messages(side, link)  # what arrived before the end still counts
            self._lose(side, loss.value, is_silent=loss is Loss.UNANSWERED)
        elif link.unfinished_bytes(now) > self._max_message_bytes and not self._read_messages(side, link):
            self._lose(side, "it sends a message that does not end")

    # ---- what sockets report ---------------------------------------------------------------------------------------

    def _read(self, item: object) -> None:
        if item is self._router:
            self._read_router()
        elif item == self._wake_fd:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        elif item is self._callers.monitor:
            self._events.extend(self._callers.read_monitor())
        elif self._key_check is not None and item is self._key_check.socket:
            self._key_check.answer()
        else:
            for side, link in list(self._links.items()):
                if item is link.socket:
                    self._read_messages(side, link, MAX_MESSAGES_PER_READ)
                elif item is link.monitor:
                    self._read_monitor(side, link)

    def _read_router(self) -> None:
        for _ in range(MAX_MESSAGES_PER_READ):
            frames = _receive(self._router)
            if frames is None:
                return
            peer, *buffers = [frame.buffer for frame in frames]
            self._callers.has_said(bytes(peer), frames[-1])
            self._events.append(Received(Side.SUCCESSOR, bytes(peer), buffers))

    def _read_messages(self, side: Side, link: Link, most: int = MAX_UNREAD_MESSAGES) -> int:
        """Takes up to ``most`` messages. Returns how many there were; if it is ``most``, there may be more."""
        for num_read in range(most):
            frames = _receive(link.socket)
            if frames is None:
                link.was_emptied()
                return num_read
            link.took_message()
            self._events.append(Received(side, b"", [frame.buffer for frame in frames]))
        return most

    def _read_monitor(self, side: Side, link: Link) -> None:
        news = recv_monitor_message(link.monitor)
        event = news["event"]
        if event == zmq.EVENT_CONNECTED:
            link.connected(news["value"])
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            link.came_up(self._patience_s)
            self._diagnosis.came_up(side)
            self._events.append(Connected(side, link.route.describe()))
        elif link.is_up:
            self._read_messages(side, link)  # what arrived before the end still counts
            self._lose(side, "the connection was lost")
        else:
            self._drop(side, linger_ms=0)
            self._routes.try_another(side)
            self._events.append(self._diagnosis.judge(side, event, link))


def _receive(sock: Socket) -> Sequence[zmq.Frame] | None:
    """The frames of the next message; None: there is none."""
    try:
        return sock.recv_multipart(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
