"""Limits of real control groups, as a process in them sees its own; tests/unit/test_machine.py has the cases."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

TELL = "from stagewire.machine import *; print(memory_limit_bytes(), available_bytes(), num_cpus())"
LIMIT_BYTES = 1 << 30
# Where the memory controller is mounted, by version.
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def own_path(controller: str) -> str:
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    return next((path for _, name, path in lines if name == controller), "/")


@contextlib.contextmanager
def limited_group() -> Iterator[Path]:
    """Of the memory controller, below this process's own group, with another one inside, which is what is given."""
    outer = V1 / own_path("memory").lstrip("/") if V1.is_dir() else V2 / own_path("").lstrip("/")
    group = outer / f"stagewire-test-{secrets.token_hex(4)}"
    limit = "memory.limit_in_bytes" if V1.is_dir() else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(LIMIT_BYTES))
        (group / "inner").mkdir()
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory group can be made here: {error}")
    try:
        yield group / "inner"
    finally:
        (group / "inner").rmdir()
        group.rmdir()


def ask(group: Path, *wrapper: str) -> list[int]:
    """What a process in the group says."""
    enter = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
    command = ["sh", "-c", enter, "sh", *wrapper, sys.executable, "-c", TELL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("wrapper", [(), ("unshare", "-C"), ("unshare", "-C", "-m")], ids=" ".join)
def test_a_limit_of_the_group_above(wrapper: tuple[str, ...]) -> None:
    if wrapper and (os.geteuid() != 0 or shutil.which("unshare") is None):
        pytest.skip("only root makes namespaces")
    with limited_group() as group:
        limit, available, num_cpus = ask(group, *wrapper)
    assert limit == LIMIT_BYTES
    assert 0 < available <= LIMIT_BYTES
    assert 1 <= num_cpus <= len(os.sched_getaffinity(0))
