"""Makes private folders for the sockets between processes of one run, with paths that are short enough for sockets.

A Unix socket's path has at most 107 bytes. TMPDIR alone may be longer, and vLLM adds a name of 36 characters. Every
folder for sockets is made here.

A process that is killed leaves its folder behind, and the next process that makes a folder there removes it. A folder
belongs to the process that holds the lock on the file `owner` in it. The kernel releases the lock when the last process
that has the file open ends.
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

# The kernel's limit for a Unix socket's path (sun_path, without its closing zero).
MAX_SOCKET_PATH_BYTES = 107
# The longest name of a socket in a private folder: vLLM's, which is a slash and a uuid.
SOCKET_NAME_BYTES = 37
# Room for the private folder's own name.
FOLDER_NAME_BYTES = 32
PREFIX = "stagewire-"
OWNER = "owner"


def fits_sockets(folder: str | Path) -> bool:
    """Whether every socket of a run can be made directly in this folder."""
    return len(os.fsencode(folder)) + SOCKET_NAME_BYTES <= MAX_SOCKET_PATH_BYTES


def short_base(environ: Mapping[str, str] = os.environ) -> str:
    """The folder in which private folders are made: the first place whose path is short and that is writable.

    TMPDIR comes first.

    Raises:
        ConfigError: there is no such place.
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
    """A folder for this user only, removed at the end. Also removes abandoned folders at the same place."""
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
        os.close(lock)  # another process took it for abandoned before it was locked, and removes it


def remove_abandoned(base: str | None = None) -> None:
    """Removes this user's private folders at this place whose owner has ended, as far as possible.

    Never removes a folder without a lock file, because it may not be ours.
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
    """Opens the lock file. Raises OSError unless folder and lock file belong to this user alone."""
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
    """Whether this process has the lock now; None on a file system without locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
