"""How long a ring is without a lost stage: from the kill to the next token, against that stage's own start.

    python -m benches.recovery

Each round kills every stage but the head, one after the other, in three ways, in another order each time:
    start      while nobody asks anything; from the stage's start to /ready and the answer to one short request
               for log-probabilities: what a start takes, whatever was lost
    killed     clients wait for answers; the stage is started again at once; from the kill to /ready and the next token
    standby    the same with a process of `--pipeline-standby` that has loaded before
What comes after /ready is what clients wait for beyond a stage's start; of a standby it is recomputation. A start's own
is the difference that a first step makes: a fresh tail compiles what log-probabilities need, as any vLLM process does.
A killed process is noticed at once; `tests/vllm/test_cut_links.py` says how fast a frozen one or a cut link is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import httpx
from benches.common import DEFAULT_MODEL, Ring, begin, even_ranges, print_table, settle, wait_until_quiet

from support.disturbed import Clients, mixed_bodies
from support.inside import until_idle
from support.stages import Process

WAYS = ("start", "killed", "standby")
DEADLINE_S = 120.0
SHORT = {"prompt": "Once", "max_tokens": 1, "temperature": 0, "logprobs": 1, "return_token_ids": True}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=8, help="open when a stage is killed")
    parser.add_argument("--tokens", type=int, default=40, help="received by then, all requests together")
    parser.add_argument("--max-foreign", type=float, default=0.06, help="share of the machine to wait for")
    parser.add_argument("--max-wait", type=float, default=60.0, help="seconds to wait for it")
    return parser.parse_args()


def settings() -> list[str]:
    return [
        *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "512", "--max-num-seqs", "32"),
        *("--block-size", "32", "--kv-cache-memory-bytes", "250M", "--enforce-eager"),
    ]


class Bench:
    def __init__(self, ring: Ring, options: argparse.Namespace) -> None:
        self._ring, self._options = ring, options
        self._http = httpx.Client(base_url=ring.url, trust_env=False, timeout=DEADLINE_S)
        self._bodies = mixed_bodies(options.requests, seed=3)
        # by way and what: seconds, in the order of rounds and stages, which is the same for all ways
        self.took: dict[tuple[str, str], list[float]] = defaultdict(list)

    def _clients(self) -> Clients:
        return Clients(self._ring.url, str(self._ring.model), self._bodies, self._options.requests)

    def warm_up(self) -> None:
        """Twice, for the steps of a first run, and those of one that finds prefixes in the cache."""
        for _ in range(2):
            assert not [stream.error for stream in self._clients().finish() if stream.error]

    def run(self, way: str, stage: int) -> None:
        wait_until_quiet(self._options.max_foreign, self._options.max_wait)
        standby = self._start_standby(stage) if way == "standby" else None
        running = None
        if way != "start":
            running = self._clients()
            running.wait_for_tokens(self._options.tokens)
        victim = self._ring.stages[stage]
        victim.popen.kill()
        began_at = time.monotonic()
        if standby is None:
            self._ring.restart_stage(stage)
        else:
            victim.wait()
            self._ring.stages[stage] = standby
        self._until_ready(503)
        noticed_at = time.monotonic()
        self._until_ready(200)
        self.took[way, "ready"].append(time.monotonic() - began_at)
        self.took[way, "noticed"].append(noticed_at - began_at)
        if running is None:
            running = Clients(self._ring.url, str(self._ring.model), [SHORT], 1)
        running.wait_for_tokens(1)
        self.took[way, "token"].append(time.monotonic() - began_at)
        errors = [stream.error for stream in running.finish() if stream.error]
        assert not errors, errors
        until_idle(self._ring)
        shown = ", ".join(f"{what} {each[-1]:.2f} s" for (of, what), each in self.took.items() if of == way)
        print(f"{way} {stage}: {shown}", flush=True)

    def _start_standby(self, stage: int) -> Process:
        standby = self._ring.start_stage(stage, [*self._ring.command(stage), "--pipeline-standby"])
        self._ring.wait_for(lambda: f"Stage {stage}: loaded layers" in standby.text(), DEADLINE_S)
        self._ring.stages.remove(standby)
        settle([standby.pid])
        return standby

    def _until_ready(self, code: int) -> None:
        ends_at = time.monotonic() + DEADLINE_S
        while self._http.get("/ready").status_code != code:
            assert time.monotonic() < ends_at, f"/ready is not {code}"
            time.sleep(0.02)


def row(name: str, values: Sequence[float]) -> list[str]:
    return [name, *(f"{each:.2f}" for each in (statistics.median(values), min(values), max(values)))]


def main() -> None:
    options = parse_arguments()
    begin(options.model)
    with Ring(
        options.model, even_ranges(options.model, options.stages), settings(), {"VLLM_SERVER_DEV_MODE": "1"}
    ) as ring:
        bench = Bench(ring, options)
        bench.warm_up()
        for index in range(options.rounds):
            for stage in range(1, options.stages):
                for way in WAYS if index % 2 else reversed(WAYS):
                    bench.run(way, stage)
    took = bench.took
    names = {
        "start: ready": took["start", "ready"],
        "start: first token": took["start", "token"],
        "start: after /ready": _less(took["start", "token"], took["start", "ready"]),
        "killed: noticed": took["killed", "noticed"],
        "killed: ready": took["killed", "ready"],
        "killed: next token": took["killed", "token"],
        "killed: after /ready": _less(took["killed", "token"], took["killed", "ready"]),
        "standby: noticed": took["standby", "noticed"],
        "standby: ready": took["standby", "ready"],
        "standby: next token": took["standby", "token"],
        "standby: after /ready": _less(took["standby", "token"], took["standby", "ready"]),
    }
    print_table(
        f"{options.stages} stages, {options.requests} requests, {options.rounds} rounds, seconds",
        ["", "median", "least", "most"],
        [row(name, values) for name, values in names.items()],
    )


def _less(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(some, others, strict=True)]


if __name__ == "__main__":
    main()
