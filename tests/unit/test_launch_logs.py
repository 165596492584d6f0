"""The folder of logs: one living launcher has it to itself, and whoever comes second gets one beside it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stagewire.errors import ConfigError
from stagewire.launch.logs import LogFolder

CLAIM = """
import signal, sys
from pathlib import Path
from stagewire.launch.logs import LogFolder
folder = LogFolder.claim(Path(sys.argv[1]))
print(folder.path.name, flush=True)
signal.pause()
"""


def test_the_next_launcher_removes_the_logs_of_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    first = LogFolder.claim(tmp_path / "logs")
    for name in ("stage_0.log", "stage_12.log", "stage_1_standby.log", "stage_x.log", "mine.log"):
        (first.path / name).write_text("x")
    first.close()
    second = LogFolder.claim(tmp_path / "logs")
    assert (second.path, second.note) == (tmp_path / "logs", "")
    assert {path.name for path in second.path.glob("*.log")} == {"stage_x.log", "mine.log"}
    second.close()


def test_another_launcher_s_logs_are_not_touched(tmp_path: Path) -> None:
    first = LogFolder.claim(tmp_path / "logs")
    with first.open_log("stage_0.log") as log:
        log.write(b"first\n")
    second, third = LogFolder.claim(tmp_path / "logs"), LogFolder.claim(tmp_path / "logs")
    assert [second.path.name, third.path.name] == ["logs_2", "logs_3"]
    assert second.note == third.note == f"{tmp_path}/logs belongs to the launcher that runs as process {os.getpid()}"
    assert (first.path / "stage_0.log").read_text() == "first\n"
    second.close()
    again = LogFolder.claim(tmp_path / "logs")
    assert again.path.name == "logs_2"
    for folder in (first, third, again):
        folder.close()


def test_starts_at_one_moment_get_a_folder_each_and_a_killed_one_leaves_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLAIM, str(tmp_path / "logs")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        names = {process.stdout.readline().strip(): process for process in started if process.stdout}
        assert set(names) == {"logs", "logs_2", "logs_3"}
        names["logs"].send_signal(signal.SIGKILL)
        names["logs"].wait(10)
        LogFolder.claim(tmp_path / "logs").close()
    finally:
        for process in started:
            process.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()


@pytest.mark.parametrize("wanted", ["/proc/logs", "/dev/null", "/dev/null/logs"])
def test_where_nothing_can_be_written_it_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"--log-dir {wanted}: "):
        LogFolder.claim(Path(wanted))


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    folder = LogFolder.claim(tmp_path / "logs")
    shutil.rmtree(folder.path)
    with folder.open_log("stage_0.log") as log:
        log.write(b"x")
    assert (folder.path / "stage_0.log").read_text() == "x"
    shutil.rmtree(folder.path)
    folder.path.write_text("a file")
    with folder.open_log("stage_0.log") as log:
        assert log.name == os.devnull
    folder.close()
