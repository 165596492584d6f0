"""What is at an address where no connection came up: what it says first, or why nothing is reached there.

For people and for verdicts only. It asks over TCP, with connections of its own that it ends at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from enum import Enum

__all__ = ["GREETING_TIMEOUT_S", "Greeting", "describe_absence", "read_greeting"]

GREETING_TIMEOUT_S = 0.3
_NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class Greeting(Enum):
    """What something that listens says first. ZMTP's greeting names the security mechanism (RFC 23)."""

    REFUSED = "nothing listens there"
    SILENT = "no answer"
    OTHER = "no ZMTP"
    NULL = "NULL"
    CURVE = "CURVE"


# Signature and version. No mechanism: a listener that wants another one would hang up before it has named its own.
_BEGINNING = b"\xff" + bytes(8) + b"\x7f\x03\x00"
_MECHANISM = slice(12, 32)


def read_greeting(host: str, port: int) -> Greeting:
    """Asks whoever listens there. Takes up to `GREETING_TIMEOUT_S` three times."""
    answer = b""
    try:
        with socket.create_connection((host, port), GREETING_TIMEOUT_S) as probe:
            probe.settimeout(GREETING_TIMEOUT_S)
            ends_at = time.monotonic() + GREETING_TIMEOUT_S
            with contextlib.suppress(OSError):
                probe.sendall(_BEGINNING)
                while len(answer) < _MECHANISM.stop and time.monotonic() < ends_at and (part := probe.recv(64)):
                    answer += part
    except TimeoutError:
        return Greeting.SILENT
    except OSError:
        return Greeting.REFUSED
    if answer and not answer.startswith(b"\xff"):
        return Greeting.OTHER
    names = {greeting.value.encode(): greeting for greeting in (Greeting.NULL, Greeting.CURVE)}
    return names.get(answer[_MECHANISM].rstrip(b"\0"), Greeting.SILENT)


def describe_absence(host: str, port: int) -> str:
    """Why a TCP connection to a numeric host and port cannot be made."""
    place = f"{host} port {port}"
    try:
        socket.create_connection((host, port), GREETING_TIMEOUT_S).close()
    except TimeoutError:
        return f"{place} does not answer: the machine is off, or a firewall drops what is sent there"
    except ConnectionRefusedError:
        return f"nothing listens there yet: {place} refused the connection, so the machine is there"
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        what = "there is no way to" if error.errno in _NO_WAY else "no connection to"
        return f"{what} {place}: {reason}"
    return f"{place} accepts connections now"
