"""What the benches share: starting both sides on chosen cores, driving them, ratios with their spread.

Servers are started with the tests' own helpers (tests/support/stages.py). Two sides are up at the same time and driven
alternately: `settle` waits until what was driven last is idle again, `set_aside` freezes stock vLLM meanwhile,
`Foreign` tells what other programs used, so that a disturbed pair can be measured again.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from stagewire.checkpoint.model_config import read_model_shape
from stagewire.plan.ranges import split_evenly
from stagewire.ring.rules.timeouts import PROBE_PATIENCE_ENV

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.stages import Ring, SingleProcess, cpu_seconds, process_tree  # noqa: E402
from support.workload import license_text  # noqa: E402

__all__ = [
    "DEFAULT_MODEL",
    "ROOT",
    "Foreign",
    "PinnedRing",
    "Ratios",
    "Ring",
    "SingleProcess",
    "begin",
    "complete_all",
    "cpu_seconds",
    "drive",
    "even_ranges",
    "idle_share",
    "print_table",
    "process_tree",
    "prompts",
    "set_aside",
    "settle",
    "wait_until_quiet",
]

DEFAULT_MODEL = ROOT / ".demo" / "model"


@dataclass
class PinnedRing(Ring):
    """A ring whose stages are pinned with `taskset`, one list of cores each; an empty one is not pinned.

    Rings that wait for their turn are cold, and some virtual machines then hold a core up for ten seconds.
    """

    cores: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.env = {PROBE_PATIENCE_ENV: "30", **self.env}

    def command(self, stage: int) -> list[str]:
        pin = self.cores[stage] if self.cores else ""
        return [*(("taskset", "-c", pin) if pin else ()), *super().command(stage)]


def even_ranges(model: Path, num_stages: int) -> tuple[str, ...]:
    """vLLM's own split, which is what `stagewire up` uses."""
    num_layers = read_model_shape(model).num_layers
    return tuple(str(layers) for layers in split_evenly(num_layers, num_stages))


# ---- load ----------------------------------------------------------------------------------------------------------


def prompts(count: int, num_words: int, seed: int) -> list[str]:
    """Real text, another window of it each; a number first, so that no prefix is in the cache from an earlier round."""
    words = license_text().split()
    begins = [(seed * 7919 + index * 131) % (len(words) - num_words) for index in range(count)]
    return [f"{seed} {index} " + " ".join(words[at : at + num_words]) for index, at in enumerate(begins)]


async def complete_all(url: str, model: Path, texts: Sequence[str], num_tokens: int) -> None:
    """All requests at once, each for exactly ``num_tokens`` greedy tokens."""
    limits = httpx.Limits(max_connections=len(texts) + 4)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits, trust_env=False) as client:

        async def one(text: str) -> None:
            body = {
                "model": str(model),
                "prompt": text,
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            response = await client.post("/v1/completions", json=body)
            if response.status_code != 200:
                raise RuntimeError(f"{url} answered {response.status_code}: {response.text}")
            found = response.json()["usage"]["completion_tokens"]
            if found != num_tokens:
                raise RuntimeError(f"asked for {num_tokens} tokens, got {found}")

        await asyncio.gather(*(one(text) for text in texts))


def drive(url: str, model: Path, texts: Sequence[str], num_tokens: int) -> float:
    """Seconds from the first request's start to the last one's end."""
    began_at = time.perf_counter()
    asyncio.run(complete_all(url, model, texts, num_tokens))
    return time.perf_counter() - began_at


# ---- idle sides ----------------------------------------------------------------------------------------------------


def idle_share(pid: int, window_s: float) -> float:
    """Share of one core that a process and its descendants use while nobody asks them for anything."""
    before = cpu_seconds(pid)
    began_at = time.monotonic()
    time.sleep(window_s)
    return (cpu_seconds(pid) - before) / (time.monotonic() - began_at)


@contextlib.contextmanager
def set_aside(pid: int | None) -> Iterator[None]:
    """Freezes a process tree meanwhile. Not for a ring: its stages would count one another as lost.

    Stock vLLM's processes spin for a second after each message before they sleep (`SpinCondition` in
    vllm/distributed/device_communicators/shm_broadcast.py), which would cost whoever is measured next.
    """
    tree = [] if pid is None else process_tree(pid)
    for each in tree:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in tree:
            os.kill(each, signal.SIGCONT)


def settle(pids: Sequence[int], limit_s: float = 10.0) -> None:
    """Returns when these processes have used almost nothing for half a second: what they did before is over."""
    ends_at = time.monotonic() + limit_s
    while time.monotonic() < ends_at and sum(idle_share(pid, 0.5) for pid in pids) > 0.05 * len(pids):
        pass


# ---- other people's load -------------------------------------------------------------------------------------------


@dataclass
class Foreign:
    """Share of the machine that processes other than this one and its descendants used within the `with` block."""

    share: float = 0.0

    def __enter__(self) -> Foreign:
        self._began = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        at, busy, own = (now - then for now, then in zip(self._read(), self._began, strict=True))
        self.share = max(0.0, (busy - own) / (at * (os.cpu_count() or 1)))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        busy = sum(fields[:8]) - fields[3] - fields[4]  # all but idle and iowait
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), cpu_seconds(os.getpid())


def wait_until_quiet(max_foreign: float, limit_s: float) -> None:
    """Returns when others have used little of the machine for two seconds, or after the limit."""
    ends_at = time.monotonic() + limit_s
    while time.monotonic() < ends_at:
        with Foreign() as foreign:
            time.sleep(2.0)
        if foreign.share <= max_foreign:
            return


# ---- results -------------------------------------------------------------------------------------------------------


@dataclass
class Ratios:
    """Pairs of measurements made one right after the other; the ratio is taken within a pair, then the median."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def add(self, ours: float, theirs: float) -> None:
        self.ours.append(ours)
        self.theirs.append(theirs)

    @property
    def each(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def cells(self, form: str) -> list[str]:
        """Medians of both sides, median of the ratios, their smallest and largest."""
        each = self.each
        medians = [format(statistics.median(side), form) for side in (self.ours, self.theirs)]
        return [*medians, f"{statistics.median(each):.3f}", f"{min(each):.3f}-{max(each):.3f}"]


def begin(model: Path) -> None:
    """Says what is measured on; from here on SIGTERM, like Ctrl-C, ends the servers first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _print_machine(model)


def _print_machine(model: Path) -> None:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown CPU",
    )
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("vllm", "torch", "pyzmq"))
    shape = read_model_shape(model)
    print(f"machine: {os.cpu_count()} cores ({cpu}), load {Path('/proc/loadavg').read_text().strip()}; {versions}")
    print(f"model: {shape.num_layers} layers", flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())
    sys.stdout.flush()
