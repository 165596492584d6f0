"""docs/reference/models.md, from the results of a sweep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FAILS_IN_STOCK", "NOT_MADE", "REFUSED", "WORKS", "WRONG", "Row", "render"]

WORKS = "works"
REFUSED = "refused"
FAILS_IN_STOCK = "fails in stock"
NOT_MADE = "no checkpoint made here"
WRONG = "WRONG"
_ORDER = (WRONG, WORKS, REFUSED, FAILS_IN_STOCK, NOT_MADE)
_LONGEST_DETAIL = 240


@dataclass(frozen=True)
class Row:
    """One architecture's result.

    Args:
        status: one of the words above.
        says: what is peculiar.
        ranges: layers of each stage.
        between: tensors from stage to stage.
        distinct: different ids among those generated, of 40.
        ties: requests that differ from one process where one process differs from itself in another batch.
        detail: an error, in its own words, or what differed.
    """

    architecture: str
    status: str
    says: str = ""
    ranges: Sequence[str] = ()
    between: Sequence[str] = ()
    distinct: int = 0
    ties: int = 0
    detail: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def render(declared: Sequence[str], rows: Mapping[str, Row], versions: str) -> str:
    """The whole page. ``declared``: every architecture, so that one without a result shows."""
    known = [rows[name] for name in declared if name in rows]
    counts = {status: sum(row.status == status for row in known) for status in _ORDER}
    missing = len(declared) - len(known)
    first = (
        f"{len(declared)} architectures declared: {counts[WORKS]} work, {counts[REFUSED]} refused, "
        f"{counts[FAILS_IN_STOCK]} fail in stock vLLM, {counts[NOT_MADE]} without a checkpoint made here"
    )
    first += f", {counts[WRONG]} WRONG" if counts[WRONG] else ""
    first += f", {missing} not run" if missing else ""
    lines = [f"{first}.", "", "# Models", "", _INTRODUCTION.format(versions=versions).strip()]
    for status in _ORDER:
        chosen = [row for row in known if row.status == status]
        if chosen:
            lines += ["", f"## {_TITLES[status]}", "", *_table(status, chosen)]
    return "\n".join(lines) + "\n"


_TITLES = {
    WORKS: "Works",
    REFUSED: "Refused, with our reason",
    FAILS_IN_STOCK: "Fails in stock vLLM, in one process",
    NOT_MADE: "No checkpoint made here",
    WRONG: "Wrong",
}
_INTRODUCTION = """
Every text-generation architecture of vLLM's registry that declares pipeline support, with {versions} on a CPU.
Multimodal architectures and drafters are not among them. Each one is a tiny checkpoint with random weights, in
float32 (bfloat16 where vLLM's CPU kernels want it), over three stages of different depth and in one process of stock
vLLM: four requests of 5 to 60 tokens with 10 greedy tokens each, together, together again with hits in the prefix
cache, and one after the other; the longest prompt in two chunks (where vLLM can). *Works* means the same 40 ids each
time, and at least 10 different ones among them.

A *tie* is a request among others whose ids differ from one process, where one process differs from itself too when it
is asked again or alone. One after the other there are no ties: every id is the same. *Between stages* names what
travels besides the schedule, with its size for each token.

`.venv/bin/python tests/sweep/run.py --page docs/reference/models.md` makes this page. `--only NAME` runs one
architecture again. Results are kept, so it goes on where it was interrupted.
"""


def _table(status: str, rows: Sequence[Row]) -> list[str]:
    if status in (WORKS, WRONG):
        head = ["architecture", "peculiar", "layers", "between stages", "different ids", "ties"]
        body = [
            [
                row.architecture,
                row.says,
                " ".join(row.ranges),
                _between(row.between),
                str(row.distinct),
                str(row.ties or ""),
            ]
            for row in rows
        ]
        if status == WRONG:
            head.append("difference")
            body = [[*cells, _quote(row.detail)] for cells, row in zip(body, rows, strict=True)]
    else:
        head = ["architecture", "peculiar", "reason" if status == NOT_MADE else "error"]
        body = [[row.architecture, row.says, _quote(row.detail)] for row in rows]
    return [_line(head), _line(["---"] * len(head)), *map(_line, body)]


def _between(tensors: Sequence[str]) -> str:
    """``hidden_states: float32 [128]`` -> ``hidden_states 128``; shapes in full where they are no single number."""
    return ", ".join(re.sub(r": float32 \[(\d+)\]", r" \1", tensor) for tensor in tensors)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _quote(text: str) -> str:
    text = re.sub(r"/[^ :'\"]*/", "", " ".join(text.split())).replace("|", "\\|")
    return text if len(text) <= _LONGEST_DETAIL else text[: _LONGEST_DETAIL - 3] + "..."
