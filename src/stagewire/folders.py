"""Private folders for the sockets between processes of one run, with paths that are short enough for sockets.

A Unix socket's path has at most 107 bytes. TMPDIR may be longer than that alone, and vLLM adds a name of 36 characters.
Every folder for sockets is made here.

A process that is killed leaves its folder behind, and the next process that makes a folder there removes it. A folder
belongs to the process that holds the lock on the file `owner` in it. The kernel releases the lock with the last process
that has the file open.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from stagewire.errors import ConfigError

__all__ = ["MAX_SOCKET_PATH_BYTES", "fits_sockets", "private_folder", "remove_abandoned", "short_base"]

# What the kernel takes for a Unix socket's path (sun_path, without its closing zero).
MAX_SOCKET_PATH_BYTES = 107
# The longest name of a socket in a private folder: vLLM's, a uuid behind a slash.
SOCKET_NAME_BYTES = 37
# Of the private folder's own name, with room.
FOLDER_NAME_BYTES = 32
PREFIX = "stagewire-"
OWNER = "owner"


def fits_sockets(folder: str | Path) -> bool:
    """Whether every socket of a run can be made right in this folder."""
    return len(os.fsencode(folder)) + SOCKET_NAME_BYTES <= MAX_SOCKET_PATH_BYTES


def short_base(environ: Mapping[str, str] = os.environ) -> str:
    """Where private folders are made: the temporary folder, or the first place that is short enough and writable.

    Raises:
        ConfigError: there is none.
    """
    places = _places(environ)
    for place in places:
        if fits_sockets(f"{place}/{'x' * FOLDER_NAME_BYTES}") and os.access(place, os.W_OK | os.X_OK):
            return place
    raise ConfigError(
        f"there is no folder for the sockets of this run: {', '.join(places)} are not writable, or their names are too "
        "long for a socket; set TMPDIR to a writable folder with a short name"
    )


def _places(environ: Mapping[str, str]) -> list[str]:
    own = [environ.get("TMPDIR"), "/tmp", environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.geteuid()}"]
    return list(dict.fromkeys(place for place in (*own, "/var/tmp", "/dev/shm") if place and os.path.isabs(place)))


@contextmanager
def private_folder() -> Iterator[str]:
    """A folder of this user only, removed at the end. Also removes those at the same place that nobody owns."""
    base = short_base()
    remove_abandoned(base)
    path, lock = _make_owned(base)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make_owned(base: str) -> tuple[str, int]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX, dir=base)
        lock = os.open(f"{path}/{OWNER}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if _lock(lock) is not False and os.fstat(lock).st_nlink:
            return path, lock
        os.close(lock)  # another process has taken it for abandoned, and removes it


def remove_abandoned(base: str | None = None) -> None:
    """Removes this user's private folders at this place whose owner has ended, as far as that is possible.

    Never removes one without a lock file: it may not be ours.
    """
    base = short_base() if base is None else base
    for path in glob.iglob(f"{glob.escape(base)}/{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = _open_lock(path)
            try:
                if _lock(lock):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _open_lock(path: str) -> int:
    """Raises OSError unless this is a folder of this user alone, with a lock file of his."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock = os.open(OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        for found in (os.fstat(folder), os.fstat(lock)):
            if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                os.close(lock)
                raise PermissionError(path)
    finally:
        os.close(folder)
    return lock


def _lock(lock: int) -> bool | None:
    """Whether it is ours now; None on a file system without locks, where nobody can know."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
