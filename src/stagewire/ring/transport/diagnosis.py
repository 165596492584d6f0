"""Why a connection did not come up, for people and for the ring's rules.

Tells a place where nothing listens yet from something that is no stage, and says what to do about keys. Asks the port
itself (transport/greeting.py) where ZeroMQ does not say. Knows attempts that failed; no living connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import zmq

from stagewire.config import KEY_FILE_FLAG
from stagewire.errors import ConfigError
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import Side
from stagewire.ring.transport import hosts
from stagewire.ring.transport.greeting import Greeting, describe_absence, read_greeting
from stagewire.ring.transport.interface import BadHandshake, Disconnected
from stagewire.ring.transport.link import BAD_HANDSHAKES, Link
from stagewire.ring.transport.routes import Route
from stagewire.ring.transport.security import Security

__all__ = ["Diagnosis"]

# How many other stages of this machine a message names.
MAX_NAMED = 4

_NEEDS_KEY = f"the stage there has a key: start this one with the same {KEY_FILE_FLAG}"
_HAS_NO_KEY = f"the stage there has no key: start it, like all stages of the ring, with the same {KEY_FILE_FLAG}"
_OTHER_KEY = f"the stage there has another key: copy one {KEY_FILE_FLAG} to all hosts of the ring"
_NOT_OURS = (
    "the port is not of a stage of this user on this host: it is another program's, another user's, or leads into a "
    f"container or through a tunnel, for which all stages need {KEY_FILE_FLAG}"
)


class Diagnosis:
    """See the module."""

    def __init__(self, security: Security) -> None:
        self._security = security
        self._foreign_since: dict[Side, float] = {}  # since when something has held a port without being known
        self._notes: dict[Side, str] = {}  # why the route that was asked for failed last

    def came_up(self, side: Side) -> None:
        """The side has a connection, so what was suspected of its port does not count any more."""
        self._foreign_since.pop(side, None)

    def judge(self, side: Side, event: int, link: Link) -> BadHandshake | Disconnected:
        """Why ``link`` did not come up; ``event``: what ZeroMQ's monitor said.

        The route that was asked for counts more than the others.
        """
        route = link.route
        if route.instead_of or (route.local_path and not self._security.is_local(route.host)):
            return Disconnected(side, self._notes.get(side, "nothing listens there yet"))
        verdict = self._judge_local(side, link) if route.local_path else self._judge_tcp(side, event, link)
        self._notes[side] = verdict.note
        return verdict

    def _judge_tcp(self, side: Side, event: int, link: Link) -> BadHandshake | Disconnected:
        route = link.route
        if not event & BAD_HANDSHAKES:
            return Disconnected(side, describe_absence(route.host, route.port))
        greeting = read_greeting(route.host, route.port)
        note = self._compare_keys(greeting, link)
        is_protocol = event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        if note or is_protocol or greeting is Greeting.OTHER or link.was_mute():
            return BadHandshake(side, note)
        # A proxy whose stage is not up yet accepts and hangs up. That is not yet another program.
        note = "something accepts connections there and ends them at once: a proxy, or a stage that is not up yet"
        return Disconnected(side, note)

    def _compare_keys(self, greeting: Greeting, link: Link) -> str:
        """What keys have to do with a handshake that failed; empty: nothing."""
        if self._security.key is None:
            return _NEEDS_KEY if greeting is Greeting.CURVE else ""
        if greeting is Greeting.NULL or self._is_listening_locally(link.route):
            return _HAS_NO_KEY
        return _OTHER_KEY if greeting is Greeting.CURVE and not link.was_mute() else ""

    def _judge_local(self, side: Side, link: Link) -> BadHandshake | Disconnected:
        """Why a Unix socket's connection did not come up. The TCP port's holder may be no stage of this user."""
        if link.was_mute():
            return BadHandshake(side)
        route = link.route
        greeting = read_greeting(route.host, route.port)
        now = time.monotonic()
        if greeting is Greeting.REFUSED:
            self._foreign_since.pop(side, None)
            return Disconnected(side, f"nothing listens there yet: {_describe_local_absence(route)}")
        if greeting in (Greeting.OTHER, Greeting.CURVE):
            return BadHandshake(side, _NEEDS_KEY if greeting is Greeting.CURVE else "")
        # A stage that has just taken its port, or is just leaving it, has no socket for a moment.
        if now - self._foreign_since.setdefault(side, now) < timeouts.HANDSHAKE_TIMEOUT_MS / 1000:
            return Disconnected(side, "its port is taken, but no stage of this user answers there yet")
        return BadHandshake(side, f"{_NOT_OURS} (looked for {route.local_path})")

    def _is_listening_locally(self, route: Route) -> bool:
        """Whether a stage of this user that has no key is there."""
        if self._security.find_folder is None or not hosts.is_loopback(route.host):
            return False
        with contextlib.suppress(ConfigError), socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self._security.socket_path(route.host, route.port)) == 0
        return False


def _describe_local_absence(route: Route) -> str:
    folder = os.path.dirname(str(route.local_path))
    here = sorted(name.rpartition("-")[0].replace("-", " port ") for name in _living_sockets(folder))
    seen = f"; stages here listen on {', '.join(here[:MAX_NAMED])}" if here else ""
    return f"{route.host} port {route.port} refused the connection, and {folder} has no socket for it{seen}"


def _living_sockets(folder: str) -> set[str]:
    """The names of the sockets in a folder that a process of this network namespace listens on."""
    try:
        lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {line.rpartition("/")[2] for line in lines if line.rpartition("/")[0].endswith(f" {folder}")}
