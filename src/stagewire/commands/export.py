"""`stagewire export`, and tools/offline_pipelining/serve_pipeline.py: one folder for each stage, cut out beforehand.

Standard library only, so that the tool runs from a bare clone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stagewire.checkpoint.export_plan import ExportPlan, TensorSums, plan_export
from stagewire.checkpoint.export_writer import describe_bytes, run_export, verify_export
from stagewire.checkpoint.index import TensorInfo
from stagewire.checkpoint.manifest import Manifest
from stagewire.commands.split_question import (
    add_choice_arguments,
    add_load_arguments,
    choose_ranges,
    load_flags,
    warn,
)
from stagewire.errors import ConfigError, StagewireError
from stagewire.plan.ranges import LayerRange, split_evenly

__all__ = ["add_arguments", "main", "run"]

_MAX_NAMED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, metavar="PATH", help="folder of the full checkpoint (safetensors)")
    add("--pipeline-parallel-size", type=int, metavar="N", help="number of stages, each of which gets a folder")
    add("--output-dir", type=Path, required=True, metavar="PATH", help="takes stage_0, stage_1 and so on")
    add(
        "--ranges",
        nargs="+",
        metavar="START-END",
        help="each stage's layers, END not included; default: vLLM's own split, or what --memory or --balance choose",
    )
    add_choice_arguments(parser)
    add_load_arguments(parser)
    add("--overwrite", action="store_true", help="throw away an export that is already in the output folder")
    add("--verify", action="store_true", help="export nothing: read every byte again and compare it with the manifests")


def run(args: argparse.Namespace) -> int:
    """Exports, or verifies; prints what it does.

    Raises:
        ConfigError: a wrong setting, a checkpoint that cannot be cut, an export that is not what it was.
    """
    output_dir = args.output_dir.expanduser()
    if args.verify and (unused := [flag for flag, value in _export_flags(args) if value]):
        raise ConfigError(f"--verify exports nothing: drop {', '.join(unused)}, or --verify")
    try:
        if args.verify:
            _say_verified(verify_export(output_dir, _say), output_dir)
        else:
            _export(args, output_dir)
    except OSError as error:
        raise ConfigError(f"{error}; once that is mended, run the same command again: it goes on there") from error
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The tool: as `stagewire export`, with the package found by its caller."""
    parser = argparse.ArgumentParser(
        prog="serve_pipeline.py",
        description="Cut a checkpoint into one folder for each stage of a pipeline.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except StagewireError as error:
        print(f"serve_pipeline.py: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _export_flags(args: argparse.Namespace) -> list[tuple[str, object]]:
    names = ("model", "pipeline_parallel_size", "ranges", "memory", "balance", "overwrite")
    return [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in names]


def _export(args: argparse.Namespace, output_dir: Path) -> None:
    if args.model is None:
        raise ConfigError("--model is missing: the folder of the full checkpoint (only --verify needs none)")
    flags = load_flags(args)
    export = plan_export(args.model.expanduser(), lambda num_layers: _choose_ranges(args, num_layers), flags)
    warn(export.warnings)
    _say_plan(export)
    manifests = run_export(export, output_dir, _say, is_overwriting=args.overwrite)
    _say_sums(export.sums)
    _say(
        f"Export {manifests[0].export_id} is complete in {output_dir}: {describe_bytes(export.num_bytes)} in "
        f"{len(export.files)} files\n\nServe it with: stagewire up --pipeline-dir {output_dir}"
    )


def _choose_ranges(args: argparse.Namespace, num_layers: int) -> tuple[LayerRange, ...]:
    """What was typed; without ranges, what memory or time ask for; without those, vLLM's own split."""
    num_stages: int | None = args.pipeline_parallel_size
    if args.ranges is None and (args.memory or args.balance):
        return choose_ranges(args, num_stages)
    unused = [flag for flag in ("memory", "balance") if getattr(args, flag)]
    if unused:
        raise ConfigError(f"--ranges says all: drop --{', --'.join(unused)}")
    if args.ranges is None:
        if num_stages is None:
            raise ConfigError("give --pipeline-parallel-size N, the number of stages, or --ranges")
        return split_evenly(num_layers, num_stages)
    if num_stages not in (None, len(args.ranges)):
        raise ConfigError(
            f"--pipeline-parallel-size {num_stages} but --ranges has {len(args.ranges)}: "
            "give one of them, or the same number"
        )
    return tuple(LayerRange.parse(text) for text in args.ranges)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _say_plan(export: ExportPlan) -> None:
    _say(f"{export.model_dir}: {export.num_layers} layers, {describe_bytes(export.sums.checkpoint_bytes)} of tensors")
    for stage, (layers, num_bytes) in enumerate(zip(export.ranges, export.sums.stage_bytes, strict=True)):
        _say(f"  Stage {stage}: {layers.describe()}, {describe_bytes(num_bytes)}")
    for name in export.left_out:
        _say(f"  {name} is not copied: too large for a file that is no weights")


def _say_sums(sums: TensorSums) -> None:
    """Where each byte went; `TensorSums.check` has already held it against the checkpoint."""
    parts = [f"{sums.checkpoint_bytes} bytes in the checkpoint"]
    if sums.nowhere:
        parts[0] += (
            f" - {sum(tensor.num_bytes for tensor in sums.nowhere)} of layers that only draft ({_some(sums.nowhere)}), "
            "which vLLM does not build"
        )
    if sums.twice:
        again = sum(tensor.num_bytes for tensor in sums.twice)
        names = ", ".join(tensor.name for tensor in sums.twice)
        parts.append(f"{again} again in the last stage ({names}, shared with the head)")
    if sums.everywhere:
        again = sum(tensor.num_bytes for tensor in sums.everywhere) * (len(sums.stage_bytes) - 1)
        parts.append(f"{again} because every stage has {_some(sums.everywhere)}, of unknown role")
    _say(f"Tensors: {' + '.join(parts)} = {sum(sums.stage_bytes)} in {len(sums.stage_bytes)} stages")


def _some(tensors: Sequence[TensorInfo]) -> str:
    more = f" and {len(tensors) - _MAX_NAMED} more" if len(tensors) > _MAX_NAMED else ""
    return ", ".join(tensor.name for tensor in tensors[:_MAX_NAMED]) + more


def _say_verified(manifests: Sequence[Manifest], output_dir: Path) -> None:
    num_bytes = sum(record.num_bytes for each in manifests for record in each.files.values())
    num_files = sum(len(each.files) for each in manifests)
    amount = f"{num_files} files, {describe_bytes(num_bytes)}"
    _say(f"{output_dir}: {amount}, all as exported (export {manifests[0].export_id})")
