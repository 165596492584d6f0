"""`stagewire up`: a whole pipeline on this machine, from one command."""

from __future__ import annotations

import argparse
from contextlib import closing
from functools import partial

from stagewire.commands.launching import add_launch_arguments, announce, describe_serving, read_wanted
from stagewire.commands.screen import open_screen
from stagewire.folders import private_folder
from stagewire.launch.decision import decide
from stagewire.launch.loop import run_loop
from stagewire.launch.supervisor import Supervisor

__all__ = ["add_arguments", "run"]

USAGE = "%(prog)s (--model PATH | --pipeline-dir PATH) [options] [-- VLLM_ARGUMENTS]"
EPILOG = """\
Everything after `--` goes to every stage's `vllm serve`, for instance: stagewire up --model DIR -- --dtype float32

Ctrl-C, SIGTERM and the end of the terminal stop every stage in order; told twice, all end at once. Under nohup
or setsid the end of the terminal stops nothing.
Exit codes: 0 stopped while serving; 128 + signal stopped before that; 1, 2 or 3 the code of the stage that
failed (1 an error of a stage or a kill, 2 a setting, 3 another stage or the network)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    add_launch_arguments(parser)
    parser.add_argument("--host", help="address that the API binds; default: vLLM's")
    parser.add_argument("--port", type=int, help="port of the API; default: vLLM's, 8000")


def run(args: argparse.Namespace) -> int:
    """Blocks until the pipeline has stopped; returns the exit code.

    Raises:
        StagewireError: a wrong setting, a stage that failed, a ring that is not ready in time.
    """
    launch = decide(read_wanted(args, args.host, args.port))
    with closing(launch.logs), private_folder() as folder:
        screen = open_screen(launch.specs)
        announce(launch, screen)
        supervisor = Supervisor(launch, screen, folder, partial(describe_serving, launch))
        return run_loop(supervisor.run())
