"""Private folders for the sockets between processes of one run, with paths that are short enough for sockets.

A Unix socket's path has at most 107 bytes. TMPDIR may be longer than that alone, and vLLM puts a name of 36
characters on top. Whoever makes a folder for sockets asks here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from stagewire.errors import ConfigError

__all__ = ["MAX_SOCKET_PATH_BYTES", "fits_sockets", "private_folder", "short_base"]

# What the kernel takes for a Unix socket's path (sun_path, without its closing zero).
MAX_SOCKET_PATH_BYTES = 107
# The longest name of a socket in a private folder: vLLM's, a uuid behind a slash.
SOCKET_NAME_BYTES = 37
# Of the private folder's own name, with room.
FOLDER_NAME_BYTES = 32
PREFIX = "stagewire-"


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
    """A folder of this user only, which is removed at the end."""
    path = tempfile.mkdtemp(prefix=PREFIX, dir=short_base())
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
