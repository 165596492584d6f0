"""`stagewire keys`: the key that all stages of a ring share, in a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from stagewire.ring.transport.security import make_key_file

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="is made, readable for you only; must not exist yet")


def run(args: argparse.Namespace) -> int:
    """Raises ``ConfigError`` when the file exists or cannot be made."""
    path = args.file.expanduser()
    make_key_file(path)
    print(  # noqa: T201
        f"{path}: a new key. Copy the file to every host of the ring (scp -p keeps its mode, 0600) and give every "
        f"stage --pipeline-key-file {path}"
    )
    return 0
