"""Links between real stages are cut or stand still, both ways and one way: it is noticed, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import httpx
import pytest

from stagewire.errors import ConfigError
from support.disturbed import Clients, Stream, differences, mixed_bodies
from support.proxy import Proxy
from support.soak import ProxiedRing, proxied
from support.stages import free_ports

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NUM_STAGES = 3
BODIES = mixed_bodies(12, seed=9)
CONCURRENCY = 8
DISTURBANCES: dict[str, Callable[[Proxy], None]] = {
    "cut": lambda proxy: proxy.cut(),
    "both ways": lambda proxy: proxy.hold("to target", "from target"),
    "forward": lambda proxy: proxy.hold("from target"),  # a stage calls its predecessor
    # Greetings and pings go there, and no steps. (A cable that is cut so carries nothing forward either, for want of
    # acknowledgements: tests/process/test_zmq_liveness.py.)
    "backward": lambda proxy: proxy.hold("to target"),
}
QUICK = {("cut", 1), ("forward", 0), ("backward", 2)}
CASES = [
    pytest.param(how, link, marks=[] if (how, link) in QUICK else pytest.mark.slow)
    for how in DISTURBANCES
    for link in range(NUM_STAGES)
]


@pytest.fixture(scope="module")
def ring(small_model: Path) -> Iterator[ProxiedRing]:
    with proxied(small_model, NUM_STAGES) as running:
        yield running


def clients(ring: ProxiedRing) -> Clients:
    return Clients(ring.url, str(ring.model), BODIES, CONCURRENCY)


@pytest.fixture(scope="module")
def undisturbed(ring: ProxiedRing) -> list[Stream]:
    streams = clients(ring).finish()
    assert not [stream.error for stream in streams if stream.error]
    return streams


@pytest.fixture(scope="module")
def noticed_s() -> list[float]:
    return []


def until_ready_is(ring: ProxiedRing, code: int) -> None:
    """Each question is a request, which is what makes the time pass."""
    ends_at = time.monotonic() + 60
    while httpx.get(f"{ring.url}/ready", trust_env=False, timeout=10).status_code != code:
        assert time.monotonic() < ends_at, f"/ready is not {code}"


@pytest.fixture(autouse=True)
def _mended(ring: ProxiedRing) -> Iterator[None]:
    yield
    for proxy in ring.proxies:
        proxy.mend()


@pytest.mark.parametrize(("how", "link"), CASES)
def test_no_request_is_lost(
    ring: ProxiedRing, undisturbed: list[Stream], noticed_s: list[float], how: str, link: int
) -> None:
    """``link``: by the stage behind it."""
    running = clients(ring)
    running.wait_for_tokens(60)
    DISTURBANCES[how](ring.proxies[link])
    began_at = time.monotonic()
    until_ready_is(ring, 503)
    noticed_s.append(time.monotonic() - began_at)
    ring.proxies[link].mend()
    assert differences(running.finish(), undisturbed) == []
    until_ready_is(ring, 200)
    assert all(stage.popen.poll() is None for stage in ring.stages), "no stage has to start again"


def test_it_was_noticed_within_two_seconds(noticed_s: list[float], say: Callable[[str], None]) -> None:
    """The median: a busy machine is slow to look."""
    assert noticed_s, "run the tests above with it"
    say(f"noticed after {', '.join(f'{each:.2f}' for each in sorted(noticed_s))} s")
    assert median(noticed_s) < 2
    assert max(noticed_s) < 5


def test_a_stage_returns_from_another_host(ring: ProxiedRing, undisturbed: list[Stream]) -> None:
    """Before the connection of the process that it replaces has timed out: that one neither ends nor answers. When it
    does again, it is told that its place is taken, and leaves.
    """
    running = clients(ring)
    running.wait_for_tokens(60)
    before = ring.stages[1]
    os.kill(before.pid, signal.SIGSTOP)
    (ring.ports[1],) = free_ports(1)
    ring.proxies[2].target = ring.ports[1]  # the name that stage 2 was given leads there now
    ring.start_stage(1)
    ring.stages[1] = ring.stages.pop()
    try:
        assert differences(running.finish(), undisturbed) == []
    finally:
        os.kill(before.pid, signal.SIGCONT)
    assert before.wait(60) == ConfigError.exit_code
    assert "there is already a stage 1 in this pipeline and it answers" in before.text()
    assert differences(clients(ring).finish(), undisturbed) == []
