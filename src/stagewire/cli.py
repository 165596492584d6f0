"""The `stagewire` command. Each subcommand imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from stagewire import __version__
from stagewire.commands import export, front, keys, plan, status
from stagewire.errors import StagewireError
from stagewire.launch import up
from stagewire.observe.signals import Interrupted, stop_signals_interrupt
from stagewire.observe.streams import keep_writing

__all__ = ["main"]


def _run_up(args: argparse.Namespace, extra: Sequence[str]) -> int:
    return up.run(args, extra)


def _run_front(args: argparse.Namespace, extra: Sequence[str]) -> int:
    return front.run(args, extra)


def _run_status(args: argparse.Namespace, extra: Sequence[str]) -> int:
    return status.run(args)


def _run_demo_model(args: argparse.Namespace, extra: Sequence[str]) -> int:
    from stagewire.launch.demo_model import is_made, make_demo_model

    if not is_made(args.dir):
        print(f"{args.dir}: fetching and converting SmolLM2-135M-Instruct, once", flush=True)  # noqa: T201
        make_demo_model(args.dir)
    return 0


def _run_export(args: argparse.Namespace, extra: Sequence[str]) -> int:
    return export.run(args)


def _run_keys(args: argparse.Namespace, extra: Sequence[str]) -> int:
    return keys.run(args)


def _run_plan(args: argparse.Namespace, extra: Sequence[str]) -> int:
    return plan.run(args, details=True)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagewire",
        description="Pipeline parallelism between independent `vllm serve` processes.",
        allow_abbrev=False,
    )
    parser.set_defaults(serves=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up_parser = commands.add_parser(
        "up",
        help="start, watch and stop all stages of a pipeline on this machine",
        usage="%(prog)s (--model PATH | --pipeline-dir PATH) [options] [-- VLLM_ARGUMENTS]",
        epilog=up.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    up.add_arguments(up_parser)
    up_parser.set_defaults(run=_run_up, takes_extra=True, serves=True)

    front_parser = commands.add_parser(
        "front",
        help="a pipeline behind one public HTTP port, with the status of every stage",
        usage=front.USAGE,
        epilog=front.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    front.add_arguments(front_parser)
    front_parser.set_defaults(run=_run_front, takes_extra=True, serves=True)

    status_parser = commands.add_parser("status", help="how each stage of a running pipeline is", allow_abbrev=False)
    status.add_arguments(status_parser)
    status_parser.set_defaults(run=_run_status, takes_extra=False)

    plan_parser = commands.add_parser(
        "plan",
        help="check or calculate which layers each stage gets, before anything is started",
        epilog=plan.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan.add_arguments(plan_parser)
    plan_parser.set_defaults(run=_run_plan, takes_extra=False)

    export_parser = commands.add_parser(
        "export", help="cut a checkpoint into one folder for each stage", allow_abbrev=False
    )
    export.add_arguments(export_parser)
    export_parser.set_defaults(run=_run_export, takes_extra=False)

    keys_parser = commands.add_parser(
        "keys", help="make the key that protects a ring between hosts", allow_abbrev=False
    )
    keys.add_arguments(keys_parser)
    keys_parser.set_defaults(run=_run_keys, takes_extra=False)

    demo = commands.add_parser("demo-model", help="make a small real model to try things with", allow_abbrev=False)
    demo.add_argument("dir", nargs="?", type=Path, default=Path(".demo/model"), help="default: %(default)s")
    demo.set_defaults(run=_run_demo_model, takes_extra=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; a StagewireError becomes one message on stderr and its exit code.

    Args:
        argv: by default this process's own; a process that serves then outlives whoever reads its output.
    """
    own = list(sys.argv[1:] if argv is None else argv)
    extra: list[str] = []
    if "--" in own:
        cut = own.index("--")
        own, extra = own[:cut], own[cut + 1 :]
    parser = _make_parser()
    args = parser.parse_args(own)
    if extra and not args.takes_extra:
        parser.error(f"unrecognized arguments: -- {' '.join(extra)}")
    if args.serves and argv is None:
        keep_writing()
    try:
        with stop_signals_interrupt():
            code: int = args.run(args, extra)
    except StagewireError as error:
        print(f"stagewire: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
        print(f"stagewire: stopped by {number.name}", file=sys.stderr)  # noqa: T201
        return 128 + number
    return code
