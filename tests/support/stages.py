"""Starts real `vllm serve` processes, as a person would by hand, and waits for them by messages.

Independent of the launcher, so that the launcher's bugs do not hide in the tests of the ring.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from stagewire.checkpoint.manifest import stage_folder
from stagewire.observe.status_events import LAUNCHER_SOCKET_ENV, Phase, StatusEvent, StatusReceiver
from stagewire.ring.rules.timeouts import PROBE_PATIENCE_ENV
from support.forkserver import ForkedProcess, ForkServer

VLLM = str(Path(sys.executable).parent / "vllm")
START_DEADLINE_S = 480.0
STOP_DEADLINE_S = 30.0
MAX_WORKERS = 6  # of scripts/test
# Only in pytest (conftest.py): benchmarks measure, and soak runs, what a person starts.
fork_server: ForkServer | None = None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on right now, all different.

    Below the range that the system picks from: every stage opens a dozen such ports (gloo), and one of them was once
    the very port that another stage was about to bind. For the same reason each worker of pytest-xdist has its own,
    in one piece: a launcher takes those after the one that it is given.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_own_ports(), 500):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def _own_ports() -> range:
    ports = range(18000, 32000)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return ports
    size = len(ports) // MAX_WORKERS
    return ports[int(worker.removeprefix("gw")) % MAX_WORKERS * size :][:size]


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # vLLM's 5 s for a grammar are short for a machine that runs several tests beside one another.
    return {**os.environ, **quiet, "VLLM_REGEX_COMPILATION_TIMEOUT_S": "60", **(extra or {})}


def process_tree(pid: int) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its descendants."""
    ticks = 0
    for each in process_tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def thread_states(pid: int) -> list[str]:
    """Of each thread its name, its state and what it waits for in the kernel."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            name, rest = (task / "stat").read_text().rsplit(") ", 1)
            found.append(f"{name.partition('(')[2]} {rest[0]} {(task / 'wchan').read_text()}")
    return found


class StageFailedError(AssertionError):
    """A process ended before it was ready; the message has its log's end."""


@dataclass
class Process:
    """One started process; its output goes to a file."""

    name: str
    popen: subprocess.Popen[bytes] | ForkedProcess
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = STOP_DEADLINE_S) -> int:
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            error.add_note(f"{self.name}, its threads: {thread_states(self.pid)}\n{self.text()[-3000:]}")
            raise

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait(STOP_DEADLINE_S)


def start(
    name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, network: str | None = None
) -> Process:
    """``network``: the namespace that the process is to live in, as `ip netns` names it."""
    environ = child_environment(env)
    with log.open("wb") as output:
        forked = fork_server.fork(command, environ, output, network) if fork_server else None
        popen = forked or subprocess.Popen(
            [*(("ip", "netns", "exec", network) if network else ()), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,
        )
    return Process(name, popen, log)


def run(name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Process:
    """A command that ends by itself within minutes."""
    process = start(name, command, log, env)
    try:
        process.wait(240)
    finally:
        process.kill_group()
    return process


@dataclass
class Ring:
    """Stages on this machine, one port each; a context manager.

    Args:
        model: checkpoint folder.
        ranges: one per stage, as typed.
        extra: arguments of every stage.
        env: environment of every stage.
        own: arguments of one stage, by its index.
    """

    model: Path
    ranges: Sequence[str]
    extra: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[int, Sequence[str]] = field(default_factory=dict)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sw-")))
    stages: list[Process] = field(default_factory=list)
    events: list[StatusEvent] = field(default_factory=list)
    _num_started: int = 0

    def __post_init__(self) -> None:
        self.num_stages = len(self.ranges)
        self.api_port, *self.ports = free_ports(self.num_stages + 1)
        self._receiver = StatusReceiver(str(self.folder / "status"))
        self._heard = threading.Condition()
        self._is_over = threading.Event()
        # All the time: a stage waits a moment for a listener whose queue is full.
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        while not self._is_over.is_set():
            select.select([self._receiver], [], [], 0.2)
            with self._heard:
                self.events += self._receiver.receive()
                self._heard.notify_all()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    def command(self, stage: int) -> list[str]:
        predecessor = f"127.0.0.1:{self.ports[stage - 1]}"
        own = (
            ["--pipeline-prev-stage-addr", predecessor, "--port", str(self.api_port)]
            if stage == 0
            else ["--pipeline-prev-stage-service-addr", predecessor, "--external-pp-worker"]
        )
        return [
            *(VLLM, "serve", str(self.model), "--pipeline-stage-mode", "external"),
            *("--pipeline-stage-idx", str(stage), "--pipeline-total-stages", str(self.num_stages)),
            *("--pipeline-layer-range", self.ranges[stage], "--pipeline-local-bind-port", str(self.ports[stage])),
            *own,
            *self.extra,
            *self.own.get(stage, ()),
        ]

    def start_stage(self, stage: int, command: Sequence[str] | None = None) -> Process:
        env = {**self.env, LAUNCHER_SOCKET_ENV: self._receiver.path}
        self._num_started += 1
        log = self.folder / f"stage_{stage}.{self._num_started}.log"
        process = start(f"stage {stage}", command or self.command(stage), log, env)
        self.stages.append(process)
        return process

    def restart_stage(self, stage: int) -> Process:
        """Starts a stage whose process has ended again, as whoever looks after it would."""
        self.stages[stage].wait()
        self.start_stage(stage)
        self.stages[stage] = self.stages.pop()
        return self.stages[stage]

    def __enter__(self) -> Self:
        for stage in range(self.num_stages):
            self.start_stage(stage)
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self, deadline_s: float = START_DEADLINE_S) -> None:
        """Until every stage has said that it is ready and the head listens."""
        self.wait_for(lambda: self._ready() == set(range(self.num_stages)), deadline_s)
        self.wait_for(lambda: "Application startup complete" in self.stages[0].text(), deadline_s)

    def _ready(self) -> set[int]:
        return {event.stage for event in self.events if event.phase is Phase.READY}

    def wait_for(self, is_true: object, deadline_s: float) -> None:
        """Takes status events until ``is_true()``; fails when a process ends or the deadline passes."""
        assert callable(is_true)
        ends_at = time.monotonic() + deadline_s
        while not is_true():
            left = ends_at - time.monotonic()
            dead = [stage for stage in self.stages if stage.popen.poll() is not None]
            if dead or left <= 0:
                raise StageFailedError(self._describe(dead or self.stages))
            with self._heard:
                self._heard.wait(min(left, 0.3))

    def _describe(self, stages: Sequence[Process]) -> str:
        return "\n".join(f"--- {s.name}, exit code {s.popen.poll()}:\n{s.text()[-3000:]}" for s in stages)

    def stop(self) -> None:
        """SIGTERM to the head, which takes the others along; without a head, to each of them.

        Raises:
            StageFailedError: they did not all end; those that were left are killed.
        """
        running = [stage for stage in self.stages if stage.popen.poll() is None]
        for stage in running:
            if stage is self.stages[0] or self.stages[0] not in running:
                stage.popen.terminate()
        ends_at = time.monotonic() + STOP_DEADLINE_S
        left = []
        for stage in self.stages:
            try:
                stage.wait(max(0.1, ends_at - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                left.append("\n".join([str(error), *error.__notes__]))
            stage.kill_group()
        self._is_over.set()
        self._listener.join()
        self._receiver.close()
        if left:
            raise StageFailedError("\n".join([*left, f"the head's log:\n{self.stages[0].text()[-3000:]}"]))
        if os.environ.get("STAGEWIRE_KEEP_LOGS") is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def worker_pid(self, stage: int) -> int:
        """The process that runs the layers: on the head that is EngineCore, a child of the API server."""
        if stage > 0:
            return self.stages[stage].pid
        for pid in process_tree(self.stages[0].pid):
            if Path(f"/proc/{pid}/comm").read_text().startswith("VLLM::EngineCor"):
                return pid
        raise AssertionError("the head has no EngineCore")

    def cpu_seconds(self) -> list[float]:
        return [cpu_seconds(stage.pid) for stage in self.stages]


@dataclass
class PreSplitRing(Ring):
    """Each stage from its own folder below ``model``, without a range."""

    def command(self, stage: int) -> list[str]:
        command = super().command(stage)
        at = command.index("--pipeline-layer-range")
        del command[at : at + 2]
        command[command.index(str(self.model))] = str(stage_folder(self.model, stage))
        return command


@dataclass
class SingleProcess:
    """Stock `vllm serve`, without any of our flags: what every answer is compared with."""

    model: Path
    extra: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sw-")))

    def __enter__(self) -> SingleProcess:
        (self.port,) = free_ports(1)
        command = [VLLM, "serve", str(self.model), "--port", str(self.port), *self.extra]
        self.process = start("reference", command, self.folder / "reference.log", self.env)
        descriptor = os.pidfd_open(self.process.pid)
        try:
            ends_at = time.monotonic() + START_DEADLINE_S
            while not re.search("Application startup complete", self.process.text()):
                if select.select([descriptor], [], [], 0.3)[0] or time.monotonic() > ends_at:
                    raise StageFailedError(self.process.text()[-3000:])
        except BaseException:
            self.process.kill_group()
            raise
        finally:
            os.close(descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait()
        self.process.kill_group()
        if os.environ.get("STAGEWIRE_KEEP_LOGS") is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def together(*servers: Ring | SingleProcess) -> Iterator[None]:
    """Starts them side by side, and stops them so: the processes of one process's start come one after the other.

    They keep one another waiting meanwhile, which must not count as a lost stage.
    """
    for server in servers:
        if isinstance(server, Ring):
            server.env = {PROBE_PATIENCE_ENV: "30", **server.env}
    with ThreadPoolExecutor(len(servers)) as pool:
        starting = [pool.submit(server.__enter__) for server in servers]
        try:
            for each in starting:
                each.result()
            yield
        finally:
            wait(starting)
            started = [server for server, each in zip(servers, starting, strict=True) if each.exception() is None]
            stopping = [pool.submit(server.__exit__, None, None, None) for server in started]
            for stop in stopping:
                stop.result()
