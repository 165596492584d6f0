"""Runs functions in forked children of one process that has imported vLLM, because importing it takes seven seconds.

A fork is safe only before any other thread exists: `become_parent` imports and checks that, and everything that vLLM
starts, it starts in a child. A child's result comes back through a file, its output goes to a log.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagewire.ring.rules.timeouts import PROBE_PATIENCE_ENV
from stagewire.vllm_plugin.worker.cpu import REEXECUTED_ENV

__all__ = ["ENVIRONMENT", "Child", "become_parent", "fork", "wait"]

# What children would import one after the other. vLLM's models are imported by the child that needs one.
_MODULES = """torch transformers vllm vllm.entrypoints.llm vllm.entrypoints.cli.main vllm.entrypoints.cli.serve
    vllm.entrypoints.cli.openai vllm.entrypoints.cli.launch vllm.entrypoints.cli.benchmark.main
    vllm.entrypoints.cli.collect_env vllm.entrypoints.cli.download_kernels vllm.entrypoints.cli.preload
    vllm.entrypoints.cli.run_batch vllm.entrypoints.cli.snapshot vllm.v1.engine.core vllm.v1.worker.cpu_worker
    vllm.v1.worker.cpu_model_runner vllm.v1.executor.uniproc_executor vllm.model_executor.model_loader
    vllm.model_executor.models.registry vllm.model_executor.layers.fused_moe stagewire.vllm_plugin.entry.serve
    stagewire.vllm_plugin.head.executor stagewire.vllm_plugin.host.stage_host stagewire.vllm_plugin.head.scheduler"""

# One thread each, also for what numpy starts when it is imported.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_COLOR": "0",
    # A stage in a child is not run again with preloaded libraries: its command line would be this process's.
    REEXECUTED_ENV: "1",
    PROBE_PATIENCE_ENV: "30",
}


@dataclass
class Child:
    """A running child. ``result`` is set by `wait`: what its function returned, or how it ended."""

    name: str
    pid: int
    log: Path
    result_file: Path
    descriptor: int
    result: Any = None
    error: str = ""
    exit_code: int | None = None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def become_parent() -> None:
    """Imports what children need. The environment must have been set before Python started."""
    for module in _MODULES.split():
        importlib.import_module(module)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(
            f"{threads} threads after importing: a fork would copy their locks; which import starts one?"
        )


def fork(name: str, function: Callable[[], Any], folder: Path) -> Child:
    """``function`` in a child, as the leader of its own process group. It must return JSON, or end the process."""
    log, result_file = folder / f"{name}.log", folder / f"{name}.json"
    result_file.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os._exit(_run_child(function, log, result_file))
    return Child(name, pid, log, result_file, os.pidfd_open(pid))


def _run_child(function: Callable[[], Any], log: Path, result_file: Path) -> int:
    """Never returns to the parent's code, whatever happens."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        outcome = {"result": function()}
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        outcome = {"error": f"exit code {code}"}
    except BaseException as error:  # noqa: BLE001  the child's end: whatever it is goes to the parent
        traceback.print_exc()
        outcome = {"error": describe(error)}
    with contextlib.suppress(Exception):
        result_file.write_text(json.dumps(outcome))
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def describe(error: BaseException) -> str:
    """An assertion without a text: the line that failed."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    if not text and frames:
        text = f"{frames[-1].line} ({Path(frames[-1].filename).name})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def wait(children: Sequence[Child], timeout_s: float, grace_s: float = 5.0) -> None:
    """Until all have ended. When one has failed the others have ``grace_s`` left; whoever remains is killed."""
    try:
        _wait(children, timeout_s, grace_s)
    finally:
        for child in children:
            child.kill()  # the child, or what it has left behind in its group
            os.close(child.descriptor)
    for child in children:
        if child.exit_code is None:
            _collect(child)
            child.error = f"still running after {timeout_s:.0f} s"


def _wait(children: Sequence[Child], timeout_s: float, grace_s: float) -> None:
    ends_at = time.monotonic() + timeout_s
    running = {child.descriptor: child for child in children}
    poll = select.poll()
    for descriptor in running:
        poll.register(descriptor, select.POLLIN)
    while running and (left_s := ends_at - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left_s * 1000):
            child = running.pop(descriptor)
            poll.unregister(descriptor)
            _collect(child)
            if child.exit_code:
                ends_at = min(ends_at, time.monotonic() + grace_s)


def _collect(child: Child) -> None:
    _, status = os.waitpid(child.pid, 0)
    child.exit_code = os.waitstatus_to_exitcode(status)
    try:
        outcome = json.loads(child.result_file.read_text())
    except (OSError, ValueError):
        outcome = {"error": f"ended by signal {-child.exit_code}"} if child.exit_code < 0 else {}
    child.result, child.error = outcome.get("result"), outcome.get("error", "")
