"""Load on a ring while its stages are killed and frozen and its links cut, held up and delayed, at random from a seed.

    python -m support.soak --minutes 10 --seed 1                    # from tests/; with chaos, every answer compared
    python -m support.soak --minutes 30 --quiet                     # load alone: does memory stay flat?
    python -m support.soak --minutes 90 --only kill --times 100     # until a hundred stages were killed

Every link runs through a TCP proxy (support/proxy.py). Each round of clients must end with the answers of the one that
nobody disturbed. Prints what was done, what was in flight, and what was left behind at the end.

vLLM's CPU kernels keep what oneDNN compiles for each number of rows, and recoveries bring numbers that no undisturbed
run has. So memory is compared with that of stages which have run steps of every number once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from stagewire.plan.ranges import split_evenly
from stagewire.ring.transport.security import make_key_file
from support import stages
from support.disturbed import Clients, Stream, differences, mixed_bodies
from support.forkserver import ForkServer
from support.inside import states, until_idle
from support.proxy import Proxy
from support.stages import Process, Ring

MAX_ROWS = 256
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager"),
    *("--max-num-batched-tokens", str(MAX_ROWS), "--kv-cache-memory-bytes", "250M", "--block-size", "32"),
]
CONCURRENCY = 32
# Of stages that were warmed up, and of others, where this finds what is large only: one stock process grows from 1.84
# to 2.13 GB in eight rounds.
MAX_GROWTH_WARM, MAX_GROWTH_COLD = 1.05, 1.5
DISTURBANCES = ("kill", "kill", "two kills", "freeze", "cut", "hold one way", "hold both", "delay")


@dataclass
class ProxiedRing(Ring):
    """Every stage reaches its predecessor through a proxy."""

    proxies: list[Proxy] = field(default_factory=list)

    def command(self, stage: int) -> list[str]:
        command = super().command(stage)
        real = f"127.0.0.1:{self.ports[stage - 1]}"
        return [f"127.0.0.1:{self.proxies[stage].port}" if word == real else word for word in command]


@contextlib.contextmanager
def proxied(model: Path, num_stages: int, *, one_port: bool = False) -> Any:
    with ExitStack() as stack:
        # Without a key, stages of one machine speak over Unix sockets, which no proxy is on.
        key = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "ring.key"
        make_key_file(key)
        settings = [*SETTINGS, "--pipeline-key-file", str(key)]
        num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        ranges = [str(each) for each in split_evenly(num_layers, num_stages)]
        ring = ProxiedRing(model, ranges, settings, {"VLLM_SERVER_DEV_MODE": "1"})
        if one_port:
            ring.ports = ring.ports[:1] * num_stages
        ring.proxies = [stack.enter_context(Proxy(ring.ports[stage - 1])) for stage in range(num_stages)]
        yield stack.enter_context(ring)


@dataclass
class Chaos:
    """One disturbance after another, in a thread, until the time is over or it did enough; then everything is mended.

    Args:
        ring: of real processes; stage 0 is left alone.
        seed: of what, when and whom.
        only: what may happen; more often what is there more often.
        say: told what is done.
    """

    ring: ProxiedRing
    seed: int
    say: Callable[[str], None]
    in_flight: Callable[[], int]
    only: Sequence[str] = DISTURBANCES
    times: float = math.inf
    ends_at: float = math.inf
    done: Counter[str] = field(default_factory=Counter)
    histogram: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = time.monotonic()

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join(180)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self.done.total() < self.times and not self._ending.wait(self._rng.uniform(1, 10)):
                if time.monotonic() >= self.ends_at:
                    break
                self._disturb()
        except BaseException as error:  # noqa: BLE001  told by `end`
            self._error = error

    def _disturb(self) -> None:
        what = self._rng.choice(self.only)
        stage = self._rng.randrange(1, self.ring.num_stages)
        link = self._rng.randrange(self.ring.num_stages)  # by the stage behind it
        seconds = self._rng.uniform(0.5, 12)
        count = self.in_flight()
        self.done[what] += 1
        self.histogram[count // 8 * 8] += 1
        who = f"link to stage {link}" if what in ("cut", "hold one way", "hold both", "delay") else f"stage {stage}"
        self.say(f"{time.monotonic() - self._began:6.1f} s  {what}: {who}, {seconds:.1f} s, {count} requests in flight")
        proxy = self.ring.proxies[link]
        match what:
            case "kill":
                self._kill([stage])
            case "two kills":
                others = [other for other in range(1, self.ring.num_stages) if other != stage]
                self._kill([stage, *self._rng.sample(others, min(1, len(others)))])
            case "freeze":
                pid = self.ring.worker_pid(stage)
                os.kill(pid, signal.SIGSTOP)
                self._ending.wait(seconds)
                os.kill(pid, signal.SIGCONT)
            case "cut":
                proxy.cut()
                self._ending.wait(seconds)
            case "hold one way":
                proxy.hold(self._rng.choice(("to target", "from target")))
                self._ending.wait(seconds)
            case "hold both":
                proxy.hold("to target", "from target")
                self._ending.wait(seconds)
            case "delay":
                proxy.delay_s = self._rng.uniform(0.005, 0.05)
                self._ending.wait(seconds)
        proxy.mend()

    def _kill(self, stages: Sequence[int]) -> None:
        for stage in stages:
            self.ring.stages[stage].popen.kill()
        for process in [self.ring.restart_stage(stage) for stage in stages]:
            self._until_ready(process)

    def _until_ready(self, process: Process) -> None:
        """Or the end: a stage that is lost while it starts is somebody else's to start."""
        ends_at = time.monotonic() + 120
        while "catching up: compile_or_warm_up_model" not in process.text() and not self._ending.wait(0.2):
            assert process.popen.poll() is None, process.text()[-3000:]
            assert time.monotonic() < ends_at, process.text()[-3000:]


@dataclass
class Footprint:
    """Of the process that runs a stage's layers."""

    rss_mb: int
    threads: int
    files: int  # without the callers
    sockets: int  # among these files
    callers: int  # connections that came in: two of the successor's, and two of each stage that shares its port

    @classmethod
    def of(cls, pid: int) -> Footprint:
        status = Path(f"/proc/{pid}/status").read_text()
        values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        files = []
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                files.append(os.readlink(descriptor))
        sockets = sum(name.startswith("socket:") for name in files)
        connections = psutil.Process(pid).net_connections("tcp")
        ports = {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
        callers = sum(each.status != psutil.CONN_LISTEN and each.laddr.port in ports for each in connections)
        rss_mb, threads = int(values["VmRSS"].split()[0]) // 1024, int(values["Threads"])
        return cls(rss_mb, threads, len(files) - callers, sockets - callers, callers)


def footprints(ring: Ring) -> list[Footprint]:
    return [Footprint.of(ring.worker_pid(stage)) for stage in range(ring.num_stages)]


def describe(each: Sequence[Footprint]) -> str:
    return "; ".join(
        f"{f.rss_mb} MB, {f.threads} threads, {f.files} files, {f.sockets} sockets, {f.callers} callers" for f in each
    )


@dataclass
class Report:
    rounds: int = 0
    answers: int = 0
    problems: list[str] = field(default_factory=list)
    disturbances: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[int] = field(default_factory=Counter)
    footprints: list[list[Footprint]] = field(default_factory=list)


def soak(
    ring: ProxiedRing,
    seconds: float,
    seed: int,
    *,
    is_quiet: bool,
    say: Callable[[str], None],
    only: Sequence[str] = DISTURBANCES,
    times: float = math.inf,
    is_warm: bool = True,
) -> Report:
    """Rounds of clients until the time is over or enough was done; every answer is compared with the undisturbed.

    ``is_warm``: steps of every size come first, so that memory is held to a closer bound.
    """
    bodies = mixed_bodies(CONCURRENCY + CONCURRENCY // 2, seed)
    report = Report()

    def clients() -> Clients:
        return Clients(ring.url, str(ring.model), bodies, CONCURRENCY)

    if is_warm:
        warm_up(ring)
    expected: list[Stream] = clients().finish(900)
    report.problems += [stream.error for stream in expected if stream.error]
    report.problems += [f"undisturbed: {each}" for each in differences(clients().finish(900), expected)]
    until_idle(ring)
    report.footprints.append(footprints(ring))
    running = clients()
    ends_at = time.monotonic() + seconds
    chaos = Chaos(ring, seed, say, lambda: running.num_open, only, times, ends_at)
    if not is_quiet:
        chaos.start()
    while True:
        found = running.finish(max(0.0, ends_at - time.monotonic()) + 900)  # it may be disturbed all the time
        report.rounds += 1
        report.answers += len(found)
        problems = differences(found, expected)
        report.problems += [f"round {report.rounds}: {each}" for each in problems]
        for problem in problems:
            say(f"WRONG: {problem}")
        if time.monotonic() >= ends_at or chaos.done.total() >= times:
            break
        running = clients()
        if report.rounds % (20 if is_quiet else 4) == 0:
            report.footprints.append(footprints(ring))
            say(f"after {report.rounds} rounds: {describe(report.footprints[-1])}")
    if not is_quiet:
        chaos.end()
        report.problems += [f"after it: {each}" for each in differences(clients().finish(900), expected)]
    report.disturbances, report.in_flight = chaos.done, chaos.histogram
    until_idle(ring)
    report.footprints.append(footprints(ring))
    report.problems += leaks(report.footprints, MAX_GROWTH_WARM if is_warm else MAX_GROWTH_COLD)
    return report


def warm_up(ring: Ring) -> None:
    """One step of each number of rows, on every stage, and as many rows of logits on the last."""
    for num_rows in range(1, MAX_ROWS + 1):
        # Another first token each: no prefix is in the cache.
        body = {"prompt": [1000 + num_rows] + [100] * (num_rows - 1), "max_tokens": 1, "temperature": 0}
        body |= {"prompt_logprobs": 1, "stream": False}
        (stream,) = Clients(ring.url, str(ring.model), [body], 1).finish(60)
        assert not stream.error, stream.error


def leaks(seen: Sequence[Sequence[Footprint]], max_growth: float) -> list[str]:
    """What a stage holds at the end beyond what it held at first, in words. Also of a process that is new since.

    ``max_growth``: of memory, besides 100 MB.
    """
    problems = []
    for stage, (first, last) in enumerate(zip(seen[0], seen[-1], strict=True)):
        for name, slack in (("threads", 2), ("files", 8), ("sockets", 4)):
            before, after = getattr(first, name), getattr(last, name)
            if after > before + slack:
                problems.append(f"stage {stage} has {after} {name}, at first {before}")
        if last.callers > 2 * len(seen[0]):  # any stage may own a shared port by now
            problems.append(f"stage {stage} has {last.callers} callers")
        if last.rss_mb > first.rss_mb * max_growth + 100:
            problems.append(f"stage {stage} has {last.rss_mb} MB, at first {first.rss_mb}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[2] / ".demo" / "model")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", type=int, choices=(2, 3, 4), default=4)
    parser.add_argument(
        "--only", nargs="+", choices=sorted(set(DISTURBANCES)), default=DISTURBANCES, help="default: all"
    )
    parser.add_argument("--one-port", action="store_true", help="all stages share one; whoever owns it is killed too")
    parser.add_argument("--times", type=float, default=math.inf, help="end after so many disturbances")
    parser.add_argument("--quiet", action="store_true", help="no disturbance")
    parser.add_argument("--cold", action="store_true", help="without steps of every size before: minutes less")
    parser.add_argument("--fork", action="store_true", help="fork stages from a process that has imported vLLM: faster")
    args = parser.parse_args()
    with ExitStack() as stack:
        if args.fork:
            stages.fork_server = stack.enter_context(contextlib.closing(ForkServer(stages.VLLM)))
        return run(args)


def run(args: argparse.Namespace) -> int:
    with proxied(args.model, args.stages, one_port=args.one_port) as ring:
        say = partial(print, flush=True)
        report = soak(
            ring,
            args.minutes * 60,
            args.seed,
            is_quiet=args.quiet,
            say=say,
            only=args.only,
            times=args.times,
            is_warm=not args.cold,
        )
        print(json.dumps([{k: v for k, v in state.items() if k != "activations"} for state in states(ring)]))
    print(f"{report.rounds} rounds, {report.answers} answers, {len(report.problems)} wrong")
    print(f"disturbances: {dict(report.disturbances)}")
    print(f"requests in flight at each: {dict(sorted(report.in_flight.items()))}")
    for when, each in zip(("at first", "at the end"), (report.footprints[0], report.footprints[-1]), strict=True):
        print(f"{when}: {describe(each)}")
    for problem in report.problems:
        print(problem)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
