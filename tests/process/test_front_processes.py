"""The front with the launcher's own supervision and real processes in place of vLLM's."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from process.test_launch_supervisor import DEADLINE_S, Launcher, assert_gone

pytestmark = [pytest.mark.process, pytest.mark.timeout(60)]

FAKE_FRONT = Path(__file__).with_name("launch_fake_front.py")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Fronted(Launcher):
    """A front that launches, and its public port."""

    port: int

    def get(self, path: str) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        connection.request("GET", path)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        found = response.status, headers, json.loads(response.read())
        connection.close()
        return found


Start = Callable[..., Fronted]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(*behaviours: str, port: int | None = None) -> Fronted:
        port = port or free_port()
        process = subprocess.Popen(
            [sys.executable, str(FAKE_FRONT), str(tmp_path), str(free_port()), str(port), *behaviours],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        fronted = Fronted(process, tmp_path)
        fronted.port = port
        return fronted

    yield run
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            process.wait(DEADLINE_S)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def test_it_serves_until_it_is_told_to_stop(start: Start) -> None:
    front = start("serve", "serve", "serve")
    front.wait_for(f"Serving fake-model at http://localhost:{front.port}")
    assert front.get("/ready")[0] == 200
    assert front.get("/v1/models")[2] == {"data": [{"id": "fake-model"}]}
    main = "import sys; from stagewire.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "status", "--url", f"http://127.0.0.1:{front.port}"]
    status = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (status.returncode, status.stdout.splitlines()[0]) == (0, "serving")
    front.process.send_signal(signal.SIGTERM)
    assert front.end() == 0
    assert front.stop_order()[0] == 0
    for stage in range(3):
        assert_gone(front.number("pid", stage))
    with pytest.raises(OSError, match="refused"):
        front.get("/health")


def test_it_answers_before_the_head_does(start: Start) -> None:
    front = start("serve", "hang")
    for line in ("stage 0  ready", "stage 1  loading"):
        if not any(each.startswith(line) for each in front.lines):
            front.wait_for(line)
    assert front.get("/health")[0] == 200
    status, headers, body = front.get("/ready")
    assert (status, headers["retry-after"]) == (503, "5")
    assert "no token has gone round" in body["error"]["message"]
    stages = front.get("/pipeline/status")[2]["front"]["stages"]
    assert [(stage["state"], stage["layers"]) for stage in stages] == [("ready", "0-15"), ("loading", "15-30")]
    assert stages[1]["pid"] == front.number("pid", 1)


def test_a_killed_stage_ends_it_with_the_reason(start: Start) -> None:
    front = start("serve", "serve", "serve")
    front.wait_for("Serving fake-model")
    os.kill(front.number("pid", 2), signal.SIGKILL)
    assert front.end() == 1
    assert "stage 2 was killed by SIGKILL" in front.error()
    assert_gone(front.number("engine", 0))


def test_a_public_port_that_is_taken_is_told_before_a_stage_starts(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        front = start("serve", "serve", port=taken.getsockname()[1])
        assert front.end() == 2
    assert "--port" in front.error()
    assert not (front.folder / "stage_0.log").exists()
