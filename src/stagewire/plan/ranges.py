"""Parses, splits and checks layer ranges. Pure decisions on whole numbers; standard library only.

A range is half-open everywhere: ``0-8`` means layers 0 to 7. Layers are numbered from 0 over the whole model.

``check_own_range`` and ``partition_counts`` are for one stage, which knows only its own range. ``check_adjacent`` is
for the ring's handshake, which sees neighbours. ``find_problems`` is for the validator, which sees all ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise

from stagewire.errors import ConfigError

__all__ = [
    "PARTITION_ENV",
    "LayerRange",
    "check_adjacent",
    "check_own_range",
    "check_ranges",
    "find_problems",
    "partition_counts",
    "ranges_line",
    "repairs",
    "split_evenly",
]

# The variable by which vLLM divides layers among stages. A stage sets it for vLLM; a user's value is not used.
PARTITION_ENV = "VLLM_PP_LAYER_PARTITION"

_IDX_FLAG = "--pipeline-stage-idx"
_TOTAL_FLAG = "--pipeline-total-stages"
_RANGE_FLAG = "--pipeline-layer-range"

_FORM = 'START-END, two whole numbers with END not included: "0-8" means layers 0 to 7'
# Only a few ASCII digits, because int() also takes digits of other scripts and is slow on very long input.
_RANGE_TEXT = re.compile(r"\s*([0-9]{1,6})\s*-\s*([0-9]{1,6})\s*")
_ONE_NUMBER = re.compile(r"\s*([0-9]{1,6})\s*")


@dataclass(frozen=True, order=True)
class LayerRange:
    """Layers ``start`` to ``end - 1`` of a model; never empty.

    Raises ``ConfigError`` when constructed with ``start < 0`` or ``end <= start``.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ConfigError(
                f"a layer range needs 0 <= start < end, found start {self.start} and end {self.end}; "
                f"the form is {_FORM}"
            )

    @classmethod
    def parse(cls, text: str) -> LayerRange:
        """``"0-8"`` -> layers 0 to 7. Blanks around the numbers are allowed.

        Raises ``ConfigError`` when ``text`` is malformed, reversed or empty, each with its own message.
        """
        match = _RANGE_TEXT.fullmatch(text)
        if match is None:
            raise ConfigError(_describe_malformed(text))
        start, end = int(match[1]), int(match[2])
        if start > end:
            raise ConfigError(
                f'layer range "{text}" is reversed: it starts at {start}, after its end {end}; '
                f'expected {_FORM}; did you mean "{end}-{start}"?'
            )
        if start == end:
            raise ConfigError(
                f'layer range "{text}" is empty: END is not included, so it holds no layer; '
                f'expected {_FORM}; for layer {start} alone write "{start}-{start + 1}"'
            )
        return cls(start, end)

    @property
    def num_layers(self) -> int:
        return self.end - self.start

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.start <= layer < self.end

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"

    def describe(self) -> str:
        """For people, last layer included: ``layers 0-7``, or ``layer 5``."""
        return _name_layers(self.start, self.end, "-")


def split_evenly(num_layers: int, num_stages: int) -> tuple[LayerRange, ...]:
    """The ranges that vLLM itself would choose: 30 layers over 4 stages are 7, 8, 8, 7.

    The rule is ``get_pp_indices`` in vllm/distributed/utils.py. Each layer left over goes to one of the stages before
    the last, from the back, because the last stage also has the final norm and the head.
    Raises ``ConfigError`` for fewer than one stage, or fewer layers than stages.
    """
    _check_counts(num_layers, num_stages)
    counts = [num_layers // num_stages] * num_stages
    for i in range(2, num_layers % num_stages + 2):
        counts[-i] += 1
    ends = [sum(counts[: stage + 1]) for stage in range(num_stages)]
    return tuple(LayerRange(end - count, end) for count, end in zip(counts, ends, strict=True))


def check_own_range(stage: int, num_stages: int, layers: LayerRange, num_layers: int) -> None:
    """Checks what one stage can check alone: its index, and that its range leaves room for the others.

    Raises ``ConfigError`` with every problem. It names the flag to correct, with the corrected value if it is known.
    """
    _check_counts(num_layers, num_stages)
    _check_index(stage, num_stages)
    problems = list(_own_problems(stage, num_stages, layers, num_layers))
    if problems:
        advice = _advise_own_range(stage, num_stages, layers, num_layers)
        raise ConfigError(f"stage {stage} of {num_stages} has {_RANGE_FLAG} {layers}: {'; '.join(problems)}; {advice}")


def check_adjacent(stage: int, layers: LayerRange, next_stage: int, next_layers: LayerRange) -> str | None:
    """The message if the second of two neighbours does not start where the first ends; ``None`` if it does."""
    if next_layers.start == layers.end:
        return None
    advice = _advise_next(layers, next_stage, next_layers)
    owns = f"stage {stage} owns layers {_interval(layers)}"
    if next_layers == layers:
        return f"{owns} and so does stage {next_stage}: each layer needs exactly one owner; {advice}"
    if next_layers.start > layers.end:
        gap = _describe_owners((), layers.end, next_layers.start)
        return f"{owns} but stage {next_stage} starts at {next_layers.start}: {gap}; {advice}"
    if next_layers.end <= layers.start:
        return (
            f"{owns} but stage {next_stage} owns {_interval(next_layers)}, which come before: "
            f"stages must be in the order of their layers; {advice}"
        )
    twice = _name_layers(max(layers.start, next_layers.start), min(layers.end, next_layers.end))
    return f"{owns} but stage {next_stage} owns {_interval(next_layers)}: {twice} would be owned twice; {advice}"


def find_problems(ranges: Sequence[LayerRange], num_layers: int) -> list[str]:
    """Every problem of a whole pipeline; an empty list when each of ``num_layers`` layers has exactly one owner.

    ``ranges[i]`` is stage i's. They are not sorted, because stages run in this order.
    """
    if num_layers < 1:
        return [f"the model must have at least 1 layer, found {num_layers}"]
    if not ranges:
        return ["no layer ranges were given; expected one per stage"]
    return list(_pipeline_problems(ranges, num_layers))


def check_ranges(ranges: Sequence[LayerRange], num_layers: int) -> None:
    """Raises ``ConfigError`` with all of ``find_problems``, and a corrected ``--ranges`` line if one can be derived."""
    problems = find_problems(ranges, num_layers)
    if problems:
        lines = [f"these layer ranges do not cover {num_layers} layers exactly once:"]
        lines += [f"  - {problem}" for problem in problems]
        raise ConfigError("\n".join(lines + _advise_ranges(ranges, num_layers)))


def repairs(ranges: Sequence[LayerRange], num_layers: int) -> Iterator[tuple[str, tuple[LayerRange, ...]]]:
    """Valid splits into as many stages, each after words for what it keeps of ``ranges``. The one that keeps most is
    first.

    The candidates are the same ranges in order, boundaries where the given stages end, boundaries where they start, and
    last vLLM's own split. Those that are not valid are left out.
    """
    ends = [layers.end for layers in ranges[:-1]]
    starts = [layers.start for layers in ranges[1:]]
    in_order = tuple(sorted(ranges))
    if not find_problems(in_order, num_layers):
        yield "The same ranges in order", in_order
    for kept, boundaries in (("ends", ends), ("starts", starts)):
        points = [0, *boundaries, num_layers]
        if all(start < end for start, end in pairwise(points)):
            yield f"The given {kept} kept", tuple(LayerRange(start, end) for start, end in pairwise(points))
    if 1 <= len(ranges) <= num_layers:
        yield "An even split", split_evenly(num_layers, len(ranges))


def ranges_line(ranges: Sequence[LayerRange]) -> str:
    """The arguments to paste: ``--ranges "0-8" "8-16"``."""
    return " ".join(["--ranges", *(f'"{layers}"' for layers in ranges)])


def partition_counts(stage: int, num_stages: int, layers: LayerRange, num_layers: int) -> tuple[int, ...]:
    """The layer counts, one per stage, that a stage which knows only its own range writes into `PARTITION_ENV`.

    They sum to ``num_layers``, and with them vLLM's ``get_pp_indices`` gives exactly ``layers`` for this stage. The
    counts of other stages have no meaning. 16-24 of 32 on stage 2 of 4 is ``16, 0, 8, 8``.
    Raises ``ConfigError`` as ``check_own_range`` does.
    """
    check_own_range(stage, num_stages, layers, num_layers)
    counts = [0] * num_stages
    counts[0] += layers.start
    counts[-1] += num_layers - layers.end
    counts[stage] += layers.num_layers
    return tuple(counts)


def _describe_malformed(text: str) -> str:
    single = _ONE_NUMBER.fullmatch(text)
    hint = f'; for layer {int(single[1])} alone write "{int(single[1])}-{int(single[1]) + 1}"' if single else ""
    return f'layer range "{text}" is malformed: expected {_FORM}{hint}'


def _check_counts(num_layers: int, num_stages: int) -> None:
    if num_stages < 1:
        raise ConfigError(f"{_TOTAL_FLAG} must be at least 1, found {num_stages}")
    if num_layers < num_stages:
        raise ConfigError(
            f"{num_stages} stages need at least {num_stages} layers, the model has {num_layers}; "
            f"give {_TOTAL_FLAG} {max(num_layers, 1)} or less"
        )


def _check_index(stage: int, num_stages: int) -> None:
    if 0 <= stage < num_stages:
        return
    last = num_stages - 1
    fix = f"give {_IDX_FLAG} {last} (stages count from 0)" if stage == num_stages else f"correct {_IDX_FLAG}"
    other = f", or {_TOTAL_FLAG} {stage + 1} if there are that many" if stage >= num_stages else ""
    raise ConfigError(f"{_IDX_FLAG} must be 0 to {last} with {_TOTAL_FLAG} {num_stages}, found {stage}; {fix}{other}")


def _own_problems(stage: int, num_stages: int, layers: LayerRange, num_layers: int) -> Iterator[str]:
    before, after = stage, num_stages - 1 - stage
    if layers.end > num_layers:
        yield f"the model has {num_layers} layers, so END can be at most {num_layers}, found {layers.end}"
    if before == 0 and layers.start != 0:
        yield f"stage 0 must start at layer 0, found {layers.start}"
    if layers.start < before:
        yield _too_few(layers.start, before, "before")
    if after == 0 and layers.end < num_layers:
        yield f"the last stage must end at {num_layers}, found {layers.end}"
    if num_layers - after < layers.end <= num_layers:
        yield _too_few(num_layers - layers.end, after, "after")


def _too_few(num_left: int, num_stages: int, where: str) -> str:
    left = {0: "no layer", 1: "1 layer"}.get(num_left, f"{num_left} layers")
    stages = "1 stage" if num_stages == 1 else f"{num_stages} stages"
    return f"it leaves {left} for the {stages} {where} it, at least {num_stages} needed"


def _advise_own_range(stage: int, num_stages: int, layers: LayerRange, num_layers: int) -> str:
    advice = f"give {_RANGE_FLAG} {_nearest_fit(stage, num_stages, layers, num_layers)}"
    if stage > 0 and layers.start == 0:
        advice += f", or {_IDX_FLAG} 0 if this is the first stage"
    elif stage < num_stages - 1 and layers.end == num_layers:
        advice += f", or {_TOTAL_FLAG} {stage + 1} if this is the last stage"
    return advice


def _nearest_fit(stage: int, num_stages: int, layers: LayerRange, num_layers: int) -> LayerRange:
    """``layers`` with only its wrong ends moved; the even split's range when nothing of it can be kept."""
    after = num_stages - 1 - stage
    start = 0 if stage == 0 else max(layers.start, stage)
    end = num_layers if after == 0 else min(layers.end, num_layers - after)
    return LayerRange(start, end) if start < end else split_evenly(num_layers, num_stages)[stage]


def _advise_next(layers: LayerRange, next_stage: int, next_layers: LayerRange) -> str:
    if next_layers.end > layers.end:
        return f"give stage {next_stage} {_RANGE_FLAG} {layers.end}-{next_layers.end}"
    return f"give stage {next_stage} a {_RANGE_FLAG} that starts at {layers.end}"


def _pipeline_problems(ranges: Sequence[LayerRange], num_layers: int) -> Iterator[str]:
    if ranges[0].start != 0:
        missing = _name_layers(0, ranges[0].start)
        yield f"stage 0 must start at layer 0 but starts at {ranges[0].start}: {missing} would not come first"
    for stage, (layers, next_layers) in enumerate(pairwise(ranges)):
        if layers.end > num_layers:
            yield _beyond(stage, layers, num_layers)
        if next_layers.start > layers.end:
            yield _gap(ranges, stage)
        elif problem := check_adjacent(stage, layers, stage + 1, next_layers):
            yield problem
    yield from _apart_but_same(ranges)
    last = len(ranges) - 1
    if ranges[last].end > num_layers:
        yield _beyond(last, ranges[last], num_layers)
    elif ranges[last].end < num_layers:
        missing = _describe_owners(ranges, ranges[last].end, num_layers)
        yield f"stage {last}, the last, must end at {num_layers} but ends at {ranges[last].end}: {missing}"


def _gap(ranges: Sequence[LayerRange], stage: int) -> str:
    """As ``check_adjacent``, but the layers between two neighbours may be another stage's."""
    layers, next_layers = ranges[stage], ranges[stage + 1]
    between = _describe_owners(ranges, layers.end, next_layers.start)
    advice = _advise_next(layers, stage + 1, next_layers)
    starts = f"stage {stage + 1} starts at {next_layers.start}"
    return f"stage {stage} owns layers {_interval(layers)} but {starts}: {between}; {advice}"


def _describe_owners(ranges: Sequence[LayerRange], start: int, end: int) -> str:
    """``layers 8 to 15 are stage 2's, layer 16 has no owner``."""
    points = {start, end, *(point for layers in ranges for point in (layers.start, layers.end) if start < point < end)}
    spans = [(span, [i for i, layers in enumerate(ranges) if span[0] in layers]) for span in pairwise(sorted(points))]
    clauses = []
    for stages, group in groupby(spans, key=lambda owned: owned[1]):
        joined = [span for span, _ in group]
        first, after = joined[0][0], joined[-1][1]
        is_one = after - first == 1
        whose = f"stage {stages[0]}'s" if stages else "no owner"
        verb = ("is" if is_one else "are") if stages else ("has" if is_one else "have")
        clauses.append(f"{_name_layers(first, after)} {verb} {whose}")
    return ", ".join(clauses)


def _apart_but_same(ranges: Sequence[LayerRange]) -> Iterator[str]:
    """Layers that two stages own that are not neighbours. Neighbours are checked by ``check_adjacent``."""
    for (stage, layers), (other, others) in combinations(enumerate(ranges), 2):
        start, end = max(layers.start, others.start), min(layers.end, others.end)
        if other - stage > 1 and start < end:
            twice = _name_layers(start, end)
            yield (
                f"stage {stage} owns layers {_interval(layers)} and stage {other} owns {_interval(others)}: "
                f"{twice} would be owned twice"
            )


def _beyond(stage: int, layers: LayerRange, num_layers: int) -> str:
    return f"stage {stage} owns layers {_interval(layers)} but the model has {num_layers} layers, 0 to {num_layers - 1}"


def _advise_ranges(ranges: Sequence[LayerRange], num_layers: int) -> list[str]:
    return [f"{kept}: {ranges_line(split)}" for kept, split in repairs(ranges, num_layers)][:1]


def _interval(layers: LayerRange) -> str:
    return f"[{layers.start}, {layers.end})"


def _name_layers(start: int, end: int, joint: str = " to ") -> str:
    return f"layer {start}" if end - start == 1 else f"layers {start}{joint}{end - 1}"
