"""One end of a link over ZeroMQ in a process of its own: prints its port and its events, a line each.

    python zmq_peer.py SECURITY            listens
    python zmq_peer.py SECURITY PORT       connects there

SECURITY is "local" (in the user's folder for sockets), "open", or the path of a key file. Both are on loopback, or at
what `ZMQ_PEER_HOST` says.

A line on standard input is sent as a message; the listening end answers with the same frames. SIGUSR1: this thread
does nothing for two seconds, ZeroMQ's own do.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

from stagewire.config import Address
from stagewire.ring.rules.actions import Side
from stagewire.ring.transport.interface import Connected, Received, UnreachableError
from stagewire.ring.transport.security import OPEN, Security, read_key_file, runtime_folder
from stagewire.ring.transport.zmq_transport import ZmqTransport

HOST = os.environ.get("ZMQ_PEER_HOST", "127.0.0.1")


def say(text: str) -> None:
    print(text, flush=True)


def read_security(text: str) -> Security:
    if text == "local":
        return Security(find_folder=lambda: runtime_folder(os.environ, os.geteuid()))
    return OPEN if text == "open" else Security(read_key_file(Path(text)))


def stall(*_: object) -> None:
    say("stalled")
    time.sleep(2)


def main() -> None:
    signal.signal(signal.SIGUSR1, stall)
    transport = ZmqTransport(HOST, 1 << 20, read_security(sys.argv[1]))
    is_listening = len(sys.argv) == 2
    if is_listening:
        say(str(transport.bind(0).port))
    else:
        transport.connect(Side.PREDECESSOR, Address(HOST, int(sys.argv[2])))
    while True:
        for event in transport.poll(0.1):
            if isinstance(event, Received):
                if is_listening:
                    with contextlib.suppress(UnreachableError):
                        transport.send(Side.SUCCESSOR, event.peer, [bytes(frame) for frame in event.frames])
                else:
                    say(bytes(event.frames[0]).decode())
            else:
                say("connected" if isinstance(event, Connected) else f"{event}")
        if select.select([0], [], [], 0)[0]:
            data = os.read(0, 1000)
            if not data:
                return
            transport.send(Side.PREDECESSOR, b"", [data.strip()])


if __name__ == "__main__":
    main()
