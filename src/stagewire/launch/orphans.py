"""Children that this process did not start: as process 1 of a container it inherits whoever loses his parent.

Nobody else asks for their exit codes, so they would stay in the process table for ever, as zombies. What the launcher
has started itself leads a session of its own (`start_new_session`), and is waited for by whoever started it.
"""

from __future__ import annotations

import contextlib
import os

import psutil

__all__ = ["reap_orphans"]


def reap_orphans() -> list[int]:
    """Takes the exit codes of all that have ended; returns their process ids."""
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
