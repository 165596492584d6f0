"""Keys, addresses and folders: what is let in, what is refused, and in which words."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from stagewire.cli import main
from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange
from stagewire.ring.transport.security import (
    OPEN,
    Reach,
    RingKey,
    Security,
    make_key_file,
    read_key_file,
    runtime_folder,
    secure,
    secure_stage,
)

KEY = RingKey(bytes(32), bytes(32))


def config(bind: str | None, predecessor: str, **changes: Any) -> StageConfig:
    return StageConfig(1, 4, LayerRange(8, 16), 15550, Address(predecessor, 15550), bind, **changes)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    make_key_file(tmp_path / "ring.key")
    return tmp_path / "ring.key"


class TestKeyFile:
    def test_a_made_key_is_read_again_and_like_no_other(self, key_file: Path, tmp_path: Path) -> None:
        make_key_file(tmp_path / "other.key")
        one, other = read_key_file(key_file), read_key_file(tmp_path / "other.key")
        assert one == read_key_file(key_file)
        assert len({one.listener, one.caller, other.listener, other.caller}) == 4
        assert {len(one.listener), len(one.caller)} == {32}

    def test_nobody_else_can_read_it(self, key_file: Path) -> None:
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644, 0o777, 0o610])
    def test_a_file_that_others_can_use_is_refused(self, key_file: Path, mode: int) -> None:
        key_file.chmod(mode)
        with pytest.raises(ConfigError, match=f"has mode {mode:04o}.*chmod 600 {key_file}"):
            read_key_file(key_file)

    @pytest.mark.parametrize("mode", [0o600, 0o400])
    def test_a_file_of_ones_own_is_taken(self, key_file: Path, mode: int) -> None:
        key_file.chmod(mode)
        read_key_file(key_file)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_somebody_elses_file_is_refused(self, key_file: Path) -> None:
        os.chown(key_file, 12345, -1)
        with pytest.raises(ConfigError, match=r"belongs to user 12345.*chmod 600"):
            read_key_file(key_file)

    def test_what_is_no_file_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo", 0o600)
        for name, words in (("missing", "No such file"), ("fifo", "is not a file"), (".", "is not a file")):
            with pytest.raises(ConfigError, match=words):
                read_key_file(tmp_path / name)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "# only words\n",
            "stagewire-key-1 " + "0" * 64,
            "stagewire-key-2 " + "0" * 64 + " " + "0" * 64,
            "stagewire-key-1 " + "0" * 64 + " " + "0" * 63,
            "stagewire-key-1 " + "0" * 64 + " " + "g" * 64,
            ("stagewire-key-1 " + "0" * 64 + " " + "0" * 64 + "\n") * 2,
            "\x00\xff" * 10_000,
        ],
    )
    def test_a_file_without_a_key_is_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "ring.key"
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="holds no key of a ring"):
            read_key_file(path)

    def test_a_key_is_never_printed(self, key_file: Path) -> None:
        key = read_key_file(key_file)
        assert key.listener.hex() not in repr(Security(key))
        assert str(key.listener) not in repr(Security(key))

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "new.key"
        assert main(["keys", str(path)]) == 0
        key = read_key_file(path)
        assert f"--pipeline-key-file {path}" in (said := capsys.readouterr().out)
        assert key.caller.hex() not in said
        assert main(["keys", str(path)]) == 2
        assert "exists" in capsys.readouterr().err
        assert read_key_file(path) == key
        assert main(["keys", str(tmp_path / "no" / "folder")]) == 2


@pytest.mark.parametrize(
    ("host", "reach"),
    [
        ("127.0.0.1", Reach.LOOPBACK),
        ("127.8.9.10", Reach.LOOPBACK),
        ("::1", Reach.LOOPBACK),
        ("::ffff:127.0.0.1", Reach.LOOPBACK),
        ("10.0.0.1", Reach.PRIVATE),
        ("172.16.0.1", Reach.PRIVATE),
        ("172.31.255.255", Reach.PRIVATE),
        ("192.168.1.10", Reach.PRIVATE),
        ("100.64.0.1", Reach.PRIVATE),
        ("100.127.255.254", Reach.PRIVATE),
        ("169.254.3.4", Reach.PRIVATE),
        ("fe80::1", Reach.PRIVATE),
        ("fe80::1%eth0", Reach.PRIVATE),
        ("fd12:3456::1", Reach.PRIVATE),
        ("::ffff:10.1.2.3", Reach.PRIVATE),
        ("172.32.0.1", Reach.PUBLIC),
        ("172.15.255.255", Reach.PUBLIC),
        ("100.63.255.255", Reach.PUBLIC),
        ("100.128.0.0", Reach.PUBLIC),
        ("192.169.0.1", Reach.PUBLIC),
        ("11.0.0.1", Reach.PUBLIC),
        ("8.8.8.8", Reach.PUBLIC),
        ("198.18.0.1", Reach.PUBLIC),
        ("203.0.113.5", Reach.PUBLIC),
        ("2001:db8::1", Reach.PUBLIC),
        ("2606:4700::1", Reach.PUBLIC),
        ("::ffff:8.8.8.8", Reach.PUBLIC),
        ("64:ff9b::8.8.8.8", Reach.PUBLIC),
        ("0.0.0.0", Reach.PUBLIC),
        ("::", Reach.PUBLIC),
    ],
)
def test_who_can_reach_an_address(host: str, reach: Reach) -> None:
    assert Reach.of(host) is reach


class TestRules:
    @pytest.mark.parametrize(
        ("bind", "predecessor"),
        [("8.8.8.8", "127.0.0.1"), ("127.0.0.1", "8.8.8.8"), ("0.0.0.0", "10.0.0.1"), ("::", "::1")],
    )
    def test_other_networks_need_a_key(self, bind: str, predecessor: str, key_file: Path) -> None:
        with pytest.raises(ConfigError, match=r"stage 1: .*--pipeline-key-file.*--pipeline-allow-insecure"):
            secure_stage(config(bind, predecessor))
        secured = secure_stage(config(bind, predecessor, key_file=str(key_file)))
        assert secured.security.key == read_key_file(key_file)
        assert not secured.warnings

    def test_other_networks_by_permission(self) -> None:
        secured = secure_stage(config("8.8.8.8", "127.0.0.1", allow_insecure=True))
        assert len(secured.warnings) == 1
        assert "NOT PROTECTED: connections at 8.8.8.8" in secured.warnings[0]

    def test_private_networks_are_warned_of(self) -> None:
        secured = secure_stage(config("192.168.1.11", "192.168.1.10"))
        assert secured.host == "192.168.1.11"
        assert secured.security.key is None
        assert [warning.split()[4] for warning in secured.warnings] == ["192.168.1.11", "192.168.1.10"]
        assert all("--pipeline-key-file" in warning for warning in secured.warnings)

    def test_loopback_needs_nothing(self) -> None:
        secured = secure_stage(config(None, "localhost"))
        assert secured.host == "127.0.0.1"
        assert secured.security.socket_path(secured.host, 15550)
        assert not secured.warnings

    def test_a_key_goes_before_local_sockets(self, socket_folder: Path) -> None:
        assert not Security.of_folder(socket_folder, KEY).has_local_sockets
        assert not OPEN.has_local_sockets

    def test_a_name_that_comes_up_later(self) -> None:
        secured = secure_stage(config("127.0.0.1", "no-such-host.invalid"))
        assert secured.host == "127.0.0.1"
        with pytest.raises(ConfigError, match=r"--pipeline-local-bind-host no-such-host\.invalid"):
            secure_stage(config("no-such-host.invalid", "127.0.0.1"))

    def test_one_socket_for_each_host_and_port(self, socket_folder: Path) -> None:
        security = Security.of_folder(socket_folder)
        places = [("127.0.0.1", 1), ("127.0.0.1", 2), ("127.0.0.2", 1), ("::1", 1)]
        assert len({security.socket_path(host, port) for host, port in places}) == 4
        assert security.socket_path("::ffff:127.0.0.1", 1) == security.socket_path("127.0.0.1", 1)
        assert security.is_local("127.9.9.9")
        assert not security.is_local("10.0.0.1")

    def test_no_folder_no_loopback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: object) -> Path:
            raise ConfigError("no folder")

        monkeypatch.setattr("stagewire.ring.transport.security.runtime_folder", fail)
        with pytest.raises(ConfigError, match="no folder"):
            secure(config(None, "127.0.0.1"), ["127.0.0.1"])
        security = secure(config(None, "10.0.0.1"), ["10.0.0.1"])
        assert security.problem("127.0.0.1")
        assert not security.problem("10.0.0.1")


class TestFolder:
    @pytest.fixture
    def tmp_path(self, socket_folder: Path) -> Path:
        """Short: pytest's own is longer than a folder of sockets may be."""
        return socket_folder

    def make(self, tmp_path: Path, environ: dict[str, str] | None = None) -> Path:
        (tmp_path / "tmp").mkdir(exist_ok=True)
        return runtime_folder(environ or {}, os.geteuid(), tmp_path / "run", tmp_path / "tmp")

    def test_where_it_is(self, tmp_path: Path) -> None:
        uid = os.geteuid()
        assert self.make(tmp_path) == tmp_path / "tmp" / f"stagewire-{uid}"
        (tmp_path / "run" / str(uid)).mkdir(parents=True, mode=0o700)
        assert self.make(tmp_path) == tmp_path / "run" / str(uid) / "stagewire"
        (tmp_path / "xdg").mkdir(mode=0o700)
        assert self.make(tmp_path, {"XDG_RUNTIME_DIR": str(tmp_path / "xdg")}) == tmp_path / "xdg" / "stagewire"

    def test_where_nothing_but_shared_memory_can_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "shm").mkdir()
        monkeypatch.setattr(os, "access", lambda path, _: Path(path) == tmp_path / "shm")
        places = (tmp_path / "run", tmp_path / "tmp", tmp_path / "shm")
        assert runtime_folder({}, os.geteuid(), *places) == tmp_path / "shm" / f"stagewire-{os.geteuid()}"

    def test_one_with_a_long_name_is_passed_over(self, tmp_path: Path) -> None:
        """Every process of the user passes it over alike."""
        (tmp_path / ("x" * 60)).mkdir(mode=0o700)
        found = self.make(tmp_path, {"XDG_RUNTIME_DIR": str(tmp_path / ("x" * 60))})
        assert found == tmp_path / "tmp" / f"stagewire-{os.geteuid()}"

    @pytest.mark.parametrize("host", ["127.0.0.1", "fd00:1111:2222:3333:4444:5555:6666:7777"])
    @pytest.mark.parametrize("length", [10, 40, 60])
    def test_every_socket_can_be_bound_there(self, socket_folder: Path, host: str, length: int) -> None:
        base = Path(str(socket_folder) + "/" + "x" * (length - len(str(socket_folder)) - 1))
        base.mkdir(mode=0o700, exist_ok=True)
        security = Security(find_folder=lambda: runtime_folder({"XDG_RUNTIME_DIR": str(base)}, os.geteuid()))
        path = security.socket_path(host, 65535)
        assert path == security.socket_path(host, 65535)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
        os.unlink(path)

    def test_it_is_made_anew(self, socket_folder: Path) -> None:
        security = Security.of_folder(socket_folder / "s")
        path = Path(security.socket_path("127.0.0.1", 1))
        path.parent.rmdir()
        assert security.socket_path("127.0.0.1", 1) == str(path)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    def test_sockets_of_one_port_under_other_addresses(self, socket_folder: Path) -> None:
        security = Security.of_folder(socket_folder)
        for host, port in (("127.0.0.1", 1), ("::1", 1), ("10.0.0.1", 1), ("127.0.0.1", 11)):
            Path(security.socket_path(host, port)).touch()
        assert sorted(security.other_paths("127.0.0.1", 1).values()) == ["10.0.0.1", "::1"]

    def test_it_is_made_once_and_for_one_user(self, tmp_path: Path) -> None:
        assert self.make(tmp_path) == self.make(tmp_path)
        assert stat.S_IMODE(self.make(tmp_path).stat().st_mode) == 0o700

    def test_tmpdir_is_of_no_account(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = runtime_folder({}, os.geteuid())
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        assert runtime_folder(os.environ, os.geteuid()) == before

    @pytest.mark.parametrize("mode", [0o755, 0o701, 0o770, 0o777, 0o1777])
    def test_one_that_others_can_use_is_refused(self, tmp_path: Path, mode: int) -> None:
        self.make(tmp_path).chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
            self.make(tmp_path)

    def test_a_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "tmp").mkdir()
        (tmp_path / "else").mkdir(mode=0o700)
        (tmp_path / "tmp" / f"stagewire-{os.geteuid()}").symlink_to(tmp_path / "else")
        with pytest.raises(ConfigError, match="only user"):
            self.make(tmp_path)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
    def test_somebody_elses(self, tmp_path: Path) -> None:
        """A runtime folder of another user (sudo keeps the variable) is passed over; a folder in /tmp is refused."""
        (tmp_path / "xdg").mkdir(mode=0o700)
        os.chown(tmp_path / "xdg", 12345, -1)
        found = self.make(tmp_path, {"XDG_RUNTIME_DIR": str(tmp_path / "xdg")})
        assert found == tmp_path / "tmp" / "stagewire-0"
        os.chown(found, 12345, -1)
        with pytest.raises(ConfigError, match="of user 12345"):
            self.make(tmp_path)
