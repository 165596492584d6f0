"""How the short run is put together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import schedule

TESTS = Path(__file__).parents[1]


def item(nodeid: str, *keywords: str) -> Any:
    return SimpleNamespace(nodeid=nodeid, keywords=keywords, path=Path(nodeid.partition("::")[0]))


def test_what_takes_longest_exists() -> None:
    assert {name for name in schedule.LONGEST_FIRST if not (TESTS / "vllm" / name).is_file()} == set()


@pytest.mark.parametrize(
    ("nodeid", "piece"),
    [
        ("tests/unit/test_a.py::test_b[c::d/e]", "tests/unit/test_a.py"),
        ("tests/vllm/test_a.py::TestB::test_c", "tests/vllm/test_a.py"),
        ("tests/process/test_a.py::test_b", "tests/process"),
    ],
)
def test_tests_of_one_file_are_one_piece(nodeid: str, piece: str) -> None:
    assert schedule.piece_of(nodeid) == piece


def test_cheap_tests_are_first_and_long_files_before_short_ones() -> None:
    order = [
        item("tests/unit/test_a.py::test_b"),
        item("tests/process/test_a.py::test_b", "process"),
        *(item(f"tests/vllm/{name}::test_b", "vllm") for name in schedule.LONGEST_FIRST[:2]),
        item("tests/vllm/test_a.py::test_b", "vllm"),
    ]
    upside_down = order[::-1]
    assert sorted(upside_down, key=schedule.place_of) == order


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], ["test_short"]),
        (["tests/vllm/test_a.py"], ["test_short"]),
        (["tests/vllm/test_a.py::test_long"], ["test_long[1]", "test_short"]),
        (["tests/vllm/test_a.py::test_long[2]"], ["test_short"]),
    ],
)
def test_a_slow_test_runs_only_when_it_is_named(arguments: list[str], kept: list[str]) -> None:
    items = [item("tests/vllm/test_a.py::test_long[1]", "slow"), item("tests/vllm/test_a.py::test_short")]
    found, others = schedule.without_slow(items, arguments)
    assert [each.nodeid.partition("::")[2] for each in found] == kept
    assert len(found) + len(others) == 2
