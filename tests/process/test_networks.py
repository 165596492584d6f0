"""Rings over networks that are not simple: namespaces of this kernel, with cables between them."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagewire.ring.transport.security import make_key_file
from support.peers import StagePeer, stages

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2's `ip`"
    ),
]

WHOLE_S = 20.0
_number = itertools.count()


class Network:
    """Hosts with cables; gone at the end."""

    def __init__(self) -> None:
        self.hosts: list[str] = []

    def host(self) -> str:
        name = f"sw{os.getpid()}x{next(_number)}"
        self.run(f"ip netns add {name}")
        self.hosts.append(name)
        self.run(f"ip -n {name} link set lo up")
        return name

    def cable(self, one: str, end: str, other: str, other_end: str) -> None:
        """Between two hosts; ``end``: a name of an interface and its address with the length of its prefix, or only
        the name.
        """
        (name, *address), (other_name, *other_address) = end.split(), other_end.split()
        self.run(f"ip link add {name} netns {one} type veth peer name {other_name} netns {other}")
        for host, interface, addresses in ((one, name, address), (other, other_name, other_address)):
            for each in addresses:
                self.run(f"ip -n {host} addr add {each} dev {interface}")
            self.run(f"ip -n {host} link set {interface} up")

    def run(self, command: str) -> None:
        subprocess.run(command.split(), check=True, capture_output=True)

    def close(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def inside(host: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", host)


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        yield network
    finally:
        network.close()


@pytest.fixture
def pair(network: Network) -> list[str]:
    """10.77.0.1 and 10.77.0.2."""
    hosts = [network.host(), network.host()]
    network.cable(hosts[0], "e0 10.77.0.1/24", hosts[1], "e0 10.77.0.2/24")
    return hosts


@pytest.fixture
def runtime_dir(socket_folder: Path) -> dict[str, str]:
    (socket_folder / "x").mkdir(mode=0o700)
    return {"XDG_RUNTIME_DIR": str(socket_folder / "x")}


def open_all(ring: list[StagePeer]) -> None:
    for stage in ring:
        stage.until("^open$", WHOLE_S)


class TestOwnAddress:
    def test_that_changes_is_followed(self, network: Network, pair: list[str], runtime_dir: dict[str, str]) -> None:
        """Stage 1 listens on the one that has come; its name is stage 0's to resolve."""
        hosts = Path(f"/etc/netns/{pair[0]}")
        hosts.mkdir(parents=True)
        try:
            (hosts / "hosts").write_text("10.77.0.2 bee.test\n")
            commands = ["15550 bee.test:15551", "15551 10.77.0.1:15550"]
            with stages(*commands, prefixes=[inside(host) for host in pair], **runtime_dir) as ring:
                open_all(ring)
                network.run(f"ip -n {pair[1]} addr del 10.77.0.2/24 dev e0")
                ring[1].until("10.77.0.2, the address that this stage listens on, is gone from this machine")
                network.run(f"ip -n {pair[1]} addr add 10.77.0.9/24 dev e0")
                ring[1].until("^bound 10.77.0.9:15551")
                (hosts / "hosts").write_text("10.77.0.9 bee.test\n")
                open_all(ring)
        finally:
            shutil.rmtree(hosts)

    @pytest.mark.slow
    def test_that_was_given_and_is_gone_is_waited_for(
        self, network: Network, pair: list[str], runtime_dir: dict[str, str]
    ) -> None:
        commands = ["15550 10.77.0.2:15551", "15551 10.77.0.1:15550 pipeline_local_bind_host=10.77.0.2"]
        with stages(*commands, prefixes=[inside(host) for host in pair], **runtime_dir) as ring:
            open_all(ring)
            network.run(f"ip -n {pair[1]} addr del 10.77.0.2/24 dev e0")
            network.run(f"ip -n {pair[1]} addr add 10.77.0.9/24 dev e0")
            ring[1].until("10.77.0.2, the address that this stage listens on, is gone from this machine")
            for stage in ring:
                stage.until("^broken")
            network.run(f"ip -n {pair[1]} addr add 10.77.0.2/24 dev e0")
            open_all(ring)

    @pytest.mark.slow
    def test_that_does_not_come_back_ends_the_stage(
        self, network: Network, pair: list[str], runtime_dir: dict[str, str]
    ) -> None:
        more = "pipeline_local_bind_host=10.77.0.2 pipeline_start_timeout=8"
        commands = ["15550 10.77.0.2:15551", f"15551 10.77.0.1:15550 {more}"]
        with stages(*commands, prefixes=[inside(host) for host in pair], **runtime_dir) as ring:
            open_all(ring)
            network.run(f"ip -n {pair[1]} addr del 10.77.0.2/24 dev e0")
            ring[1].until("^failed 3: .*10.77.0.2, the address that this stage listens on, is gone", WHOLE_S)


class TestDirectCables:
    """Three machines, each joined to the two others by cables of their own: 10.0.1.x, 10.0.2.x, 10.0.3.x."""

    @pytest.fixture
    def triangle(self, network: Network) -> list[str]:
        a, b, c = (network.host() for _ in range(3))
        network.cable(a, "e0 10.0.1.1/24", b, "e0 10.0.1.2/24")
        network.cable(b, "e1 10.0.2.1/24", c, "e0 10.0.2.2/24")
        network.cable(c, "e1 10.0.3.1/24", a, "e1 10.0.3.2/24")
        return [a, b, c]

    commands = ("15550 10.0.3.1:15552", "15551 10.0.1.1:15550", "15552 10.0.2.1:15551")

    def test_each_says_which_address_to_listen_on(self, triangle: list[str], runtime_dir: dict[str, str]) -> None:
        """By default each listens where its predecessor is, and the others refuse the connection."""
        with stages(*self.commands, prefixes=[inside(host) for host in triangle], **runtime_dir) as ring:
            for stage, own, other in (
                (0, "10.0.3.2", "10.0.1.1"),
                (1, "10.0.1.2", "10.0.2.1"),
                (2, "10.0.2.2", "10.0.3.1"),
            ):
                successor = (stage + 1) % 3
                ring[stage].until(
                    rf"listens on {own} port 1555{stage} only.* {other} \(e\d\).*"
                    rf"if stage {successor} calls that.*--pipeline-local-bind-host",
                    WHOLE_S,
                )

    def test_with_these_addresses_it_works(
        self, triangle: list[str], runtime_dir: dict[str, str], tmp_path: Path
    ) -> None:
        make_key_file(tmp_path / "ring.key")
        hosts = ("10.0.1.1", "10.0.2.1", "10.0.3.1")
        commands = [
            f"{command} pipeline_local_bind_host={host} pipeline_key_file={tmp_path / 'ring.key'}"
            for command, host in zip(self.commands, hosts, strict=True)
        ]
        with stages(*commands, prefixes=[inside(host) for host in triangle], **runtime_dir) as ring:
            open_all(ring)


@pytest.fixture
def black_hole(network: Network) -> list[str]:
    """Two hosts with an MTU of 1500, and a switch between them that drops what is larger than 600 bytes on its way to
    the second one, and tells nobody.
    """
    a, b, switch = (network.host() for _ in range(3))
    network.cable(a, "e0 10.77.0.1/24", switch, "pa")
    network.cable(b, "e0 10.77.0.2/24", switch, "pb")
    for command in ("add br0 type bridge", "set pa master br0", "set pb master br0", "set br0 up", "set pb mtu 600"):
        network.run(f"ip -n {switch} link {command}")
    network.run(f"ip -n {a} link set e0 gso_max_segs 1")  # packets as on a wire, not several at once
    return [a, b]


@pytest.mark.parametrize("is_keyed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_path_that_swallows_large_packets_is_named(
    network: Network, black_hole: list[str], runtime_dir: dict[str, str], tmp_path: Path, is_keyed: bool
) -> None:
    make_key_file(tmp_path / "ring.key")
    more = " rules.timeouts.STALL_S=3" + (f" pipeline_key_file={tmp_path / 'ring.key'}" if is_keyed else "")
    commands = [f"15550 10.77.0.2:15551{more}", f"15551 10.77.0.1:15550{more}"]
    with stages(*commands, prefixes=[inside(host) for host in black_hole], **runtime_dir) as ring:
        open_all(ring)
        ring[0].write("300")
        ring[1].until("^got Call 300$")
        ring[0].write("300000")
        ring[0].until(
            r"^broken: .*\d+ bytes on link 0 -> 1 .*not acknowledged.*small messages pass.*swallows.*1448 bytes.*MTU",
            WHOLE_S,
        )
        network.run(f"ip -n {black_hole[0]} link set e0 mtu 600")  # what the message says
        open_all(ring)
        ring[0].write("300000")
        ring[1].until("^got Call 300000$", WHOLE_S)


def test_a_shared_ports_second_port_that_is_not_forwarded_is_named(
    network: Network, runtime_dir: dict[str, str]
) -> None:
    """Behind a router that forwards the shared port and nothing else."""
    inner, outer = network.host(), network.host()
    network.cable(inner, "e0 10.77.0.1/24", outer, "e0 10.77.0.2/24")
    forward = subprocess.Popen([*inside(outer), "python3", "-c", FORWARD])
    network.run(f"ip -n {outer} addr add 10.88.0.1/32 dev lo")
    started = [StagePeer("0", "3", "15550", "10.77.0.2:15552", prefix=inside(inner), environ=runtime_dir)]
    try:
        started[0].until("^bound 10.77.0.1:15550")  # it owns the port
        started.append(StagePeer("1", "3", "15550", "10.77.0.1:15550", prefix=inside(inner), environ=runtime_dir))
        words = ("15552", "10.88.0.1:15550", "rules.timeouts.WAIT_LINE_INTERVAL_S=2", "rules.timeouts.FORWARDING_S=3")
        started.append(StagePeer("2", "3", *words, prefix=inside(outer), environ=runtime_dir))
        started[2].until(
            r"10\.88\.0\.1:15550 sends this stage on to port \d+, where stage 1 listens: .*10\.88\.0\.1 port \d+ "
            r"refused.*forward.*--pipeline-local-bind-port",
            30,
        )
    finally:
        for each in started:
            each.end()
        forward.kill()
        forward.wait()


FORWARD = """
import asyncio

async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()

async def accept(reader, writer):
    there, back = await asyncio.open_connection("10.77.0.1", 15550)
    await asyncio.gather(copy(reader, back), copy(there, writer))

async def main():
    server = await asyncio.start_server(accept, "10.88.0.1", 15550)
    await server.serve_forever()

while True:
    try:
        asyncio.run(main())
    except OSError:  # its address is not there yet
        pass
"""
