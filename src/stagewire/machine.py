"""How much memory and CPU time of the machine this process may use, with the limits of its control groups (containers).

A container's limits are in the control group file system, which psutil and /proc/meminfo do not read. Each group from
the process's own one up to the root of the mount may have limits, and the smallest counts. Both versions of control
groups are read, wherever they are mounted. The parsing is pure: `Files` gives it the content of files.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

import psutil

__all__ = [
    "Files",
    "Limits",
    "available_bytes",
    "memory_bytes",
    "memory_limit_bytes",
    "num_cpus",
    "read_limits",
    "whole_cpus",
]

# Version 1 writes "no limit" as the largest number of whole pages, which is above this.
_NO_LIMIT_BYTES = 1 << 60
# How many groups are searched at most for the one that holds this process.
_MAX_SEARCHED = 10_000
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Limits:
    """The limits of the control groups; ``None`` without a limit.

    ``memory_bytes``: for all processes together. ``available_bytes``: the part that is free, or that the kernel would
    free from the page cache. ``cpus``: seconds of CPU time per second, such as 1.5.
    """

    memory_bytes: int | None = None
    available_bytes: int | None = None
    cpus: float | None = None


class Files(Protocol):
    """The files that limits are read from."""

    def read(self, path: str) -> str:
        """The file's text; empty when it cannot be read."""

    def folders(self, path: str) -> list[str]:
        """The names of the folders in ``path``; none when it cannot be read."""


@dataclass(frozen=True)
class _Mount:
    """A mounted control group file system. ``root``: the group at ``point``, as named in this process's namespace."""

    root: str
    point: str
    controllers: frozenset[str]
    is_v2: bool


def read_limits(files: Files, pid: int) -> Limits:
    """The limits of process ``pid``, which must be this process, because /proc/self is read."""
    memory = [*_folders_of("memory", files, pid)]
    rooms = [room for folder in memory for room in _rooms(files, folder)]
    quotas = [quota for folder in _folders_of("cpu", files, pid) for quota in _quotas(files, folder)]
    return Limits(
        memory_bytes=min((limit for limit, _ in rooms), default=None),
        available_bytes=min((available for _, available in rooms), default=None),
        cpus=min(quotas, default=None),
    )


def memory_limit_bytes() -> int | None:
    """The memory limit of this process's container; ``None`` when the machine's memory is the limit."""
    limit = _own_limits().memory_bytes
    return limit if limit is not None and limit < psutil.virtual_memory().total else None


def memory_bytes() -> int:
    """The memory of this machine, swap included, or of this process's container if that is less."""
    total: int = psutil.virtual_memory().total + psutil.swap_memory().total
    return _smaller(total, memory_limit_bytes())


def available_bytes() -> int:
    """How much a new allocation may take now, on this machine and in this process's container."""
    return _smaller(psutil.virtual_memory().available, _own_limits().available_bytes)


def num_cpus() -> int:
    """How many threads this process can keep busy: the cores that it may use, or the whole CPUs of its container."""
    return whole_cpus(len(os.sched_getaffinity(0)), _own_limits().cpus)


def whole_cpus(num_cores: int, quota: float | None) -> int:
    """The smaller of both, in whole CPUs and at least 1.

    With one thread more than the quota has CPUs, all threads of a step would wait for the next period.
    """
    return num_cores if quota is None else min(num_cores, max(1, int(quota)))


def _smaller(value: int, limit: int | None) -> int:
    return value if limit is None else min(value, limit)


# ---- control groups ------------------------------------------------------------------------------------------------


class _MachineFiles:
    def read(self, path: str) -> str:
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
        return ""

    def folders(self, path: str) -> list[str]:
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return []


def _own_limits() -> Limits:
    return read_limits(_MachineFiles(), os.getpid())


def _folders_of(controller: str, files: Files, pid: int) -> Iterator[str]:
    """The folder of each group that holds the process, from its own group up to the mount's."""
    paths = dict(_own_paths(files.read("/proc/self/cgroup")))
    for mount in _mounts(files.read("/proc/self/mountinfo")):
        path = paths.get("" if mount.is_v2 else controller)
        if path is None or not (mount.is_v2 or controller in mount.controllers):
            continue
        inner = _inner_path(mount, path, files, pid)
        for folder in (inner, *inner.parents):
            yield f"{mount.point.rstrip('/')}/{folder}".removesuffix("/.")


def _own_paths(text: str) -> Iterator[tuple[str, str]]:
    """Controller and group of each line of /proc/self/cgroup. Version 2 has the controller ""."""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            yield controller, path


def _mounts(text: str) -> Iterator[_Mount]:
    """Reads /proc/self/mountinfo (proc(5)): "36 35 98:0 /root /point options - type source options"."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, *options) = left.split(), right.split() or [""]
        if kind in ("cgroup", "cgroup2") and len(fields) > 4:
            root, point = (_OCTAL.sub(lambda found: chr(int(found[1], 8)), field) for field in fields[3:5])
            yield _Mount(root, point, frozenset(options[-1].split(",") if options else ()), kind == "cgroup2")


def _inner_path(mount: _Mount, path: str, files: Files, pid: int) -> PurePosixPath:
    """Where group ``path`` is below the mount's point; "." for the point itself, and when the place is unknown."""
    own, root = PurePosixPath(path), PurePosixPath(mount.root)
    if ".." in own.parts:
        return PurePosixPath()  # the process was moved out of its namespace
    if ".." in root.parts:  # the mount is above this process's namespace, so the names between are hidden
        return _search(mount, root.parts.count(".."), own.relative_to("/"), files, pid)
    return own.relative_to(root) if own.is_relative_to(root) else PurePosixPath()


def _search(mount: _Mount, depth: int, own: PurePosixPath, files: Files, pid: int) -> PurePosixPath:
    """The group that lists ``pid`` among those with ``depth`` unknown names before ``own``."""
    groups = [PurePosixPath()]
    for _ in range(depth):
        groups = [group / name for group in groups for name in files.folders(f"{mount.point}/{group}")][:_MAX_SEARCHED]
    for group in groups:
        if str(pid) in files.read(f"{mount.point}/{group / own}/cgroup.procs").split():
            return group / own
    return PurePosixPath()


def _rooms(files: Files, folder: str) -> Iterator[tuple[int, int]]:
    """Each memory limit of one group, and how much of it is left."""
    limits = _numbers(files.read(f"{folder}/{name}") for name in ("memory.max", "memory.high", "memory.limit_in_bytes"))
    statistics = dict(line.split(" ", 1) for line in files.read(f"{folder}/memory.stat").splitlines() if " " in line)
    # Version 1 has this limit, which includes groups above the mount.
    limits += _numbers([statistics.get("hierarchical_memory_limit", "")])
    used = max(
        _numbers(files.read(f"{folder}/{name}") for name in ("memory.current", "memory.usage_in_bytes")), default=0
    )
    prefix = "total_" if "total_inactive_file" in statistics else ""
    cache = sum(_numbers(statistics.get(f"{prefix}{kind}_file", "") for kind in ("active", "inactive")))
    for limit in limits:
        if limit < _NO_LIMIT_BYTES:
            yield limit, max(0, limit - max(0, used - cache))


def _quotas(files: Files, folder: str) -> Iterator[float]:
    """The CPU quota of one group, in CPUs."""
    pairs = [files.read(f"{folder}/cpu.max").split()]
    pairs += [[files.read(f"{folder}/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]]
    for pair in pairs:
        numbers = _numbers(pair)
        if len(numbers) == 2 and numbers[1]:
            yield numbers[0] / numbers[1]


def _numbers(texts: Iterable[str]) -> list[int]:
    """The texts that are numbers. "max", "-1" and empty texts mean no limit."""
    return [int(text) for text in texts if text.strip().isdecimal()]
