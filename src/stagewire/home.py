"""Completes the environment of a process that has no home it can write to.

Containers run as users without an entry in passwd, on read-only file systems. Without HOME, libraries make a folder
called "~" in the current one. If the home cannot be written, they fail at the first file.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from stagewire.errors import ConfigError
from stagewire.folders import short_base

__all__ = ["complete_environment", "own_home"]

# Folders to which libraries write when a model runs. HF_HOME stays: it has the models and may be read-only on purpose.
CACHES = ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "HF_MODULES_CACHE", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")
_USER_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # as getpass asks for them


def complete_environment(environ: Mapping[str, str], make_home: Callable[[], str]) -> dict[str, str]:
    """The variables to add for a user's name, a home and a temporary folder; empty if nothing is missing.

    ``make_home``: makes a writable folder of this user's own. Called only if it is needed.
    """
    home, added = _home(environ), {}
    if home is None:
        added["HOME"] = make_home()
    elif not _can_write(environ.get("XDG_CACHE_HOME") or f"{home}/.cache"):
        added |= {name: f"{make_home()}/{name.lower()}" for name in CACHES if name not in environ}
    if not any(environ.get(name) for name in _USER_NAMES) and _passwd_home() is None:
        added["USER"] = f"uid{os.geteuid()}"
    if not any(_can_write(place) for place in _temporary_places(environ)):
        added["TMPDIR"] = short_base(environ)
    return added


def own_home() -> str:
    """A folder of this user's own that stays from one start to the next. It is made if it is not there.

    Raises:
        ConfigError: no place is writable, or another user made a folder of that name.
    """
    path = f"{short_base()}/stagewire-home-{os.geteuid()}"
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be made ({error.strerror}): set HOME to a folder that can be written"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{path} is not a folder of this user alone: remove it, or set HOME to one that can be written"
        )
    return path


def _home(environ: Mapping[str, str]) -> str | None:
    return environ.get("HOME") or _passwd_home()


def _passwd_home() -> str | None:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


def _temporary_places(environ: Mapping[str, str]) -> list[str]:
    """The places where Python's tempfile looks."""
    own = [environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    return [place for place in (*own, "/tmp", "/var/tmp", "/usr/tmp", os.getcwd()) if place and os.path.isdir(place)]


def _can_write(place: str) -> bool:
    """Whether the folder is writable or can be made."""
    path = Path(place)
    nearest = next((each for each in (path, *path.parents) if each.exists()), path)
    return os.access(nearest, os.W_OK | os.X_OK)
