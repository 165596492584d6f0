"""How much a TCP connection has brought without a whole message, by the kernel's own count.

ZeroMQ bounds a frame, not how many of them a message has, hands a message out only when it is whole, and keeps what has
come of it until then. Nothing but the kernel tells how much that is.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

__all__ = ["Intake"]

# tcpi_bytes_received in Linux's struct tcp_info (since 4.1): 64 bits at this place.
_BYTES_RECEIVED = struct.Struct("=128xQ")
_GONE = (errno.EBADF, errno.ENOTSOCK, errno.ENOTCONN)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, for no time


class Intake:
    """One connection, by its descriptor, which belongs to somebody else and may end at any time.

    Args:
        descriptor: of the connection.
        ports: its own and its peer's, None where it does not matter: another one may have the descriptor by now.
        allowed_per_s: bytes that may come besides, for a peer whose messages are not told (`took_message`).
    """

    def __init__(self, descriptor: int, ports: tuple[int | None, int | None], allowed_per_s: float = 0.0) -> None:
        self.descriptor = descriptor
        self.is_gone = False
        self._ports = ports
        self._allowed_per_s = allowed_per_s
        self._begin = 0
        self._looked_at: float | None = None
        self._has_taken = False

    def __repr__(self) -> str:
        return f"Intake(descriptor={self.descriptor}, ports={self._ports})"

    def took_message(self) -> None:
        """A whole message was taken from it: what had come before it counts no more."""
        self._has_taken = True

    def look(self, now: float) -> int:
        """How many bytes have come since the last whole message, beyond what is allowed; 0 where that cannot be told.

        Call it several times a second, after everything was taken that could be.
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

    def hang_up(self) -> bool:
        """Whoever owns the connection finds it closed by its peer. False: it could not be done now.

        The peer finds it reset. An end in order would not reach one that waits for room in our receive buffer: Linux
        announces no more room after a shutdown, and what is left of the closed connection drops the peer's probes.
        """
        try:
            with self._borrow() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            return error.errno in _GONE
        return True

    def _bytes_received(self) -> int | None:
        """None: it cannot be told now, or the connection is gone."""
        try:
            with self._borrow() as sock:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        except OSError as error:
            self.is_gone = error.errno in _GONE
            return None
        return int(_BYTES_RECEIVED.unpack(info)[0]) if len(info) == _BYTES_RECEIVED.size else None

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
            for wanted, name in zip(self._ports, (sock.getsockname(), sock.getpeername()), strict=True):
                if wanted not in (None, name[1]):
                    raise OSError(errno.ENOTCONN, "another connection")
        except BaseException:
            sock.close()
            raise
        return sock
