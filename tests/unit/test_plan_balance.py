"""The optimiser, against every split there is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewire.plan.balance import Allowed, best_split, most_stages, nearest_split
from stagewire.plan.ranges import LayerRange, split_evenly


def every_split(num_layers: int, num_stages: int, allowed: Allowed) -> Iterator[tuple[LayerRange, ...]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        spans = list(pairwise((0, *cuts, num_layers)))
        if all(allowed(*span) for span in spans):
            yield tuple(LayerRange(*span) for span in spans)


def squares(split: tuple[LayerRange, ...]) -> int:
    return sum(layers.num_layers**2 for layers in split)


def distance(split: tuple[LayerRange, ...], other: tuple[LayerRange, ...]) -> int:
    return sum((a.end - b.end) ** 2 for a, b in zip(split, other, strict=True))


def last_boundaries(split: tuple[LayerRange, ...]) -> list[int]:
    return [layers.start for layers in reversed(split)]


@st.composite
def questions(draw: st.DrawFn) -> tuple[int, int, dict[tuple[int, int, int], int], set[tuple[int, int]]]:
    """Layers, stages, any costs at all (not growing with the range), forbidden ranges."""
    num_layers = draw(st.integers(1, 8))
    num_stages = draw(st.integers(1, num_layers))
    spans = list(combinations(range(num_layers + 1), 2))
    costs = {(stage, *span): draw(st.integers(-3, 4)) for stage in range(num_stages) for span in spans}
    forbidden = draw(st.sets(st.sampled_from(spans), max_size=8))
    return num_layers, num_stages, costs, forbidden


@given(questions())
def test_the_best_of_all_splits(
    question: tuple[int, int, dict[tuple[int, int, int], int], set[tuple[int, int]]],
) -> None:
    num_layers, num_stages, costs, forbidden = question

    def allowed(start: int, end: int) -> bool:
        return (start, end) not in forbidden

    def judge(split: tuple[LayerRange, ...]) -> tuple[int, int, int, list[int]]:
        worst = max(costs[stage, layers.start, layers.end] for stage, layers in enumerate(split))
        near = split_evenly(num_layers, num_stages)
        return worst, squares(split), distance(split, near), last_boundaries(split)

    expected = min(every_split(num_layers, num_stages, allowed), key=judge, default=None)
    assert best_split(num_layers, num_stages, lambda *span: costs[span], allowed) == expected


@given(questions())
def test_the_nearest_of_all_splits(
    question: tuple[int, int, dict[tuple[int, int, int], int], set[tuple[int, int]]],
) -> None:
    num_layers, num_stages, costs, forbidden = question

    def allowed(start: int, end: int) -> bool:
        return (start, end) not in forbidden

    splits = list(every_split(num_layers, num_stages, lambda start, end: True))
    wanted = splits[sum(costs.values()) % len(splits)]
    possible = every_split(num_layers, num_stages, allowed)
    expected = min(
        possible, key=lambda split: (distance(split, wanted), squares(split), last_boundaries(split)), default=None
    )
    assert nearest_split(wanted, allowed) == expected
    counts = [n for n in range(1, num_layers + 1) if any(every_split(num_layers, n, allowed))]
    assert most_stages(num_layers, allowed) == max(counts, default=0)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(32, 4), (30, 4), (31, 7), (5, 5), (9, 1), (126, 16)])
def test_equal_costs_give_the_split_of_vllm(num_layers: int, num_stages: int) -> None:
    split = best_split(num_layers, num_stages, lambda stage, start, end: end - start)
    assert split == split_evenly(num_layers, num_stages)


def test_the_figures_of_a_real_question() -> None:
    """32 layers of 10 each, the second machine half as fast, a head of 25 on the last."""
    split = best_split(32, 4, lambda stage, start, end: (end - start) * (20 if stage == 1 else 10) + 25 * (stage == 3))
    assert split is not None
    assert [layers.num_layers for layers in split] == [10, 5, 10, 7]


@pytest.mark.parametrize("num_stages", [0, -1, 5])
def test_no_such_number_of_stages(num_stages: int) -> None:
    assert best_split(4, num_stages, lambda stage, start, end: 0) is None
