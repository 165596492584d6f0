"""When is a peer gone? Real processes, frozen by SIGSTOP: one of them, or both, as when a whole machine stalls."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from stagewire.config import Address
from stagewire.errors import ConfigError
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import Side
from stagewire.ring.rules.timeouts import PROBE_PATIENCE_ENV
from stagewire.ring.transport.interface import Connected, Disconnected, Event, Received
from stagewire.ring.transport.security import OPEN, make_key_file
from stagewire.ring.transport.zmq_transport import ZmqTransport
from support.peers import DEADLINE_S, Peer
from support.proxy import Proxy

pytestmark = pytest.mark.process


@pytest.fixture(params=["local", "key"])
def security(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """How both peers protect their link: when one is gone does not depend on it."""
    if request.param == "key":
        make_key_file(tmp_path / "ring.key")
        return str(tmp_path / "ring.key")
    return str(request.param)


@contextlib.contextmanager
def linked(security: str, hosts: Sequence[str] = ()) -> Iterator[tuple[Peer, Peer]]:
    """``hosts``: network namespaces of the listener and of the caller."""
    where: list[Sequence[str]] = [("ip", "netns", "exec", host) for host in hosts] or [(), ()]
    with contextlib.ExitStack() as stack:
        listener = Peer(security, prefix=where[0])
        stack.callback(listener.process.kill)
        port = listener.line()
        assert port is not None
        caller = Peer(security, port, prefix=where[1])
        stack.callback(caller.process.kill)
        assert caller.line() == "connected"
        caller.write("hello")
        assert caller.line() == "hello"
        yield listener, caller


def test_a_frozen_peer_is_lost_within_two_seconds(security: str, say: Callable[[str], None]) -> None:
    """The best of three, because a busy machine is slow to look; never above five."""
    took_s = []
    for _ in range(3):
        with linked(security) as (listener, caller):
            caller.write("settled")
            assert caller.line() == "settled"
            time.sleep(1.0)  # its probe is up, which nothing tells
            listener.signal(signal.SIGSTOP)
            began_at = time.monotonic()
            event = caller.line()
            assert event is not None
            assert event.startswith("Disconnected")
            took_s.append(time.monotonic() - began_at)
    say(f"a frozen peer was lost after {', '.join(f'{each:.2f}' for each in sorted(took_s))} s")
    assert min(took_s) < 2.0
    assert max(took_s) < 5.0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, 10.78.0.1 and 10.78.0.2."""
    names = [f"swa{os.getpid()}", f"swb{os.getpid()}"]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add e0 netns {names[0]} type veth peer name e0 netns {names[1]}")
    for number, name in enumerate(names, 1):
        commands += [f"ip -n {name} addr add 10.78.0.{number}/24 dev e0", f"ip -n {name} link set e0 up"]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2")
@pytest.mark.parametrize("mute", [(0,), (1,), (0, 1)], ids=["listener", "caller", "both"])
@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_a_cut_cable_is_noticed_within_two_seconds(
    hosts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    say: Callable[[str], None],
    mute: tuple[int, ...],
    is_busy: bool,
) -> None:
    """In one direction too: nothing that ``mute`` hosts send arrives, not even TCP's acknowledgements."""
    monkeypatch.setenv("ZMQ_PEER_HOST", "10.78.0.1")
    make_key_file(tmp_path / "ring.key")
    with linked(str(tmp_path / "ring.key"), hosts) as (_, caller):
        time.sleep(1.0)  # its probe is up, which nothing tells
        for host in mute:
            other = f"10.78.0.{2 - host}"
            subprocess.run(["ip", "-n", hosts[host], "route", "add", "blackhole", other], check=True)
        began_at = time.monotonic()
        if is_busy:
            caller.write("x" * 500)
        event = caller.line(5.0)
        took_s = time.monotonic() - began_at
        assert event is not None
        assert event.startswith("Disconnected")
        say(f"noticed after {took_s:.2f} s")
        assert took_s < 2.5  # a busy machine is slow to look


@contextlib.contextmanager
def pinging(port: int) -> Iterator[Callable[[Callable[[], bool]], list[Event]]]:
    """A link of this process to ``port``: sends a message at each turn until something holds, and gives all events."""
    events: list[Event] = []
    side = Side.PREDECESSOR

    def turn_until(condition: Callable[[], bool]) -> list[Event]:
        ends_at = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < ends_at, events
            events.extend(transport.poll(0.05))
            if Connected(side) in events and not isinstance(events[-1], Disconnected):
                transport.send(side, b"", [b"ping"])
        return events

    transport = ZmqTransport("127.0.0.1", 1 << 20, OPEN)
    try:
        transport.connect(side, Address("127.0.0.1", port))
        yield turn_until
    finally:
        transport.close(0)


def lasts(seconds: float) -> Callable[[], bool]:
    ends_at = time.monotonic() + seconds
    return lambda: time.monotonic() >= ends_at


def test_a_link_to_a_frozen_peer_is_lost_though_another_process_answers_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever answers there keeps the probe up."""
    monkeypatch.setattr(timeouts, "DOUBTED_LINK_S", 2)
    with contextlib.ExitStack() as stack:
        before, after = (Peer("open") for _ in range(2))
        for peer in (before, after):
            stack.callback(peer.process.kill)
        proxy = stack.enter_context(Proxy(int(before.line() or 0)))
        turn_until = stack.enter_context(pinging(proxy.port))
        events = turn_until(lasts(1.0))
        assert any(isinstance(event, Received) for event in events)
        before.signal(signal.SIGSTOP)
        proxy.target = int(after.line() or 0)
        turn_until(lambda: isinstance(events[-1], Disconnected))
        assert events[-1] == Disconnected(Side.PREDECESSOR, "nothing comes by its connection any more")


def test_silence_within_the_patience_is_no_loss_once_the_probe_is_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "DOUBTED_LINK_S", 2)
    monkeypatch.setenv(PROBE_PATIENCE_ENV, "9")
    with contextlib.ExitStack() as stack:
        peer = Peer("open")
        stack.callback(peer.process.kill)
        turn_until = stack.enter_context(pinging(int(peer.line() or 0)))
        turn_until(lasts(1.0))
        peer.signal(signal.SIGSTOP)
        num_events = len(turn_until(lasts(4.0)))
        peer.signal(signal.SIGUSR1)  # ZeroMQ's thread goes on at once and the other one later
        peer.signal(signal.SIGCONT)
        events = turn_until(lasts(3.0))
        assert len(events) > num_events
        assert not any(isinstance(event, Disconnected) for event in events)


def test_a_killed_peer_is_lost_at_once(security: str) -> None:
    with linked(security) as (listener, caller):
        listener.process.kill()
        event = caller.line(1.0)
        assert event is not None
        assert event.startswith("Disconnected")


@pytest.mark.parametrize("who", ["both", "caller", "listener"])
def test_a_stall_is_no_loss(monkeypatch: pytest.MonkeyPatch, who: str, security: str) -> None:
    """A machine that stands still for longer than any heartbeat, or one process for less than the patience."""
    monkeypatch.setenv("STAGEWIRE_PEER_PATIENCE_S", "5")  # a busy machine may stall on top of this
    with linked(security) as (listener, caller):
        peers = {"both": [listener, caller], "caller": [caller], "listener": [listener]}[who]
        for peer in peers:
            peer.signal(signal.SIGSTOP)
        time.sleep(3.0 if who == "listener" else 7.0)  # the stall itself
        for peer in peers:
            peer.signal(signal.SIGCONT)
        caller.write("after the stall")
        assert caller.line() == "after the stall"
        assert caller.line(3.0) is None


def test_more_patience_is_for_the_link_in_use_too() -> None:
    listener = Peer("open")
    transport = ZmqTransport("127.0.0.1", 1 << 20, OPEN)

    def events(seconds: float) -> list[Event]:
        ends_at = time.monotonic() + seconds
        found: list[Event] = []
        while not found and time.monotonic() < ends_at:
            found = transport.poll(0.1)
        return found

    try:
        port = listener.line()
        assert port is not None
        transport.connect(Side.PREDECESSOR, Address("127.0.0.1", int(port)))
        assert events(DEADLINE_S) == [Connected(Side.PREDECESSOR)]
        assert events(1.0) == []  # its probe is up, which nothing tells
        assert [round(transport.be_more_patient(), 1) for _ in range(6)] == [1.2, 2.4, 4.8, 9.6, 10.0, 10.0]
        listener.signal(signal.SIGSTOP)
        assert events(4.0) == []
        listener.signal(signal.SIGCONT)
        assert events(1.0) == []
    finally:
        transport.close()
        listener.process.kill()


def test_patience_is_set_in_the_environment(monkeypatch: pytest.MonkeyPatch, security: str) -> None:
    monkeypatch.setenv("STAGEWIRE_PEER_PATIENCE_S", "12")
    with linked(security) as (listener, caller):
        listener.signal(signal.SIGSTOP)
        assert caller.line(6.0) is None
        listener.signal(signal.SIGCONT)
        caller.write("after the stall")
        assert caller.line() == "after the stall"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "61"])
def test_malformed_patience_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("STAGEWIRE_PEER_PATIENCE_S", text)
    with pytest.raises(ConfigError, match="STAGEWIRE_PEER_PATIENCE_S="):
        ZmqTransport("127.0.0.1", 1 << 20, OPEN)
