"""A head that lost its ring goes on answering for a while, unless nobody is left who started it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from stagewire.observe.status_events import LAUNCHER_PID_ENV
from stagewire.vllm_plugin.head.api_server import linger

FOR_EVER_S = 600.0
DEADLINE_S = 30.0


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until it is killed."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setenv(LAUNCHER_PID_ENV, str(process.pid))
    yield process
    process.kill()
    process.communicate()


def lingering() -> threading.Thread:
    thread = threading.Thread(target=linger, args=(FOR_EVER_S,), daemon=True)
    thread.start()
    return thread


def test_it_ends_when_the_launcher_is_killed(launcher: subprocess.Popen[bytes]) -> None:
    thread = lingering()
    launcher.kill()  # and nobody asks for its exit code: a zombie is as dead
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_it_does_not_begin_when_the_launcher_is_gone(launcher: subprocess.Popen[bytes]) -> None:
    launcher.kill()
    launcher.wait()
    thread = lingering()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


@pytest.mark.usefixtures("launcher")
def test_it_lasts_while_the_launcher_lives() -> None:
    began_at = time.monotonic()
    linger(0.2)
    assert time.monotonic() - began_at >= 0.2


def test_it_lasts_for_a_head_that_was_started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER_PID_ENV, raising=False)
    began_at = time.monotonic()
    linger(0.2)
    assert time.monotonic() - began_at >= 0.2
