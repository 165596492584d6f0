"""Finds the best split for a given cost of each stage, by dynamic programming. Pure; standard library only.

The result is always an optimum. The caller decides what a stage costs and which ranges are allowed. A cost is a whole
number: a stage's time, or its KV cache tokens with the sign turned. With n layers and s stages, at most s * n^2 / 2
costs are computed; 128 layers over 16 stages need 90,400.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stagewire.plan.ranges import LayerRange, split_evenly

__all__ = ["Allowed", "Cost", "best_split", "most_stages", "nearest_split"]

# The cost of a stage with layers start to end - 1: of stage, start, end.
Cost = Callable[[int, int, int], int]
# Whether a stage may own layers start to end - 1.
Allowed = Callable[[int, int], bool]
_Weight = Callable[[int, int, int], tuple[int, ...]]
# start, end
_Span = tuple[int, int]


def best_split(
    num_layers: int, num_stages: int, cost: Cost, allowed: Allowed = lambda start, end: True
) -> tuple[LayerRange, ...] | None:
    """The split whose most expensive stage is cheapest; ``None`` when no split is allowed.

    ``cost`` need not grow with the range. Among equally good splits, these decide in order:

    1. the smallest sum of squared layer counts,
    2. the boundaries nearest to vLLM's own (sum of squared distances),
    3. the smallest last boundary, then the smallest one before it, and so on.
    """
    if not 1 <= num_stages <= num_layers:
        return None
    spans = _spans(num_layers, num_stages, allowed)
    costs = [{span: cost(stage, *span) for span in spans[stage]} for stage in range(num_stages)]
    limit = _least_maximum(costs)
    if limit is None:
        return None
    near = [layers.end for layers in split_evenly(num_layers, num_stages)]
    within = [[span for span, value in stage_costs.items() if value <= limit] for stage_costs in costs]
    return _least_sum(within, lambda stage, start, end: ((end - start) ** 2, (end - near[stage]) ** 2))


def nearest_split(
    ranges: Sequence[LayerRange], allowed: Allowed = lambda start, end: True
) -> tuple[LayerRange, ...] | None:
    """The allowed split whose boundaries are nearest to those of ``ranges``; ``None`` when no split is allowed.

    Nearest means the smallest sum of squared distances, then the smallest sum of squared layer counts. ``ranges`` must
    be valid.
    """
    ends = [layers.end for layers in ranges]
    spans = _spans(ends[-1], len(ends), allowed)
    return _least_sum(spans, lambda stage, start, end: ((end - ends[stage]) ** 2, (end - start) ** 2))


def most_stages(num_layers: int, allowed: Allowed) -> int:
    """The largest number of stages into which the model can be split; 0 when not even one stage is allowed."""
    most: list[int] = [0] * (num_layers + 1)
    for end in range(1, num_layers + 1):
        counts = [most[start] + 1 for start in range(end) if (start == 0 or most[start]) and allowed(start, end)]
        most[end] = max(counts, default=0)
    return most[num_layers]


def _spans(num_layers: int, num_stages: int, allowed: Allowed) -> list[list[_Span]]:
    """For each stage, the allowed ranges that leave at least one layer to every other stage."""
    is_allowed = {
        (start, end): allowed(start, end) for start in range(num_layers) for end in range(start + 1, num_layers + 1)
    }
    last = num_stages - 1
    spans: list[list[_Span]] = []
    for stage in range(num_stages):
        starts = range(stage, num_layers - (last - stage)) if stage else range(1)
        spans.append(
            [
                (start, end)
                for start in starts
                for end in (range(start + 1, num_layers - (last - stage) + 1) if stage < last else (num_layers,))
                if is_allowed[start, end]
            ]
        )
    return spans


def _least_maximum(costs: Sequence[dict[_Span, int]]) -> int | None:
    """The smallest possible largest cost of a split; ``None`` when there is no split."""
    least = {end: value for (_, end), value in costs[0].items()}
    for stage_costs in costs[1:]:
        after: dict[int, int] = {}
        for (start, end), value in stage_costs.items():
            before = least.get(start)
            if before is None:
                continue
            largest = before if before > value else value
            if end not in after or largest < after[end]:
                after[end] = largest
        least = after
    return min(least.values(), default=None)


def _least_sum(spans: Sequence[Sequence[_Span]], weight: _Weight) -> tuple[LayerRange, ...] | None:
    """The split with the smallest sum of weights, compared element by element.

    Among equal ones, the split with the smallest start of the last stage, then of the stage before it, and so on.
    """
    sums: list[dict[int, tuple[tuple[int, ...], int]]] = []  # of each stage: end -> sum up to there, start
    for stage, stage_spans in enumerate(spans):
        reached: dict[int, tuple[tuple[int, ...], int]] = {}
        for start, end in stage_spans:
            own = weight(stage, start, end)
            if stage:
                before = sums[-1].get(start)
                if before is None:
                    continue
                own = tuple(a + b for a, b in zip(before[0], own, strict=True))
            if end not in reached or (own, start) < reached[end]:
                reached[end] = (own, start)
        sums.append(reached)
    if not sums[-1]:
        return None
    split: list[LayerRange] = []
    end = max(sums[-1])
    for reached in reversed(sums):
        start = reached[end][1]
        split.append(LayerRange(start, end))
        end = start
    return tuple(reversed(split))
