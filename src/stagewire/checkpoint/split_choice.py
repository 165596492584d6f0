"""Answers a question about a split: which ranges, what is wrong with them, what each stage would have. Pure.

Without memory or times the answer is vLLM's own split, which the launcher starts. With them it is the best split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagewire.checkpoint.footprint import Footprint
from stagewire.checkpoint.kv_cache import KvLayout, advise_split, find_kv_problems
from stagewire.plan.balance import best_split
from stagewire.plan.ranges import LayerRange, find_problems, ranges_line, repairs, split_evenly

__all__ = ["Answer", "Compared", "MeasuredTimes", "Question", "StageFigures", "choose"]

_BYTES_PER_GB = 10**9
# The cost of a stage that does not fit, when the split is chosen by time. Larger than any time.
_NEVER = 10**30

Split = tuple[LayerRange, ...]


@dataclass(frozen=True)
class MeasuredTimes:
    """Measured times in whole nanoseconds, so that equal sums compare as equal. ``layer_ns``: one per stage."""

    layer_ns: tuple[int, ...]
    head_ns: int
    embed_ns: int

    def stage_ns(self, stage: int, start: int, end: int, num_layers: int) -> int:
        ends = self.embed_ns * (start == 0) + self.head_ns * (end == num_layers)
        return self.layer_ns[stage] * (end - start) + ends


@dataclass(frozen=True)
class Question:
    """``memory``: bytes of each stage's device; needs ``footprint``. vLLM uses the share ``utilization`` of them."""

    num_layers: int
    num_stages: int
    ranges: Split | None = None
    layout: KvLayout | None = None
    footprint: Footprint | None = None
    memory: tuple[int, ...] | None = None
    utilization: float = 1.0
    times: MeasuredTimes | None = None

    @property
    def objective(self) -> str | None:
        """The aim by which the split is chosen; ``None`` for given ranges and for vLLM's own split."""
        if self.ranges is not None:
            return None
        return "shortest time" if self.times else "most KV cache" if self.memory else None

    def usable_bytes(self, stage: int) -> int:
        """As vLLM's ``request_memory`` computes it (vllm/v1/worker/utils.py)."""
        return 0 if self.memory is None else math.ceil(self.memory[stage] * self.utilization)

    def free_bytes(self, stage: int, start: int, end: int) -> int:
        """Bytes that the weights leave for the KV cache; negative when the weights do not fit."""
        return self.usable_bytes(stage) - (self.footprint.weight_bytes(start, end) if self.footprint else 0)

    def kv_tokens(self, stage: int, start: int, end: int) -> int:
        """How many tokens fit into the KV cache; below 1 when the stage does not fit."""
        kv_bytes = self.footprint.kv_bytes_per_token(start, end) if self.footprint else 0
        # Ranges that a rule forbids may have layers without KV cache. Then only the weights count.
        return self.free_bytes(stage, start, end) // max(kv_bytes, 1)

    def stage_ns(self, stage: int, start: int, end: int) -> int:
        return 0 if self.times is None else self.times.stage_ns(stage, start, end, self.num_layers)


@dataclass(frozen=True)
class StageFigures:
    """What one stage would have. ``None``: not asked for, or not known."""

    layers: LayerRange
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    num_state_layers: int | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None
    kv_tokens: int | None = None
    time_ns: int | None = None


@dataclass(frozen=True)
class Compared:
    """A split and the figures of its worst stage. ``problem``: why the split cannot run; then it has no figures."""

    name: str
    split: Split
    kv_tokens: int | None = None
    fewest_stage: int | None = None
    time_ns: int | None = None
    slowest_stage: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Answer:
    """``advice``: a line that says what to give instead. ``corrected``: the same as ranges, if it names any."""

    split: Split
    problems: tuple[str, ...] = ()
    advice: str | None = None
    corrected: Split | None = None
    stages: tuple[StageFigures, ...] = ()
    compared: tuple[Compared, ...] = ()

    @property
    def is_valid(self) -> bool:
        return not self.problems


def choose(question: Question) -> Answer:
    """Judges the split that was asked about, or chooses one and judges it."""
    num_layers, num_stages = question.num_layers, question.num_stages
    if question.ranges is None and num_stages > num_layers:
        problem = f"{num_stages} stages need at least {num_stages} layers, the model has {num_layers}"
        return Answer((), (problem,), f"Give --num-stages {num_layers} or less")
    best = _best(question) if question.memory or question.times else None
    split = question.ranges or best or split_evenly(num_layers, num_stages)
    problems = [*find_problems(split, num_layers), *_kv_problems(question, split)]
    if problems:
        return _refuse(question, split, problems)
    short = list(_too_small(question, split))
    fitting = best if short and best and not list(_too_small(question, best)) else None
    return Answer(
        split,
        tuple(short),
        _advise_memory(fitting) if short else None,
        fitting,
        tuple(_figures(question, stage, layers) for stage, layers in enumerate(split)),
        tuple(_compare(question, split, best)) if best else (),
    )


def _best(question: Question) -> Split | None:
    """The best split; ``None`` when the kinds of layers allow no split into so many stages."""
    allowed = question.layout.rule() if question.layout else _anything
    cost: Callable[[int, int, int], int] = _tokens_missing(question)
    if question.times:
        cost = _time_where_it_fits(question) if question.memory else question.stage_ns
    return best_split(question.num_layers, question.num_stages, cost, allowed)


def _anything(start: int, end: int) -> bool:
    return True


def _tokens_missing(question: Question) -> Callable[[int, int, int], int]:
    return lambda stage, start, end: -question.kv_tokens(stage, start, end)


def _time_where_it_fits(question: Question) -> Callable[[int, int, int], int]:
    """The cost is the stage's time. A stage that does not fit costs more, the more it lacks."""

    def cost(stage: int, start: int, end: int) -> int:
        tokens = question.kv_tokens(stage, start, end)
        return question.stage_ns(stage, start, end) if tokens > 0 else _NEVER - tokens

    return cost


def _kv_problems(question: Question, split: Split) -> list[str]:
    return find_kv_problems(question.layout, split) if question.layout else []


def _refuse(question: Question, split: Split, problems: Sequence[str]) -> Answer:
    if question.layout is not None:
        advice, corrected = advise_split(question.layout, split)
    else:
        kept, corrected = next(repairs(split, question.num_layers), (None, None))
        advice = (
            f"{kept}: {ranges_line(corrected)}"
            if corrected
            else f"Give {question.num_layers} ranges or fewer: every stage needs a layer"
        )
    return Answer(split, tuple(problems), advice, corrected)


def _too_small(question: Question, split: Split) -> list[str]:
    """One problem for each stage whose weights leave no room for a single token."""
    if question.memory is None or question.footprint is None:
        return []
    problems = []
    for stage, layers in enumerate(split):
        span = (layers.start, layers.end)
        lacking = -question.free_bytes(stage, *span)
        if question.kv_tokens(stage, *span) < 1:
            problems.append(
                f"stage {stage} with layers [{layers.start}, {layers.end}) does not fit: "
                f"{_gb(question.footprint.weight_bytes(*span))} of weights, {_gb(question.usable_bytes(stage))} usable "
                f"({question.utilization:g} of {_gb(question.memory[stage])}), "
                + (f"{_gb(lacking)} too little" if lacking > 0 else "which leaves no room for a KV cache")
            )
    return problems


def _advise_memory(fitting: Split | None) -> str:
    if fitting:
        return f"These fit: {ranges_line(fitting)}"
    return "No split into so many stages fits: give more stages, more memory, or a quantized checkpoint"


def _figures(question: Question, stage: int, layers: LayerRange) -> StageFigures:
    footprint, span = question.footprint, (layers.start, layers.end)
    has_kv = footprint is not None and question.layout is not None and question.layout.unknown is None
    return StageFigures(
        layers,
        footprint.weight_bytes(*span) if footprint else None,
        footprint.kv_bytes_per_token(*span) if footprint and has_kv else None,
        footprint.num_state_layers(*span) if footprint else None,
        question.memory[stage] if question.memory else None,
        question.free_bytes(stage, *span) if question.memory else None,
        max(0, question.kv_tokens(stage, *span)) if question.memory else None,
        question.stage_ns(stage, *span) if question.times else None,
    )


def _compare(question: Question, split: Split, best: Split) -> list[Compared]:
    own = split_evenly(question.num_layers, question.num_stages)
    named = [("vLLM's own split", own), ("the best split", best)]
    if question.ranges is not None:
        named.insert(0, ("the given split", split))
    return [_judge(question, name, compared) for name, compared in named]


def _judge(question: Question, name: str, split: Split) -> Compared:
    if problems := _kv_problems(question, split):
        return Compared(name, split, problem=problems[0])
    spans = [(stage, layers.start, layers.end) for stage, layers in enumerate(split)]
    fewest = min(spans, key=lambda span: question.kv_tokens(*span)) if question.memory else None
    slowest = max(spans, key=lambda span: question.stage_ns(*span)) if question.times else None
    return Compared(
        name,
        split,
        max(0, question.kv_tokens(*fewest)) if fewest else None,
        fewest[0] if fewest else None,
        question.stage_ns(*slowest) if slowest else None,
        slowest[0] if slowest else None,
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / _BYTES_PER_GB:.2f} GB"
