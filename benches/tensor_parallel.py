"""What tensor parallel ranks add to a step of a stage, against a stage of one, which does none of it.

Two tables, one run:

1. The local broadcast: from the leader's first byte until the follower, which does nothing but copy what came, has
   answered. This is all that a stage of two adds besides vLLM's own collectives. Frames of a decode step, then tensors
   of 64 KiB, 1 MiB and 8 MiB. Beside it the same frames through a pipe: the plainest way.
2. A tail of one rank and of two, one thread for each, as the second of two stages of a random model that is made on the
   spot: time in the stage (started to finished, observe/timings.py) of decode steps of one and of eight requests.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benches.common import DEFAULT_MODEL, PinnedRing, Ratios, begin, drive, print_table, prompts, settle
from benches.hop import SIZES, step_frames

from stagewire.observe.timings import STEP_TRACE_ENV
from stagewire.vllm_plugin.ranks.local_link import Block, Done, Follower, Followers, LeaderLink, RunStep
from stagewire.wire.codec import Frame
from stagewire.wire.messages import Step

NUM_LAYERS = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_MODEL, help="model whose tokenizer is used")
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the random model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=200, help="per size, way and round")
    parser.add_argument("--no-stages", action="store_true", help="the first table only")
    return parser.parse_args()


# ---- the local broadcast -------------------------------------------------------------------------------------------


def _follow(connection: Connection[Any, Any], block: Block) -> None:
    link = LeaderLink(connection, block)
    kept = bytearray(sum(SIZES.values()))
    while True:
        _, frames = link.receive()
        for frame in frames:
            kept[: frame.nbytes] = frame
        link.answer(Done(0))


def _follow_pipe(connection: Connection[Any, Any], num_frames: int) -> None:
    kept = bytearray(sum(SIZES.values()))
    while True:
        for _ in range(num_frames):
            connection.recv_bytes_into(kept)
        connection.send_bytes(b"done")


def through_block(leader: Followers, message: Step, payloads: Sequence[Frame]) -> float:
    began_ns = time.perf_counter_ns()
    leader.send(RunStep(message.digest, message.tensors), payloads)
    leader.settle(0)
    return (time.perf_counter_ns() - began_ns) / 1000


def through_pipe(connection: Connection[Any, Any], payloads: Sequence[Frame]) -> float:
    began_ns = time.perf_counter_ns()
    for payload in payloads:
        connection.send_bytes(payload)
    connection.recv_bytes()
    return (time.perf_counter_ns() - began_ns) / 1000


def measure_broadcast(options: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    loads = {"decode step": step_frames(2, 1, options.hidden_size, "float32")}
    for name, num_bytes in SIZES.items():
        loads[name] = step_frames(2, num_bytes // 2 // 4 // 256, 256, "float32")
    results = {name: Ratios() for name in loads}
    with ExitStack() as stack:
        block = Block()
        here, there = spawn.Pipe()
        pipe_here, pipe_there = spawn.Pipe()
        words, _ = spawn.Pipe(duplex=False)
        num_frames = len(loads["decode step"][1])
        follower = spawn.Process(target=_follow, args=(there, block), daemon=True)
        pipe_follower = spawn.Process(target=_follow_pipe, args=(pipe_there, num_frames), daemon=True)
        for process in (follower, pipe_follower):
            process.start()
            stack.callback(process.kill)
        leader = Followers([Follower(1, follower, here, words)], block)
        for _ in range(options.rounds + 1):  # the first one is not counted: it waits for the processes to start
            for name, (message, payloads) in loads.items():
                count = options.messages // 4 if name == "8 MiB" else options.messages
                ours = [through_block(leader, message, payloads) for _ in range(count)]
                theirs = [through_pipe(pipe_here, payloads) for _ in range(count)]
                results[name].add(statistics.median(ours), statistics.median(theirs))
    rows = []
    for name, (_, payloads) in loads.items():
        results[name].ours.pop(0)
        results[name].theirs.pop(0)
        num_bytes = sum(memoryview(payload).nbytes for payload in payloads)
        rows.append([name, str(num_bytes), *results[name].cells(".0f")])
    print_table(
        "From the leader's first byte to the follower's answer, medians in microseconds",
        ["frames", "bytes", "block", "pipe", "ratio", "spread"],
        rows,
    )


# ---- stages --------------------------------------------------------------------------------------------------------


class UnevenRing(PinnedRing):
    """The head is of one rank, the tail of ``num_ranks``."""

    num_ranks = 1

    def command(self, stage: int) -> list[str]:
        return [*super().command(stage), "--tensor-parallel-size", str(self.num_ranks if stage else 1)]


def in_tail_us(trace: Path, num_requests: int) -> float:
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    spans: list[float] = [
        (step["stages"][1][3] - step["stages"][1][2]) / 1000
        for step in steps
        if step["tokens"] == step["requests"] == num_requests
    ]
    return statistics.median(spans)


def measure_stages(options: argparse.Namespace) -> None:
    from support.models import make_llama

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sizes = {"hidden_size": options.hidden_size, "intermediate_size": 4 * options.hidden_size}
        heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
        model = make_llama(folder / "model", options.tokenizer, NUM_LAYERS, "500MB", **sizes, **heads)
        extra = [
            *("--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "256", "--enforce-eager"),
            *("--max-num-seqs", "16", "--block-size", "32", "--kv-cache-memory-bytes", "128M"),
        ]
        ranges = (f"0-{NUM_LAYERS // 2}", f"{NUM_LAYERS // 2}-{NUM_LAYERS}")
        rings: dict[int, UnevenRing] = {}
        for num_ranks in (1, 2):
            made = UnevenRing(model, ranges, extra, {STEP_TRACE_ENV: str(folder / f"{num_ranks}.jsonl")})
            made.num_ranks = num_ranks
            rings[num_ranks] = stack.enter_context(made)
        for index in range(options.rounds):
            for ring in rings.values():
                settle([stage.pid for each in rings.values() for stage in each.stages])
                # One alone; sixteen, because two stages work on halves of them in turn.
                for count in (1, 16):
                    drive(ring.url, model, prompts(count, 12, index), 40)
        rows = []
        for count in (1, 8):
            one, two = (in_tail_us(folder / f"{num_ranks}.jsonl", count) for num_ranks in (1, 2))
            rows.append([str(count), f"{one:.0f}", f"{two:.0f}", f"{two / one:.2f}"])
    print_table(
        f"Decode steps in a tail of {NUM_LAYERS // 2} layers, hidden size {options.hidden_size}, medians, microseconds",
        ["requests", "one rank", "two ranks", "ratio"],
        rows,
    )


def main() -> None:
    options = parse_arguments()
    begin(options.tokenizer)
    measure_broadcast(options)
    if not options.no_stages:
        measure_stages(options)


if __name__ == "__main__":
    main()
