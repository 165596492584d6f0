"""Where a stage listens: its TCP port, the Unix socket that stands for it on this machine, and what becomes of both.

Whoever holds the TCP port owns the Unix socket of that name. Where only the Unix socket is used, the TCP port is held
without an answer, so that a port has one owner in either case.

A folder of sockets can vanish (a log-out, tmpfiles) and an address can go (another DHCP lease, a cable). The listener
looks once a second, makes its socket anew, and listens on the address that has come in the old one's place.

Knows addresses and paths; not who calls there (transport/callers.py).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq

from stagewire.config import Address
from stagewire.errors import ConfigError, PeerError
from stagewire.ring.rules import timeouts
from stagewire.ring.transport import hosts
from stagewire.ring.transport.interface import (
    AddressGone,
    Event,
    ListenFailed,
    Moved,
    NoAddressError,
    Notice,
    PortTakenError,
)
from stagewire.ring.transport.security import Security
from stagewire.ring.transport.sockets import endpoint

__all__ = ["Listener"]

LOOPBACKS = ("127.0.0.1", "::1")


@dataclass(frozen=True)
class _LocalSocket:
    """A Unix socket that stands for a port; ``path`` is empty when it could not be made yet."""

    path: str = ""
    inode: int = 0


class Listener:
    """What a ROUTER socket is bound to.

    Args:
        router: belongs to the caller.
        security: how connections are protected.
        host: numeric local address; None: not known yet.
        find_host: the address to listen on as things are now; raises OSError while that cannot be known.
    """

    def __init__(
        self, router: zmq.Socket[bytes], security: Security, host: str | None, find_host: Callable[[], str] | None
    ) -> None:
        self.host = host
        self._router = router
        self._security = security
        self._find_host = find_host
        self._ports: list[int] = []
        self._held: list[socket.socket] = []  # TCP ports behind local sockets; nobody accepts from them
        self._sockets: dict[Address, _LocalSocket] = {}  # by the address that they stand for
        self._next_look_at = 0.0
        self._had_host = False
        self._is_lost = False
        self._said: set[str] = set()

    def __repr__(self) -> str:
        return f"Listener(host={self.host}, ports={self._ports})"

    def bind(self, port: int) -> Address:
        """See `stagewire.ring.transport.interface.Transport.bind`."""
        host = self._decide()
        try:
            port = self._bind(host, port)
        except (OSError, zmq.ZMQError) as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTakenError(port) from error
            raise ConfigError(
                f"cannot listen on {host} port {port} ({error}): give --pipeline-local-bind-host an address of this "
                "machine"
            ) from error
        self._had_host = hosts.is_own(host)
        return Address(host, port)

    def is_own_path(self, path: str) -> bool:
        """Whether this is a local socket of this stage itself."""
        return any(path == own.path for own in self._sockets.values())

    def mind(self, now: float) -> list[Event]:
        """Looks once a second whether the sockets and the address are still there. Call it often."""
        if now < self._next_look_at or not self._ports:
            return []
        self._next_look_at = now + timeouts.LISTENER_LOOK_INTERVAL_S
        return [*self._mind_sockets(), *self._mind_address()]

    def hide(self) -> None:
        """Removes the sockets, so that nobody finds this stage. The router may take long to end after this."""
        for own in self._sockets.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(own.path)

    def close(self) -> None:
        """Lets the ports go. Call it after the router's end, in which libzmq may have made a path anew."""
        self.hide()
        for held in self._held:
            held.close()  # now somebody else may have the port, and the path

    # ---- binding ---------------------------------------------------------------------------------------------------

    def _decide(self) -> str:
        if self.host is None:
            assert self._find_host is not None
            try:
                host = self._find_host()
            except OSError as error:
                raise NoAddressError(str(error)) from error
            problem = self._security.problem(host)
            if problem is not None:
                raise ConfigError(problem)
            self.host = host
        return self.host

    def _bind(self, host: str, port: int) -> int:
        if not self._security.is_local(host):
            port = self._bind_tcp(host, port)
            self._try_to_bind_sockets(host, port)
        else:
            port = self._bind_local(host, port)
        if port not in self._ports:
            self._ports.append(port)
        return port

    def _bind_tcp(self, host: str, port: int) -> int:
        if ":" in host:
            self._router.setsockopt(zmq.IPV6, 1)
        self._router.bind(endpoint(host, port))
        bound = self._router.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return int(bound.rstrip(b"\0").rpartition(b":")[2])

    def _bind_local(self, host: str, port: int) -> int:
        """Binds the Unix socket alone and holds the TCP port. A socket that a killed stage has left is replaced."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        held = socket.create_server((host, port), family=family, backlog=1)
        try:
            port = int(held.getsockname()[1])
            self._bind_socket(host, port)
        except BaseException:
            held.close()
            raise
        self._held.append(held)
        return port

    def _try_to_bind_sockets(self, host: str, port: int) -> None:
        """Binds the Unix sockets beside a TCP port, so that stages of this machine find it under any address."""
        if not self._security.has_local_sockets:
            return
        is_all = ipaddress.ip_address(host.partition("%")[0]).is_unspecified
        for name in LOOPBACKS if is_all else (host,):
            try:
                self._bind_socket(name, port)
            except (ConfigError, OSError, zmq.ZMQError):
                self._sockets[Address(name, port)] = _LocalSocket()  # tried again at every look

    def _bind_socket(self, host: str, port: int) -> None:
        path = self._security.socket_path(host, port)
        self._router.bind(f"ipc://{path}")  # besides one whose file is gone: its connections go on
        self._sockets[Address(host, port)] = _LocalSocket(path, os.stat(path).st_ino)

    # ---- what becomes of it ----------------------------------------------------------------------------------------

    def _mind_sockets(self) -> Iterator[Event]:
        for address, own in list(self._sockets.items()):
            host, port, path = address.host, address.port, own.path
            try:
                if self._security.socket_path(host, port) == path and _inode(path) == own.inode:
                    continue
                self._bind_socket(host, port)
            except (ConfigError, OSError, zmq.ZMQError) as error:
                where = os.path.dirname(path) or "the folder of local sockets"
                yield from self._say(
                    f"{where} is gone and cannot be made anew, so no stage of this machine can find "
                    f"this one at {host} port {port}: {error}",
                    is_warning=True,
                )
                continue
            if path:
                new, old = os.path.dirname(self._sockets[address].path), os.path.dirname(path)
                where = "it is there again" if new == old else f"it is in {new} now"
                yield Notice(f"the local socket of {host} port {port} was gone from {old}: {where}")

    def _mind_address(self) -> Iterator[Event]:
        host = self.host
        if host is None or not self._had_host or hosts.is_loopback(host):
            return
        if hosts.is_own(host):
            if self._is_lost:
                yield AddressGone("")
            self._is_lost = False
            return
        if not self._is_lost:
            yield AddressGone(self._describe_loss(host))
        self._is_lost = True
        try:
            new = self._find_host() if self._find_host is not None else host
        except OSError:
            return
        if new == host or not hosts.is_own(new):
            return
        problem = self._security.problem(new)
        if problem is not None:
            yield ListenFailed(PeerError(f"{self._describe_loss(host)}, and {problem}"))
            return
        yield from self._move(host, new)

    def _describe_loss(self, host: str) -> str:
        return f"{host}, the address that this stage listens on, is gone from this machine"

    def _move(self, old: str, new: str) -> Iterator[Event]:
        self.host, self._is_lost = new, False
        for address in [address for address in self._sockets if address.host == old]:
            del self._sockets[address]
        for port in self._ports:
            try:
                self._bind(new, port)
            except (OSError, zmq.ZMQError) as error:
                text = f"{self._describe_loss(old)}, and this stage cannot listen on {new} port {port}: {error}"
                yield ListenFailed(PeerError(text))
                return
            yield Moved(Address(new, port))

    def _say(self, text: str, *, is_warning: bool) -> Iterator[Event]:
        if text not in self._said:
            self._said.add(text)
            yield Notice(text, is_warning)


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
