"""Which addresses are this machine's, and on which one a stage listens.

This machine has many spellings: all of 127/8, ::1, every address of its interfaces, their names, and IPv4-mapped IPv6
addresses. All questions about that are answered here. Knows names and addresses; no port is opened.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from typing import Any

import psutil

from stagewire.config import Address, StageConfig

__all__ = [
    "bind_host",
    "is_loopback",
    "is_own",
    "likely_host",
    "normalize",
    "other_addresses",
    "resolve",
    "shares_machine",
]


def resolve(address: Address) -> str:
    """The numeric form of a host: IPv4 if it has such an address. An IPv4-mapped IPv6 address becomes IPv4.

    Raises:
        OSError: the name does not resolve, now.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(error.errno, f"the name {address.host} does not resolve here ({error.strerror})") from error
    except UnicodeError as error:  # an empty or overlong label; the codec's own message names no host
        raise OSError(f"{address.host!r} is not a host name") from error
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return normalize(_numeric(found[0][4]))


def _numeric(address: Any) -> str:
    """The host of a socket's address. A link-local one has its interface, without which it cannot be reached."""
    scope = int(address[3]) if len(address) == 4 else 0
    return f"{address[0]}%{socket.if_indextoname(scope)}" if scope else str(address[0])


def normalize(host: str) -> str:
    """A numeric address in one form: an IPv4-mapped IPv6 address (``::ffff:10.0.0.1``) becomes IPv4."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped) if mapped else host


def is_loopback(host: str) -> bool:
    """Of a numeric address."""
    return ipaddress.ip_address(_without_scope(host)).is_loopback


def is_own(host: str) -> bool:
    """Whether a numeric address is one of this machine's, or of this container's."""
    return is_loopback(host) or str(ipaddress.ip_address(_without_scope(host))) in own_addresses()


def own_addresses() -> dict[str, str]:
    """Every address of this machine that is not loopback, without scope, to the name of its interface."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
        if not is_loopback(address := str(ipaddress.ip_address(_without_scope(entry.address))))
    }


def other_addresses(host: str) -> list[str]:
    """The addresses that this machine could listen on besides ``host``, as "address (interface)"; none link-local."""
    own = _without_scope(host)
    return [
        f"{address} ({name})"
        for address, name in own_addresses().items()
        if address != own and not ipaddress.ip_address(address).is_link_local
    ]


def likely_host() -> str:
    """The address of a machine that has only one on a network, such as a pod; else loopback."""
    found = [host for host in own_addresses() if ipaddress.ip_address(host).version == 4]
    return found[0] if len(found) == 1 else "127.0.0.1"


@functools.cache
def shares_machine(address: Address) -> bool:
    """Whether a stage's address is this machine's. Decided once, whatever the name server says later.

    A name that does not resolve counts as another machine's.
    """
    try:
        return is_own(resolve(address))
    except OSError:
        return False


def bind_host(config: StageConfig) -> str:
    """The numeric address that a stage listens on: the configured one, else that of the interface which reaches its
    predecessor. It is loopback only if the predecessor's address is. Nothing is sent.

    Raises:
        OSError: the name does not resolve now, or there is no route to the predecessor now.
    """
    if config.bind_host:
        return resolve(Address(config.bind_host, config.bind_port))
    return _towards(Address(resolve(config.predecessor), config.predecessor.port))


def _towards(address: Address) -> str:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address.host, address.port))
        except OSError as error:
            raise OSError(error.errno, f"nothing leads to {address.host} from here ({error.strerror})") from error
        return _numeric(probe.getsockname())


def _without_scope(host: str) -> str:
    return normalize(host).partition("%")[0]
