"""The answer to a question about a split, as text for people and as JSON for programs. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stagewire.checkpoint.split_choice import Answer, Compared, Question, StageFigures
from stagewire.commands.split_question import Source
from stagewire.plan.ranges import LayerRange, ranges_line, split_evenly

__all__ = ["describe", "describe_details", "to_json"]

_RULE = "-" * 60
_MIN_DIGITS = 2
_BYTES_PER_GB = 10**9
_NS_PER_MS = 10**6
_NOT_COUNTED = (
    "Not counted: activations, CUDA graphs, and what else uses the device. vLLM measures those when it starts.",
    "Sliding window layers count as full ones, so that with long requests vLLM's own figure may be higher.",
)
_STATES = "The constant state of each running request takes from the KV cache too, and is not counted."


def describe(source: Source, question: Question, answer: Answer) -> str:
    """The block of the quick start: what was asked, the table, the verdict. Ends without a newline."""
    lines = [*_head(source, question)]
    if answer.split:
        lines += [
            _how(question),
            "",
            "Layer Range Configuration:",
            _RULE,
            *_table(answer.split, question.num_layers),
            _RULE,
        ]
    return "\n".join([*lines, "", *(_valid(question.num_layers) if answer.is_valid else _invalid(answer))])


def describe_details(source: Source, question: Question, answer: Answer) -> str:
    """What each stage would have, and the splits compared; empty when there are no figures."""
    if not answer.stages or (source.weights is None and question.times is None):
        return ""
    lines = [_title(source), *_columns(answer.stages)]
    if source.unknown:
        lines.append(f"KV cache: not known, because {source.unknown}")
    lines += _comparison(answer.compared)
    if question.objective and answer.is_valid and answer.split != split_evenly(question.num_layers, len(answer.split)):
        lines += ["", f"To launch this split: {ranges_line(answer.split)}"]
    if question.memory:
        has_states = any(stage.num_state_layers for stage in answer.stages)
        lines += ["", *_too_few_tokens(source, answer), *_NOT_COUNTED, *([_STATES] if has_states else [])]
    return "\n".join(lines)


def _too_few_tokens(source: Source, answer: Answer) -> list[str]:
    """vLLM does not start when one request of the greatest length would not fit."""
    tokens = min(stage.kv_tokens or 0 for stage in answer.stages)
    if source.max_positions is None or not 0 < tokens < source.max_positions:
        return []
    return [f"That is less than one request of {source.max_positions:,} tokens: give vLLM a smaller --max-model-len."]


def to_json(source: Source, question: Question, answer: Answer) -> str:
    """All figures: bytes, tokens, milliseconds. What was not asked for or is not known is null."""
    content = {
        "valid": answer.is_valid,
        "model": source.model,
        "num_layers": question.num_layers,
        "num_stages": question.num_stages,
        "chosen_for": question.objective,
        "ranges": _texts(answer.split),
        "problems": list(answer.problems),
        "advice": answer.advice,
        "corrected_ranges": None if answer.corrected is None else _texts(answer.corrected),
        "weights_dtype": source.weights,
        "kv_cache_dtype": source.kv,
        "kv_cache_unknown": source.unknown,
        "gpu_memory_utilization": question.utilization if question.memory else None,
        "stages": [_stage_json(i, layers, answer.stages) for i, layers in enumerate(answer.split)],
        "compared": [_compared_json(compared) for compared in answer.compared],
    }
    if source.warnings:
        content["warnings"] = list(source.warnings)
    return json.dumps(content, indent=2)


def _head(source: Source, question: Question) -> list[str]:
    num_layers = _count(question.num_layers, "layer")
    if source.model is None:
        return [f"✓ {num_layers} (--total-layers)"]
    return [f"✓ Model: {source.model}", f"✓ Detected {num_layers} from {source.config_name}"]


def _how(question: Question) -> str:
    how = "Given layer ranges" if question.ranges is not None else "Auto-calculated layer ranges"
    chosen = f": {question.objective}" if question.objective else ""
    return f"✓ {how} for {_count(question.num_stages, 'stage')}{chosen}"


def _table(split: Sequence[LayerRange], num_layers: int) -> list[str]:
    digits = max(_MIN_DIGITS, len(str(num_layers)), *(len(str(layers.end)) for layers in split))
    width = len(str(len(split) - 1))
    return [
        f"  Stage {stage:>{width}}: [{layers.start:>{digits}}-{layers.end:>{digits}})  "
        f"({layers.num_layers:>{digits}} {'layer' if layers.num_layers == 1 else 'layers'})"
        for stage, layers in enumerate(split)
    ]


def _valid(num_layers: int) -> list[str]:
    return [
        "✓ Configuration is VALID",
        f"  - All {_count(num_layers, 'layer')} are covered exactly once",
        "  - No overlaps or gaps detected",
        "  - Ready for pipeline parallelism",
    ]


def _invalid(answer: Answer) -> list[str]:
    lines = ["✗ Configuration is INVALID", *(f"  - {problem}" for problem in answer.problems)]
    return lines if answer.advice is None else [*lines, "", answer.advice]


def _title(source: Source) -> str:
    if source.weights is None:
        return "Each stage:"
    return f"Each stage (weights in {source.weights}, KV cache in {source.kv}, 1 GB = 10^9 bytes):"


def _columns(stages: Sequence[StageFigures]) -> list[str]:
    """One column for each figure that is known, and a last row with the sums of those that add up."""
    has_states = any(stage.num_state_layers for stage in stages)
    columns = [
        ["stage", *(str(i) for i in range(len(stages))), "all"],
        ["layers", *(str(stage.layers) for stage in stages), str(sum(stage.layers.num_layers for stage in stages))],
        _column("state layers", [stage.num_state_layers if has_states else None for stage in stages], str, sum),
        _column("weights", [stage.weight_bytes for stage in stages], _gb, sum),
        _column("KV bytes/token", [stage.kv_bytes_per_token for stage in stages], str, sum),
        _column("memory", [stage.memory_bytes for stage in stages], _gb, sum),
        _column("for KV cache", [stage.free_bytes for stage in stages], _gb, sum),
        _column("KV tokens", [stage.kv_tokens for stage in stages], _thousands, min),
        _column("step", [stage.time_ns for stage in stages], _ms, max),
    ]
    return [line.rstrip() for line in _align([column for column in columns if column])]


def _column(title: str, values: Sequence[int | None], show: Any, together: Any) -> list[str]:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return []
    return [title, *(show(value) for value in known), show(together(known))]


def _align(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return ["  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _comparison(compared: Sequence[Compared]) -> list[str]:
    if not compared:
        return []
    lines = ["", "The stage with the fewest KV tokens decides for all of them, the slowest one how fast they go:"]
    if compared[0].time_ns is None:
        lines = ["", "The stage with the fewest KV tokens decides for all of them:"]
    elif compared[0].kv_tokens is None:
        lines = ["", "The slowest stage decides how fast all of them go:"]
    for each in compared:
        lines += [f"  {each.name}: {_verdict(each)}", f"    {ranges_line(each.split)}"]
    return lines


def _verdict(compared: Compared) -> str:
    if compared.problem is not None:
        return f"cannot be run: {compared.problem}"
    parts = []
    if compared.kv_tokens is not None:
        tokens = f"{_thousands(compared.kv_tokens)} KV tokens" if compared.kv_tokens > 0 else "does not fit"
        parts.append(f"{tokens} (stage {compared.fewest_stage})")
    if compared.time_ns is not None:
        parts.append(f"{_ms(compared.time_ns)} (stage {compared.slowest_stage})")
    return ", ".join(parts)


def _stage_json(stage: int, layers: LayerRange, figures: Sequence[StageFigures]) -> dict[str, Any]:
    own = figures[stage] if figures else StageFigures(layers)
    return {
        "stage": stage,
        "start": layers.start,
        "end": layers.end,
        "num_layers": layers.num_layers,
        "weight_bytes": own.weight_bytes,
        "kv_bytes_per_token": own.kv_bytes_per_token,
        "num_state_layers": own.num_state_layers,
        "memory_bytes": own.memory_bytes,
        "free_bytes": own.free_bytes,
        "kv_tokens": own.kv_tokens,
        "time_ms": None if own.time_ns is None else own.time_ns / _NS_PER_MS,
    }


def _compared_json(compared: Compared) -> dict[str, Any]:
    return {
        "name": compared.name,
        "ranges": _texts(compared.split),
        "kv_tokens": compared.kv_tokens,
        "fewest_stage": compared.fewest_stage,
        "time_ms": None if compared.time_ns is None else compared.time_ns / _NS_PER_MS,
        "slowest_stage": compared.slowest_stage,
        "problem": compared.problem,
    }


def _texts(split: Sequence[LayerRange]) -> list[str]:
    return [str(layers) for layers in split]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / _BYTES_PER_GB:.2f} GB"


def _ms(time_ns: int) -> str:
    return f"{time_ns / _NS_PER_MS:.3f} ms"


def _thousands(number: int) -> str:
    return f"{number:,}"
