"""Children that this process did not start: process 1 of a container inherits every process that loses its parent.

Nobody else asks for their exit codes, so they would stay in the process table as zombies. A stage is not one of them:
it leads a session of its own (`start_new_session`), and the launcher waits for it.
"""

from __future__ import annotations

import contextlib
import os

import psutil

__all__ = ["reap_orphans"]


def reap_orphans() -> list[int]:
    """Takes the exit codes of all orphans that have ended; returns their process ids."""
    orphans = [child.pid for child in psutil.Process().children() if _is_ended_orphan(child)]
    for pid in orphans:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return orphans


def _is_ended_orphan(child: psutil.Process) -> bool:
    try:
        return bool(child.status() == psutil.STATUS_ZOMBIE) and os.getsid(child.pid) != child.pid
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
