"""The cost of a hop: what a pipeline of independent processes adds to a token, and where.

Four tables, one run:

1. Time per output token of one request (greedy) on N stages against one stock process with one stage's threads and
   one core. Stages work one after the other on one request, so without any cost of hops the two are equal. Taken from
   two requests of different lengths, which cancels the prefill and the HTTP exchange; interleaved.
2. Where it goes, from the step trace at the head (observe/timings.py), medians in microseconds over decode steps of one
   request. Only instants of one stage's clock are subtracted.
       wire      (head sent -> result back, minus what passes between `received` and `sent` on the other stages) / hops:
                 both threads' queues, the codec, ZeroMQ, the kernel
       receive   received -> started: hand-over to the model's thread, decoding the schedule
       send      finished -> sent: encoding
       hop       (head sent -> result back, minus finished - received of the other stages) / hops
       compute   started -> finished, summed over the stages
       head      result back -> next step begins: vLLM's scheduler and output handling, which one process has too
3. The floor: half the round trip of the same frames (those of a decode step, then two tensors of 64 KiB, 1 MiB and
   8 MiB in all) between two processes: raw ZeroMQ (DEALER/ROUTER over TCP) and our codec and transport, interleaved.
   Also with a pause before each message, as long as a forward pass: what waking up idle cores costs anybody, and so the
   floor of a hop in a pipeline of one request. In a stage the ring's thread and the model's thread are two: `wire` has
   their two hand-overs on top.
4. The same frames over plain TCP, over a Unix socket as between stages on loopback, and under CURVE as with a key.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from benches.common import (
    DEFAULT_MODEL,
    Foreign,
    PinnedRing,
    Ratios,
    Ring,
    SingleProcess,
    begin,
    drive,
    even_ranges,
    idle_share,
    print_table,
    prompts,
    set_aside,
    settle,
    wait_until_quiet,
)

from stagewire.checkpoint.model_config import read_config
from stagewire.config import Address
from stagewire.observe.timings import STEP_TRACE_ENV
from stagewire.ring.rules.actions import Side
from stagewire.ring.transport import callers
from stagewire.ring.transport.interface import Connected, Received
from stagewire.ring.transport.security import OPEN, RingKey, Security
from stagewire.ring.transport.sockets import COPY_THRESHOLD_BYTES
from stagewire.ring.transport.zmq_transport import ZmqTransport
from stagewire.wire.codec import Frame, decode, encode
from stagewire.wire.messages import Bye, StageTiming, Step, TensorSpec

HOST = "127.0.0.1"
# An echo sends backward what a ring only sends forward.
callers.MAX_BACKWARD_BYTES = 1 << 30
callers.CALLER_BURST_BYTES = callers.CALLERS_BURST_BYTES = 1 << 40
SIZES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "8 MiB": 8 << 20}
AFTER_PAUSE = "decode step, after a pause"
DEADLINE_S = 20.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 4], help="none: the floor only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", type=int, default=16, help="output tokens of the short request")
    parser.add_argument("--long", type=int, default=112, help="output tokens of the long request")
    parser.add_argument("--messages", type=int, default=200, help="per size, side and round")
    parser.add_argument("--pause-ms", type=float, default=10.0, help="before a message, where the table says so")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-foreign", type=float, default=0.04, help="share of the machine; above, a pair repeats")
    parser.add_argument("--repeats", type=int, default=6, help="at most, of a disturbed pair; the last one counts")
    parser.add_argument("--max-wait", type=float, default=60.0, help="seconds to wait for a quiet machine")
    return parser.parse_args()


# ---- the floor -----------------------------------------------------------------------------------------------------


def step_frames(num_stages: int, num_rows: int, hidden: int, dtype: str) -> tuple[Step, list[Frame]]:
    """A decode step as it looks in the middle of the ring: header, a schedule's worth of bytes, two tensors."""
    item_bytes = 4 if dtype == "float32" else 2
    specs = [TensorSpec(name, dtype, [num_rows, hidden]) for name in ("hidden_states", "residual")]
    now = time.monotonic_ns()
    timings = [StageTiming(stage, now, now, now, now, 50_000) for stage in range(max(1, num_stages - 1))]
    schedule = bytes(96 + 48 * min(num_rows, 64))  # about what one decoding request takes
    tensors: list[Frame] = [memoryview(bytearray(num_rows * hidden * item_bytes)) for _ in specs]
    return Step(1, 1, num_rows, 1 << 60, False, specs, timings), [schedule, *tensors]


def _pin(index: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})


def _raw_echo(port: Any) -> None:
    _pin(1)
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port.send(router.bind_to_random_port(f"tcp://{HOST}"))
    while True:
        _raw_send(router, [frame.buffer for frame in router.recv_multipart(copy=False)])


def _raw_send(sock: Any, frames: Sequence[Frame]) -> None:
    """Large frames without a copy, as the fastest plain pyzmq program would."""
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        is_small = memoryview(frame).nbytes < COPY_THRESHOLD_BYTES
        sock.send(frame, 0 if index == last else zmq.SNDMORE, copy=is_small)


def _our_echo(port: Any, security: Security) -> None:
    _pin(1)
    transport = ZmqTransport(HOST, 1 << 30, security)
    port.send(transport.bind(0))
    while True:
        for event in transport.poll(DEADLINE_S):
            if isinstance(event, Received):
                message, payloads = decode(event.frames)
                if isinstance(message, Bye):
                    return
                transport.send(Side.SUCCESSOR, event.peer, encode(message, payloads))


@dataclass
class RawPing:
    port: int

    def __post_init__(self) -> None:
        self._context: Any = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        self._dealer.connect(f"tcp://{HOST}:{self.port}")

    def half_us(self, message: Step, payloads: Sequence[Frame], count: int, pause_s: float) -> float:
        frames = encode(message, payloads)  # once: a raw program has no codec
        times = []
        for _ in range(count):
            time.sleep(pause_s)
            began_ns = time.perf_counter_ns()
            _raw_send(self._dealer, frames)
            self._dealer.recv_multipart(copy=False)
            times.append(time.perf_counter_ns() - began_ns)
        return statistics.median(times) / 2000

    def close(self) -> None:
        self._dealer.close(0)
        self._context.term()


@dataclass
class OurPing:
    port: int
    security: Security

    def __post_init__(self) -> None:
        self._transport = ZmqTransport(HOST, 1 << 30, self.security)
        self._transport.connect(Side.PREDECESSOR, Address(HOST, self.port))
        self._await(Connected)

    def _await(self, kind: type[Connected] | type[Received]) -> Connected | Received:
        ends_at = time.monotonic() + DEADLINE_S
        while time.monotonic() < ends_at:
            for event in self._transport.poll(1.0):
                if isinstance(event, kind):
                    return event
        raise TimeoutError(f"no {kind.__name__} within {DEADLINE_S:.0f} s")

    def half_us(self, message: Step, payloads: Sequence[Frame], count: int, pause_s: float) -> float:
        times = []
        for _ in range(count):
            time.sleep(pause_s)
            began_ns = time.perf_counter_ns()
            self._transport.send(Side.PREDECESSOR, b"", encode(message, payloads))
            event = self._await(Received)
            assert isinstance(event, Received)
            decode(event.frames)
            times.append(time.perf_counter_ns() - began_ns)
        return statistics.median(times) / 2000

    def close(self) -> None:
        self._transport.send(Side.PREDECESSOR, b"", encode(Bye("done")))
        self._transport.close()


def _start_echo(stack: ExitStack, target: Callable[..., None], *arguments: Any) -> int:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    stack.callback(process.kill)
    if not here.poll(DEADLINE_S):
        raise TimeoutError("the echo process did not start")
    port: int = here.recv()
    return port


def _loads(options: argparse.Namespace) -> dict[str, tuple[Step, list[Frame]]]:
    hidden = int(read_config(options.model)["hidden_size"])
    decode_step = step_frames(2, 1, hidden, options.dtype)
    loads = {"decode step": decode_step, AFTER_PAUSE: decode_step}
    for name, num_bytes in SIZES.items():
        loads[name] = step_frames(2, num_bytes // 2 // 4 // 256, 256, "float32")
    return loads


def measure_security(options: argparse.Namespace) -> None:
    """Prints what Unix sockets and CURVE cost beside plain TCP, measured in turns."""
    loads = _loads(options)
    affinity = os.sched_getaffinity(0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        kinds = {
            "plain TCP": OPEN,
            "Unix socket": Security.of_folder(folder),
            "CURVE": Security(RingKey(b"l" * 32, b"c" * 32)),
        }
        ports = {kind: _start_echo(stack, _our_echo, security) for kind, security in kinds.items()}
        _pin(0)
        stack.callback(os.sched_setaffinity, 0, affinity)
        pings = {kind: OurPing(ports[kind], security) for kind, security in kinds.items()}
        found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in loads}
        for index in range(options.rounds):
            for name, (message, payloads) in loads.items():
                pause_s = options.pause_ms / 1000 if name == AFTER_PAUSE else 0.0
                is_slow = pause_s > 0 or sum(map(len, payloads)) >= 1 << 22
                wait_until_quiet(options.max_foreign, options.max_wait)
                for kind in [*kinds][:: 1 if index % 2 else -1]:
                    count = options.messages // 4 if is_slow else options.messages
                    found[name][kind].append(pings[kind].half_us(message, payloads, count, pause_s))
        for ping in pings.values():
            ping.close()
    rows = []
    for name, times in found.items():
        num_bytes = sum(memoryview(frame).nbytes for frame in encode(*loads[name]))
        plain, *others = (statistics.median(each) for each in times.values())
        added = [f"{other - plain:+.0f}" for other in others]
        rate = f"{num_bytes / (others[-1] * 1e-6) / 1e9:.2f}"
        rows.append([name, str(num_bytes), *(f"{each:.0f}" for each in (plain, *others)), *added, rate])
    print_table(
        "One way between two processes, by how the link is protected, microseconds",
        ["message", "bytes", *kinds, "Unix socket adds", "CURVE adds", "CURVE, GB/s"],
        rows,
    )


def measure_floor(options: argparse.Namespace) -> float:
    """Prints table 3; returns the raw half round trip of a decode step after a pause, in microseconds."""
    loads = _loads(options)
    results = {name: Ratios() for name in loads}
    affinity = os.sched_getaffinity(0)
    with ExitStack() as stack:
        ports = []
        for target, arguments in ((_raw_echo, ()), (_our_echo, (OPEN,))):
            ports.append(_start_echo(stack, target, *arguments))
        _pin(0)
        stack.callback(os.sched_setaffinity, 0, affinity)
        raw, ours = RawPing(ports[0]), OurPing(ports[1], OPEN)
        for index in range(options.rounds):
            for name, (message, payloads) in loads.items():
                pause_s = options.pause_ms / 1000 if name == AFTER_PAUSE else 0.0
                is_slow = pause_s > 0 or sum(map(len, payloads)) >= 1 << 22
                count = options.messages // 4 if is_slow else options.messages
                wait_until_quiet(options.max_foreign, options.max_wait)
                pair = [raw.half_us, ours.half_us]
                found = [each(message, payloads, count, pause_s) for each in (pair if index % 2 else pair[::-1])]
                theirs, mine = found if index % 2 else found[::-1]
                results[name].add(mine, theirs)
        raw.close()
        ours.close()
    rows = []
    for name, (message, payloads) in loads.items():
        frames = encode(message, payloads)
        num_bytes = sum(memoryview(frame).nbytes for frame in frames)
        rows.append([name, str(len(frames)), str(num_bytes), *results[name].cells(".0f")])
    print_table(
        "One way between two processes (half a round trip), microseconds",
        ["message", "frames", "bytes", "codec + transport", "raw ZeroMQ", "ratio", "spread"],
        rows,
    )
    return statistics.median(results[AFTER_PAUSE].theirs)


# ---- stages --------------------------------------------------------------------------------------------------------


def settings(options: argparse.Namespace) -> list[str]:
    return [
        *("--dtype", options.dtype, "--max-model-len", "1024", "--max-num-batched-tokens", "256"),
        *("--max-num-seqs", "16", "--block-size", "32", "--kv-cache-memory-bytes", "256M", "--enforce-eager"),
        "--disable-uvicorn-access-log",
    ]


def ms_per_token(url: str, options: argparse.Namespace, seed: int) -> float:
    """Of one request that runs alone, from its short and its long form."""
    text = prompts(1, 24, seed)
    short, long = (drive(url, options.model, text, tokens) for tokens in (options.short, options.long))
    num_tokens: int = options.long - options.short
    return 1000 * (long - short) / num_tokens


def cores_of(num_stages: int) -> list[str]:
    """As the launcher pins them: a core each if there are enough, else not at all."""
    cores = sorted(os.sched_getaffinity(0))
    return [str(core) for core in cores[:num_stages]] if len(cores) >= num_stages else []


def trace_row(num_stages: int, trace: Path, raw_us: float) -> list[str]:
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    decode_steps = [step for step in steps if step["tokens"] == step["requests"] == 1]
    wire, receive, send, hop, compute, head = [], [], [], [], [], []
    for step, following in zip(decode_steps, [*decode_steps[1:], None], strict=True):
        first, *others = step["stages"]
        away = step["returned_ns"] - first[4]
        wire.append((away - sum(sent - received for _, received, _, _, sent, _ in others)) / num_stages)
        hop.append((away - sum(finished - received for _, received, _, finished, _, _ in others)) / num_stages)
        receive += [started - received for _, received, started, _, _, _ in others]
        compute.append(sum(finished - started for _, _, started, finished, _, _ in step["stages"]))
        send += [sent - finished for _, _, _, finished, sent, _ in step["stages"]]
        if following is not None and following["step"] == step["step"] + 1:
            head.append(following["stages"][0][2] - step["returned_ns"])
    medians = [statistics.median(each) / 1000 for each in (hop, wire, receive, send, compute, head)]
    return [
        str(num_stages),
        str(len(decode_steps)),
        *(f"{median:.0f}" for median in medians),
        f"{raw_us:.0f}",
        f"{medians[0] / raw_us:.2f}",
    ]


def measure_stages(options: argparse.Namespace, raw_us: float) -> None:
    extra = settings(options)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        one_core = {"VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))}
        single = stack.enter_context(SingleProcess(options.model, extra, one_core))
        rings: dict[int, Ring] = {}
        for count in options.stages:
            env = {STEP_TRACE_ENV: str(folder / f"{count}.jsonl")}
            made = PinnedRing(options.model, even_ranges(options.model, count), extra, env, cores=cores_of(count))
            rings[count] = stack.enter_context(made)
        for url in (single.url, *(ring.url for ring in rings.values())):
            ms_per_token(url, options, seed=9999)
        idle = [max(idle_share(stage.pid, 2.0) for stage in ring.stages) for ring in rings.values()]
        print(f"idle, share of a core: one process {idle_share(single.process.pid, 2.0):.1%}, rings {max(idle):.1%}")
        results = {count: Ratios() for count in rings}
        num_repeated = 0
        for index in range(options.rounds):
            for count, ring in rings.items():
                for attempt in range(options.repeats + 1):
                    seed = (index * 10 + attempt) * 10 + count

                    def on_ring(ring: Ring = ring, seed: int = seed) -> float:
                        settle([stage.pid for stage in ring.stages])
                        with set_aside(single.process.pid):
                            return ms_per_token(ring.url, options, seed)

                    def on_one(seed: int = seed) -> float:
                        settle([single.process.pid])
                        return ms_per_token(single.url, options, seed)

                    wait_until_quiet(options.max_foreign, options.max_wait)
                    with Foreign() as foreign:
                        if (index + attempt) % 2:
                            ours, theirs = on_ring(), on_one()
                        else:
                            theirs, ours = on_one(), on_ring()
                    print(
                        f"round {index + 1}: {count} stages {ours:.2f}, one process {theirs:.2f} ms per token; "
                        f"others used {foreign.share:.0%} of the machine",
                        flush=True,
                    )
                    if foreign.share <= options.max_foreign:
                        break
                    num_repeated += attempt < options.repeats
                results[count].add(ours, theirs)
        print_table(
            f"Time per output token, one request, {options.dtype}, eager, {options.rounds} rounds "
            f"({num_repeated} pairs repeated), milliseconds",
            ["stages", "stages", "one process, one thread", "ratio", "spread"],
            [[str(count), *each.cells(".2f")] for count, each in results.items()],
        )
        print_table(
            "Of a decode step, medians in microseconds; raw ZeroMQ: a decode step after a pause",
            ["stages", "steps", "hop", "wire", "receive", "send", "compute", "head", "raw ZeroMQ", "hop / raw"],
            [trace_row(count, folder / f"{count}.jsonl", raw_us) for count in rings],
        )


def main() -> None:
    options = parse_arguments()
    begin(options.model)
    raw_us = measure_floor(options)
    measure_security(options)
    if options.stages:
        measure_stages(options, raw_us)


if __name__ == "__main__":
    main()
