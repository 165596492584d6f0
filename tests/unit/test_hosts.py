"""Which addresses are this machine's, and where a stage listens."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange
from stagewire.ring.transport import hosts
from stagewire.ring.transport.security import secure_stage


def config(predecessor: str, bind: str | None = None) -> StageConfig:
    return StageConfig(1, 4, LayerRange(8, 16), 15550, Address(predecessor, 15550), bind)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two cables."""

    def entry(address: str) -> SimpleNamespace:
        return SimpleNamespace(family=socket.AF_INET6 if ":" in address else socket.AF_INET, address=address)

    found = {
        "lo": [entry("127.0.0.1"), entry("::1")],
        "eth0": [entry("10.0.1.2"), entry("fe80::1:2%eth0")],
        "eth1": [entry("10.0.2.1"), entry("fd00::2")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("::ffff:127.0.1.1", True),
        ("10.0.1.2", True),
        ("::ffff:10.0.2.1", True),
        ("fd00::2", True),
        ("fd00:0:0::2", True),
        ("fe80::1:2%eth0", True),
        ("10.0.1.1", False),
        ("128.0.0.1", False),
        ("fd00::3", False),
        ("0.0.0.0", False),
    ],
)
def test_whether_an_address_is_this_machines(host: str, is_own: bool) -> None:
    assert hosts.is_own(host) is is_own


@pytest.mark.usefixtures("machine")
def test_the_others() -> None:
    assert hosts.other_addresses("10.0.1.2") == ["10.0.2.1 (eth1)", "fd00::2 (eth1)"]
    assert hosts.likely_host() == "127.0.0.1"  # of two networks none is likelier


def test_where_to_listen() -> None:
    for predecessor, host in (
        ("localhost", "127.0.0.1"),
        ("127.0.1.1", "127.0.0.1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
    ):
        assert hosts.bind_host(config(predecessor)) == host
    assert hosts.bind_host(config("no-such-host.invalid", "localhost")) == "127.0.0.1"


@pytest.mark.parametrize("name", ["no-such-host.invalid", "x" * 80 + ".invalid", "a..b"])
def test_a_name_that_does_not_resolve_yet(name: str) -> None:
    with pytest.raises(OSError, match=name[:10]):
        hosts.bind_host(config(name))
    secured = secure_stage(config(name))
    assert (secured.host, secured.warnings) == (None, [])
    assert secured.security.problem("8.8.8.8")  # what comes of it later is looked at then
    with pytest.raises(ConfigError, match="--pipeline-local-bind-host"):
        secure_stage(config("localhost", name))


def test_whether_a_stage_is_here_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["127.0.1.1"])
    monkeypatch.setattr(hosts, "resolve", lambda _: next(answers))
    address = Address("asked-once.test", 1)
    assert [hosts.shares_machine(address) for _ in range(2)] == [True, True]
