"""`stagewire front` and `stagewire status` as typed: what is refused before anything starts, and the table."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from stagewire.cli import main
from stagewire.commands import front
from stagewire.commands.status import describe
from stagewire.errors import ConfigError
from stagewire.launch.decision import Wanted
from stagewire.launch.spec import Launch


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--head", "localhost:8001"], "expected http://HOST:PORT"),
            (["--head", "ftp://a:1"], "expected http://HOST:PORT"),
            (["--head", "http://a:99999"], "expected http://HOST:PORT"),
            (["--head", "http://a:1/v1"], "expected http://HOST:PORT"),
            (["--head", "http://user:word@a:1"], "expected http://HOST:PORT"),
            (["--head", "http://a:1", "--ranges", "0-4", "4-8"], "--ranges with --head"),
            (["--head", "http://a:1", "--gpu-ids", "0"], "--gpu-ids with --head"),
            (["--head", "http://a:1", "--standby", "--base-port", "7"], "--base-port, --standby with --head"),
            (["--head", "http://a:1", "--", "--dtype", "float32"], "arguments after `--` with --head"),
            (["--model", "m", "--port", "8001"], "--port and --api-port are both 8001"),
            (["--model", "m", "--port", "1234567"], "cannot listen on every interface port 1234567"),
            (["--model", "m", "--", "--ssl-keyfile", "k"], "--ssl-keyfile after `--`"),
            (["--model", "m", "--gpu-ids", "0,,1"], "--gpu-ids '0,,1'"),
            (["--model", "m", "--gpu-ids", "1,1"], "--gpu-ids '1,1'"),
            (["--model", "m", "--gpu-ids", "0,1"], "CPU build"),
        ],
    )
    def test_with_the_way_out(self, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["front", *arguments]) == 2
        assert says in capsys.readouterr().err

    def test_a_source_is_needed_and_only_one(self) -> None:
        for arguments in ([], ["--model", "m", "--head", "http://a:1"]):
            with pytest.raises(SystemExit, match="2"):
                main(["front", *arguments])


class TestHandedOn:
    """What the launcher gets: the head on loopback, and the GPUs that were chosen."""

    @pytest.fixture
    def decided(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Wanted, Mapping[str, str]]]:
        seen: list[tuple[Wanted, Mapping[str, str]]] = []

        def decide(wanted: Wanted, environ: Mapping[str, str]) -> Launch:
            seen.append((wanted, environ))
            raise ConfigError("seen")

        monkeypatch.setattr(front, "decide", decide)
        monkeypatch.setattr(front, "is_cpu_build", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        return seen

    def test_the_head_is_on_loopback(self, decided: list[tuple[Wanted, Mapping[str, str]]]) -> None:
        assert main(["front", "--model", "m", "--host", "127.0.0.1", "--port", "0", "--api-port", "9001"]) == 2
        ((wanted, environ),) = decided
        assert (wanted.host, wanted.port, wanted.num_stages) == ("127.0.0.1", 9001, None)
        assert environ["CUDA_VISIBLE_DEVICES"] == "7"

    @pytest.mark.parametrize(
        ("more", "num_stages"),
        [
            ([], 3),
            (["--num-stages", "3"], 3),
            (["--num-stages", "auto"], 3),
            (["--ranges", "0-1", "1-2", "2-3"], None),
        ],
    )
    def test_chosen_gpus_are_the_ones_that_stages_see(
        self, decided: list[tuple[Wanted, Mapping[str, str]]], more: list[str], num_stages: int | None
    ) -> None:
        main(["front", "--model", "m", "--host", "127.0.0.1", "--port", "0", "--gpu-ids", "0, 2,3", *more])
        ((wanted, environ),) = decided
        assert environ["CUDA_VISIBLE_DEVICES"] == "0,2,3"
        assert wanted.num_stages == num_stages

    def test_another_number_of_gpus_than_stages(
        self, decided: list[tuple[Wanted, Mapping[str, str]]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["front", "--model", "m", "--port", "0", "--gpu-ids", "0,1", "--num-stages", "3"]) == 2
        assert "for 3 stages" in capsys.readouterr().err
        assert not decided


FOUND: dict[str, Any] = {
    "state": "linking",
    "is_ready": False,
    "reason": "stage 1 at 127.0.0.1:15551 (nothing listens there yet)",
    "steps": None,
    "stages": [
        {"stage": 0, "layers": "0-15", "state": "loading", "reason": "", "pid": 7, "rss_bytes": 3 << 29},
        {"stage": 1, "layers": None, "state": "not linked yet", "reason": "it was linked before", "pid": None},
    ],
}


class TestTable:
    def test_what_is_not_known_is_a_dash(self) -> None:
        assert [" ".join(line.split()) for line in describe(FOUND).splitlines()] == [
            "linking: stage 1 at 127.0.0.1:15551 (nothing listens there yet)",
            "",
            "stage layers state pid address up memory KV cached step compute hop age",
            "0 0-15 loading 7 - - 1.50 GiB - - - - - -",
            "1 - not linked yet - - - - - - - - - -",
            "stage 1: it was linked before",
        ]

    def test_device_memory_is_added_where_there_is_a_device(self) -> None:
        stage = {**FOUND["stages"][0], "device_bytes": 5 << 30}
        assert "1.50+5.00 GiB" in describe({**FOUND, "stages": [stage]})


class TestStatus:
    @pytest.fixture
    def answers(self) -> Iterator[tuple[str, list[bytes]]]:
        bodies: list[bytes] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = bodies[0] if self.path == "/pipeline/status" else b""
                self.send_response(200 if body else 404)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        server.server_close()

    @pytest.mark.parametrize(("is_ready", "code"), [(True, 0), (False, 3)])
    def test_the_exit_code_is_readiness(
        self, answers: tuple[str, list[bytes]], is_ready: bool, code: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        url, bodies = answers
        bodies.append(json.dumps({**FOUND, "is_ready": is_ready}).encode())
        assert main(["status", "--url", f"{url}/", "--json"]) == code
        assert json.loads(capsys.readouterr().out) == {**FOUND, "is_ready": is_ready}

    @pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"<html>"])
    def test_something_else_answers(
        self, answers: tuple[str, list[bytes]], body: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        url, bodies = answers
        bodies.append(body)
        assert main(["status", "--url", url]) == 3
        assert main(["status", "--url", url.removeprefix("http://")]) == 2
        assert "--url says where" in capsys.readouterr().err


def test_the_tool_finds_the_package(tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "offline_pipelining" / "http_index.py"
    asked = subprocess.run(
        [sys.executable, str(tool), "--head", "nonsense"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert asked.returncode == 2
    assert "--head 'nonsense' is not the head's address" in asked.stderr
