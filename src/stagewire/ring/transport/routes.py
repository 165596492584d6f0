"""The ways to an address, and which is tried next.

An address of another machine has one way. An address of this machine has several: the Unix socket that stands for it,
TCP, and the sockets of other addresses of this machine with the same port.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from stagewire.config import Address
from stagewire.errors import ConfigError
from stagewire.ring.rules.actions import Side, Way
from stagewire.ring.transport import hosts
from stagewire.ring.transport.listener import Listener
from stagewire.ring.transport.security import Security

__all__ = ["Route", "Routes"]


@dataclass(frozen=True)
class Route:
    """One way to an address.

    Args:
        host: numeric.
        port: of ``host``.
        local_path: the Unix socket that stands for them, if it leads there.
        instead_of: the host that was asked for, if ``host`` is another address of this machine. A stage may be reached
            under any of them.
        is_here: whether it leads to this machine, where there may be more routes, now or later.
    """

    host: str
    port: int
    local_path: str | None = None
    instead_of: str = ""
    is_here: bool = False

    def describe(self) -> Way:
        if not self.instead_of:
            return Way(has_others=self.is_here)
        # Loopback has many spellings. An address on a network may be of another ring of this user, with the same port.
        is_doubtful = not (hosts.is_loopback(self.instead_of) and _is_loopback_name(self.host))
        return Way(f"{self.host} port {self.port}", is_doubtful, self.is_here)


def _is_loopback_name(host: str) -> bool:
    try:
        return hosts.is_loopback(host)
    except ValueError:  # the digest of a long address, which loopback's are not
        return False


@dataclass
class _Aim:
    """The address of a side, and how many of its routes have been tried."""

    address: Address
    num_tried: int = 0


class Routes:
    """See the module.

    Args:
        security: which address is reached in which way.
        listener: this stage's own, to which no route leads.
    """

    def __init__(self, security: Security, listener: Listener) -> None:
        self._security = security
        self._listener = listener
        self._aims: dict[Side, _Aim] = {}

    def aim(self, side: Side, address: Address) -> None:
        """The side's next connections go to ``address``. If that has not changed, its routes go on where they were."""
        if side not in self._aims or self._aims[side].address != address:
            self._aims[side] = _Aim(address)

    def try_another(self, side: Side) -> None:
        if side in self._aims:
            self._aims[side].num_tried += 1

    def choose(self, side: Side) -> Route:
        """The route whose turn it is.

        Raises:
            OSError: the name does not resolve, now.
            ConfigError: the address must not be used like this, or there is no folder for its local socket.
        """
        aim = self._aims[side]
        host = hosts.resolve(aim.address)
        problem = self._security.problem(host)
        if problem is not None:
            raise ConfigError(problem)
        routes = self._find(side, host, aim.address.port)
        return routes[aim.num_tried % len(routes)]

    def _find(self, side: Side, host: str, port: int) -> list[Route]:
        """The routes to a numeric address, the best first."""
        if not self._security.has_local_sockets or not hosts.is_own(host):
            return [Route(host, port)]
        path = self._security.socket_path(host, port)
        plain, local = Route(host, port, is_here=True), Route(host, port, path, is_here=True)
        routes = [local] if self._security.is_local(host) else [*([local] if os.path.exists(path) else []), plain]
        # A stage of this machine may listen on another address of it. A port's owner has this very address.
        if side is not Side.OWNER:
            others = self._security.other_paths(host, port).items()
            routes += [Route(other, port, path, host, is_here=True) for path, other in others]
        routes = [route for route in routes if not self._listener.is_own_path(route.local_path or "")] or [local]
        routes.sort(key=lambda route: route.local_path is not None and not os.path.exists(route.local_path))
        return routes
