"""Forks `vllm` commands from one that has done vLLM's imports, which take seven seconds of each start.

Python scripts that use vLLM too.

The parent stops where `vllm`'s own ``main`` is about to read its arguments, before it loads a plugin; a child goes on
from there with a command line and an environment of its own. So what is imported, and in which order, is as in a
process that was started from nothing. Whoever starts stages otherwise, the launcher and the guide's commands, has
that in the tests too.

What a child spawns (an API server its EngineCore, that one its workers) is forked as well, from a copy of the child
that has stood still since its start. It is a child of whoever spawned it, as ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import inspect
import json
import multiprocessing.util
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

MAX_REQUEST_BYTES = 1 << 17
# Variables that nothing reads before the arguments are read (pytest's name the running test); a process in which others
# differ is started from nothing.
FREE_VARIABLES = re.compile(
    r"STAGEWIRE_\w+|PYTEST_\w+|LD_PRELOAD|PATH|PYTHONPATH|NO_PROXY|CUDA_VISIBLE_DEVICES"
    r"|VLLM_CPU_CI_ENV|VLLM_SERVER_DEV_MODE|VLLM_ALLOW_RUNTIME_LORA_UPDATING"
)
# Threads would keep locks that a child has copies of.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class ForkServer:
    """Started with the first process that it can fork.

    Args:
        script: the `vllm` command of this environment.
    """

    def __init__(self, script: str) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._environ: Mapping[str, str] = {}
        self._control: socket.socket | None = None
        self._parent: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        with self._lock:
            if self._control is not None and self._parent is not None:
                self._control.close()
                self._parent.wait(30)

    def fork(
        self, command: Sequence[str], env: Mapping[str, str], log: BinaryIO, network: str | None = None
    ) -> ForkedProcess | None:
        """Runs ``command`` as the leader of its own session; None if only a process from nothing would be the same.

        It is `vllm` with any arguments, or Python with a script, which finds vLLM imported.

        Args:
            network: the namespace that it is to live in, as `ip netns` names it.
        """
        if command[0] != self._script and not _is_script(command):
            return None
        with self._lock:
            if self._control is None:
                self._start(env)
            assert self._control is not None
            changed = {name for name in {**self._environ, **env} if self._environ.get(name) != env.get(name)}
            if not all(map(FREE_VARIABLES.fullmatch, changed)):
                return None
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            request = json.dumps({"command": list(command), "environ": dict(env), "network": network}).encode()
            assert len(request) < MAX_REQUEST_BYTES, len(request)
            with theirs:
                socket.send_fds(self._control, [request], [theirs.fileno(), log.fileno()])
        return ForkedProcess(command, ours)

    def _start(self, env: Mapping[str, str]) -> None:
        from stagewire.launch.resources import preload_libraries

        self._environ = dict(env)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tests = str(Path(__file__).parents[1])
        paths = os.pathsep.join(filter(None, (tests, env.get("PYTHONPATH"))))
        own = {"LD_PRELOAD": preload_libraries(env.get("LD_PRELOAD", "")), "PYTHONPATH": paths}
        with theirs:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", "support.forkserver", str(theirs.fileno())],
                env={**env, **ONE_THREAD, **own},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )


class ForkedProcess:
    """What the tests use of `subprocess.Popen`, for a child of the fork server, which tells how it ended."""

    def __init__(self, command: Sequence[str], news: socket.socket) -> None:
        self.args = command
        self.returncode: int | None = None
        self._news = news
        self._lock = threading.Lock()
        told = news.recv(64)
        if not told:
            raise ChildProcessError("the fork server has ended; its last words are on stderr")
        self.pid = int(told)

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                with contextlib.suppress(BlockingIOError):
                    told = self._news.recv(64, socket.MSG_DONTWAIT)
                    if not told:
                        raise ChildProcessError(f"the fork server has ended before its child {self.pid}")
                    self.returncode = int(told)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            select.select([self._news], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# ---- in the parent ---------------------------------------------------------------------------------------------------


@dataclass
class _Child:
    pid: int
    news: socket.socket


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    import setproctitle
    from vllm.entrypoints.cli.main import main as vllm_main

    setproctitle.getproctitle()  # finds the room for titles, which an environment that is exchanged would hide

    # What it imports before it makes its parser.
    for module in re.findall(r"^\s+import (vllm\.\S+)", inspect.getsource(vllm_main), re.MULTILINE):
        importlib.import_module(module)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads after importing: a fork would copy their locks"
    request = _fork_for_each_request(control)
    if request is None:
        os._exit(0)  # without what libraries have to say of an orderly end
    command = request["command"]
    if request["network"]:
        _enter_network(request["network"])
    _become(command if _is_script(command) else [sys.executable, *command], request["environ"])
    _spawn_by_forking()
    if _is_script(command):
        runpy.run_path(command[1], run_name="__main__")
        sys.exit()
    sys.exit(vllm_main())


CLONE_NEWNET = 0x40000000


def _enter_network(name: str) -> None:
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
    os.close(descriptor)


def _is_script(command: Sequence[str]) -> bool:
    return command[0] == sys.executable and command[1].endswith(".py")


def _fork_for_each_request(control: socket.socket) -> dict[str, Any] | None:
    """Its request in each child; None in the parent, when nobody asks any more."""
    children: dict[int, _Child] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != control.fileno():
                child = children.pop(ready)
                poll.unregister(ready)
                _, status = os.waitpid(child.pid, 0)
                os.close(ready)
                with contextlib.suppress(OSError):  # nobody waits for it
                    child.news.send(str(os.waitstatus_to_exitcode(status)).encode())
                child.news.close()
                continue
            message, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 2)
            if not message:
                for child in children.values():  # who asked for them was killed
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
                return None
            news_number, log_number = descriptors
            pid = os.fork()
            if pid == 0:
                os.setsid()
                for number in (1, 2):
                    os.dup2(log_number, number)
                for number in (control.detach(), *descriptors, *children):
                    os.close(number)
                for child in children.values():
                    child.news.close()
                request: dict[str, Any] = json.loads(message)
                return request
            os.close(log_number)
            news = socket.socket(fileno=news_number)
            news.send(str(pid).encode())
            descriptor = os.pidfd_open(pid)
            children[descriptor] = _Child(pid, news)
            poll.register(descriptor, select.POLLIN)


def _become(command: Sequence[str], environ: dict[str, str]) -> None:
    """What a program finds that was started with this command: its arguments, environment, and name in `ps`."""
    import setproctitle

    os.environ.clear()
    os.environ.update(environ)
    sys.argv = list(command[1:])
    sys.orig_argv[:] = command
    this = sys.modules["__main__"]
    this.__spec__, this.__file__ = None, command[1]  # for what multiprocessing spawns
    setproctitle.setproctitle(" ".join(sys.orig_argv))


# ---- in a child, and in what it spawns -------------------------------------------------------------------------------

PR_SET_CHILD_SUBREAPER = 36


def _spawn_by_forking() -> None:
    """From now on `multiprocessing` gets processes from a copy of this one instead of from new interpreters."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        by_exec = multiprocessing.util.spawnv_passfds
        multiprocessing.util.spawnv_passfds = partial(_spawn, ours, threading.Lock(), by_exec)
        return
    ours.close()
    _run_spawned(*_fork_for_each_order(theirs))


def _spawn(
    control: socket.socket,
    lock: threading.Lock,
    by_exec: Any,
    path: bytes,
    command: Sequence[str],
    passed: Sequence[int],
) -> int:
    """In place of `multiprocessing.util.spawnv_passfds`: starts a process with some of this one's files.

    Returns:
        Its id; it is a child of this process.
    """
    if "--multiprocessing-fork" not in command:  # the resource tracker's, say
        return int(by_exec(path, command, passed))
    program = command.index("-c")
    numbers = sorted(map(int, passed))
    order = {"argv": command[program:], "numbers": numbers, "environ": dict(os.environ)}
    libc = ctypes.CDLL(None)
    with lock:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # it becomes ours when the one in between ends
        try:
            socket.send_fds(control, [json.dumps(order).encode()], numbers)
            return int(control.recv(64))
        finally:
            libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _fork_for_each_order(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """In each new process the order and the files that came with it; ends with who gives the orders."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 64)
        if not message:
            os._exit(0)
        go, say_go = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            os.close(say_go)
            os.read(go, 1)
            control.send(str(os.getpid()).encode())
            control.close()
            os.close(go)
            return json.loads(message), descriptors
        os.waitpid(between, 0)
        os.write(say_go, b".")
        for descriptor in (go, say_go, *descriptors):
            os.close(descriptor)


def _run_spawned(order: dict[str, Any], descriptors: Sequence[int]) -> None:
    """What a new interpreter does with this command line, these files and this environment."""
    import torch

    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, max(order["numbers"]) + 1) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(high, order["numbers"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environ"])
    if "OMP_NUM_THREADS" in os.environ:  # read when the library was loaded
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _spawn_by_forking()
    _, program, *arguments = order["argv"]
    sys.argv = ["-c", *arguments]
    exec(program, {"__name__": "__main__"})  # it ends with sys.exit


if __name__ == "__main__":
    main()
