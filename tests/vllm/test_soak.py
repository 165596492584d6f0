"""Two minutes of load on four stages that are killed, frozen, cut off and held up at random: no answer differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.soak import proxied, soak

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def test_nothing_is_lost_and_nothing_left_behind(model_dir: Path, say: Callable[[str], None]) -> None:
    with proxied(model_dir, 4) as ring:
        report = soak(ring, 120, seed=7, is_quiet=False, say=say, is_warm=False)
    say(f"{report.answers} answers, {dict(report.disturbances)}, in flight {dict(report.in_flight)}")
    assert report.problems == []
    assert report.disturbances.total() >= 5
