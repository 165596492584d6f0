"""The documentation's commands, as a reader would type them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "ROOT", "Typed", "typed_commands"]

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "requirements/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Typed:
    """One command: the page, and its words, without the variables that are set before it."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)[:60]}"


def typed_commands() -> list[Typed]:
    """Every command in a fenced block: of ``bash`` all lines, of others those behind a prompt."""
    found = []
    for page in PAGES:
        for language, text in _FENCED.findall(page.read_text()):
            source = text if language == "bash" else "\n".join(re.findall(r"^\$ (.*)$", text, re.MULTILINE))
            found += [_typed(str(page.relative_to(ROOT)), words) for words in _split(source)]
    return found


def _split(source: str) -> list[list[str]]:
    """Commands of a shell text: lines that end in a backslash, or inside quotes, go on."""
    commands: list[list[str]] = []
    pending = ""
    for line in source.splitlines():
        pending += line.removesuffix("\\") + ("" if line.endswith("\\") else "\n")
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote that is still open
            continue
        pending = ""
        if words:
            commands.append(words)
    assert not pending, f"a command without its end: {pending}"
    return commands


def _typed(page: str, words: list[str]) -> Typed:
    """Without a change of folder and variables."""
    if words[0] == "cd":
        assert words[2] == "&&"
        words = words[3:]
    count = next(index for index, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=\S*", word))
    return Typed(page, tuple(words[count:]))
