"""docs/reference/features.md: every row names tests that exist, and every case of the tables of requests has a row."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from support.features import CHATS, COMPLETIONS, ROUTES, STREAMED_CHATS, STREAMED_COMPLETIONS

TESTS = Path(__file__).parents[1]
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "features.md"
CASES: dict[str, Iterable[str]] = {
    "test_completion": COMPLETIONS,
    "test_completion_stream": STREAMED_COMPLETIONS,
    "test_chat": CHATS,
    "test_chat_stream": STREAMED_CHATS,
    "test_route": ROUTES,
}
NAMED = re.compile(r"`(test_\w+)(?:\[([^\]]+)\])?`")


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def defined_tests() -> set[str]:
    trees = (ast.parse(path.read_text()) for path in TESTS.rglob("test_*.py"))
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist() -> None:
    defined = defined_tests()
    for row in rows():
        assert len(row) == 3, row
        named = NAMED.findall(row[2])
        assert named, f"no test in {row}"
        for name, case in named:
            assert name in defined, row
            assert not case or case in CASES[name], row


def test_every_case_has_one_row() -> None:
    named = [pair for row in rows() for pair in NAMED.findall(row[2]) if pair[1]]
    assert sorted(named) == sorted((name, case) for name, cases in CASES.items() for case in cases)
