"""The sweep's own decisions: what equals one process, and what its page says."""

from __future__ import annotations

import itertools

import pytest

from sweep import report
from sweep.engines import compare
from sweep.recipes import RECIPES
from sweep.report import Row

ONE, OTHER = [5, 6, 7], [5, 8, 9]


@pytest.mark.parametrize(
    ("answer", "references", "wrong", "ties"),
    [
        (ONE, [ONE], 0, 0),
        (ONE, [ONE, OTHER], 0, 0),
        ([5, 6, 8], [ONE], 1, 0),
        ([5, 8, 9], [ONE, OTHER], 0, 1),
        # The reference is unsure from the second token on; about the first it is not.
        ([5, 1, 2], [ONE, OTHER], 0, 1),
        ([4, 6, 7], [ONE, OTHER], 1, 0),
        ([5, 6, 8], [ONE, [5, 6, 7]], 1, 0),
    ],
)
def test_an_id_may_differ_only_where_one_process_differs_from_itself(
    answer: list[int], references: list[list[int]], wrong: int, ties: int
) -> None:
    found = compare([answer], [[reference] for reference in references])
    assert (len(found.wrong), found.ties) == (wrong, ties)


def test_an_answer_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        compare([[5, 6]], [[ONE]])


def test_the_first_line_counts_everything() -> None:
    rows = {
        "A": Row(
            "A", report.WORKS, "plain", ("0-1", "1-2"), ["hidden_states: float32 [8]", "x: float32 [2, 4]"], 12, 1
        ),
        "B": Row("B", report.FAILS_IN_STOCK, detail="KeyError: a|b in /some/where/file.py"),
        "C": Row("C", report.NOT_MADE, detail="why"),
    }
    first, *lines = report.render(["A", "B", "C", "D"], rows, "vLLM 0").splitlines()
    assert first == (
        "4 architectures declared: 1 work, 0 refused, 1 fail in stock vLLM, 1 without a checkpoint made here, "
        "1 not run."
    )
    assert "| A | plain | 0-1 1-2 | hidden_states 8, x: float32 [2, 4] | 12 | 1 |" in lines
    assert "| B |  | KeyError: a\\|b in file.py |" in lines


def test_every_recipe_is_for_three_stages_that_touch() -> None:
    for recipe in RECIPES.values():
        ends = [tuple(map(int, each.split("-"))) for each in recipe.ranges]
        assert len(ends) == 3, recipe.architecture
        assert ends[0][0] == 0, recipe.architecture
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ends)), recipe.architecture
