"""Folders for sockets: private, gone at the end, and short whatever the environment says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stagewire.errors import ConfigError
from stagewire.folders import fits_sockets, private_folder, remove_abandoned, short_base


def test_it_is_private_and_gone_at_the_end() -> None:
    with private_folder() as folder:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        Path(folder, "left over").touch()
    assert not os.path.exists(folder)


@pytest.mark.parametrize("length", [10, 36, 60, 90, 200])
def test_the_longest_socket_can_be_bound_whatever_tmpdir_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    place = tmp_path / ("x" * length)
    place.mkdir()
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(place))
    with private_folder() as folder, socket.socket(socket.AF_UNIX) as sock:
        assert fits_sockets(folder)
        sock.bind(f"{folder}/{uuid.uuid4()}")


def test_a_short_temporary_folder_is_used(socket_folder: Path) -> None:
    assert short_base({"TMPDIR": str(socket_folder)}) == str(socket_folder)
    assert short_base({"TMPDIR": str(socket_folder / "gone"), "XDG_RUNTIME_DIR": "relative"}) == "/tmp"


def test_no_place_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"/tmp, .*TMPDIR"):
        short_base({})


OWNER_PROGRAM = """
from stagewire.folders import private_folder
with private_folder() as folder:
    print(folder, flush=True)
    input()
"""


@pytest.fixture
def place(socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(socket_folder))
    return socket_folder


@contextlib.contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that has a private folder."""
    command = [sys.executable, "-c", OWNER_PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


@pytest.mark.usefixtures("place")
def test_what_a_killed_owner_left_is_removed_and_a_living_ones_is_not() -> None:
    with owner() as (killed, left), owner() as (_, kept), private_folder() as own:
        (left / "some socket").touch()
        killed.kill()
        killed.wait()
        assert left.is_dir()
        with private_folder():
            assert not left.exists()
            assert kept.is_dir()
            assert os.path.isdir(own)


def abandoned(place: Path) -> Path:
    folder = place / "stagewire-abandoned"
    folder.mkdir(mode=0o700)
    (folder / "owner").touch(mode=0o600)
    return folder


def without_a_lock_file(folder: Path) -> None:
    (folder / "owner").unlink()


def open_to_others(folder: Path) -> None:
    folder.chmod(0o770)


def with_a_link_for_a_lock_file(folder: Path) -> None:
    (folder / "owner").rename(folder / "elsewhere")
    (folder / "owner").symlink_to(folder / "elsewhere")


def of_somebody_else(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    os.chown(folder, 65534, 65534)


@pytest.mark.parametrize("make", [without_a_lock_file, open_to_others, with_a_link_for_a_lock_file, of_somebody_else])
def test_what_is_not_known_to_be_ours_stays(place: Path, make: Callable[[Path], None]) -> None:
    folder = abandoned(place)
    make(folder)
    remove_abandoned()
    assert folder.is_dir()


def test_a_link_to_an_abandoned_folder_stays_and_so_does_the_folder(place: Path) -> None:
    folder = abandoned(place).rename(place / "elsewhere")
    (place / "stagewire-link").symlink_to(folder)
    remove_abandoned()
    assert folder.is_dir()


def test_who_is_overtaken_by_somebody_who_tidies_up_gets_another_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a new folder's lock file and its lock."""
    flock, is_first = fcntl.flock, True

    def late(descriptor: int, how: int) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            remove_abandoned()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with private_folder() as folder:
        assert os.path.isdir(folder)
        assert [str(path) for path in place.iterdir()] == [folder]


def test_without_locks_a_folder_is_made_and_none_is_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = abandoned(place)
    with private_folder() as own:
        assert os.path.isdir(own)
        assert folder.is_dir()
