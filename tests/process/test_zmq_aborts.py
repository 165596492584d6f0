"""What libzmq ends a process for, and what keeps it from that: each end in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from support.peers import Peer
from support.zmtp import PING, READY, frame, greeting, until_ready

pytestmark = pytest.mark.process

HOST = "127.0.0.1"
DEADLINE_S = 30.0
RESET = struct.pack("ii", 1, 0)  # struct linger: on, for no time
# More than ZeroMQ queues unless told otherwise; then what has to be answered, though nobody is there any more by the
# time that the queue has room again.
BURST = frame(0, 1, b"x") * 5000 + PING * 100


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Peer]:
    peer = Peer(*arguments)
    try:
        yield peer
    finally:
        peer.process.kill()
        peer.process.wait()


def burst_and_hang_up(sock: socket.socket) -> None:
    sock.settimeout(DEADLINE_S)
    sock.sendall(BURST)
    time.sleep(0.5)  # it has been read: a reset drops what has not
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def until_line(peer: Peer, start: str) -> None:
    """Fails when the process ends."""
    ends_at = time.monotonic() + DEADLINE_S
    while not (line := peer.line() or "").startswith(start):
        assert time.monotonic() < ends_at, line


def test_a_caller_that_hangs_up_with_a_full_queue_behind_it() -> None:
    with running("open") as listener:
        port = int(listener.line() or 0)
        with socket.create_connection((HOST, port), DEADLINE_S) as sock:
            sock.sendall(greeting(b"NULL") + READY[b"DEALER"])
            until_ready(sock)
            listener.signal(signal.SIGUSR1)
            until_line(listener, "stalled")
            burst_and_hang_up(sock)
        with running("open", str(port)) as caller:
            until_line(caller, "connected")
            caller.write("hello")
            until_line(caller, "hello")


@pytest.mark.parametrize("what", ["link", "probe"])
def test_a_predecessor_that_hangs_up_with_a_full_queue_behind_it(what: str) -> None:
    """The link is the first connection that comes, the probe, which nobody reads, the second."""
    with socket.create_server((HOST, 0)) as server, running("open", str(server.getsockname()[1])) as caller:
        server.settimeout(DEADLINE_S)
        with contextlib.ExitStack() as stack:
            link, probe = (_accept(stack, server) for _ in range(2))
            if what == "link":
                caller.signal(signal.SIGUSR1)
                until_line(caller, "stalled")
            burst_and_hang_up(link if what == "link" else probe)
            until_line(caller, "Disconnected")
            caller.signal(signal.SIGUSR1)
            until_line(caller, "stalled")  # it lives


def _accept(stack: contextlib.ExitStack, server: socket.socket) -> socket.socket:
    sock, _ = server.accept()
    sock.settimeout(DEADLINE_S)
    stack.enter_context(sock)
    sock.sendall(greeting(b"NULL") + READY[b"ROUTER"])
    until_ready(sock)
    return sock
