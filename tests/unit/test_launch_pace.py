"""When a start has failed: nobody gets on who could."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stagewire.launch.pace import BUSY_BYTES, Pace, deadline, io_bytes

GB = 10**9


def test_reading_is_progress_as_long_as_it_advances() -> None:
    pace = Pace(0.0)
    pace.read(5.0, 1, 100)
    pace.read(9.0, 1, 100)
    assert pace.last_at == 5.0
    pace.read(9.5, 2, 100)
    assert pace.last_at == 9.5
    pace.step(11.0)
    assert pace.last_at == 11.0


@pytest.mark.parametrize(
    ("points", "now", "expected"),
    [
        ([], 7.0, "no progress for 7 s"),
        ([(1.0, 0.8)], 1.5, "0.80 of 4.20 GB read, no progress for 0 s"),
        ([(1.0, 0.0), (11.0, 0.031)], 11.0, "0.03 of 4.20 GB read, 3.1 MB/s in the last 10 s, no progress for 0 s"),
        (
            [(t * 1.0, t * 0.0031) for t in range(0, 301, 10)],
            310.0,
            "0.93 of 4.20 GB read, 2.6 MB/s in the last minute, no progress for 10 s",
        ),
        ([(1.0, 0.8)], 601.0, "0.80 of 4.20 GB read, 0.0 B/s in the last minute, no progress for 600 s"),
    ],
)
def test_how_far_and_how_fast(points: list[tuple[float, float]], now: float, expected: str) -> None:
    pace = Pace(0.0)
    for at, done in points:
        pace.read(at, int(done * GB), int(4.2 * GB))
    assert pace.describe(now) == expected


def test_small_models_have_small_units() -> None:
    pace = Pace(0.0)
    pace.read(1.0, 120_000, 450_000)
    assert pace.describe(1.0).startswith("120.00 of 450.00 kB read")


def test_files_that_are_read_are_progress_and_a_line_of_a_log_is_none() -> None:
    pace = Pace(0.0)
    pace.see_io(1.0, BUSY_BYTES)
    assert pace.last_at == 1.0
    pace.see_io(1.5, 100 * BUSY_BYTES)  # too soon to tell
    pace.see_io(2.0, BUSY_BYTES + 1000)
    assert pace.last_at == 1.0
    pace.see_io(12.0, 2 * BUSY_BYTES + 1000)  # as much in ten seconds
    assert pace.last_at == 1.0
    pace.see_io(13.0, 4 * BUSY_BYTES)
    assert pace.last_at == 13.0


@pytest.mark.parametrize(
    ("loading", "waiting", "expected"),
    [([], [3.0, 8.0], 18.0), ([5.0, 7.0], [1.0], 15.0), ([9.0], [2.0, 3.0], 19.0)],
)
def test_who_waits_for_others_need_not_get_on(loading: list[float], waiting: list[float], expected: float) -> None:
    assert deadline([Pace(at) for at in loading], [Pace(at) for at in waiting], 10.0) == expected


def test_the_kernel_counts_what_a_process_reads(tmp_path: Path) -> None:
    before = io_bytes(os.getpid())
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    (tmp_path / "file").read_bytes()
    assert io_bytes(os.getpid()) - before >= 2 << 20
    assert io_bytes(1 << 30) == 0
