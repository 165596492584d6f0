"""Output that may fail: a closed terminal, a pipe whose reader has gone, a full disk.

For processes that serve: they go on without their output. A command whose product is its output must fail instead.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO, cast

__all__ = ["keep_writing"]


class _Tolerant:
    """A stream that ignores a failure to write, and tries again with the next text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def keep_writing() -> None:
    """From here on this process goes on when its stdout or stderr cannot be written.

    Opens descriptors that were closed at its start on /dev/null: the next file to be opened would get their numbers.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # The interpreter flushes the originals at its end too, and exits with 120 if that fails.
    sys.stdout = sys.__stdout__ = _tolerant(sys.stdout)  # type: ignore[assignment,misc]
    sys.stderr = sys.__stderr__ = _tolerant(sys.stderr)  # type: ignore[assignment,misc]


def _tolerant(stream: TextIO | None) -> TextIO:
    if isinstance(stream, _Tolerant):
        return cast(TextIO, stream)
    return cast(TextIO, _Tolerant(stream or open(os.devnull, "w")))
