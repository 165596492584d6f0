"""Stages of one machine, in processes of their own: whatever they call it, and whatever becomes of their sockets."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from stagewire.ring.transport import hosts
from support.peers import StagePeer, stages

pytestmark = pytest.mark.process

WHOLE_S = 20.0


@pytest.fixture
def runtime_dir(socket_folder: Path) -> Path:
    (socket_folder / "x").mkdir(mode=0o700)
    return socket_folder / "x"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [int(server.getsockname()[1]) for server in servers]


def network_address() -> str:
    """Of this machine, IPv4, other than loopback."""
    found = [text.split()[0] for text in hosts.other_addresses("127.0.0.1") if ":" not in text]
    if not found:
        pytest.skip("this machine has no network")
    return found[0]


SPELLINGS = {
    "Debian's own name": ("127.0.1.1", "127.0.1.1"),
    "all of 127/8": ("127.3.2.1", "localhost"),
    "IPv6": ("[::1]", "127.0.0.1"),
    "mapped": ("[::ffff:127.0.0.1]", "[::1]"),
    "network and loopback": ("NETWORK", "127.0.0.1"),
    "loopback and network": ("127.0.1.1", "NETWORK"),
    "mapped network": ("[::ffff:NETWORK]", "NETWORK"),
    "own name": (socket.gethostname(), "NETWORK"),
}


@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_any_spelling_of_this_machine_is_this_machine(spelling: str, runtime_dir: Path) -> None:
    """Each stage has its own way to name the other."""
    names = [name.replace("NETWORK", network_address()) for name in SPELLINGS[spelling]]
    ports = free_ports(2)
    anywhere = "pipeline_allow_insecure=1"  # this machine's address need not be of a private network
    commands = [f"{ports[stage]} {names[stage]}:{ports[1 - stage]} {anywhere}" for stage in (0, 1)]
    with stages(*commands, XDG_RUNTIME_DIR=str(runtime_dir)) as ring:
        for stage in ring:
            stage.until("^open$", WHOLE_S)


def test_stages_that_share_a_port_and_spell_it_differently(runtime_dir: Path) -> None:
    """Two own it, one under each address, and each stage finds its predecessor with one or the other."""
    shared, last = free_ports(2)
    commands = [f"{shared} 127.0.1.1:{last}", f"{shared} [::1]:{shared}", f"{shared} 127.0.0.1:{shared}"]
    with stages(*commands, f"{last} [::1]:{shared}", XDG_RUNTIME_DIR=str(runtime_dir)) as ring:
        for stage in ring:
            stage.until("^open$", WHOLE_S)


def test_another_ring_on_the_same_port_of_another_address_is_left_alone(runtime_dir: Path) -> None:
    """Its stage 0 is found in place of one that is not up yet; who does not belong there goes on waiting."""
    own, ports = network_address(), free_ports(3)
    with stages(
        f"{ports[0]} 127.0.0.1:{ports[1]}", f"{ports[1]} 127.0.0.1:{ports[0]}", XDG_RUNTIME_DIR=str(runtime_dir)
    ) as ring:
        for stage in ring:
            stage.until("^open$", WHOLE_S)
        words = (str(ports[2]), f"{own}:{ports[0]}", "pipeline_allow_insecure=1")
        late = StagePeer("1", "2", *words, environ={"XDG_RUNTIME_DIR": str(runtime_dir)})
        try:
            ring[0].until("stage 1 was refused: there is already a stage 1", WHOLE_S)
            assert late.line(0.5) is None or late.process.poll() is None
        finally:
            late.end()
        assert not any("broken" in line for line in ring[0].said)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2")
def test_a_name_that_does_not_resolve_yet_is_waited_for(runtime_dir: Path) -> None:
    """Without --pipeline-local-bind-host too: where to listen is known when the name is."""
    name, folder = f"sw{os.getpid()}", Path(f"/etc/netns/sw{os.getpid()}")
    prefix = ("ip", "netns", "exec", name)
    folder.mkdir(parents=True)
    try:
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        for command in (f"ip netns add {name}", f"ip -n {name} link set lo up"):
            subprocess.run(command.split(), check=True)
        commands = ["15550 late.test:15551", "15551 late.test:15550"]
        with stages(*commands, prefixes=[prefix] * 2, XDG_RUNTIME_DIR=str(runtime_dir)) as ring:
            for stage in ring:
                stage.until("listens nowhere yet: .*late.test does not resolve")
            (folder / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 late.test\n")
            for stage in ring:
                stage.until("^open$", WHOLE_S)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(folder)


class TestVanishedFolder:
    """Somebody removes the folder of local sockets: a log-out, tmpfiles."""

    @pytest.fixture
    def ports(self) -> list[int]:
        return free_ports(2)

    def commands(self, ports: list[int]) -> list[str]:
        return [f"{ports[0]} 127.0.0.1:{ports[1]}", f"{ports[1]} 127.0.0.1:{ports[0]}"]

    @pytest.mark.parametrize("what", ["stagewire", "."])
    def test_while_a_stage_waits(self, ports: list[int], runtime_dir: Path, what: str) -> None:
        """``.``: the whole of XDG_RUNTIME_DIR, which later stages then do not use."""
        environ = {"XDG_RUNTIME_DIR": str(runtime_dir)}
        first, second = self.commands(ports)
        one = StagePeer("1", "2", *second.split(), environ=environ)
        try:
            one.until("^bound")
            shutil.rmtree((runtime_dir / what).resolve())
            one.until(f"{runtime_dir}/stagewire")
            zero = StagePeer("0", "2", *first.split(), environ=environ)
            try:
                for stage in (zero, one):
                    stage.until("^open$", WHOLE_S)
            finally:
                zero.end()
        finally:
            one.end()

    def test_while_they_serve_and_then_a_stage_is_lost(self, ports: list[int], runtime_dir: Path) -> None:
        environ = {"XDG_RUNTIME_DIR": str(runtime_dir)}
        commands = self.commands(ports)
        with stages(*commands, **environ) as ring:
            for stage in ring:
                stage.until("^open$", WHOLE_S)
            shutil.rmtree(runtime_dir / "stagewire")
            ring[1].end()
            again = StagePeer("1", "2", *commands[1].split(), environ=environ)
            try:
                for stage in (ring[0], again):
                    stage.until("^open$", WHOLE_S)
            finally:
                again.end()

    def test_a_standby_takes_over_and_a_shared_ports_owner_is_found(self, runtime_dir: Path) -> None:
        environ = {"XDG_RUNTIME_DIR": str(runtime_dir)}
        shared, last = free_ports(2)
        commands = [f"{shared} 127.0.0.1:{last}", f"{shared} 127.0.0.1:{shared}", f"{last} 127.0.0.1:{shared}"]
        with stages(*commands, **environ) as ring:
            for stage in ring:
                stage.until("^open$", WHOLE_S)
            standby = StagePeer("1", "3", *commands[1].split(), "pipeline_standby=1", environ=environ)
            try:
                standby.until("^bound")
                shutil.rmtree(runtime_dir / "stagewire")
                ring[1].end()
                for stage in (standby, ring[0], ring[2]):
                    stage.until("^open$", WHOLE_S)
            finally:
                standby.end()

    def test_a_folder_that_cannot_be_made_anew_is_said(self, ports: list[int], runtime_dir: Path) -> None:
        one = StagePeer("1", "2", *self.commands(ports)[1].split(), environ={"XDG_RUNTIME_DIR": str(runtime_dir)})
        try:
            one.until("^bound")
            (runtime_dir / "file").write_text("not a folder")
            while not (runtime_dir / "stagewire").is_file():  # the stage makes its folder anew at any moment
                shutil.rmtree(runtime_dir / "stagewire", ignore_errors=True)
                with contextlib.suppress(IsADirectoryError):
                    (runtime_dir / "file").rename(runtime_dir / "stagewire")
            one.until(f"{runtime_dir}/stagewire is gone and cannot be made anew")
        finally:
            one.end()
