"""Load on four stages that are killed, frozen, cut off and held up at random: no answer differs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.soak import MAX_GROWTH_WARM, Footprint, leaks, proxied, soak

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_left_behind(model_dir: Path, say: Callable[[str], None]) -> None:
    with proxied(model_dir, 4) as ring:
        report = soak(ring, 900, seed=7, is_quiet=False, say=say, times=5, is_warm=False)
    say(f"{report.answers} answers, {dict(report.disturbances)}, in flight {dict(report.in_flight)}")
    assert report.problems == []
    assert report.disturbances.total() >= 5


def test_a_footprint_tells_callers_from_other_sockets() -> None:
    before = Footprint.of(os.getpid())
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        accepted, _ = server.accept()
        with accepted:
            after = Footprint.of(os.getpid())
    assert (after.sockets, after.files, after.callers) == (before.sockets + 2, before.files + 2, before.callers + 1)


def test_what_is_left_behind_is_found() -> None:
    first = [Footprint(1000, 20, 60, 20, 2)] * 4
    owner_now = replace(first[0], callers=8)
    assert leaks([first, [owner_now, *first[1:]]], MAX_GROWTH_WARM) == []
    grown = Footprint(1151, 23, 69, 25, 9)
    assert len(leaks([first, [*first[1:], grown]], MAX_GROWTH_WARM)) == 5
