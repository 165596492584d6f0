"""`stagewire up` and `stagewire front` in the background: nohup, setsid, and output that nobody takes any more."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(60)]

FAKE_UP = Path(__file__).with_name("launch_fake_up.py")
STAGEWIRE = Path(sys.executable).with_name("stagewire")
DEADLINE_S = 30.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def ignores(pid: int, signum: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(mask >> (signum - 1) & 1)


def as_nohup_does() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[Any]]]:
    processes: list[subprocess.Popen[Any]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            process.wait(DEADLINE_S)


def fake_up(folder: Path, **how: Any) -> subprocess.Popen[Any]:
    command = [sys.executable, str(FAKE_UP), str(folder), str(free_port()), "{}", "serve", "serve"]
    return subprocess.Popen(command, **how)


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def wait_for_line(stream: IO[str], text: str) -> None:
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"no {text!r}")


def stop(process: subprocess.Popen[Any]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(DEADLINE_S)


def test_a_hang_up_that_was_ignored_at_the_start_stays_ignored(
    tmp_path: Path, started: list[subprocess.Popen[Any]]
) -> None:
    process = fake_up(tmp_path, stdout=subprocess.PIPE, text=True, preexec_fn=as_nohup_does)
    started.append(process)
    assert process.stdout is not None
    wait_for_line(process.stdout, "serving fake-model")
    stages = children(process.pid)
    assert len(stages) == 2
    assert all(ignores(pid, signal.SIGHUP) for pid in [process.pid, *stages])
    process.send_signal(signal.SIGHUP)
    os.kill(stages[-1], signal.SIGKILL)
    wait_for_line(process.stdout, "is started again")
    assert stop(process) == 0
    process.stdout.close()


@pytest.mark.parametrize("is_nohup", [True, False])
def test_a_front_alone_takes_a_hang_up_likewise(is_nohup: bool, started: list[subprocess.Popen[Any]]) -> None:
    port = str(free_port())
    command = [str(STAGEWIRE), "front", "--head", "http://127.0.0.1:1", "--host", "127.0.0.1", "--port", port]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=as_nohup_does if is_nohup else None
    )
    started.append(process)
    assert process.stdout is not None
    wait_for_line(process.stdout, "is the front of")
    process.send_signal(signal.SIGHUP)
    if is_nohup:
        assert ignores(process.pid, signal.SIGHUP)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=DEADLINE_S) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 0
    process.stdout.close()


def broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("out", [broken_pipe, closed_terminal, full_disk])
def test_output_that_nobody_takes_ends_nothing(tmp_path: Path, started: list[subprocess.Popen[Any]], out: Any) -> None:
    os.mkfifo(tmp_path / "serving")
    lost = out()
    process = fake_up(tmp_path, stdout=lost, stderr=lost)
    started.append(process)
    os.close(lost)
    wait_until_serving(tmp_path)
    assert stop(process) == 0


def test_streams_that_were_closed_at_the_start_are_none(tmp_path: Path, started: list[subprocess.Popen[Any]]) -> None:
    def close() -> None:
        for fd in (0, 1, 2):
            os.close(fd)

    os.mkfifo(tmp_path / "serving")
    process = fake_up(tmp_path, preexec_fn=close)
    started.append(process)
    wait_until_serving(tmp_path)
    assert stop(process) == 0


def wait_until_serving(folder: Path) -> None:
    """Where the launcher cannot print it says so in a FIFO."""
    with (folder / "serving").open() as serving:
        assert serving.read() == "serving\n"


def test_a_folder_of_logs_that_was_removed_stops_no_restart(
    tmp_path: Path, started: list[subprocess.Popen[Any]]
) -> None:
    logs = tmp_path / "logs"
    process = fake_up(tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "FAKE_LOGS": str(logs)})
    started.append(process)
    assert process.stdout is not None
    wait_for_line(process.stdout, "serving fake-model")
    shutil.rmtree(logs)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    wait_for_line(process.stdout, "is started again")
    wait_for_line(process.stdout, "stage 1  ready")
    assert (logs / "stage_1.log").exists()
    assert stop(process) == 0
    process.stdout.close()
