"""What all of the ring's ZeroMQ sockets have set, and one outgoing socket with its monitor.

Knows options and addresses; not who is at the other end.
"""

from __future__ import annotations

from collections.abc import Mapping

import zmq

from stagewire.ring.rules import timeouts
from stagewire.ring.transport.curve import secure_caller
from stagewire.ring.transport.security import RingKey

__all__ = ["COPY_THRESHOLD_BYTES", "Context", "Dealer", "Socket", "endpoint", "set_common"]

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

# Frames below this size are copied, which is cheaper than keeping a Python buffer alive across threads.
COPY_THRESHOLD_BYTES = 65536


def endpoint(host: str, port: int) -> str:
    """Of a numeric host, as ZeroMQ writes it."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def set_common(sock: Socket, max_frame_bytes: int) -> None:
    """``max_frame_bytes``: a larger frame ends its connection before memory is taken for it."""
    sock.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    # No heartbeats of ZeroMQ's on a link, and no bound on the number of received messages. libzmq 4.3.5 aborts
    # ("Assertion failed: !_io_error") when a heartbeat is due on a connection that has ended while what came by it
    # could not be queued. Bytes are counted instead (transport/tcp_counters.py).
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.setsockopt(zmq.HANDSHAKE_IVL, timeouts.HANDSHAKE_TIMEOUT_MS)
    # The kernel ends a connection whose other end is gone without a word: it asks after a third, and then four times.
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, timeouts.SILENT_LINK_S // 3)
    sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, timeouts.SILENT_LINK_S // 6)
    sock.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
    sock.setsockopt(zmq.TCP_MAXRT, timeouts.SILENT_LINK_S * 1000)
    sock.copy_threshold = COPY_THRESHOLD_BYTES


class Dealer:
    """An outgoing socket with its monitor, connecting from the start.

    Args:
        target: the address, as ZeroMQ writes it.
        key: the ring's, if it has one.
        max_frame_bytes: see `set_common`.
        options: besides the common ones.
        events: of ZeroMQ's monitor.
    """

    def __init__(
        self,
        context: Context,
        target: str,
        key: RingKey | None,
        max_frame_bytes: int,
        options: Mapping[zmq.SocketOption, int],
        events: int,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        set_common(self.socket, max_frame_bytes)
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        if key is not None:
            secure_caller(self.socket, key)
        if target.startswith("tcp://["):
            self.socket.setsockopt(zmq.IPV6, 1)
        self.monitor = self.socket.get_monitor_socket(events)
        self.socket.connect(target)

    def close(self, linger_ms: int) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)  # else the end of the context would wait for it for ever
        self.socket.close(linger_ms)
