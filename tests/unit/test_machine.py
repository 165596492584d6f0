"""What a process may use: control groups of both versions, nested, mounted anywhere, seen from inside a namespace."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pytest

from stagewire.machine import Limits, read_limits, whole_cpus

GIB = 1 << 30
PID = 42
NO_LIMIT = "9223372036854771712\n"


@dataclass
class FakeFiles:
    """By path. ``mounts``: (root, point, type, super options)."""

    groups: str
    mounts: list[tuple[str, str, str, str]]
    content: dict[str, str] = field(default_factory=dict)

    def read(self, path: str) -> str:
        if path == "/proc/self/cgroup":
            return self.groups
        if path == "/proc/self/mountinfo":
            lines = [
                f"31 23 0:28 {root} {point} rw,relatime shared:9 - {kind} c {options}\n"
                for root, point, kind, options in self.mounts
            ]
            return "23 1 8:1 / / rw - ext4 /dev/vda rw\n" + "".join(lines)
        return self.content.get(str(PurePosixPath(path)), "")

    def folders(self, path: str) -> list[str]:
        top = str(PurePosixPath(path))
        below = [each.removeprefix(f"{top}/") for each in self.content if each.startswith(f"{top}/")]
        return sorted({each.split("/")[0] for each in below if "/" in each})


V2 = ("/", "/sys/fs/cgroup", "cgroup2", "rw,nsdelegate")
V1_MEMORY = ("/", "/sys/fs/cgroup/memory", "cgroup", "rw,memory")
V1_CPU = ("/", "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
C2, M1, Q1 = V2[1], V1_MEMORY[1], V1_CPU[1]

CASES: dict[str, tuple[FakeFiles, Limits]] = {
    "no control groups": (FakeFiles("", []), Limits()),
    "version 2, no limit": (
        FakeFiles(
            "0::/a\n",
            [V2],
            {f"{C2}/a/memory.max": "max\n", f"{C2}/a/cpu.max": "max 100000\n"},
        ),
        Limits(),
    ),
    "version 2, in a container's namespace": (
        FakeFiles(
            "0::/\n",
            [V2],
            {
                f"{C2}/memory.max": f"{4 * GIB}\n",
                f"{C2}/memory.current": f"{3 * GIB}\n",
                f"{C2}/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {GIB // 2}\n",
                f"{C2}/cpu.max": "150000 100000\n",
            },
        ),
        Limits(4 * GIB, 4 * GIB - 3 * GIB + GIB + GIB // 2, 1.5),
    ),
    "version 2, the outer group is the narrower one": (
        FakeFiles(
            "0::/pod/box\n",
            [V2],
            {
                f"{C2}/pod/memory.max": f"{2 * GIB}\n",
                f"{C2}/pod/memory.current": f"{GIB}\n",
                f"{C2}/pod/box/memory.max": f"{8 * GIB}\n",
                f"{C2}/pod/cpu.max": "400000 100000\n",
                f"{C2}/pod/box/cpu.max": "50000 100000\n",
            },
        ),
        Limits(2 * GIB, GIB, 0.5),
    ),
    "version 2, throttled before the limit": (
        FakeFiles("0::/a\n", [V2], {f"{C2}/a/memory.high": f"{GIB}\n", f"{C2}/a/memory.max": f"{3 * GIB}\n"}),
        Limits(GIB, GIB),
    ),
    "version 1, from the host": (
        FakeFiles(
            "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
            [V1_MEMORY, V1_CPU],
            {
                f"{M1}/memory.limit_in_bytes": NO_LIMIT,
                f"{M1}/docker/memory.limit_in_bytes": NO_LIMIT,
                f"{M1}/docker/abc/memory.limit_in_bytes": f"{4 * GIB}\n",
                f"{M1}/docker/abc/memory.usage_in_bytes": f"{GIB}\n",
                f"{M1}/docker/abc/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 4}\n",
                f"{Q1}/docker/abc/cpu.cfs_quota_us": "-1\n",
                f"{Q1}/docker/abc/cpu.cfs_period_us": "100000\n",
                f"{Q1}/docker/cpu.cfs_quota_us": "300000\n",
                f"{Q1}/docker/cpu.cfs_period_us": "100000\n",
            },
        ),
        Limits(4 * GIB, 4 * GIB - GIB + GIB // 4, 3.0),
    ),
    "version 1, only the own group is mounted": (
        FakeFiles(
            "4:memory:/docker/abc\n",
            [("/docker/abc", M1, "cgroup", "rw,memory")],
            {f"{M1}/memory.limit_in_bytes": f"{GIB}\n"},
        ),
        Limits(GIB, GIB),
    ),
    "version 1, a limit of a group that is not mounted": (
        FakeFiles(
            "4:memory:/\n",
            [V1_MEMORY],
            {
                f"{M1}/memory.limit_in_bytes": NO_LIMIT,
                f"{M1}/memory.stat": f"hierarchical_memory_limit {GIB}\n",
            },
        ),
        Limits(GIB, GIB),
    ),
    "both versions, memory in the first": (
        FakeFiles(
            "4:memory:/a\n0::/b\n",
            [V1_MEMORY, ("/", "/sys/fs/cgroup/unified", "cgroup2", "rw")],
            {f"{M1}/a/memory.limit_in_bytes": f"{GIB}\n", "/sys/fs/cgroup/unified/b/memory.max": ""},
        ),
        Limits(GIB, GIB),
    ),
    "mounted elsewhere, under a name with a space": (
        FakeFiles("0::/\n", [("/", r"/my\040groups", "cgroup2", "rw")], {"/my groups/memory.max": f"{GIB}\n"}),
        Limits(GIB, GIB),
    ),
    "a namespace of its own over a mount of the host": (
        FakeFiles(
            "4:memory:/inner\n",
            [("/../..", M1, "cgroup", "rw,memory")],
            {
                f"{M1}/other/x/inner/cgroup.procs": "7\n",
                f"{M1}/other/x/inner/memory.limit_in_bytes": "1\n",
                f"{M1}/pod/box/inner/cgroup.procs": f"1\n{PID}\n",
                f"{M1}/pod/memory.limit_in_bytes": f"{2 * GIB}\n",
                f"{M1}/pod/box/inner/memory.limit_in_bytes": f"{3 * GIB}\n",
            },
        ),
        Limits(2 * GIB, 2 * GIB),
    ),
    "moved out of its namespace": (
        FakeFiles("0::/../other\n", [V2], {f"{C2}/memory.max": f"{GIB}\n"}),
        Limits(GIB, GIB),
    ),
    "more is used than there may be": (
        FakeFiles("0::/\n", [V2], {f"{C2}/memory.max": f"{GIB}\n", f"{C2}/memory.current": f"{2 * GIB}\n"}),
        Limits(GIB, 0),
    ),
    "text that is none": (
        FakeFiles(
            "x\n0\n::\n", [V2], {f"{C2}/memory.max": "much\n", f"{C2}/cpu.max": "0 0 0\n", f"{C2}/memory.stat": "x\n"}
        ),
        Limits(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_limits(case: str) -> None:
    files, expected = CASES[case]
    assert read_limits(files, PID) == expected


@pytest.mark.parametrize(
    ("num_cores", "quota", "expected"),
    [(8, None, 8), (8, 2.0, 2), (8, 1.5, 1), (8, 0.2, 1), (2, 16.0, 2), (1, None, 1)],
)
def test_threads_fit_into_the_quota(num_cores: int, quota: float | None, expected: int) -> None:
    assert whole_cpus(num_cores, quota) == expected
