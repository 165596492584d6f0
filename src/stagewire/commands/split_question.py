"""A question about a split, as typed: the arguments that `plan` and `export` share, and how they become a `Question`.

Refuses what is malformed, all of it at once. Reads the model's configuration, and its weights' headers when figures are
asked for. The answer is decided in checkpoint/split_choice.py. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from stagewire.checkpoint.folder import Checkpoint, read_checkpoint
from stagewire.checkpoint.footprint import (
    DTYPES,
    KV_CACHE_DTYPES,
    Footprint,
    is_quantized,
    kv_cache_dtype,
    measure,
    served_dtype,
)
from stagewire.checkpoint.index import CheckpointIndex
from stagewire.checkpoint.kv_cache import KvLayout, read_layout
from stagewire.checkpoint.model_config import (
    LoadFlags,
    config_path,
    language_settings,
    parse_overrides,
    read_config,
)
from stagewire.checkpoint.split_choice import MeasuredTimes, Question, choose
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange

__all__ = [
    "Asked",
    "Source",
    "add_choice_arguments",
    "add_load_arguments",
    "choose_ranges",
    "load_flags",
    "read_question",
    "warn",
]

# vLLM's own (CacheConfig.gpu_memory_utilization, vllm/config/cache.py).
DEFAULT_UTILIZATION = 0.92
_NS_PER_MS = 10**6
_MAX_MS = 10**9
_UNIT_BYTES = {
    f"{letter}{infix}b": base**power
    for power, letter in enumerate("kmgt", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE_TEXT = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*([a-z]{2,3})\s*", re.IGNORECASE)
_LOCAL = "the GPUs here"


@dataclass(frozen=True)
class Source:
    """Where the question came from. ``weights`` and ``kv``: names of dtypes, ``None`` when nothing was measured.

    ``unknown``: why the KV cache has no figures. ``max_positions``: config.json's max_position_embeddings.
    ``warnings``: what is odd about the checkpoint. ``config_name``: the file that says how many layers there are.
    """

    model: str | None
    weights: str | None = None
    kv: str | None = None
    unknown: str | None = None
    max_positions: int | None = None
    warnings: tuple[str, ...] = ()
    config_name: str = "config.json"


@dataclass(frozen=True)
class Asked:
    source: Source
    question: Question


@dataclass(frozen=True)
class _Figures:
    """What was typed as text: ranges, bytes of each stage's device, times in nanoseconds. One value may be for all."""

    ranges: tuple[LayerRange, ...] | None
    memory: tuple[int, ...] | None
    layer_ns: tuple[int, ...] | None
    head_ns: int
    embed_ns: int


@dataclass(frozen=True)
class _Model:
    source: Source
    layout: KvLayout | None = None
    footprint: Footprint | None = None


def add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    """What a split can be chosen by; `read_question` reads it."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, help="as for vLLM (default: auto)")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, help="as for vLLM (default: auto)")
    add(
        "--memory",
        nargs="?",
        const=_LOCAL,
        metavar="SIZES",
        help="memory of each stage's device, for instance 24GiB,12GiB, or one for all; alone: of the GPUs here. "
        "Chooses the split with the most KV cache on its smallest stage",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help=f"as for vLLM: the share of the memory that it uses (default: {DEFAULT_UTILIZATION})",
    )
    add("--balance", choices=["time"], help="choose the split whose slowest stage is fastest")
    add("--layer-ms", metavar="MS", help="measured time of one layer; several, by commas, for unequal machines")
    add("--head-ms", metavar="MS", help="measured time of the final norm and the head")
    add("--embed-ms", metavar="MS", help="measured time of the embedding (default: 0)")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """How the folder is read, spelled as for vLLM; `load_flags` reads it."""
    add = parser.add_argument
    add("--load-format", metavar="FORMAT", help="as for vLLM: auto, hf, safetensors, mistral, ... (default: auto)")
    add("--config-format", metavar="FORMAT", help="as for vLLM: auto, hf or mistral (default: auto)")
    add("--hf-config-path", metavar="PATH", help="as for vLLM: the folder with the configuration, if it is another")
    add("--hf-overrides", metavar="JSON", help="as for vLLM: settings that replace those of the configuration")


def load_flags(args: argparse.Namespace) -> LoadFlags:
    """Raises ``ConfigError`` for overrides that are no JSON object."""
    overrides = {} if args.hf_overrides is None else parse_overrides(args.hf_overrides)
    return LoadFlags(args.load_format or "auto", args.config_format or "auto", args.hf_config_path, overrides)


def warn(warnings: Sequence[str]) -> None:
    """On standard error, so that standard output is what a program expects."""
    for warning in warnings:
        print(f"Warning: {warning}", file=sys.stderr)  # noqa: T201


def choose_ranges(args: argparse.Namespace, num_stages: int | None) -> tuple[LayerRange, ...]:
    """The split that `stagewire plan` gives for the same arguments.

    Args:
        args: ``model``, ``ranges``, and those of `add_choice_arguments` and `add_load_arguments`.
        num_stages: None where the arguments say it otherwise.

    Raises:
        ConfigError: a malformed question, or a split that does not fit.
    """
    own = {"num_stages": num_stages, "total_layers": None, "details": False}
    answer = choose(read_question(argparse.Namespace(**{**vars(args), **own}), has_details=False).question)
    if not answer.is_valid:
        raise ConfigError(
            "\n  - ".join(["no split into stages fits:", *answer.problems, *filter(None, [answer.advice])])
        )
    return answer.split


def read_question(args: argparse.Namespace, *, has_details: bool) -> Asked:
    """Checks everything that was typed first, then what the model's files say about it.

    Args:
        args: ``model``, ``total_layers``, ``num_stages``, ``ranges``, ``details``, and those of
            `add_choice_arguments` and `add_load_arguments`.
        has_details: read the weights' headers wherever there are weights.

    Raises:
        ConfigError: it is malformed, or the model cannot be read.
    """
    figures = _parse(args)
    num_stages = _count_stages(args, figures)
    model = _read_model(args, has_details)
    question = Question(
        num_layers=_num_layers(args, model.layout),
        num_stages=num_stages,
        ranges=figures.ranges,
        layout=model.layout,
        footprint=model.footprint,
        memory=None if figures.memory is None else _for_each(figures.memory, num_stages),
        utilization=DEFAULT_UTILIZATION if args.gpu_memory_utilization is None else args.gpu_memory_utilization,
        times=_times(figures, num_stages),
    )
    return Asked(model.source, question)


def _parse(args: argparse.Namespace) -> _Figures:
    problems: list[str] = list(_contradictions(args))
    figures = _Figures(
        ranges=_collect(problems, _parse_all, args.ranges, LayerRange.parse),
        memory=_collect(problems, _parse_memory, args.memory),
        layer_ns=_collect(problems, _parse_all, args.layer_ms and args.layer_ms.split(","), _parse_ms),
        head_ns=_collect(problems, _parse_ms, args.head_ms) or 0,
        embed_ns=_collect(problems, _parse_ms, args.embed_ms) or 0,
    )
    if problems:
        raise ConfigError("\n  - ".join([_how_many(problems), *problems]) if len(problems) > 1 else problems[0])
    return figures


def _times(figures: _Figures, num_stages: int) -> MeasuredTimes | None:
    if figures.layer_ns is None:
        return None
    return MeasuredTimes(_for_each(figures.layer_ns, num_stages), figures.head_ns, figures.embed_ns)


def _how_many(problems: Sequence[str]) -> str:
    return f"{len(problems)} things are wrong with what was asked:"


def _collect(problems: list[str], parse: Callable[..., Any], value: Any, *more: Any) -> Any:
    """``parse(value)``, ``None`` for ``None``; what it refuses goes to ``problems``."""
    if value is None:
        return None
    try:
        return parse(value, *more)
    except ConfigError as error:
        problems += [line for line in str(error).splitlines() if line]
        return None


def _contradictions(args: argparse.Namespace) -> Iterator[str]:
    if args.model is None and args.total_layers is None:
        yield "no model: give --model PATH, or --total-layers N"
    for flag, value in (("--total-layers", args.total_layers), ("--num-stages", args.num_stages)):
        if value is not None and value < 1:
            yield f"{flag} must be at least 1, found {value}"
    for flag in ("details", "memory", "dtype", "kv_cache_dtype"):
        if args.model is None and getattr(args, flag):
            yield f"{_flag(flag)} is about a model's weights and KV cache: give --model PATH"
    for flag in ("load_format", "config_format", "hf_config_path", "hf_overrides"):
        if args.model is None and getattr(args, flag) is not None:
            yield f"{_flag(flag)} is about reading a model: give --model PATH"
    if args.gpu_memory_utilization is not None and args.memory is None:
        yield "--gpu-memory-utilization is a share of --memory: give that too"
    if args.gpu_memory_utilization is not None and not 0 < args.gpu_memory_utilization <= 1:
        yield f"--gpu-memory-utilization must be above 0 and at most 1, found {args.gpu_memory_utilization:g}"
    for flag in ("layer_ms", "head_ms", "embed_ms"):
        given = getattr(args, flag) is not None
        if given and args.balance is None:
            yield f"{_flag(flag)} is for --balance time: give that too"
        if not given and args.balance == "time" and flag != "embed_ms":
            yield f"--balance time needs {_flag(flag)}, measured: it has no figures of its own"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _count_stages(args: argparse.Namespace, figures: _Figures) -> int:
    """Every argument that says it must say the same. One memory, or one time, is for any number of stages."""
    ranges, memory, layer_ns = figures.ranges, figures.memory, figures.layer_ns
    said = {} if args.num_stages is None else {f"--num-stages {args.num_stages}": int(args.num_stages)}
    if ranges is not None:
        said[f"{len(ranges)} in --ranges"] = len(ranges)
    if layer_ns is not None and len(layer_ns) > 1:
        said[f"{len(layer_ns)} in --layer-ms"] = len(layer_ns)
    if memory is not None and args.memory == _LOCAL:
        # Stages take the first ones, so that there may be more.
        if not said or len(memory) < max(said.values()):
            said[f"{len(memory)} GPUs here"] = len(memory)
    elif memory is not None and len(memory) > 1:
        said[f"{len(memory)} in --memory"] = len(memory)
    if not said:
        raise ConfigError("how many stages? Give --num-stages N, or --ranges, or one --memory for each stage")
    if len(set(said.values())) > 1:
        raise ConfigError(f"how many stages? {', '.join(said)}: make them agree, or leave some out")
    return next(iter(said.values()))


def _num_layers(args: argparse.Namespace, layout: KvLayout | None) -> int:
    if layout is None:
        return int(args.total_layers)
    found = len(layout.layers)
    if args.total_layers not in (None, found):
        raise ConfigError(
            f"--total-layers {args.total_layers} but {args.model} has {found} layers: leave --total-layers out"
        )
    return found


def _read_model(args: argparse.Namespace, has_details: bool) -> _Model:
    """The weights' headers only when figures are asked for, or with ``has_details`` where they are there."""
    if args.model is None:
        return _Model(Source(None))
    model_dir, flags = Path(args.model).expanduser(), load_flags(args)
    config = read_config(model_dir, flags)
    layout = read_layout(config)
    asked = [_flag(name) for name in ("details", "memory", "dtype", "kv_cache_dtype") if getattr(args, name)]
    checkpoint = read_checkpoint(model_dir, flags) if asked or has_details else None
    if checkpoint is not None and checkpoint.index is None and asked:
        nothing = checkpoint.files.describe_nothing()
        raise ConfigError(f"{asked[0]} needs the headers of safetensors weights, and {model_dir} {nothing}")
    if args.memory is not None:
        _check_tokens_have_a_size(layout)
    if checkpoint is None or checkpoint.index is None:
        return _Model(Source(args.model, config_name=config_path(model_dir, flags).name), layout)
    return _measure(args, checkpoint, checkpoint.index, layout)


def _check_tokens_have_a_size(layout: KvLayout) -> None:
    if layout.unknown or not any(layer.elements_per_token for layer in layout.layers):
        why = layout.unknown or "no layer of this model has a KV cache that grows with the tokens"
        raise ConfigError(f"--memory is planned by KV cache tokens, whose size is not known: {why}")


def _measure(args: argparse.Namespace, checkpoint: Checkpoint, index: CheckpointIndex, layout: KvLayout) -> _Model:
    config, shape = checkpoint.config, checkpoint.shape
    dtype = served_dtype(shape, args.dtype or "auto")
    kv = kv_cache_dtype(config, dtype, args.kv_cache_dtype or "auto")
    weights = None if is_quantized(config) or checkpoint.quantization_file else dtype
    positions = language_settings(config).get("max_position_embeddings")
    source = Source(
        args.model,
        weights=weights.name if weights else "what they are quantized to",
        kv=kv.name,
        unknown=layout.unknown,
        max_positions=positions if isinstance(positions, int) else None,
        warnings=checkpoint.warnings,
        config_name=checkpoint.config_name,
    )
    return _Model(source, layout, measure(index, shape, layout, weights, kv))


def _parse_memory(text: str) -> tuple[int, ...]:
    if text == _LOCAL:
        from stagewire.launch.gpus import gpu_memory_bytes

        return tuple(gpu_memory_bytes(os.environ))
    return _parse_all(text.split(","), _parse_size)


def _parse_all(texts: Sequence[str], parse: Callable[[str], Any]) -> tuple[Any, ...]:
    """Parses all of ``texts``. Raises ``ConfigError`` with all that are malformed, a line each."""
    problems: list[str] = []
    values = tuple(_collect(problems, parse, text) for text in texts)
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def _parse_size(text: str) -> int:
    match = _SIZE_TEXT.fullmatch(text)
    unit = _UNIT_BYTES.get(match[2].lower()) if match else None
    if match is None or unit is None or not Decimal(match[1]):
        raise ConfigError(
            f'--memory "{text}" is no size: expected a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB, '
            "for instance 24GiB; several, by commas, one for each stage"
        )
    return int(Decimal(match[1]) * unit)


def _parse_ms(text: str) -> int:
    """Nanoseconds."""
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        value = Decimal(-1)
    if not value.is_finite() or not 0 <= value <= _MAX_MS:
        raise ConfigError(f'"{text}" is no time: expected milliseconds, for instance 0.42')
    return int(value * _NS_PER_MS)


def _for_each(values: Sequence[int], num_stages: int) -> tuple[int, ...]:
    return tuple(values) * num_stages if len(values) == 1 else tuple(values[:num_stages])
