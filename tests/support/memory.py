"""A limit on a running process's memory that the kernel enforces by ending it, as it does on a full machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
from collections.abc import Iterator
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def can_limit() -> bool:
    """Whether this user may make groups of the kernel's memory controller here."""
    try:
        with _group():
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _group() -> Iterator[tuple[Path, Path]]:
    """A group, and the file of its limit."""
    is_v1 = _V1.is_dir()
    group = (_V1 if is_v1 else _V2) / f"stagewire-test-{secrets.token_hex(4)}"
    group.mkdir()
    try:
        limit = group / ("memory.limit_in_bytes" if is_v1 else "memory.max")
        if not limit.exists():
            raise OSError("no memory controller")
        yield group, limit
    finally:
        group.rmdir()


@contextlib.contextmanager
def out_of_memory(pid: int) -> Iterator[None]:
    """What the process asks for from now on is more than it may have. If it has not ended when the block does, it is
    killed: on a slow disk it may read the pages of its code again and again and ask for nothing.
    """
    with _group() as (group, limit):
        limit.write_text(str(os.sysconf("SC_PAGE_SIZE") * 16))
        swap = group / "memory.swappiness"
        if swap.exists():
            swap.write_text("0")
        process = os.pidfd_open(pid)
        (group / "cgroup.procs").write_text(str(pid))  # what it holds stays where it was counted
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [])
            os.close(process)
