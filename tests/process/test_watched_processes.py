"""observe/processes.py and observe/signals.py with real processes: who sees whose end, and from when on."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import pytest

from stagewire.observe.processes import Guard, Watched, find_launcher, mark_of
from stagewire.observe.status_events import LAUNCHER_PID_ENV

pytestmark = [pytest.mark.process, pytest.mark.timeout(60)]

DEADLINE_S = 30.0


@contextlib.contextmanager
def running(program: str, *args: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A Python of its own, from the moment when it has printed a line; ``words`` has what it printed."""
    command = [sys.executable, "-c", program, *args]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **env}
    ) as process:
        assert process.stdout is not None
        process.words = process.stdout.readline().split()  # type: ignore[attr-defined]
        try:
            yield process
        finally:
            process.kill()


def words(process: subprocess.Popen[str]) -> list[str]:
    found: list[str] = process.words  # type: ignore[attr-defined]
    return found


def assert_ends(descriptor: int) -> None:
    assert select.select([descriptor], [], [], DEADLINE_S)[0], "it was left behind"


# ---- one process -----------------------------------------------------------------------------------------------------

WAIT = "print(); input()"


def test_a_process_has_ended_when_it_is_a_zombie_and_when_it_is_gone() -> None:
    with running(WAIT) as process:
        watched = Watched(process.pid)
        assert not watched.has_ended()
        process.kill()
        assert watched.wait(DEADLINE_S)
        process.wait()
        assert watched.has_ended()
        assert Watched(process.pid).has_ended()


@pytest.mark.parametrize(("mark", "has_ended"), [("{pid}", False), ("{mark}", False), ("{pid}:1", True)])
def test_a_number_that_is_somebody_elses_by_now_is_no_launcher(
    monkeypatch: pytest.MonkeyPatch, mark: str, has_ended: bool
) -> None:
    with running(WAIT) as process:
        monkeypatch.setenv(LAUNCHER_PID_ENV, mark.format(pid=process.pid, mark=mark_of(process.pid)))
        launcher = find_launcher()
        assert launcher is not None
        assert launcher.has_ended() == has_ended


@pytest.mark.parametrize("value", ["", "0", "nobody"])
def test_a_stage_that_was_started_by_hand_has_no_launcher(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(LAUNCHER_PID_ENV, value)
    assert find_launcher() is None


def test_a_guard_that_was_taken_does_nothing() -> None:
    acts: list[str] = []
    with running(WAIT) as process:
        left, taken = (Guard(Watched(process.pid), partial(acts.append, name)) for name in ("left", "taken"))
        watched = taken.take()
        process.kill()
        assert watched.wait(DEADLINE_S)
        ends_at = time.monotonic() + DEADLINE_S
        while "left" not in acts and time.monotonic() < ends_at:
            select.select([], [], [], 0.01)
        assert acts == ["left"], (left, taken)


# ---- what a process spawns -------------------------------------------------------------------------------------------

# A child that never gets to code of ours: as if it imported for ever.
SPAWN = """
import multiprocessing, multiprocessing.spawn, sys, threading
from stagewire.observe.processes import watch_spawned

class Slow:
    def __reduce__(self):
        return eval, ("print('importing', flush=True) or __import__('time').sleep(600)",)

def spawn():
    with watch_spawned("a child"):
        process = multiprocessing.get_context("spawn").Process(target=print, args=(Slow(),))
        process.start()
    print(process.pid, flush=True)

thread = threading.Thread(target=spawn)
thread.start()
thread.join()
input()
"""


def test_a_spawned_process_ends_with_its_parent_while_it_imports() -> None:
    with running(SPAWN) as parent:
        descriptor = os.pidfd_open(int(words(parent)[0]))
        assert parent.stdout is not None
        assert parent.stdout.readline() == "importing\n"
        assert not select.select([descriptor], [], [], 0.2)[0], "it does not end with the thread that spawned it"
        parent.kill()
        assert_ends(descriptor)
        assert parent.stderr is not None
        assert "a child: its parent process has ended" in parent.stderr.read()


def test_a_terminals_interrupt_is_the_parents_business() -> None:
    with running(SPAWN) as parent:
        child = int(words(parent)[0])
        descriptor = os.pidfd_open(child)
        assert parent.stdout is not None
        parent.stdout.readline()
        os.kill(child, signal.SIGINT)
        assert not select.select([descriptor], [], [], 0.3)[0]
        os.kill(child, signal.SIGTERM)
        assert_ends(descriptor)


# ---- what a launcher starts ------------------------------------------------------------------------------------------

LAUNCH = """
import os, subprocess, sys
from functools import partial
from stagewire.observe.processes import die_with
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], preexec_fn=partial(die_with, os.getpid()))
print(process.pid, flush=True)
input()
"""
IMPORTS = "import time; time.sleep(600)"
# A stage whose own code runs: whoever has begun looks for itself, and may end in order.
BEGUN = """
import os, sys, time
from stagewire.observe.processes import begin_stage
begin_stage(lambda: (print("saw it", flush=True), os._exit(3)))
print("begun", flush=True)
time.sleep(600)
"""


def test_a_stage_that_still_imports_ends_with_its_launcher() -> None:
    with running(LAUNCH, IMPORTS) as launcher:
        descriptor = os.pidfd_open(int(words(launcher)[0]))
        launcher.kill()
        assert_ends(descriptor)


def test_a_stage_that_has_begun_sees_its_launchers_end() -> None:
    with running(WAIT) as owner, running(LAUNCH, BEGUN, **{LAUNCHER_PID_ENV: mark_of(owner.pid)}) as launcher:
        descriptor = os.pidfd_open(int(words(launcher)[0]))
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "begun\n"
        launcher.kill()
        launcher.wait()
        assert not select.select([descriptor], [], [], 0.3)[0], "the kernel does not kill it any more"
        owner.kill()
        assert launcher.stdout.readline() == "saw it\n"
        assert_ends(descriptor)


# ---- signals ---------------------------------------------------------------------------------------------------------

SIGNALS = """
import os, select, sys, time
from stagewire.observe import signals
signals.END_S = float(sys.argv[2])
drain_s = float(sys.argv[1])
def say(word): print(word, flush=True)
def early(*_): say("this is how it ended before")
watch = signals.SignalWatch(early, early, early)
time.sleep(0.01)  # most often it waits for a signal by now
watch.direct(lambda number: say(f"ask {number}") or drain_s, lambda: say("stop"), lambda: (say("end"), os._exit(0)))
say("ready")
__import__("hashlib").pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # in C: no handler of Python's runs
"""


@pytest.mark.parametrize(
    ("drain_s", "end_s", "num_signals", "told"),
    [
        (0, 0.1, 1, ["ask 15", "stop", "end"]),
        (0.1, 0.1, 1, ["ask 15", "stop", "end"]),
        (600, 0.1, 2, ["ask 15", "stop", "end"]),
        (0, 600, 2, ["ask 15", "stop", "end"]),
        (600, 600, 3, ["ask 15", "stop", "end"]),
    ],
)
def test_signals_are_heard_while_the_main_thread_computes(
    drain_s: float, end_s: float, num_signals: int, told: list[str]
) -> None:
    with running(SIGNALS, str(drain_s), str(end_s)) as process:
        heard = []
        assert process.stdout is not None
        for _ in range(num_signals):
            process.send_signal(signal.SIGTERM)
            heard.append(process.stdout.readline().strip())
        heard += process.stdout.read().split("\n")
        assert process.wait(DEADLINE_S) == 0
        assert [line for line in heard if line] == told


INTERRUPTED = """
import os, signal, sys, threading, time
from stagewire.observe import signals
number = int(sys.argv[1])
reader, writer = os.pipe()
main_thread = f"/proc/self/task/{threading.get_native_id()}/stat"
def send():
    while open(main_thread).read().rpartition(")")[2].split()[0] != "S":  # until it is in the call
        time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), number)  # this thread is broken off; the main thread's call goes on
print("ready", flush=True)
try:
    with signals.stop_signals_interrupt():
        threading.Thread(target=send).start()
        os.read(reader, 1)
except signals.Interrupted as interrupt:
    print(interrupt.number.name, signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_breaks_off_no_call_is_heard_all_the_same(number: signal.Signals) -> None:
    """As one does that comes a moment before the main thread enters the call."""
    with running(INTERRUPTED, str(int(number))) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], DEADLINE_S / 3)[0], "the call goes on"
        assert process.stdout.readline() == f"{number.name} True\n"
        assert process.wait(DEADLINE_S) == 0


def test_a_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + INTERRUPTED.replace(
        "os.read(reader, 1)", "os.kill(os.getpid(), number); print('goes on', flush=True)"
    ).replace("threading.Thread(target=send).start()", "pass")
    with running(program, str(int(signal.SIGINT))) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "goes on\n"
        assert process.wait(DEADLINE_S) == 0
