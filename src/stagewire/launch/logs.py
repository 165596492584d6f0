"""The folder of the stages' logs, which one running launcher has to itself.

The launcher holds the kernel's lock (flock) on a file in the folder. The lock ends with the launcher, however that
ends. A launcher that finds its folder taken uses one beside it: both pipelines were started on purpose.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stagewire.errors import ConfigError

__all__ = ["LogFolder"]

LOCK_NAME = "launcher.lock"


class LogFolder:
    """``path``: the folder. ``note``: why it is another than was asked for, empty otherwise."""

    def __init__(self, path: Path, lock: IO[bytes], note: str) -> None:
        self.path = path
        self.note = note
        self._lock = lock

    def __repr__(self) -> str:
        return f"LogFolder({str(self.path)!r})"

    @classmethod
    def claim(cls, wanted: Path) -> LogFolder:
        """Takes the folder, or the first free one of its name: makes it, and removes the logs of an earlier launcher.

        Raises:
            ConfigError: nothing can be written there.
        """
        note = ""
        for number in itertools.count(1):
            path = wanted if number == 1 else wanted.with_name(f"{wanted.name}_{number}")
            lock = _try_lock(path)
            if lock is not None:
                folder = cls(path, lock, note)
                folder._remove_old()
                return folder
            note = note or f"{wanted} belongs to the launcher that runs as process {_holder(path)}"
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Lets the next launcher have it."""
        self._lock.close()

    def open_log(self, name: str) -> IO[bytes]:
        """To append to. A folder that is gone is made again; where that fails too, the log goes to /dev/null."""
        for _ in range(2):
            with contextlib.suppress(OSError):
                return (self.path / name).open("ab")
            with contextlib.suppress(OSError):
                self.path.mkdir(parents=True, exist_ok=True)
        return open(os.devnull, "ab")

    def _remove_old(self) -> None:
        try:
            for old in self._stage_logs():
                old.unlink()
        except OSError as error:
            raise ConfigError(f"--log-dir {self.path}: {error}") from error

    def _stage_logs(self) -> Iterator[Path]:
        for path in self.path.glob("stage_*.log"):
            if path.stem.removeprefix("stage_").removesuffix("_standby").isdecimal():
                yield path


def _try_lock(path: Path) -> IO[bytes] | None:
    """None: a living launcher has it.

    Raises:
        ConfigError: the folder cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK_NAME).open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(f"--log-dir {path}: {error}; give --log-dir a folder that can be written") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError:
        pass  # a file system without locks: nobody can know of another launcher
    with contextlib.suppress(OSError):  # a full disk
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n".encode())
    return lock


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return (path / LOCK_NAME).read_text().strip() or "?"
    return "?"
