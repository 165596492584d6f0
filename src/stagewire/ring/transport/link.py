"""One outgoing connection, the probe beside it, and when it counts as lost.

ZeroMQ never reconnects a link: a lost one is an event, and the ring's rules decide where to connect next. Names are
resolved again then, and a Redirect may have expired.

Knows one connection. Where else it could lead is in transport/routes.py, why it did not come up in
transport/diagnosis.py, the limits in ring/rules/timeouts.py.
"""

from __future__ import annotations

import time
from enum import Enum

import zmq

from stagewire.ring.rules import timeouts
from stagewire.ring.transport.probe import Probe
from stagewire.ring.transport.routes import Route
from stagewire.ring.transport.security import RingKey
from stagewire.ring.transport.sockets import Context, Dealer, endpoint
from stagewire.ring.transport.tcp_counters import Intake, Ports

__all__ = ["BAD_HANDSHAKES", "MAX_UNREAD_MESSAGES", "Link", "Loss"]

# When ZeroMQ reconnects: never, in milliseconds. Its own "never" (-1) ends the pipe with the connection and drops what
# was not read yet, such as the peer's last messages (libzmq 4.3.5: term_endpoint does not wait for the reader).
NEVER = 24 * 3600 * 1000
# After so many messages without a pause the peer is no stage.
MAX_UNREAD_MESSAGES = 10_000

BAD_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_EVENTS = (
    zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | BAD_HANDSHAKES | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
)


class Loss(Enum):
    """Why a link counts as lost though its connection has not ended, for people."""

    UNANSWERED = "it has stopped answering"
    SILENT = "nothing comes by its connection any more"
    SPEAKS_TO_PROBE = "it says something where a stage says nothing"
    FLOOD = "it sends more than can be read"


class Link(Dealer):
    """See the module. Once it is up it has a probe. When it is lost, the transport makes another."""

    def __init__(self, context: Context, route: Route, key: RingKey | None, max_frame_bytes: int) -> None:
        self.route = route
        self._target = f"ipc://{route.local_path}" if route.local_path else endpoint(route.host, route.port)
        options = {zmq.RECONNECT_IVL: NEVER, zmq.CONNECT_TIMEOUT: timeouts.CONNECT_TIMEOUT_MS}
        super().__init__(context, self._target, key, max_frame_bytes, options, _EVENTS)
        self.is_up = False
        self._context = context
        self._key = key
        self._probe: Probe | None = None
        self._intake: Intake | None = None
        self._began_at = time.monotonic()
        self._seen_at = self._began_at
        self._silent_s = 0.0
        self._num_unbroken = 0  # messages that were taken since there was none to take

    # ---- coming up -------------------------------------------------------------------------------------------------

    def connected(self, descriptor: int) -> None:
        """The connection is made and has this descriptor. The handshake follows."""
        if self.route.local_path is None:
            self._intake = Intake(descriptor, Ports(peer=self.route.port))

    def came_up(self, patience_s: float) -> None:
        """``patience_s``: of the probe."""
        self.is_up = True
        self._probe = Probe(self._context, self._target, self._key, patience_s)
        self._seen_at = time.monotonic()

    def is_overdue(self, now: float) -> bool:
        """Whether it should have come up or failed long ago, and ZeroMQ's monitor has not said which."""
        limit_s = (timeouts.CONNECT_TIMEOUT_MS + timeouts.HANDSHAKE_TIMEOUT_MS) / 1000 + 1
        return not self.is_up and now - self._began_at > limit_s

    def was_mute(self) -> bool:
        """Whether its handshake ended because of the time that it took."""
        return time.monotonic() - self._began_at >= timeouts.HANDSHAKE_TIMEOUT_MS / 1000 * 0.9

    # ---- while it is up --------------------------------------------------------------------------------------------

    def set_patience(self, patience_s: float) -> None:
        if self._probe is not None:
            self._probe.patience_s = patience_s

    def took_message(self) -> None:
        self._num_unbroken += 1
        self._silent_s = 0.0
        if self._intake is not None:
            self._intake.took_message()

    def was_emptied(self) -> None:
        """There is no message to take."""
        self._num_unbroken = 0

    def find_loss(self, now: float) -> Loss | None:
        """Why it counts as lost. Call it several times a second while it is up."""
        assert self._probe is not None
        turn_s = min(now - self._seen_at, timeouts.MAX_COUNTED_TURN_S)
        self._seen_at = now
        self._silent_s += turn_s
        if self._probe.is_unanswered(turn_s):
            return Loss.UNANSWERED
        if self._probe.is_spoken_to:
            return Loss.SPEAKS_TO_PROBE
        if self._num_unbroken >= MAX_UNREAD_MESSAGES:
            return Loss.FLOOD
        limit_s = timeouts.SILENT_LINK_S if self._probe.num_connections <= 1 else timeouts.DOUBTED_LINK_S
        return Loss.SILENT if self._silent_s >= limit_s + self._probe.patience_s else None

    def unfinished_bytes(self, now: float) -> int:
        """About how much has come of a message that is not whole yet; 0 over a Unix socket, where nobody counts."""
        return 0 if self._intake is None else self._intake.look(now)

    def close(self, linger_ms: int) -> None:
        if self._probe is not None:
            self._probe.close(0)
        super().close(linger_ms)
