"""What the HTTP front costs: the same requests through `stagewire front` and to the head directly, interleaved.

1. Before a fake head that answers at once and streams what it is asked for, so that nothing but the front is measured:
       request    microseconds from sending a small completion request to its whole answer, on a kept connection
       event      microseconds from the head's sending of an event to the client's having it, events some ms apart
       flood      thousands of events per second when the head sends as fast as it can: per connection, and over many
   and the front's own processor time for each.
2. Before a real ring of 2 stages: time to the first token and between tokens of one streamed request, and tokens per
   second of many.

Head, front and client run on the same machine. Within a round both sides are measured one after the other, in turns;
the ratio is taken within a pair, its median and spread over the rounds are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
import uvloop
from benches.common import (
    DEFAULT_MODEL,
    Ratios,
    Ring,
    begin,
    cpu_seconds,
    even_ranges,
    print_table,
    prompts,
    settle,
    wait_until_quiet,
)

from stagewire.front.server import listen

DEADLINE_S = 30.0
EVENT = '{"id":"cmpl-0123456789","object":"text_completion","choices":[{"index":0,"text":" word","logprobs":null}]}'


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=300, help="small requests per side and round")
    parser.add_argument("--events", type=int, default=200, help="paced events per side and round")
    parser.add_argument("--pace-ms", type=float, default=4.0, help="between two of them")
    parser.add_argument("--flood", type=int, default=20000, help="events as fast as possible, per side and round")
    parser.add_argument("--streams", type=int, default=32, help="connections of the flood over many")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 16], help="on the ring; none: without a ring")
    parser.add_argument("--tokens", type=int, default=64, help="of each request to the ring")
    parser.add_argument("--max-foreign", type=float, default=0.06, help="share of the machine to wait for")
    parser.add_argument("--max-wait", type=float, default=60.0, help="seconds to wait for it")
    return parser.parse_args()


# ---- a head that costs almost nothing ------------------------------------------------------------------------------


async def fake_head(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    """/once answers; /stream/COUNT/PACE_MS sends so many events, each with the instant it was sent."""
    while (await receive()).get("more_body"):
        pass
    _, kind, *numbers = scope["path"].split("/")
    headers = [(b"content-type", b"application/json" if kind == "once" else b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if kind == "stream":
        for _ in range(int(numbers[0])):
            if float(numbers[1]):
                await asyncio.sleep(float(numbers[1]) / 1000)
            event = f"data: {time.monotonic_ns()} {EVENT}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": EVENT.encode() if kind == "once" else b""})


def serve_fake_head(address: Any) -> None:
    with listen("127.0.0.1", 0) as sock:
        address.put(sock.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(fake_head, lifespan="off", log_config=None, access_log=False))
        uvloop.run(server.serve(sockets=[sock]))


@contextlib.contextmanager
def running_fake_head() -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    process = context.Process(target=serve_fake_head, args=(address,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{address.get(timeout=DEADLINE_S)}"
    finally:
        process.terminate()
        process.join(DEADLINE_S)


@contextlib.contextmanager
def running_front(head: str) -> Iterator[tuple[str, int]]:
    """`stagewire front --head`; its URL and pid."""
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    stagewire = str(Path(sys.executable).parent / "stagewire")
    command = [stagewire, "front", "--head", head, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            _wait_for(port, process)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until the front answers /health; the socket is bound before, so a connection waits in its backlog."""
    ends_at = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends_at and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the front did not answer on port {port} within {DEADLINE_S:g} s")


# ---- what is measured ----------------------------------------------------------------------------------------------


async def request_us(url: str, count: int) -> float:
    """Median microseconds of a small request."""
    body = json.dumps({"model": "m", "prompt": "San Francisco is a", "max_tokens": 1})
    took = []
    async with aiohttp.ClientSession() as client:
        for _ in range(count):
            began_at = time.perf_counter()
            async with client.post(f"{url}/once", data=body) as response:
                await response.read()
            took.append(time.perf_counter() - began_at)
    return statistics.median(took) * 1e6


async def event_us(url: str, count: int, pace_ms: float) -> float:
    """Median microseconds of an event on its way."""
    took = []
    async with aiohttp.ClientSession() as client, client.post(f"{url}/stream/{count}/{pace_ms}") as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                took.append(time.monotonic_ns() - int(line.split(b" ", 2)[1]))
    return statistics.median(took) / 1e3


async def flood_per_s(url: str, count: int, streams: int) -> float:
    """Thousands of events per second over so many connections."""

    async def one(client: aiohttp.ClientSession) -> None:
        async with client.post(f"{url}/stream/{count // streams}/0") as response:
            async for _ in response.content.iter_any():
                pass

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        began_at = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(streams)))
        return count / (time.perf_counter() - began_at) / 1e3


Measure = Callable[[str], Any]


def measure_fake(options: argparse.Namespace) -> None:
    what: dict[str, tuple[int, Measure]] = {
        "request, µs": (options.requests, lambda url: request_us(url, options.requests)),
        f"event each {options.pace_ms:g} ms, µs": (
            options.events,
            lambda url: event_us(url, options.events, options.pace_ms),
        ),
        "flood, 1000 events/s": (options.flood, lambda url: flood_per_s(url, options.flood, 1)),
        f"flood over {options.streams}, 1000 events/s": (
            options.flood,
            lambda url: flood_per_s(url, options.flood, options.streams),
        ),
    }
    ratios = {name: Ratios() for name in what}
    cpu_us: dict[str, list[float]] = {name: [] for name in what}
    with running_fake_head() as head, running_front(head) as (front, pid):
        for index in range(options.rounds):
            wait_until_quiet(options.max_foreign, options.max_wait)
            for name, (count, measure) in what.items():
                found: dict[str, float] = {}
                for url in (front, head) if index % 2 else (head, front):
                    before = cpu_seconds(pid)
                    found[url] = uvloop.run(measure(url))
                    if url == front:
                        cpu_us[name].append((cpu_seconds(pid) - before) / count * 1e6)
                ratios[name].add(found[front], found[head])
    rows = [[name, *ratios[name].cells(".1f"), f"{statistics.median(cpu_us[name]):.0f}"] for name in what]
    header = ["fake head", "front", "direct", "ratio", "spread", "front's CPU, µs each"]
    print_table(f"The front by itself, {options.rounds} rounds", header, rows)


async def tokens(url: str, model: Path, texts: Sequence[str], num_tokens: int) -> tuple[float, float, float]:
    """All at once: median ms to the first token, median ms between tokens, tokens per second of all."""
    firsts: list[float] = []
    between: list[float] = []
    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=900)) as client:

        async def one(text: str) -> None:
            body = {"model": str(model), "prompt": text, "max_tokens": num_tokens, "temperature": 0}
            began_at = time.perf_counter()
            asked = client.post(f"{url}/v1/completions", json={**body, "ignore_eos": True, "stream": True})
            async with asked as response:
                response.raise_for_status()
                instants = [time.perf_counter() async for _ in _events(response)]
            firsts.append(instants[0] - began_at)
            between.append((instants[-1] - instants[0]) / (num_tokens - 1))

        began_at = time.perf_counter()
        await asyncio.gather(*(one(text) for text in texts))
        took_s = time.perf_counter() - began_at
    return statistics.median(firsts) * 1e3, statistics.median(between) * 1e3, len(texts) * num_tokens / took_s


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield line


def measure_ring(options: argparse.Namespace) -> None:
    settings = [
        *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "512", "--max-num-seqs", "64"),
        *("--enforce-eager", "--kv-cache-memory-bytes", "512M", "--disable-uvicorn-access-log"),
    ]
    names = ("first token, ms", "between tokens, ms", "tokens/s")
    found = {(concurrency, name): Ratios() for concurrency in options.concurrency for name in names}
    with (
        Ring(options.model, even_ranges(options.model, 2), settings) as ring,
        running_front(ring.url) as (front, pid),
    ):
        pids = [pid, *(stage.pid for stage in ring.stages)]
        uvloop.run(tokens(ring.url, options.model, prompts(max(options.concurrency), 24, 9999), 8))
        for index in range(options.rounds):
            wait_until_quiet(options.max_foreign, options.max_wait)
            for concurrency in options.concurrency:
                texts = prompts(concurrency, 24, seed=index * 100 + concurrency)
                sides: dict[str, tuple[float, ...]] = {}
                for url in (front, ring.url) if index % 2 else (ring.url, front):
                    settle(pids)
                    own = [f"{url[-4:]} {text}" for text in texts]  # nothing that the other side put into the cache
                    sides[url] = uvloop.run(tokens(url, options.model, own, options.tokens))
                for name, ours, theirs in zip(names, sides[front], sides[ring.url], strict=True):
                    found[concurrency, name].add(ours, theirs)
    rows = [[f"{concurrency} x {name}", *ratios.cells(".2f")] for (concurrency, name), ratios in found.items()]
    title = f"Before a ring of 2 stages, {options.tokens} tokens each, {options.rounds} rounds"
    print_table(title, ["requests", "front", "direct", "ratio", "spread"], rows)


def main() -> None:
    options = parse_arguments()
    begin(options.model)
    measure_fake(options)
    if options.concurrency:
        measure_ring(options)


if __name__ == "__main__":
    main()
