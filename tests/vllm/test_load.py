"""A head under load: thousands of open requests, and a client that does not read what it asked for."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.inside import until_idle
from support.stages import Ring
from support.workload import Request, compare, license_text, requests, run

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "512", "--max-num-seqs", "64"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "300M", "--block-size", "32"),
]
NUM_OPEN = 2000


@pytest.fixture(scope="module")
def ring(model_dir: Path) -> Iterator[Ring]:
    with Ring(model_dir, ("0-15", "15-30"), SETTINGS, {"VLLM_SERVER_DEV_MODE": "1"}) as running:
        yield running


def gauge(ring: Ring, name: str) -> float:
    lines = httpx.get(f"{ring.url}/metrics", trust_env=False, timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))


def test_two_thousand_open_requests_queue_without_loss(ring: Ring, say: Callable[[str], None]) -> None:
    """All are open at once, as many as a batch holds run, and each gets the answer that it gets alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 3 * NUM_OPEN)), hard))
    different = [
        Request(each.prompt, 2 + index % 7)
        for index, each in enumerate(requests(100, seed=11, text=license_text(), longest_words=60))
    ]
    references = [run(ring.url, ring.model, different, size) for size in (64, 1)]
    most_waiting = 0.0
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, ring.url, ring.model, different * (NUM_OPEN // len(different)), NUM_OPEN)
        while not running.done():
            most_waiting = max(most_waiting, gauge(ring, "num_requests_waiting"))
    answers = running.result()
    assert len(answers) == NUM_OPEN
    repeated = [reference * (NUM_OPEN // len(different)) for reference in references]
    result = compare(answers, repeated)
    assert not result.wrong, "\n".join(result.wrong)
    assert most_waiting > NUM_OPEN / 2, "they were not open at once"
    until_idle(ring)
    say(
        f"{NUM_OPEN} requests open, up to {most_waiting:.0f} of them waiting: {NUM_OPEN} answers in "
        f"{time.monotonic() - began:.0f} s, {len(result.ties)} ties"
    )


class SlowClient:
    """Asks for four long streams with many log-probabilities and reads nothing until it is told to."""

    NUM_CHOICES, NUM_TOKENS = 4, 600

    def __init__(self, ring: Ring) -> None:
        body = {
            "model": str(ring.model),
            "prompt": "The licence says",
            "n": self.NUM_CHOICES,
            "temperature": 0.8,
            "seed": 1,
            "max_tokens": self.NUM_TOKENS,
            "ignore_eos": True,
            "logprobs": 20,
            "stream": True,
            "return_token_ids": True,
        }
        data = json.dumps(body).encode()
        self._sock = socket.socket()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._sock.connect(("127.0.0.1", ring.api_port))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        self._sock.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + data)

    def read(self) -> list[dict[str, Any]]:
        """All events, to the end."""
        self._sock.settimeout(300)
        with self._sock, self._sock.makefile("rb") as file:
            lines = [line for line in file if line.startswith(b"data: {")]
        return [json.loads(line.removeprefix(b"data: ")) for line in lines]


def test_a_client_that_does_not_read_holds_up_no_one(ring: Ring, say: Callable[[str], None]) -> None:
    work = requests(64, seed=12, text=license_text(), longest_words=60)
    run(ring.url, ring.model, work, 16)
    began = time.monotonic()
    alone = run(ring.url, ring.model, work, 16)
    alone_s = time.monotonic() - began
    slow = SlowClient(ring)
    began = time.monotonic()
    expected = run(ring.url, ring.model, work, 16)
    beside_s = time.monotonic() - began
    until_idle(ring, 240)  # the slow client's tokens have all been made, and none of them read
    began = time.monotonic()
    again = run(ring.url, ring.model, work, 16)
    after_s = time.monotonic() - began
    assert not compare(again, [expected, alone]).wrong
    events = slow.read()
    counts = [0] * SlowClient.NUM_CHOICES
    for event in events:
        for choice in event["choices"]:
            counts[choice["index"]] += len(choice["token_ids"] or ())
    assert counts == [SlowClient.NUM_TOKENS] * SlowClient.NUM_CHOICES
    assert after_s < 3 * alone_s, "a client that does not read holds up the others"
    say(
        f"64 requests took {alone_s:.1f} s, beside a client that reads nothing {beside_s:.1f} s (its tokens are made "
        f"meanwhile), after its last token {after_s:.1f} s; then it read {len(events)} events, every token once"
    )
