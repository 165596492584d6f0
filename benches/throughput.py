"""Output tokens per second of a Stagewire ring against stock vLLM's own pipeline parallelism, on the same cores.

Both get the same arguments (dtype, eager or compiled, batch limits, block size, number of KV blocks), the same layer
split, one OpenMP thread per stage and the same cores. Stock pins each worker's OpenMP threads to its core
(VLLM_CPU_OMP_THREADS_BIND) and leaves its API server and engine free; how the ring is pinned is --pin:

    stages   each stage's processes on its own core, as `stagewire up` does
    none     not at all

Each round starts both servers anew, in turn the one and the other first, and drives them alternately: how fast a
process reads its weights depends on where its pages lie. Of rings with the same settings, side by side, the one
started first was seen to be 8 % slower than the last for as long as they ran. Each round has new prompts, the same
for both, and every other round the order is reversed too. A pair of runs waits for a quiet machine and is repeated
when other programs used it meanwhile. Each side starts from idle, and stock is frozen while the ring is measured: its
processes spin for a second after their last message.

Stock pipeline parallelism dies on CPU with --enforce-eager at its first request: its receive buffers are allocated by a
warm-up that eager mode skips. stock_pp_worker.py allocates them and changes nothing else; it is given to stock through
vLLM's own --worker-cls, in eager mode only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benches.common import (
    DEFAULT_MODEL,
    ROOT,
    Foreign,
    PinnedRing,
    Ratios,
    Ring,
    SingleProcess,
    begin,
    cpu_seconds,
    drive,
    even_ranges,
    idle_share,
    print_table,
    prompts,
    set_aside,
    settle,
    wait_until_quiet,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--words", type=int, default=24, help="length of the prompts")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compiled", action="store_true", help="without --enforce-eager; needs a C++ compiler")
    parser.add_argument("--kv-cache-memory-bytes", default="512M", help="of each stage, on both sides")
    parser.add_argument("--pin", choices=("stages", "none"), default="stages")
    parser.add_argument("--max-foreign", type=float, default=0.04, help="share of the machine; above, a pair repeats")
    parser.add_argument("--repeats", type=int, default=6, help="at most, of a disturbed pair; the last one counts")
    parser.add_argument("--max-wait", type=float, default=60.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--idle-window", type=float, default=5.0, help="seconds in which idle CPU use is measured")
    return parser.parse_args()


def settings(options: argparse.Namespace) -> list[str]:
    return [
        *("--dtype", options.dtype, "--max-model-len", "1024", "--max-num-batched-tokens", "512"),
        *("--max-num-seqs", "64", "--block-size", "32", "--kv-cache-memory-bytes", options.kv_cache_memory_bytes),
        "--disable-uvicorn-access-log",
        *(() if options.compiled else ("--enforce-eager",)),
    ]


def cores_of(num_stages: int) -> list[str]:
    """One core for each stage, in order; with fewer cores than stages they are shared in turn."""
    cores = sorted(os.sched_getaffinity(0))
    return [str(cores[stage % len(cores)]) for stage in range(num_stages)]


@dataclass(frozen=True)
class Run:
    tokens_per_s: float
    cpu_ms_per_token: float


@dataclass(frozen=True)
class Side:
    """One of the two servers; ``freezes``: the other one's process, while this one is measured."""

    name: str
    url: str
    pids: Sequence[int]
    freezes: int | None

    def run(self, model: Path, texts: Sequence[str], num_tokens: int) -> Run:
        settle(self.pids)
        with set_aside(self.freezes):
            before = sum(map(cpu_seconds, self.pids))
            took_s = drive(self.url, model, texts, num_tokens)
            used_s = sum(map(cpu_seconds, self.pids)) - before
        total = len(texts) * num_tokens
        return Run(total / took_s, 1000 * used_s / total)


def measure(ring: Ring, stock: SingleProcess, findings: Findings, index: int) -> None:
    """One round."""
    options = findings.options
    shares = [idle_share(stage.pid, options.idle_window) for stage in ring.stages]
    stock_share = idle_share(stock.process.pid, options.idle_window)
    print(
        f"idle, share of a core: ring {' '.join(f'{share:.1%}' for share in shares)}, stock {stock_share:.1%}",
        flush=True,
    )
    warm_up = prompts(max(options.concurrency), options.words, seed=10_000)
    for url in (ring.url, stock.url):
        drive(url, options.model, warm_up, 8)
    sides = [
        Side("ring", ring.url, [stage.pid for stage in ring.stages], stock.process.pid),
        Side("stock", stock.url, [stock.process.pid], None),
    ]
    for concurrency in options.concurrency:
        findings.add_pair(index, concurrency, sides)


@dataclass
class Findings:
    """Pairs of runs, per number of requests."""

    options: argparse.Namespace
    num_repeated: int = 0
    speed: dict[int, Ratios] = field(default_factory=dict)
    cpu: dict[int, Ratios] = field(default_factory=dict)

    def add_pair(self, index: int, concurrency: int, sides: Sequence[Side]) -> None:
        for attempt in range(self.options.repeats + 1):
            seed = (index * 100 + attempt) * 100 + concurrency
            texts = prompts(concurrency, self.options.words, seed)
            order = sides if (index + attempt) % 2 else sides[::-1]
            wait_until_quiet(self.options.max_foreign, self.options.max_wait)
            with Foreign() as foreign:
                runs = {side.name: side.run(self.options.model, texts, self.options.tokens) for side in order}
            ours, theirs = runs["ring"], runs["stock"]
            is_disturbed = foreign.share > self.options.max_foreign
            print(
                f"round {index + 1}, {concurrency} requests: ring {ours.tokens_per_s:.1f}, stock "
                f"{theirs.tokens_per_s:.1f} tok/s, ratio {ours.tokens_per_s / theirs.tokens_per_s:.3f}; "
                f"others used {foreign.share:.0%} of the machine{', again' if is_disturbed else ''}",
                flush=True,
            )
            if not is_disturbed:
                break
            self.num_repeated += attempt < self.options.repeats
        self.speed.setdefault(concurrency, Ratios()).add(ours.tokens_per_s, theirs.tokens_per_s)
        self.cpu.setdefault(concurrency, Ratios()).add(ours.cpu_ms_per_token, theirs.cpu_ms_per_token)

    def print(self) -> None:
        options = self.options
        print_table(
            f"{options.stages} stages, {options.dtype}, {'compiled' if options.compiled else 'eager'}, "
            f"{options.tokens} tokens per request, {self.num_repeated} pairs repeated, ring pinned: {options.pin}",
            ["requests", "pairs", "ring tok/s", "stock PP tok/s", "ratio", "spread", "CPU ms/token: ring", "stock"],
            [
                [str(concurrency), str(len(speed.ours)), *speed.cells(".1f"), *self.cpu[concurrency].cells(".2f")[:2]]
                for concurrency, speed in self.speed.items()
            ],
        )


def main() -> None:
    options = parse_arguments()
    begin(options.model)
    cores = cores_of(options.stages)
    extra = settings(options)
    stock_env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(cores)}
    stock_extra = [*extra, "--pipeline-parallel-size", str(options.stages)]
    if not options.compiled:
        stock_extra += ["--worker-cls", "benches.stock_pp_worker.EagerPipelineWorker"]
        stock_env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        print("stock: its receive buffers are allocated at load, which it forgets in eager mode (stock_pp_worker.py)")
    pins = cores if options.pin == "stages" else ()
    ranges = even_ranges(options.model, options.stages)
    findings = Findings(options)
    try:
        for index in range(options.rounds):
            ring = PinnedRing(options.model, ranges, extra, cores=pins)
            stock = SingleProcess(options.model, stock_extra, stock_env)
            with contextlib.ExitStack() as servers:
                for server in (ring, stock) if index // 2 % 2 else (stock, ring):
                    servers.enter_context(server)
                measure(ring, stock, findings, index)
    finally:  # what was measured counts, also when the machine fails a server later
        findings.print()


if __name__ == "__main__":
    main()
