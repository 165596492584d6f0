"""What a running ring does: one ring of four stages, shared by all tests of this file.

The last tests kill stages, so the order of the file matters.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stagewire.vllm_plugin.member.awake import KEEP_AWAKE_ENV, LATENCY_FILE, AwakeCores
from support.inside import states, until_idle
from support.stages import Ring, free_ports, process_tree
from support.workload import Request, complete, license_text, requests, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANGES = ("0-1", "1-3", "3-4", "4-6")
RECOVERY_TIMEOUT_S = 8
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "256", "--max-num-seqs", "64"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "60M", "--block-size", "32"),
    *("--pipeline-recovery-timeout", str(RECOVERY_TIMEOUT_S)),
]


@pytest.fixture(scope="module")
def trace_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "steps.jsonl"


@pytest.fixture(scope="module")
def health_port() -> int:
    """Of stage 2."""
    (port,) = free_ports(1)
    return port


@pytest.fixture(scope="module")
def ring(small_model: Path, trace_path: Path, health_port: int) -> Iterator[Ring]:
    # The development mode of vLLM's API opens /collective_rpc, through which the tests ask stages for their state.
    env = {"VLLM_SERVER_DEV_MODE": "1", "STAGEWIRE_STEP_TRACE": str(trace_path), KEEP_AWAKE_ENV: "1"}
    own = {2: ("--pipeline-health-port", str(health_port))}
    with Ring(small_model, RANGES, SETTINGS, env, own) as running:
        yield running


def client(ring: Ring) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=ring.url, timeout=120, trust_env=False)


async def lines(ring: Ring, prompt: str, max_tokens: int) -> AsyncIterator[str]:
    """The data of a streamed completion's events."""
    body = {
        "model": str(ring.model),
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with client(ring) as http, http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield line.removeprefix("data: ")


def test_health_and_model_are_served(ring: Ring) -> None:
    for path in ("/live", "/health", "/ready", "/v1/models", "/metrics"):
        assert httpx.get(ring.url + path, trust_env=False).status_code == 200, path


def test_every_stage_is_seen_by_ps_status_and_its_own_health_port(ring: Ring, health_port: int) -> None:
    """As somebody sees it who has started the stages by hand."""
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # of pytest: ps would cut lines
    words = ["sh", "-c", "ps aux | grep vllm"]
    listed = subprocess.run(words, capture_output=True, text=True, check=True, env=env).stdout
    pids = {int(line.split()[1]) for line in listed.splitlines()}
    assert {stage.pid for stage in ring.stages} <= pids
    command = [str(Path(sys.executable).parent / "stagewire"), "status", "--url", ring.url]
    status = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    for stage, layers in enumerate(RANGES):
        assert re.search(rf"^ *{stage} +{layers} +serving", status, re.MULTILINE), status
    for path in ("/live", "/health", "/ready"):
        answer = httpx.get(f"http://127.0.0.1:{health_port}{path}", trust_env=False)
        assert answer.status_code == 200, (path, answer.text)


def test_every_stage_has_the_same_number_of_kv_blocks(ring: Ring) -> None:
    blocks = {state["num_kv_blocks"] for state in states(ring)}
    assert len(blocks) == 1
    assert blocks.pop() > 0


def test_several_steps_are_in_flight(ring: Ring, trace_path: Path, say: Callable[[str], None]) -> None:
    """Measured at the head: a step is in flight from when it was sent until its result came back."""
    run(ring.url, ring.model, [Request(f"Chapter {i}. Once upon a time", 48) for i in range(32)], 32)
    steps = [json.loads(line) for line in trace_path.read_text().splitlines()]
    decode = [step for step in steps if step["tokens"] == step["requests"] and step["requests"] > 1]
    spans = [(step["stages"][0][4], step["returned_ns"]) for step in decode]
    depth = [sum(sent <= begin < back for sent, back in spans) for begin, _ in spans]
    mean = sum(depth) / len(depth)
    say(f"{len(decode)} decode steps of 4 stages: {mean:.2f} in flight on average, {max(depth)} at most")
    assert max(depth) == len(RANGES)
    assert mean > 2.5
    for step in decode:
        assert [stage[0] for stage in step["stages"]] == [0, 1, 2, 3]
        for _, received, started, finished, sent, _ in step["stages"]:
            assert received <= started <= finished <= sent
    sizes = sorted(step["requests"] for step in decode)
    assert sizes[len(sizes) // 2] <= 32 // len(RANGES) + 1, f"micro-batches are lopsided: {sizes}"


def holds_cores_awake(pid: int) -> bool:
    folder = Path(f"/proc/{pid}/fd")
    return any(os.path.realpath(each) == str(LATENCY_FILE) for each in folder.iterdir())


def test_cores_are_kept_awake_while_steps_go_round_and_no_longer(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is possible at all: elsewhere nobody holds the file, ever."""
    monkeypatch.setenv(KEEP_AWAKE_ENV, "1")  # as the ring's stages have it
    is_possible = AwakeCores.for_stage(on_cpu=True).does_anything
    held: list[list[bool]] = []

    def holders() -> list[bool]:
        return [any(map(holds_cores_awake, process_tree(stage.pid))) for stage in ring.stages]

    async def watch() -> None:
        async for _ in lines(ring, "A long story begins", 150):
            held.append(holders())

    asyncio.run(watch())
    assert [any(each) for each in zip(*held, strict=True)] == [is_possible] * len(RANGES)
    ends_at = time.monotonic() + 20
    while any(holders()):
        assert time.monotonic() < ends_at, "cores are kept awake for nobody"
        time.sleep(0.2)


def test_200_requests_leave_nothing_behind(ring: Ring, say: Callable[[str], None]) -> None:
    """One after another; every fifth is followed by one that its client leaves after a token."""
    work = requests(200, seed=3, text=license_text(), longest_words=60)
    before = until_idle(ring)

    async def everything() -> list[int]:
        counts = []
        async with client(ring) as http:
            for index, request in enumerate(work):
                answer = await complete(http, str(ring.model), Request(request.prompt, 1 + index % 4))
                counts.append(len(answer.token_ids))
                if index % 5 == 4:
                    await hang_up_after(ring, request.prompt, 1)
        return counts

    assert asyncio.run(everything()) == [1 + index % 4 for index in range(200)]
    after = until_idle(ring)
    for one, other in zip(before, after, strict=True):
        assert {name: one[name] for name in NUMBERS} == {name: other[name] for name in NUMBERS}
    say(f"state of the stages: {after}")


NUMBERS = ("stage", "rank", "cached_requests", "rows", "num_kv_blocks")


async def hang_up_after(ring: Ring, prompt: str, num_events: int) -> None:
    seen = 0
    async for _ in lines(ring, prompt, 200):
        seen += 1
        if seen >= num_events:
            return


def test_aborts_in_prefill_and_decode_leave_nothing_behind(ring: Ring) -> None:
    """Clients that hang up while queued, in prefill and in decode, among others that stay."""
    long_prompt = " ".join(license_text().split()[:400])

    async def hang_up_at_once(prompt: str) -> None:
        body = {"model": str(ring.model), "prompt": prompt, "max_tokens": 200, "ignore_eos": True}
        async with client(ring) as http:
            with pytest.raises(httpx.TimeoutException):
                await http.post("/v1/completions", json=body, timeout=httpx.Timeout(120, read=0.05))

    async def everything() -> list[int]:
        async with client(ring) as http:
            stay = [complete(http, str(ring.model), Request(f"Story {i}:", 24)) for i in range(8)]
            leave = [hang_up_after(ring, f"{i} {long_prompt}", i % 4 + 1) for i in range(24)]
            vanish = [hang_up_at_once(f"{i} {long_prompt}") for i in range(24)]
            answers = await asyncio.gather(*stay, *leave, *vanish)
            return [len(answer.token_ids) for answer in answers if answer is not None]

    assert asyncio.run(everything()) == [24] * 8
    until_idle(ring)


@pytest.mark.slow
def test_preemption_gives_the_same_tokens(ring: Ring) -> None:
    """A KV cache far too small for the load on one stage: vLLM preempts, every stage follows, tokens stay the same."""
    work = [Request(" ".join(license_text().split()[i * 20 : i * 20 + 100]), 64) for i in range(8)]
    expected = run(ring.url, ring.model, work, 1)
    until_idle(ring)
    settings = [*SETTINGS, "--num-gpu-blocks-override", "36"]
    with Ring(ring.model, ("0-4", "4-6"), settings) as small:
        answers = run(small.url, small.model, work, 8)
        metrics = httpx.get(f"{small.url}/metrics", trust_env=False).text
    (line,) = [each for each in metrics.splitlines() if each.startswith("vllm:num_preemptions_total{")]
    assert float(line.split()[-1]) > 0, "the load did not cause a preemption"
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]


def test_structured_output_under_concurrency(ring: Ring) -> None:
    """The bitmask reaches the tail after its step: every answer obeys its own choice list."""
    choices = [[f"yes-{i}", f"no-{i}"] for i in range(16)]

    async def ask(http: httpx.AsyncClient, choice: list[str]) -> str:
        body = {
            "model": str(ring.model),
            "prompt": "Answer yes or no:",
            "max_tokens": 12,
            "temperature": 0,
            "structured_outputs": {"choice": choice},
        }
        response = await http.post("/v1/completions", json=body)
        response.raise_for_status()
        return str(response.json()["choices"][0]["text"])

    async def everything() -> list[str]:
        async with client(ring) as http:
            return list(await asyncio.gather(*(ask(http, choice) for choice in choices)))

    for answer, choice in zip(asyncio.run(everything()), choices, strict=True):
        assert answer in choice


def test_prompt_logprobs_come_from_the_tail(ring: Ring) -> None:
    body = {"model": str(ring.model), "prompt": "The capital of France is", "max_tokens": 2, "prompt_logprobs": 2}
    response = httpx.post(f"{ring.url}/v1/completions", json=body, trust_env=False, timeout=60)
    response.raise_for_status()
    found = response.json()["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    assert all(len(each) >= 2 for each in found[1:])


@pytest.mark.parametrize("stage", range(len(RANGES)))
def test_a_stopped_stage_stops_the_tokens(ring: Ring, stage: int) -> None:
    """No stage is a bystander: frozen for less than a heartbeat's patience, no token comes; then all the rest does."""

    async def watch() -> tuple[int, list[float]]:
        times: list[float] = []
        pid = ring.worker_pid(stage)
        stopped_at, count = 0.0, 0
        async for line in lines(ring, "A long story begins", 150):
            times.append(time.monotonic())
            # A slow API server puts several tokens into one event.
            count += len(json.loads(line)["choices"][0]["token_ids"]) if line != "[DONE]" else 0
            if len(times) == 20:
                os.kill(pid, signal.SIGSTOP)
                stopped_at = time.monotonic()
                asyncio.get_running_loop().call_later(0.8, os.kill, pid, signal.SIGCONT)
        return count, [at - stopped_at for at in times if at > stopped_at > 0]

    count, after = asyncio.run(watch())
    in_between = [at for at in after if 0.25 < at < 0.75]
    assert not in_between, f"tokens came while stage {stage} was stopped: {in_between}"
    assert count == 150


def test_a_call_outside_the_closed_list_is_refused(ring: Ring) -> None:
    response = httpx.post(f"{ring.url}/collective_rpc", json={"method": "save_sharded_state"}, trust_env=False)
    assert response.status_code >= 400
    assert httpx.get(f"{ring.url}/ready", trust_env=False).status_code == 200


def test_past_the_recovery_deadline_requests_end_with_the_stages_name_until_it_is_back(ring: Ring) -> None:
    async def everything() -> tuple[float, list[Any]]:
        killed_at = 0.0

        async def stream() -> str:
            nonlocal killed_at
            last, count = "", 0
            async for line in lines(ring, "And then", 800):
                count += 1
                if count == 10 and not killed_at:
                    killed_at = time.monotonic()
                    os.kill(ring.stages[2].pid, signal.SIGKILL)
                if line != "[DONE]":
                    last = line
            return last

        async def plain() -> str:
            async with client(ring) as http:
                body = {"model": str(ring.model), "prompt": "So", "max_tokens": 800, "ignore_eos": True}
                response = await http.post("/v1/completions", json=body)
                assert response.status_code == 503
                return response.text

        found = await asyncio.gather(stream(), stream(), plain(), plain())
        return time.monotonic() - killed_at, list(found)

    took_s, texts = asyncio.run(everything())
    assert RECOVERY_TIMEOUT_S - 0.5 < took_s < RECOVERY_TIMEOUT_S + 3
    for text in texts:
        message = json.loads(text)["error"]["message"]
        assert "stage 2 is lost" in message
        assert f"did not come back within {RECOVERY_TIMEOUT_S} s" in message
    for path, code in (("/ready", 503), ("/health", 503), ("/live", 200), ("/v1/models", 503)):
        response = httpx.get(ring.url + path, trust_env=False)
        assert response.status_code == code, path
        if code == 503:
            assert response.headers["retry-after"]
            assert "stage 2" in response.text
    assert all(ring.stages[stage].popen.poll() is None for stage in (0, 1, 3))
    ring.restart_stage(2)
    ends_at = time.monotonic() + 120
    while httpx.get(ring.url + "/ready", trust_env=False).status_code != 200:
        assert time.monotonic() < ends_at, ring.stages[2].text()[-2000:]
    until_idle(ring)
    asyncio.run(_complete_one(ring))


async def _complete_one(ring: Ring) -> None:
    async with client(ring) as http:
        assert (await complete(http, str(ring.model), Request("Once upon", 8))).token_ids


def test_a_lost_head_ends_its_clients_and_the_others_wait_only_so_long(ring: Ring) -> None:
    """Last in this file: the ring is gone afterwards."""
    for pid in process_tree(ring.stages[0].pid):
        os.kill(pid, signal.SIGKILL)
    for stage in (1, 2, 3):
        assert ring.stages[stage].wait(30) == 3
        assert f"waited {RECOVERY_TIMEOUT_S} s for" in ring.stages[stage].text()
