"""The `stagewire` command, which can be told to stop from its first line on, also while it imports the rest."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]


def main() -> int:
    """`stagewire.cli.main`, which takes signals in its own way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    from stagewire.cli import main as run

    return run()


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"stagewire: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
