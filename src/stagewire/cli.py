"""The `stagewire` command: a table of subcommands, each of which is a module of its name in commands/."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stagewire import __version__
from stagewire.commands import demo_model, export, front, keys, plan, status, up
from stagewire.errors import StagewireError
from stagewire.observe.signals import Interrupted, stop_signals_interrupt
from stagewire.observe.streams import keep_writing

__all__ = ["main"]


class _Module(Protocol):
    """A subcommand. Each imports what is slow to import only when it runs, so that --help is quick."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


@dataclass(frozen=True)
class _Command:
    """``serves``: it runs until it is told to stop, and outlives whoever reads its output."""

    module: _Module
    help: str
    serves: bool = False


_COMMANDS = {
    "up": _Command(up, "start, watch and stop all stages of a pipeline on this machine", serves=True),
    "front": _Command(front, "a pipeline behind one public HTTP port, with the status of every stage", serves=True),
    "status": _Command(status, "how each stage of a running pipeline is"),
    "plan": _Command(plan, "check or calculate which layers each stage gets, before anything is started"),
    "export": _Command(export, "cut a checkpoint into one folder for each stage"),
    "keys": _Command(keys, "make the key that protects a ring between hosts"),
    "demo-model": _Command(demo_model, "make a small real model to try things with"),
}


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagewire",
        description="Pipeline parallelism between independent `vllm serve` processes.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        own = subparsers.add_parser(
            name, help=command.help, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.module.add_arguments(own)
        own.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; a StagewireError becomes one message on stderr and its exit code.

    Args:
        argv: by default this process's own; a process that serves then outlives whoever reads its output.
    """
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    command: _Command = args.command
    if command.serves and argv is None:
        keep_writing()
    try:
        with stop_signals_interrupt():
            return command.module.run(args)
    except StagewireError as error:
        print(f"stagewire: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
        print(f"stagewire: stopped by {number.name}", file=sys.stderr)  # noqa: T201
        return 128 + number


def _parse(words: list[str]) -> argparse.Namespace:
    """What follows `--` becomes ``vllm_arguments`` of the subcommands that have that."""
    cut = words.index("--") if "--" in words else len(words)
    parser = _make_parser()
    args = parser.parse_args(words[:cut])
    if extra := words[cut + 1 :]:
        if "vllm_arguments" not in args:
            parser.error(f"unrecognized arguments: -- {' '.join(extra)}")
        args.vllm_arguments = extra
    return args
