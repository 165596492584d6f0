"""The probe: heartbeats beside a link, on a connection that carries nothing else.

ZeroMQ's I/O threads alone keep it up. So a forward pass does not delay it, and a frozen process is told from a busy
one. It may be impatient because losing it costs nothing: it reconnects by itself, and only a peer that does not answer
the new connection either is lost. The link itself could not have such heartbeats: after a stall of this machine
libzmq's timers expire before it reads what came meanwhile.

A probe that has reconnected may reach another process than the link does. So transport/link.py also counts how
long nothing has come by the link itself.

Knows whether the peer answers, and for how long not; its limits are in ring/rules/timeouts.py.
"""

from __future__ import annotations

import math
import os

import zmq
from zmq.utils.monitor import recv_monitor_message

from stagewire.errors import ConfigError
from stagewire.ring.rules import timeouts
from stagewire.ring.transport.security import RingKey
from stagewire.ring.transport.sockets import Context, Dealer

__all__ = ["Probe", "read_patience"]

PROBE_MAX_BYTES = 1024  # ZeroMQ's own commands; nothing else comes
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def read_patience() -> float:
    """How long a probe may be down, in seconds: the environment's number, or the default.

    Raises:
        ConfigError: the environment has no such number.
    """
    text = os.environ.get(timeouts.PROBE_PATIENCE_ENV)
    if not text:
        return timeouts.PROBE_PATIENCE_S
    try:
        patience_s = float(text)
    except ValueError:
        patience_s = math.nan
    if not 0 < patience_s <= timeouts.MAX_PROBE_PATIENCE_S:
        raise ConfigError(
            f"{timeouts.PROBE_PATIENCE_ENV}={text}: expected seconds, above 0 and at most "
            f"{timeouts.MAX_PROBE_PATIENCE_S:g}; unset, it is {timeouts.PROBE_PATIENCE_S:g}"
        )
    return patience_s


class Probe(Dealer):
    """See the module. ``patience_s`` is how long it may be down; ``num_connections`` how often it has come up."""

    def __init__(self, context: Context, target: str, key: RingKey | None, patience_s: float) -> None:
        options = {
            zmq.HEARTBEAT_IVL: timeouts.PROBE_HEARTBEAT_INTERVAL_MS,
            zmq.HEARTBEAT_TIMEOUT: timeouts.PROBE_HEARTBEAT_TIMEOUT_MS,
            zmq.RECONNECT_IVL: timeouts.PROBE_RETRY_MS,
            zmq.HANDSHAKE_IVL: timeouts.PROBE_HANDSHAKE_TIMEOUT_MS,
        }
        super().__init__(context, target, key, PROBE_MAX_BYTES, options, _EVENTS)
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
        least_s = 0.0 if self.num_connections else timeouts.FIRST_PROBE_PATIENCE_S
        return self._down_s >= max(self.patience_s, least_s)

    @property
    def is_spoken_to(self) -> bool:
        """No stage speaks here. Nobody reads it, and libzmq aborts at the next heartbeat when the queue is full."""
        return self.socket.poll(0) != 0
