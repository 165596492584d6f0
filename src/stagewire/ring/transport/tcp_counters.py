"""How much a TCP connection has brought without a whole message, and whether what is sent by it arrives.

ZeroMQ bounds the size of a frame and not the number of frames in a message. It hands a message out only when it is
whole and keeps the parts until then. Only the kernel knows how much that is, so its counters are read here (Linux's
TCP_INFO).

Knows one connection by its descriptor, which belongs to ZeroMQ; not who the peer is, nor what is too much.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
from dataclasses import dataclass

from stagewire.ring.rules.actions import Stall

__all__ = ["Intake", "Outflow", "Ports"]

# tcpi_bytes_received in Linux's struct tcp_info (since 4.1): 64 bits at this place.
_BYTES_RECEIVED = struct.Struct("=128xQ")
# Others of its fields: tcpi_retransmits, tcpi_snd_mss, tcpi_bytes_acked, tcpi_snd_wnd.
_RETRANSMITS, _SND_MSS, _ACKED, _SND_WND = (struct.Struct(form) for form in ("=2xB", "=16xI", "=120xQ", "=228xI"))
_TCP_INFO_BYTES = 256
_GONE = (errno.EBADF, errno.ENOTSOCK, errno.ENOTCONN)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, for no time


@dataclass(frozen=True)
class Ports:
    """Of the two ends of a connection; None: any."""

    own: int | None = None
    peer: int | None = None


class Connection:
    """A TCP connection by its descriptor, which belongs to somebody else and may end at any time.

    Args:
        descriptor: of the connection.
        ports: of its ends. With other ports it is another connection, which has got the descriptor since.
    """

    def __init__(self, descriptor: int, ports: Ports) -> None:
        self.descriptor = descriptor
        self.is_gone = False
        self.ports = ports

    def __repr__(self) -> str:
        return f"{type(self).__name__}(descriptor={self.descriptor}, ports={self.ports})"

    def hang_up(self) -> bool:
        """Ends the connection: its owner finds it closed by the peer, and the peer finds it reset.

        An end in order would not reach a peer that waits for room in our receive buffer. Linux announces no more room
        after a shutdown, and what is left of the closed connection drops the peer's probes.

        Returns:
            False: it could not be done now.
        """
        try:
            with self._borrow() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            return error.errno in _GONE
        return True

    def _borrow(self) -> socket.socket:
        """The connection under a descriptor of our own, for a moment.

        Raises:
            OSError: it is gone, or another one has its descriptor.
        """
        own = os.dup(self.descriptor)
        try:
            sock = socket.socket(fileno=own)
        except BaseException:
            os.close(own)
            raise
        try:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                raise OSError(errno.ENOTCONN, "not a TCP connection")
            own_port, peer_port = sock.getsockname()[1], sock.getpeername()[1]
            if self.ports.own not in (None, own_port) or self.ports.peer not in (None, peer_port):
                raise OSError(errno.ENOTCONN, "another connection")
        except BaseException:
            sock.close()
            raise
        return sock


class Intake(Connection):
    """What a connection brings.

    Args:
        descriptor, ports: see `Connection`.
        allowed_per_s: bytes that may come besides, for a peer of which nobody calls `took_message`.
    """

    def __init__(self, descriptor: int, ports: Ports, allowed_per_s: float = 0.0) -> None:
        super().__init__(descriptor, ports)
        self._allowed_per_s = allowed_per_s
        self._begin = 0
        self._looked_at: float | None = None
        self._has_taken = False

    def took_message(self) -> None:
        """A whole message was taken from it. What had come before no longer counts."""
        self._has_taken = True

    def look(self, now: float) -> int:
        """How many bytes have come since the last whole message, beyond what is allowed; 0 if that is unknown.

        Call it several times a second, after all whole messages were taken.
        """
        received = self._bytes_received()
        if received is None:
            return 0
        if self._looked_at is not None:
            self._begin += int(self._allowed_per_s * (now - self._looked_at))
        self._looked_at = now
        self._begin = received if self._has_taken else min(self._begin, received)
        self._has_taken = False
        return received - self._begin

    def _bytes_received(self) -> int | None:
        """None: unknown now, or the connection is gone."""
        try:
            with self._borrow() as sock:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        except OSError as error:
            self.is_gone = error.errno in _GONE
            return None
        return int(_BYTES_RECEIVED.unpack(info)[0]) if len(info) == _BYTES_RECEIVED.size else None


class Outflow(Connection):
    """What is sent by a connection, and whether the peer's kernel acknowledges it."""

    _acked = -1
    _since = 0.0

    def look(self, now: float) -> Stall | None:
        """How long nothing was acknowledged, though the peer would take more. Call it about once a second.

        Returns:
            None: all is well, there is nothing to send, or the peer does not read.
        """
        try:
            with self._borrow() as sock:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                (unsent,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))  # Linux: SIOCOUTQ
                ends = " -> ".join(f"{host}:{port}" for host, port, *_ in (sock.getsockname(), sock.getpeername()))
        except OSError as error:
            self.is_gone = error.errno in _GONE
            return None
        if len(info) < _ACKED.size:
            return None
        ((acked,), (packet_bytes,)) = _ACKED.unpack_from(info), _SND_MSS.unpack_from(info)
        if not unsent or acked != self._acked or not _has_room(info, packet_bytes):
            self._acked, self._since = acked, now
            return None
        return Stall(unsent, now - self._since, ends, packet_bytes)


def _has_room(info: bytes, packet_bytes: int) -> bool:
    """Whether the peer would take more. What does not arrive is then lost on the way."""
    if len(info) >= _SND_WND.size:  # Linux 5.4
        (window,) = _SND_WND.unpack_from(info)
        return bool(window >= packet_bytes)
    (retransmits,) = _RETRANSMITS.unpack_from(info)
    return bool(retransmits >= 3)
