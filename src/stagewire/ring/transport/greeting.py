"""What a port says first, or why it cannot be reached.

Asks over plain TCP, with connections of its own that it ends at once. Knows ZMTP's greeting and the kernel's errors;
what follows from the answer is decided in transport/diagnosis.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from enum import Enum

from stagewire.ring.rules import timeouts

__all__ = ["Greeting", "describe_absence", "read_greeting"]

_NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class Greeting(Enum):
    """What a listener says first. ZMTP's greeting names the security mechanism (ZeroMQ's RFC 23)."""

    REFUSED = "nothing listens there"
    SILENT = "no answer"
    OTHER = "no ZMTP"
    NULL = "NULL"
    CURVE = "CURVE"


# Signature and version. It names no mechanism: a listener that wants another would hang up before it names its own.
_BEGINNING = b"\xff" + bytes(8) + b"\x7f\x03\x00"
_MECHANISM = slice(12, 32)


def read_greeting(host: str, port: int) -> Greeting:
    """Asks the listener there. Takes up to three times `timeouts.GREETING_TIMEOUT_S`."""
    answer = b""
    try:
        with socket.create_connection((host, port), timeouts.GREETING_TIMEOUT_S) as probe:
            probe.settimeout(timeouts.GREETING_TIMEOUT_S)
            ends_at = time.monotonic() + timeouts.GREETING_TIMEOUT_S
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
        socket.create_connection((host, port), timeouts.GREETING_TIMEOUT_S).close()
    except TimeoutError:
        return f"{place} does not answer: the machine is off, or a firewall drops what is sent there"
    except ConnectionRefusedError:
        return f"nothing listens there yet: {place} refused the connection, so the machine is there"
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        what = "there is no way to" if error.errno in _NO_WAY else "no connection to"
        return f"{what} {place}: {reason}"
    return f"{place} accepts connections now"
