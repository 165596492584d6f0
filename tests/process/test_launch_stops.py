"""Stop means stop for the launcher and the front, with real processes in place of vLLM's stages; and their death."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from process.test_front_processes import Start, start
from process.test_launch_supervisor import DEADLINE_S, Launch, Launcher, assert_gone, launch

__all__ = ["launch", "start"]  # fixtures

pytestmark = [pytest.mark.process, pytest.mark.timeout(60)]

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
FOR_EVER = {"head_stop": 1000.0, "stop": 1000.0}
STOP_LIMIT_S = 3.0


@dataclass(frozen=True)
class Stop:
    """Stages of these behaviours, told by ``signals`` once the launcher has said ``text``; each after its answer."""

    behaviours: Sequence[str]
    text: str
    signals: Sequence[signal.Signals]
    code: int
    patience: dict[str, float] | None = None

    def __str__(self) -> str:
        return "-".join([self.behaviours[-1], self.text.split()[-1], *(number.name for number in self.signals)])


STOPS = [
    *(Stop(["serve", "hang"], "stage 1  loading", [number], 128 + number) for number in (TERM, INT, HUP)),
    *(Stop(["serve", "deaf"], "stage 1  loading", [number], 128 + number) for number in (TERM, INT)),
    *(Stop(["serve", "deaf"], "stage 1  loading", [TERM, number], 128 + TERM, FOR_EVER) for number in (TERM, INT)),
    *(Stop(["serve", "serve"], "serving fake-model", [number], 0) for number in (TERM, INT, HUP)),
    *(Stop(["stubborn", "stubborn"], "serving fake-model", [number], 0) for number in (TERM, INT)),
    *(
        Stop(["stubborn", "stubborn"], "serving fake-model", numbers, 0, FOR_EVER)
        for numbers in ([TERM, TERM], [INT, INT], [TERM, INT], [INT, TERM], [HUP, HUP, TERM])
    ),
]


@pytest.mark.parametrize("case", STOPS, ids=str)
def test_a_launcher_that_is_told_to_stop_stops(launch: Launch, case: Stop) -> None:
    launcher = launch(*case.behaviours, **(case.patience or {}))
    launcher.wait_for(case.text)
    began = time.monotonic()
    first, *more = case.signals
    launcher.process.send_signal(first)
    launcher.wait_for("stopping")
    for number in more:
        launcher.process.send_signal(number)
    assert launcher.end() == case.code
    assert time.monotonic() - began < busy(STOP_LIMIT_S)
    assert "Traceback" not in launcher.error()
    assert launcher.strays() == []


def busy(seconds: float) -> float:
    """On a machine whose cores are also busy with something else, as much longer."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


KILLS = [
    (["serve", "hang"], "stage 1  loading", {}),
    (["serve", "serve"], "serving fake-model", {}),
    (["serve", "serve"], "stage 1  a standby has loaded", {"standby": 1.0}),
]


@pytest.mark.parametrize(("behaviours", "text", "settings"), KILLS, ids=["loading", "serving", "standing by"])
def test_stages_do_not_outlive_a_killed_launcher(
    launch: Launch, behaviours: list[str], text: str, settings: dict[str, float]
) -> None:
    """Whatever they do: these know nothing of launchers, as a stage that still imports."""
    launcher = launch(*behaviours, **settings)
    wait_for_all(launcher, text, "stage 0  loaded engine")
    stages = [pid for stage in (0, 1) for pids in launcher.children(stage) for pid in pids]
    assert len(stages) == 2 + bool(settings)
    launcher.process.kill()
    for pid in stages:
        assert_gone(pid)
    end_strays(launcher)


def wait_for_all(launcher: Launcher, *texts: str) -> None:
    for text in texts:
        if not any(text in line for line in launcher.lines):
            launcher.wait_for(text)


def end_strays(launcher: Launcher) -> None:
    """What stands in for EngineCore is deaf."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(launcher.number("engine", 0), signal.SIGKILL)


# ---- the front -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviours", "text", "number", "code"),
    [
        (["serve", "hang"], "stage 1  loading", TERM, 128 + TERM),
        (["serve", "hang"], "stage 1  loading", INT, 128 + INT),
        (["serve", "serve"], "Serving fake-model", TERM, 0),
        (["stubborn", "stubborn"], "Serving fake-model", INT, 0),
    ],
)
def test_a_front_that_launches_stops(
    start: Start, behaviours: list[str], text: str, number: signal.Signals, code: int
) -> None:
    fronted = start(*behaviours)
    fronted.wait_for(text)
    began = time.monotonic()
    fronted.process.send_signal(number)
    assert fronted.end() == code
    assert time.monotonic() - began < busy(STOP_LIMIT_S)
    assert "Traceback" not in fronted.error()
    assert fronted.strays() == []


def test_stages_do_not_outlive_a_killed_front(start: Start) -> None:
    """It has an event loop of its own, which starts processes in another way."""
    fronted = start("serve", "hang")
    wait_for_all(fronted, "stage 1  loading", "stage 0  loaded engine")
    stages = [fronted.children(stage)[0][0] for stage in (0, 1)]
    fronted.process.kill()
    for pid in stages:
        assert_gone(pid)
    end_strays(fronted)


@pytest.fixture
def silent_head() -> Iterator[int]:
    """The port of a head that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("numbers", [[TERM], [INT], [HUP], [TERM, TERM], [INT, INT]], ids=str)
def test_a_front_before_somebody_elses_head_stops_also_with_an_open_answer(
    silent_head: int, numbers: Sequence[signal.Signals]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "stagewire"), "front"]
    command += ["--head", f"http://127.0.0.1:{silent_head}", "--host", "127.0.0.1", "--port", str(port)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "is the front of" in process.stdout.readline()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            began = time.monotonic()
            first, *more = numbers
            process.send_signal(first)
            assert process.stdout.readline() == "stopping\n"
            for number in more:
                process.send_signal(number)
            assert process.wait(DEADLINE_S) == 0
        assert time.monotonic() - began < busy(STOP_LIMIT_S)
        assert "Traceback" not in process.stderr.read()


# ---- before anything is started --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_command_that_is_told_to_stop_while_it_reads_says_so(tmp_path: Path, number: signal.Signals) -> None:
    """`plan` reads a file that never ends; so may a checkpoint on a slow disk, for any command."""
    os.mkfifo(tmp_path / "config.json")
    command = [str(Path(sys.executable).parent / "stagewire"), "up", "--model", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        with (tmp_path / "config.json").open("w"):  # returns when it reads
            process.send_signal(number)
            assert process.wait(DEADLINE_S) == 128 + number
        assert process.stderr is not None
        assert process.stderr.read() == f"stagewire: stopped by {number.name}\n"


IMPORTING = """
import importlib.abc, os, sys
class Signals(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "stagewire.cli":
            os.kill(os.getpid(), int(sys.argv[1]))
sys.meta_path.insert(0, Signals())
from stagewire.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_command_that_is_told_to_stop_while_it_imports_says_so(number: signal.Signals) -> None:
    command = [sys.executable, "-c", IMPORTING, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (128 + number, f"stagewire: stopped by {number.name}\n")
