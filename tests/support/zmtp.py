"""ZMTP 3 (RFC 23 and 37) as a program would speak it that does what no ZeroMQ library does."""

from __future__ import annotations

import socket
import struct

__all__ = ["PING", "READY", "frame", "greeting", "until_ready"]


def greeting(mechanism: bytes) -> bytes:
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def frame(flags: int, size: int, body: bytes) -> bytes:
    """A frame that says it has ``size`` bytes. Flags: 1 more, 4 command."""
    return bytes([flags | 2]) + struct.pack(">Q", size) + body


def _ready(socket_type: bytes) -> bytes:
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(socket_type)) + socket_type
    return frame(4, len(body), body)


# By the type of the socket that the speaker says it is.
READY = {socket_type: _ready(socket_type) for socket_type in (b"DEALER", b"ROUTER")}
PING = frame(4, 7, b"\x04PING" + bytes(2))


def until_ready(sock: socket.socket) -> None:
    """Reads until the other end has said that it is ready: before that no message is one."""
    heard = b""
    while b"READY" not in heard:
        heard += sock.recv(1000)
