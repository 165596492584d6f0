"""Users without a passwd entry, a home or a folder to write: what the environment gets, and what is left alone."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

import pytest

from stagewire import home
from stagewire.errors import ConfigError
from stagewire.home import CACHES, complete_environment, own_home

GIVEN = "/given"


@pytest.fixture
def is_known(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Whether passwd has this user, whose home is there then."""

    def getpwuid(uid: int) -> pwd.struct_passwd:
        if not request.param:
            raise KeyError(uid)
        return pwd.struct_passwd(("me", "x", uid, uid, "", "/home/me", "/bin/sh"))

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    return bool(request.param)


# Folders that can be written, the environment, and what is added to it.
CASES = [
    (True, ["/home/me", "/tmp"], {}, {}),
    (True, ["/home/me", "/tmp"], {"HOME": "/home/me", "USER": "me"}, {}),
    (False, ["/tmp"], {}, {"HOME": GIVEN, "USER": f"uid{os.geteuid()}"}),
    (False, ["/work", "/tmp"], {"HOME": "/work"}, {"USER": f"uid{os.geteuid()}"}),
    (False, ["/work", "/tmp"], {"HOME": "/work", "LOGNAME": "x"}, {}),
    (True, ["/tmp"], {}, {name: f"{GIVEN}/{name.lower()}" for name in CACHES}),
    (True, ["/tmp"], dict.fromkeys(CACHES, "/own"), {}),
    (True, ["/tmp", "/cache"], {"XDG_CACHE_HOME": "/cache"}, {}),
    (True, ["/home/me", "/dev/shm"], {}, {"TMPDIR": "/dev/shm"}),
    (True, ["/home/me", "/scratch"], {"TMPDIR": "/scratch"}, {}),
    (
        False,
        ["/dev/shm"],
        {},
        {"HOME": GIVEN, "USER": f"uid{os.geteuid()}", "TMPDIR": "/dev/shm"},
    ),
]


@pytest.mark.parametrize(("is_known", "writable", "environ", "expected"), CASES, indirect=["is_known"])
def test_what_is_missing(
    is_known: bool,
    writable: list[str],
    environ: Mapping[str, str],
    expected: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(home, "_can_write", lambda place: any(Path(place).is_relative_to(each) for each in writable))
    monkeypatch.setattr(home, "short_base", lambda _: "/dev/shm")
    monkeypatch.setattr(os.path, "isdir", lambda _: True)
    monkeypatch.setattr(os, "getcwd", lambda: "/")
    assert complete_environment(environ, lambda: GIVEN) == expected


def test_a_home_that_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "short_base", lambda: str(tmp_path))
    path = Path(own_home())
    assert path.stat().st_mode & 0o777 == 0o700
    (path / "kept").touch()
    assert own_home() == str(path)
    assert (path / "kept").exists()


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_a_home_that_is_somebody_elses(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "short_base", lambda: str(tmp_path))
    path = tmp_path / f"stagewire-home-{os.geteuid()}"
    if kind == "open to others":
        path.mkdir()
        path.chmod(0o755)
    elif kind == "a link":
        (tmp_path / "other").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "other")
    else:
        path.touch()
    with pytest.raises(ConfigError, match="set HOME to"):
        own_home()
