"""The ring's key on ZeroMQ's sockets (CURVE), and the check of each caller.

With a key every connection speaks CURVE. A caller needs the listener's public half to begin, which is nowhere but in
the key file. The listener then compares the caller's public half with the ring's own (`KeyCheck`).
docs/design/security.md says what that protects; reading the key file is transport/security.py's.
"""

from __future__ import annotations

import contextlib

import zmq
from zmq.utils import z85

from stagewire.ring.transport.security import RingKey

__all__ = ["KeyCheck", "secure_caller", "secure_listener"]

ZAP_DOMAIN = b"stagewire"
# Where libzmq asks, by ZeroMQ's RFC 27, and the version of that protocol.
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_VERSION = b"1.0"


def _public(secret: bytes) -> bytes:
    return z85.decode(zmq.curve_public(z85.encode(secret)))


def secure_caller(sock: zmq.Socket[bytes], key: RingKey) -> None:
    sock.setsockopt(zmq.CURVE_SERVERKEY, _public(key.listener))
    sock.setsockopt(zmq.CURVE_PUBLICKEY, _public(key.caller))
    sock.setsockopt(zmq.CURVE_SECRETKEY, key.caller)


def secure_listener(sock: zmq.Socket[bytes], key: RingKey) -> None:
    sock.setsockopt(zmq.CURVE_SERVER, 1)
    sock.setsockopt(zmq.CURVE_SECRETKEY, key.listener)
    sock.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


class KeyCheck:
    """Lets in whoever calls with the ring's own key. libzmq asks it about each caller, by ``socket``.

    The thread that owns the listener's socket calls `answer` when ``socket`` is readable.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: RingKey) -> None:
        self._caller = _public(key.caller)
        self.socket = context.socket(zmq.REP)
        self.socket.bind(_ZAP_ENDPOINT)

    def answer(self) -> None:
        with contextlib.suppress(zmq.Again):
            _, request_id, domain, _, _, mechanism, *credentials = self.socket.recv_multipart(zmq.NOBLOCK)
            is_known = domain == ZAP_DOMAIN and mechanism == b"CURVE" and credentials == [self._caller]
            status = [b"200", b"OK"] if is_known else [b"400", b"Unknown key"]
            # The last two are the caller's name and metadata, which nobody reads.
            self.socket.send_multipart([_ZAP_VERSION, request_id, *status, b"", b""])

    def close(self) -> None:
        self.socket.close(1)
