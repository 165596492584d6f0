"""`stagewire plan`, and tools/offline_pipelining/validate_layer_ranges.py: which layers each stage gets, and what then.

Standard library only, so that the tool runs from a bare clone, on a machine without vLLM or a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from stagewire.checkpoint.split_choice import choose
from stagewire.commands.plan_text import describe, describe_details, to_json
from stagewire.commands.split_question import add_choice_arguments, add_load_arguments, read_question, warn
from stagewire.errors import ConfigError, StagewireError

__all__ = ["add_arguments", "main", "run"]

EPILOG = """\
Without --memory and --balance the split is vLLM's own, which is what `stagewire up` starts.

Exit codes: 0 the split is valid; 1 it does not fit the model or the memory; 2 the question is malformed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--model", metavar="PATH", help="folder with config.json; with the weights too for the figures of each stage")
    add("--total-layers", type=int, metavar="N", help="number of layers, instead of a model")
    add("--num-stages", type=int, metavar="N", help="number of stages to split the model over")
    add("--ranges", nargs="+", metavar="START-END", help="each stage's layers to check, END not included")
    add("--json", action="store_true", help="everything as JSON")
    add("--details", action="store_true", help="weights and KV cache of each stage, from the checkpoint's headers")
    add_choice_arguments(parser)
    add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the answer, with the figures of each stage wherever there are weights.

    Returns 0 when the split is valid, 1 when it does not fit.

    Raises:
        ConfigError: a malformed question. With --json that is printed too, and 2 returned.
    """
    return _answer(args, has_details=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The tool: as `stagewire plan`, with details only when they are asked for."""
    parser = argparse.ArgumentParser(
        prog="validate_layer_ranges.py",
        description="Check which layers each stage of a pipeline gets, or calculate them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    try:
        return _answer(parser.parse_args(argv), has_details=False)
    except StagewireError as error:
        print(f"validate_layer_ranges.py: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code


def _answer(args: argparse.Namespace, *, has_details: bool) -> int:
    try:
        asked = read_question(args, has_details=has_details)
    except ConfigError as error:
        if not args.json:
            raise
        _say(json.dumps({"valid": False, "error": str(error)}, indent=2))
        return error.exit_code
    answer = choose(asked.question)
    warn(asked.source.warnings)
    if args.json:
        _say(to_json(asked.source, asked.question, answer))
    else:
        _say(describe(asked.source, asked.question, answer))
        if figures := describe_details(asked.source, asked.question, answer):
            _say(f"\n{figures}")
    return 0 if answer.is_valid else 1


def _say(text: str) -> None:
    """Replaces the check mark where the terminal's encoding has none."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(f"{text}\n".encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
