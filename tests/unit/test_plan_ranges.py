"""Layer ranges: what is parsed, split, refused, and in which words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewire.errors import ConfigError
from stagewire.plan.ranges import (
    LayerRange,
    check_adjacent,
    check_own_range,
    check_ranges,
    find_problems,
    partition_counts,
    split_evenly,
)


def get_pp_indices(num_layers: int, rank: int, size: int, partitions: Sequence[int] | None = None) -> tuple[int, int]:
    """The arithmetic of vllm/distributed/utils.py:get_pp_indices, vLLM 0.32, with VLLM_PP_LAYER_PARTITION given."""
    if partitions is None:
        counts = [num_layers // size for _ in range(size)]
        if remaining := num_layers % size:
            for i in range(2, remaining + 2):
                counts[-i] += 1
    else:
        counts = list(partitions)
        assert len(counts) == size
        assert sum(counts) == num_layers
    start = sum(counts[:rank])
    return start, start + counts[rank]


def ranges_of(*texts: str) -> list[LayerRange]:
    return [LayerRange.parse(text) for text in texts]


@st.composite
def pipelines(draw: st.DrawFn) -> list[LayerRange]:
    """Every layer once, in order: 1 to 8 stages of 1 to 20 layers."""
    counts = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [LayerRange(end - count, end) for count, end in zip(counts, ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-8", (0, 8)), (" 8 - 16 ", (8, 16)), ("\t24-32\n", (24, 32)), ("00-01", (0, 1)), ("0-126", (0, 126))],
)
def test_parse(text: str, expected: tuple[int, int]) -> None:
    assert LayerRange.parse(text) == LayerRange(*expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abc", "malformed"),
        ("", "malformed"),
        ("5", 'for layer 5 alone write "5-6"'),
        ("-1-3", "malformed"),
        ("0--8", "malformed"),
        ("0-8-16", "malformed"),
        ("0.5-8", "malformed"),
        ("0:8", "malformed"),
        ("٠-٨", "malformed"),
        ("0-" + "9" * 5000, "malformed"),
        ("8-0", 'did you mean "0-8"?'),
        ("8-8", 'for layer 8 alone write "8-9"'),
    ],
)
def test_parse_refuses(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LayerRange.parse(text)
    message = str(caught.value)
    assert f'"{text}"' in message
    assert said in message
    assert '"0-8" means layers 0 to 7' in message


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (3, 3), (4, 3)])
def test_a_range_is_never_empty_or_negative(start: int, end: int) -> None:
    with pytest.raises(ConfigError, match="0 <= start < end"):
        LayerRange(start, end)


@given(pipelines())
def test_text_round_trip(ranges: list[LayerRange]) -> None:
    assert [LayerRange.parse(str(layers)) for layers in ranges] == ranges


def test_what_a_range_knows() -> None:
    layers = LayerRange(8, 16)
    assert (str(layers), layers.num_layers, layers.describe()) == ("8-16", 8, "layers 8-15")
    assert LayerRange(5, 6).describe() == "layer 5"
    assert [layer in layers for layer in (7, 8, 15, 16)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "counts"),
    [
        (32, 4, [8, 8, 8, 8]),
        (30, 4, [7, 8, 8, 7]),
        (31, 4, [8, 8, 8, 7]),
        (29, 4, [7, 7, 8, 7]),
        (5, 2, [3, 2]),
        (7, 1, [7]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_split_evenly(num_layers: int, num_stages: int, counts: list[int]) -> None:
    assert [layers.num_layers for layers in split_evenly(num_layers, num_stages)] == counts


@given(st.integers(1, 200), st.integers(1, 32))
def test_split_evenly_is_vllms_split(num_layers: int, num_stages: int) -> None:
    if num_layers < num_stages:
        with pytest.raises(ConfigError, match="--pipeline-total-stages"):
            split_evenly(num_layers, num_stages)
        return
    split = split_evenly(num_layers, num_stages)
    assert [(r.start, r.end) for r in split] == [get_pp_indices(num_layers, i, num_stages) for i in range(num_stages)]
    assert find_problems(split, num_layers) == []


@pytest.mark.parametrize("num_stages", [0, -1])
def test_split_needs_a_stage(num_stages: int) -> None:
    with pytest.raises(ConfigError, match="--pipeline-total-stages must be at least 1"):
        split_evenly(32, num_stages)


@given(pipelines())
def test_partition_counts_give_each_stage_its_range(ranges: list[LayerRange]) -> None:
    num_layers = ranges[-1].end
    for stage, layers in enumerate(ranges):
        check_own_range(stage, len(ranges), layers, num_layers)
        counts = partition_counts(stage, len(ranges), layers, num_layers)
        assert get_pp_indices(num_layers, stage, len(ranges), counts) == (layers.start, layers.end)
        assert min(counts) >= 0


@pytest.mark.parametrize(
    ("stage", "num_stages", "text", "expected"),
    [
        (2, 4, "16-24", (16, 0, 8, 8)),
        (0, 4, "0-8", (8, 0, 0, 24)),
        (3, 4, "24-32", (24, 0, 0, 8)),
        (0, 1, "0-32", (32,)),
        (1, 2, "31-32", (31, 1)),
    ],
)
def test_partition_counts(stage: int, num_stages: int, text: str, expected: tuple[int, ...]) -> None:
    assert partition_counts(stage, num_stages, LayerRange.parse(text), 32) == expected


@pytest.mark.parametrize(
    ("stage", "num_stages", "text", "said"),
    [
        (4, 4, "24-32", ["--pipeline-stage-idx must be 0 to 3", "found 4", "--pipeline-stage-idx 3", "stages 5"]),
        (-1, 4, "0-8", ["--pipeline-stage-idx must be 0 to 3", "found -1"]),
        (0, 0, "0-8", ["--pipeline-total-stages must be at least 1, found 0"]),
        (0, 33, "0-1", ["33 stages need at least 33 layers", "--pipeline-total-stages 32"]),
        (0, 4, "1-8", ["stage 0 must start at layer 0, found 1", "--pipeline-layer-range 0-8"]),
        (3, 4, "24-31", ["the last stage must end at 32, found 31", "--pipeline-layer-range 24-32"]),
        (3, 4, "24-33", ["the model has 32 layers", "found 33", "--pipeline-layer-range 24-32"]),
        (1, 4, "0-8", ["no layer for the 1 stage before it", "--pipeline-layer-range 1-8", "--pipeline-stage-idx 0"]),
        (2, 4, "1-8", ["1 layer for the 2 stages before it, at least 2", "--pipeline-layer-range 2-8"]),
        (
            2,
            4,
            "16-32",
            ["no layer for the 1 stage after it", "--pipeline-layer-range 16-31", "--pipeline-total-stages 3"],
        ),
        (1, 4, "40-48", ["at most 32, found 48", "--pipeline-layer-range 8-16"]),
        (0, 1, "2-30", ["start at layer 0", "end at 32", "--pipeline-layer-range 0-32"]),
    ],
)
def test_own_range_is_refused(stage: int, num_stages: int, text: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_own_range(stage, num_stages, LayerRange.parse(text), 32)
    for part in said:
        assert part in str(caught.value)


@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_own_range_passes_exactly_when_others_can_complete_it(
    stage: int, num_stages: int, start: int, length: int, num_layers: int
) -> None:
    layers = LayerRange(start, start + length)
    before, after = stage, num_stages - 1 - stage
    left = num_layers - layers.end
    possible = after >= 0 and all(
        count >= stages and (stages > 0 or count == 0) for count, stages in ((start, before), (left, after))
    )
    try:
        check_own_range(stage, num_stages, layers, num_layers)
    except ConfigError:
        assert not possible
    else:
        assert possible


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("8-16", "16-24", None),
        (
            "8-16",
            "17-24",
            "stage 1 owns layers [8, 16) but stage 2 starts at 17: layer 16 has no owner; "
            "give stage 2 --pipeline-layer-range 16-24",
        ),
        (
            "8-16",
            "20-24",
            "stage 1 owns layers [8, 16) but stage 2 starts at 20: layers 16 to 19 have no owner; "
            "give stage 2 --pipeline-layer-range 16-24",
        ),
        (
            "8-16",
            "14-24",
            "stage 1 owns layers [8, 16) but stage 2 owns [14, 24): layers 14 to 15 would be owned twice; "
            "give stage 2 --pipeline-layer-range 16-24",
        ),
        (
            "8-16",
            "10-12",
            "stage 1 owns layers [8, 16) but stage 2 owns [10, 12): layers 10 to 11 would be owned twice; "
            "give stage 2 a --pipeline-layer-range that starts at 16",
        ),
        (
            "8-16",
            "0-24",
            "stage 1 owns layers [8, 16) but stage 2 owns [0, 24): layers 8 to 15 would be owned twice; "
            "give stage 2 --pipeline-layer-range 16-24",
        ),
        (
            "8-16",
            "0-8",
            "stage 1 owns layers [8, 16) but stage 2 owns [0, 8), which come before: stages must be in the order of "
            "their layers; give stage 2 a --pipeline-layer-range that starts at 16",
        ),
        (
            "8-16",
            "8-16",
            "stage 1 owns layers [8, 16) and so does stage 2: each layer needs exactly one owner; "
            "give stage 2 a --pipeline-layer-range that starts at 16",
        ),
    ],
)
def test_adjacent(first: str, second: str, expected: str | None) -> None:
    assert check_adjacent(1, LayerRange.parse(first), 2, LayerRange.parse(second)) == expected


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("0-10", "10-18", "18-24", "24-32"), []),
        ((), ["no layer ranges"]),
        (("0-8", "8-16", "16-24"), ["stage 2, the last, must end at 32 but ends at 24: layers 24 to 31 have no owner"]),
        (("1-16", "16-32"), ["stage 0 must start at layer 0 but starts at 1: layer 0 would not come first"]),
        (("0-16", "16-40"), ["stage 1 owns layers [16, 40) but the model has 32 layers, 0 to 31"]),
        (("0-8", "9-16", "15-33"), ["layer 8 has no owner", "layer 15 would be owned twice", "the model has 32"]),
        (
            ("0-8", "16-24", "8-16", "24-32"),
            ["layers 8 to 15 are stage 2's;", "which come before", "layers 16 to 23 are stage 1's;"],
        ),
        (
            ("0-8", "8-16", "0-8", "24-32"),
            [
                "which come before",
                "layers 8 to 15 are stage 1's, layers 16 to 23 have no owner;",
                "layers 0 to 7 would",
            ],
        ),
        (("0-8", "9-10", "8-9", "10-32"), ["layer 8 is stage 2's;", "which come before", "layer 9 is stage 1's;"]),
        (("16-32", "0-16"), ["0 to 15 would not come first", "which come before", "layers 16 to 31 are stage 0's"]),
    ],
)
def test_find_problems(texts: tuple[str, ...], said: list[str]) -> None:
    problems = find_problems(ranges_of(*texts), 32)
    assert len(problems) == len(said)
    for problem, part in zip(problems, said, strict=True):
        assert part in problem


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=5), st.integers(1, 16))
def test_no_problem_exactly_when_each_layer_has_one_owner_in_order(
    pairs: list[tuple[int, int]], num_layers: int
) -> None:
    ranges = [LayerRange(start, start + length) for start, length in pairs]
    owned = [layer for layers in ranges for layer in range(layers.start, layers.end)]
    assert (find_problems(ranges, num_layers) == []) == (owned == list(range(num_layers)))


@pytest.mark.parametrize(
    ("texts", "num_layers", "line"),
    [
        (("16-32", "0-16"), 32, 'The same ranges in order: --ranges "0-16" "16-32"'),
        (("0-8", "9-16"), 30, 'The given ends kept: --ranges "0-8" "8-30"'),
        (("0-8", "8-40", "16-32"), 32, 'The given starts kept: --ranges "0-8" "8-16" "16-32"'),
        (("5-40", "5-40"), 4, 'An even split: --ranges "0-2" "2-4"'),
    ],
)
def test_check_ranges_says_all_and_corrects(texts: tuple[str, ...], num_layers: int, line: str) -> None:
    ranges = ranges_of(*texts)
    with pytest.raises(ConfigError) as caught:
        check_ranges(ranges, num_layers)
    message = str(caught.value)
    assert message.endswith(line)
    assert all(problem in message for problem in find_problems(ranges, num_layers))


def test_check_ranges_without_a_correction() -> None:
    with pytest.raises(ConfigError) as caught:
        check_ranges(ranges_of("0-1", "1-2", "2-3"), 2)
    assert "--ranges" not in str(caught.value)


def test_check_ranges_accepts() -> None:
    check_ranges(ranges_of("0-10", "10-18", "18-24", "24-32"), 32)
