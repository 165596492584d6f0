"""Folders for sockets: private, gone at the end, and short whatever the environment says."""

from __future__ import annotations

import os
import socket
import stat
import uuid
from pathlib import Path

import pytest

from stagewire.errors import ConfigError
from stagewire.folders import fits_sockets, private_folder, short_base


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
