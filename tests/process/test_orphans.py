"""The launcher as process 1 of a container: orphans leave the process table, its own children are left to it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

# A subreaper inherits as process 1 does, and needs no container. Its child leads a session and waits; its grandchild
# loses its parent, and then ends.
SCRIPT = """
import ctypes, os, subprocess, sys
from stagewire.launch.orphans import reap_orphans
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
reader, writer = os.pipe()
held, hold = os.pipe()
parent = subprocess.Popen(
    [sys.executable, "-c", f"import os; p = os.fork(); os.write({writer}, b'%d' % p) if p else os.read({held}, 1)"],
    pass_fds=(writer, held),
    start_new_session=True,
)
parent.wait()
orphan = int(os.read(reader, 20))
own = subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True)
os.waitid(os.P_PID, own.pid, os.WEXITED | os.WNOWAIT)
assert reap_orphans() == [], "it lives"
os.write(hold, b"x")
os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
assert reap_orphans() == [orphan]
assert reap_orphans() == []
assert own.wait() == 0, "its exit code is still there"
print("reaped")
"""


def test_orphans_are_reaped_and_own_children_are_not() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "reaped\n"), done.stderr
