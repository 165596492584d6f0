"""The launcher with real processes in place of vLLM's: what it shows, how it ends, and that nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(60)]

FAKE_UP = Path(__file__).with_name("launch_fake_up.py")
# A machine that is busy with other tests starts a Python slowly.
DEADLINE_S = 30.0


@dataclass
class Launcher:
    """A running launcher; its lines are read as they come."""

    process: subprocess.Popen[str]
    folder: Path
    lines: list[str] = field(default_factory=list)

    def wait_for(self, text: str) -> str:
        """The first line that contains `text`, up to the end of the output."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if text in line:
                return line
        raise AssertionError(f"no {text!r} in {self.lines}, {self.error()}")

    def number(self, kind: str, stage: int) -> int:
        """The pid that a stage gave: `pid` its own, `engine` its child's."""
        return next(int(m[1]) for line in self.lines if (m := re.search(rf"stage {stage}  .* {kind} (\d+)$", line)))

    def last_number(self, kind: str, stage: int) -> int:
        """Of the process that was started last."""
        return [int(m[1]) for line in self.lines if (m := re.search(rf"stage {stage}  .* {kind} (\d+)$", line))][-1]

    def children(self, stage: int) -> tuple[list[int], list[int]]:
        """Pids of the stage's processes: first those that were started to serve or took over, oldest first."""
        found: list[tuple[int, bool]] = []
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in map(int, task.read_text().split()):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "launch_fake_stage" in words[1] and words[2] == str(stage):
                    found.append((pid, words[4].startswith("standby")))
        found.sort()
        serving = [pid for pid, stands_by in found if not stands_by]
        standbys = [pid for pid, stands_by in found if stands_by]
        return (serving or standbys[:1]), (standbys if serving else standbys[1:])

    def kill_serving(self, stage: int) -> None:
        os.kill(self.children(stage)[0][0], signal.SIGKILL)

    def held_standby(self) -> IO[str]:
        """Waits until one of behaviour `standby:held` loads; it has loaded when this is closed."""
        return (self.folder / "loading").open("w")

    def end(self) -> int:
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait(DEADLINE_S)

    def strays(self) -> list[str]:
        """Command lines of what still runs in this launcher's folder."""
        mark, found = f"FAKE_DIR={self.folder}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text().replace("\0", " "))
        return found

    def error(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def private_dir(self) -> Path:
        return Path(next(line.split()[-1] for line in self.lines if line.startswith("serving ")))

    def stop_order(self) -> list[int]:
        return [int(line) for line in (self.folder / "order").read_text().split()]


Launch = Callable[..., Launcher]


def short_folder() -> tempfile.TemporaryDirectory[str]:
    """Short enough for a Unix socket."""
    return tempfile.TemporaryDirectory(dir="/tmp")


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started: list[subprocess.Popen[str]] = []

    def start(*behaviours: str, **timeouts: float) -> Launcher:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        os.mkfifo(tmp_path / "loading")
        process = subprocess.Popen(
            [sys.executable, str(FAKE_UP), str(tmp_path), str(port), json.dumps(timeouts), *behaviours],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return Launcher(process, tmp_path)

    yield start
    for process in started:
        if process.poll() is None:
            # Twice: the second Ctrl-C ends everything at once.
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            process.wait(DEADLINE_S)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()


def assert_gone(pid: int) -> None:
    """Waits for the end of a process that is not our child."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], DEADLINE_S)[0], f"process {pid} was left behind"
    finally:
        os.close(fd)


def test_all_stages_start_answer_and_stop_in_order(launch: Launch) -> None:
    launcher = launch("serve", "serve", "serve")
    launcher.wait_for("serving fake-model")
    assert {f"stage {i}  importing" for i in range(3)} <= set(launcher.lines)
    assert {f"stage {i}  ready" for i in range(3)} <= set(launcher.lines)
    told = [line.removeprefix("stage 1  ") for line in launcher.lines if line.startswith("stage 1 ")]
    assert told[2:] == ["loading half", "loaded", "linked early", "ready"], "a link that comes early is shown in turn"
    private = launcher.private_dir()
    assert private.stat().st_mode & 0o777 == 0o700
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end() == 0
    assert launcher.stop_order()[0] == 0
    assert sorted(launcher.stop_order()) == [0, 1, 2]
    assert not private.exists()
    assert_gone(launcher.number("engine", 0))
    assert "SIGTERM 1" in (launcher.folder / "stage_1.log").read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_other_ways_to_ask_for_a_stop(launch: Launch, signum: signal.Signals) -> None:
    launcher = launch("serve", "serve")
    launcher.wait_for("serving fake-model")
    launcher.process.send_signal(signum)
    assert launcher.end() == 0
    for stage in (0, 1):
        assert_gone(launcher.number("pid", stage))


@pytest.mark.parametrize(
    "api",
    [
        {"task": "generate", "key": "s3cret"},
        {"task": "embed", "key": "s3cret"},
        {"task": "score"},
        {"task": "token_classify"},
        {"task": "plugin"},
        {"task": "generate", "uds": "api.sock"},
    ],
    ids=str,
)
def test_a_head_is_asked_as_it_tells_and_for_what_it_is_there(launch: Launch, api: dict[str, str]) -> None:
    """The launcher itself knows another port, no key, and nothing of the model."""
    with short_folder() as folder:
        told = {**api, "uds": f"{folder}/{api['uds']}"} if "uds" in api else api
        launcher = launch(f"api:{json.dumps(told)}", "serve", api_port=1)
        line = launcher.wait_for("serving fake-model")
        assert f"serving fake-model ({api['task']}) at " in line
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.end() == 0


def test_a_stop_during_start_is_not_a_success(launch: Launch) -> None:
    launcher = launch("serve", "hang")
    launcher.wait_for("stage 1  loading")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 128 + signal.SIGTERM
    assert_gone(launcher.number("pid", 1))


def test_a_second_interrupt_kills_at_once(launch: Launch) -> None:
    launcher = launch("stubborn", "stubborn", head_stop=1000, stop=1000)
    launcher.wait_for("serving fake-model")
    launcher.process.send_signal(signal.SIGINT)
    launcher.wait_for("stopping")
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end() == 0
    assert_gone(launcher.number("engine", 0))


def test_stages_that_do_not_stop_are_killed(launch: Launch) -> None:
    launcher = launch("stubborn", "stubborn", head_stop=0.2, stop=0.2)
    launcher.wait_for("serving fake-model")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 0
    assert_gone(launcher.number("engine", 0))
    assert_gone(launcher.number("pid", 1))


@pytest.mark.parametrize(
    ("behaviour", "code", "reason"),
    [
        ("fail:2", 2, "stage 1 .*: layers 3-5 are already taken"),
        ("fail:3", 3, "stage 1 .*: layers 3-5 are already taken"),
        ("die:1", 1, "stage 1 ended with exit code 1: ValueError: no such dtype: float3"),
        ("die:0", 1, "stage 1 ended with exit code 0: ValueError"),
    ],
)
def test_a_stage_that_fails_at_start_is_named_with_its_own_reason(
    launch: Launch, behaviour: str, code: int, reason: str
) -> None:
    launcher = launch("serve", behaviour, "hang")
    assert launcher.end() == code
    error = launcher.error()
    assert re.search(reason, error), error
    assert "stage_1.log" in error
    assert launcher.strays() == [], "the other stages are stopped"


def test_a_stage_killed_while_serving_is_started_again(launch: Launch) -> None:
    launcher = launch("serve", "serve", "serve")
    launcher.wait_for("serving fake-model")
    first = launcher.number("pid", 2)
    os.kill(first, signal.SIGKILL)
    launcher.wait_for("stage 2 was killed by SIGKILL")
    launcher.wait_for("stage 2 is started again")
    launcher.wait_for("stage 2  loading pid")
    launcher.wait_for("stage 2  ready")
    assert launcher.last_number("pid", 2) != first
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 0
    for stage in range(3):
        assert_gone(launcher.last_number("pid", stage))


def test_a_head_killed_while_serving_is_started_again_and_its_engine_is_not_left(launch: Launch) -> None:
    launcher = launch("serve", "serve")
    launcher.wait_for("serving fake-model")
    engine = launcher.number("engine", 0)
    os.kill(launcher.number("pid", 0), signal.SIGKILL)
    launcher.wait_for("stage 0  ready")
    launcher.wait_for("serving again")
    assert_gone(engine)


def test_it_gives_up_a_stage_that_ends_again_and_again(launch: Launch) -> None:
    launcher = launch("serve", "serve", "serve", restarts=2, back_off=0.01)
    launcher.wait_for("serving fake-model")
    for _ in range(3):
        os.kill(launcher.last_number("pid", 1), signal.SIGKILL)
        if _ < 2:
            launcher.wait_for("stage 1  ready")
    assert launcher.end() == 1
    error = launcher.error()
    again = [line for line in launcher.lines if "stage 1 is started again" in line]
    assert ["in 0.01 s" in line for line in again] == [False, True], "the pause grows"
    assert "stage 1 was killed by SIGKILL" in error
    assert "3 times in a row" in error


@pytest.mark.parametrize("limits", [{"restarts": 3}, {"restarts": 1, "healthy": 0.0}])
def test_a_standby_takes_over_and_another_one_stands_by(launch: Launch, limits: dict[str, float]) -> None:
    launcher = launch("serve", "serve", standby=1, back_off=0.01, **limits)
    launcher.wait_for("serving fake-model")
    for _ in range(3):
        launcher.wait_for("stage 1  a standby has loaded")
        (active, *_), standbys = launcher.children(1)
        os.kill(active, signal.SIGKILL)
        launcher.wait_for("stage 1: its standby takes over")
        assert len(standbys) == 1
    launcher.wait_for("stage 1  a standby has loaded")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 0
    assert sorted(launcher.stop_order()) == [0, 1, 1]


def test_a_standby_is_told_of_once(launch: Launch) -> None:
    """It says every ten seconds what it waits for, in the phase in which it is."""
    launcher = launch("serve", "serve", standby=1)
    launcher.wait_for("stage 1  a standby has loaded")
    launcher.kill_serving(1)
    launcher.wait_for("stage 1: its standby takes over")
    assert sum("a standby has loaded" in line for line in launcher.lines) == 1, launcher.lines


def test_only_the_loss_itself_says_that_requests_wait(launch: Launch) -> None:
    launcher = launch("breaks", "serve")
    launcher.wait_for("serving fake-model")
    os.kill(launcher.children(0)[0][0], signal.SIGUSR1)
    launcher.wait_for("serving again")
    heard = [line for line in launcher.lines if "stage 1 is lost" in line or "waiting for stage 1" in line]
    assert heard == ["stage 1 is lost: requests wait for it", "Stage 0: waiting for stage 1, 10 s"]


def test_a_standby_that_ends_is_started_again(launch: Launch) -> None:
    launcher = launch("serve", "serve", standby=1, back_off=0.01)
    launcher.wait_for("stage 1  a standby has loaded")
    _, (standby,) = launcher.children(1)
    os.kill(standby, signal.SIGKILL)
    launcher.wait_for("a standby of stage 1 was killed by SIGKILL")
    launcher.wait_for("a standby of stage 1 is started again")
    launcher.wait_for("stage 1  a standby has loaded")


def test_a_standby_that_still_loads_takes_over(launch: Launch) -> None:
    launcher = launch("serve", "serve+held", standby=1)
    launcher.wait_for("serving fake-model")
    with launcher.held_standby():
        _, (standby,) = launcher.children(1)
        launcher.kill_serving(1)
        launcher.wait_for("stage 1: its standby takes over")
    launcher.wait_for("stage 1  loaded")
    launcher.wait_for("stage 1  ready")
    with launcher.held_standby():
        (active, *_), standbys = launcher.children(1)
        assert active == standby
        assert len(standbys) == 1
    launcher.wait_for("stage 1  a standby has loaded")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 0
    assert not any("started again" in line for line in launcher.lines), launcher.lines


def test_a_standby_takes_over_that_came_before_its_stage_was_started_again(launch: Launch) -> None:
    launcher = launch("serve", "serve", standby=1, restarts=3, back_off=2.0)
    launcher.wait_for("stage 1  a standby has loaded")
    launcher.kill_serving(1)
    launcher.wait_for("stage 1: its standby takes over")
    launcher.wait_for("stage 1  a standby has loaded")
    (active, *_), (standby,) = launcher.children(1)
    # Both pause for as long; the standby's pause begins first.
    os.kill(standby, signal.SIGKILL)
    launcher.wait_for("a standby of stage 1 is started again in 2 s")
    os.kill(active, signal.SIGKILL)
    launcher.wait_for("stage 1 is started again in 2 s")
    launcher.wait_for("stage 1: its standby takes over")
    launcher.wait_for("stage 1  ready")


def test_a_standby_that_cannot_load_ends_nothing(launch: Launch) -> None:
    launcher = launch("serve", "serve+fail", standby=1, restarts=1)
    launcher.wait_for("serving fake-model")
    reason = "a standby of stage 1 ended with exit code 1: no memory for a second one"
    launcher.wait_for(reason)
    launcher.wait_for("a standby of stage 1 is started again")
    launcher.wait_for(reason)
    launcher.wait_for("2 times in a row")
    launcher.wait_for("stage 1 goes on without a standby")
    launcher.kill_serving(1)
    launcher.wait_for("stage 1 was killed by SIGKILL")
    launcher.wait_for("stage 1 is started again")
    launcher.wait_for("stage 1  ready")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end() == 0
    assert launcher.stop_order() == [0, 1]


def test_take_overs_count_and_a_standby_is_healthy_only_from_its_own_on(launch: Launch) -> None:
    launcher = launch("serve", "serve", "serve+6", standby=1, restarts=1, healthy=4.0)
    # The standby of stage 1 has loaded long before that of stage 2, which takes 6 s.
    launcher.wait_for("stage 2  a standby has loaded")
    launcher.kill_serving(1)
    launcher.wait_for("stage 1: its standby takes over")
    launcher.kill_serving(1)
    assert launcher.end() == 1
    error = launcher.error()
    assert "stage 1 was killed by SIGKILL" in error
    assert "2 times in a row" in error


@pytest.mark.parametrize("has_loaded", [True, False])
def test_without_restarts_a_standby_takes_over_once(launch: Launch, has_loaded: bool) -> None:
    launcher = launch("serve", "serve+held", standby=1, restarts=0)
    launcher.wait_for("serving fake-model")
    with launcher.held_standby() as held:
        if has_loaded:
            held.close()
            launcher.wait_for("stage 1  a standby has loaded")
        launcher.kill_serving(1)
        launcher.wait_for("stage 1: its standby takes over")
    launcher.wait_for("stage 1  ready")
    launcher.kill_serving(1)
    assert launcher.end() == 1
    assert "stage 1 was killed by SIGKILL" in launcher.error()


def test_without_restarts_a_standby_that_ends_ends_nothing(launch: Launch) -> None:
    launcher = launch("serve", "serve", standby=1, restarts=0)
    launcher.wait_for("stage 1  a standby has loaded")
    _, (standby,) = launcher.children(1)
    os.kill(standby, signal.SIGKILL)
    launcher.wait_for("stage 1 goes on without a standby")
    launcher.kill_serving(1)
    assert launcher.end() == 1
    assert "stage 1 was killed by SIGKILL" in launcher.error()


def test_what_was_healthy_for_long_enough_is_not_counted(launch: Launch) -> None:
    launcher = launch("serve", "serve", restarts=1, back_off=0.01, healthy=0.0)
    launcher.wait_for("serving fake-model")
    for _ in range(3):
        os.kill(launcher.last_number("pid", 1), signal.SIGKILL)
        launcher.wait_for("stage 1  ready")


def test_without_restarts_a_stage_killed_while_serving_stops_the_rest(launch: Launch) -> None:
    launcher = launch("serve", "serve", "serve", restarts=0)
    launcher.wait_for("serving fake-model")
    os.kill(launcher.number("pid", 2), signal.SIGKILL)
    assert launcher.end() == 1
    error = launcher.error()
    assert "stage 2 was killed by SIGKILL" in error
    assert "hint:" in error
    assert not launcher.private_dir().exists()


def test_the_end_of_the_head_also_ends_its_engine(launch: Launch) -> None:
    launcher = launch("serve", "serve", restarts=0)
    launcher.wait_for("serving fake-model")
    os.kill(launcher.number("pid", 0), signal.SIGKILL)
    assert launcher.end() == 1
    assert_gone(launcher.number("engine", 0))


def test_the_root_cause_wins_over_whoever_lost_a_peer(launch: Launch) -> None:
    launcher = launch("lost", "serve", "hang", root_cause=DEADLINE_S)
    launcher.wait_for("stage 0  ready")
    # Stage 0 says that it lost stage 1, and ends; only then does stage 1.
    os.kill(launcher.number("pid", 0), signal.SIGUSR1)
    assert_gone(launcher.number("pid", 0))
    if not any(line.startswith("stage 1  ready") for line in launcher.lines):
        launcher.wait_for("stage 1  ready")
    os.kill(launcher.number("pid", 1), signal.SIGKILL)
    assert launcher.end() == 1
    assert "stage 1 was killed by SIGKILL" in launcher.error()


def test_the_deadline_names_what_it_waited_for(launch: Launch) -> None:
    launcher = launch("serve", "hang", start=3.0)
    assert launcher.end() == 3
    assert re.search(r"not ready within 3 s \(--start-timeout\): .*stage 1 is at", launcher.error())


def test_the_deadline_counts_from_the_last_progress(launch: Launch) -> None:
    launcher = launch("serve", "slow:6", start=3.0, look=0.1)
    launcher.wait_for("serving fake-model")
    assert any("stage 1  loading" in line for line in launcher.lines)


def test_a_stage_that_reads_no_more_ends_the_start_though_another_one_does(launch: Launch) -> None:
    launcher = launch("serve", "stuck", "slow:100", start=3.0, look=0.1)
    assert launcher.end() == 3
    error = launcher.error()
    read = r"0\.80 of 4\.20 GB read, 0\.0 B/s in the last \d+ s"
    assert re.search(rf"stage 1 is at 'loading', {read}, no progress for [3-9] s", error)
    assert re.search(r"stage 2 is at 'loading', 0\.80 of 4\.20 GB read, .*, no progress for 0 s", error)


def test_live_bars_on_a_terminal(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ours, theirs = pty.openpty()
    command = [sys.executable, str(FAKE_UP), str(tmp_path), str(port), "{}", "serve", "serve"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(theirs)
    shown = b""
    while b"serving fake-model" not in shown:
        shown += os.read(ours, 4096)
    assert b"stage 0 (head)" in shown
    assert "━".encode() in shown
    # The terminal is closed: no reader any more, and the kernel's SIGHUP only reaches a session's leader.
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(DEADLINE_S) == 0
