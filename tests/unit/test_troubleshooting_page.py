"""docs/guide/troubleshooting.md quotes messages: each has to be one that the code can say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "troubleshooting.md"
# A row's first cell: one message between backticks, which may hold a command between backticks of its own.
ROW = re.compile(r"^\| (?P<ticks>`+)(?P<message>.+)(?P=ticks) \|[^|]+\|.+\|$", re.MULTILINE)


def literals(source: str) -> Iterator[str]:
    """Every string of a module, with an ellipsis for each value that is put into it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def quoted_messages() -> list[str]:
    return [row["message"] for row in ROW.finditer(PAGE.read_text())]


def fragments(message: str) -> list[str]:
    """What of a message stands in the source: the text between the values, without what is too short to tell."""
    return [part for part in (piece.strip(" :;,()") for piece in message.split("…")) if len(part) > 3]


@pytest.fixture(scope="module")
def said() -> str:
    return "\0".join(text for path in sorted((ROOT / "src").rglob("*.py")) for text in literals(path.read_text()))


def test_the_page_has_messages_of_every_kind() -> None:
    assert len(quoted_messages()) >= 40


@pytest.mark.parametrize("message", quoted_messages())
def test_every_message_can_be_said(message: str, said: str) -> None:
    missing = [part for part in fragments(message) if part not in said]
    assert not missing, f"no string in src has {missing}: mend docs/guide/troubleshooting.md"


def test_a_message_that_nobody_says_is_found(said: str) -> None:
    assert [part for part in fragments("stage … has eaten the … of stage …") if part not in said]
