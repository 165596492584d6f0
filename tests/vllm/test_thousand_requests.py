"""1,000 requests of mixed lengths and features, 256 at once, some more aborted: every answer is one process's."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.api import Api, differences
from support.features import GRAMMAR, SCHEMA
from support.stages import Ring, SingleProcess, together
from support.workload import license_text

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

RANGES = ("0-6", "6-19", "19-30")
COUNT, NUM_ABORTED, CONCURRENCY = 1000, 200, 256
# Prompts in chunks on the ring, in one piece in the reference, which could not do seeded requests otherwise.
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "256", "--block-size", "32"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "1G", "--disable-uvicorn-access-log"),
]

# Each a request's body in part; a request takes one from each list.
SAMPLING: Sequence[dict[str, Any]] = (
    {"temperature": 0},
    {"temperature": 0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 20},
    {"temperature": 1.2, "seed": 3, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.7, "seed": 4, "n": 2},
)
SHAPING: Sequence[dict[str, Any]] = (
    {},
    {},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.4},
    {"logit_bias": {"30": 4, "28": -100}},
    {"bad_words": [" the", " of"]},
    {"allowed_token_ids": list(range(200, 3000))},
    {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}, "max_tokens": 24},
    {"structured_outputs": {"regex": "[A-Z][a-z]{3,8} [0-9]{2}"}, "max_tokens": 16},
    {"structured_outputs": {"choice": ["no", "perhaps", "certainly not"]}},
    {"structured_outputs": {"grammar": GRAMMAR}},
)
ENDING: Sequence[dict[str, Any]] = (
    {"ignore_eos": True},
    {"stop": [".", " and"]},
    {"stop_token_ids": [28, 260], "min_tokens": 3},
    {},
)
ASKING: Sequence[dict[str, Any]] = ({"logprobs": 1}, {"logprobs": 4}, {"logprobs": 0, "prompt_logprobs": 1})


def bodies(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    words = license_text().split()
    made = []
    for index in range(count):
        num_words = rng.randrange(150, 400) if index % 16 == 15 else rng.randrange(2, 30)
        begin = rng.randrange(len(words) - num_words)
        body = {"prompt": " ".join(words[begin : begin + num_words]), "max_tokens": rng.randrange(4, 17)}
        for part in (SAMPLING, SHAPING, ENDING, ASKING):
            body |= rng.choice(part)
        if "structured_outputs" in body:  # a grammar and an early end contradict one another
            body = {key: value for key, value in body.items() if key not in ("stop", "stop_token_ids", "min_tokens")}
        made.append({**body, "return_token_ids": True})
    return made


async def ask(api: Api, work: Sequence[dict[str, Any]], aborted: Sequence[dict[str, Any]]) -> list[Any]:
    """Answers in order; the ``aborted`` are begun in between, and hung up on after a while."""
    gate = asyncio.Semaphore(CONCURRENCY)
    # Of a connection that has been idle for 5 s uvicorn hangs up, at times while the next request is on its way.
    limits = httpx.Limits(max_connections=CONCURRENCY + 4, max_keepalive_connections=0)
    rng = random.Random(9)
    async with httpx.AsyncClient(base_url=api.url, timeout=3000, limits=limits, trust_env=False) as client:

        async def answer(body: dict[str, Any]) -> Any:
            async with gate:
                response = await client.post("/v1/completions", json={"model": api.model, **body})
            assert response.status_code == 200, response.text
            return api.plain(response.json())

        async def hang_up(body: dict[str, Any], after_s: float) -> None:
            async with gate:
                long = {"model": api.model, **body, "max_tokens": 600, "ignore_eos": True}
                with contextlib.suppress(httpx.ReadTimeout):  # a few end by themselves, at a stop or a grammar's end
                    await client.post("/v1/completions", json=long, timeout=httpx.Timeout(3000, read=after_s))

        tasks: list[Any] = [answer(body) for body in work]
        for body in aborted:
            tasks.insert(rng.randrange(len(tasks)), hang_up(body, rng.uniform(0.01, 8.0)))
        given = await asyncio.gather(*tasks)
    return [each for each in given if each is not None]


def unlike(answer: Any, expected: Any, alone: Any) -> str:
    """Why an answer is wrong; empty when it is not, or where two token ids are as likely to the reference itself."""
    found = differences(answer, expected)
    if not found:
        return ""
    for mine, busy, quiet in zip(answer["choices"], expected["choices"], alone["choices"], strict=True):
        if mine["token_ids"] != busy["token_ids"] and not _is_tie(*(c["token_ids"] for c in (mine, busy, quiet))):
            return found[0]
    ids = [[choice["token_ids"] for choice in each["choices"]] for each in (answer, expected)]
    return found[0] if ids[0] == ids[1] else ""


def _is_tie(mine: list[int], busy: list[int], quiet: list[int]) -> bool:
    """Whether the reference, asked alone, leaves its own earlier answer where this one does."""
    at = next((i for i, (a, b) in enumerate(zip(mine, busy, strict=False)) if a != b), min(len(mine), len(busy)))
    return quiet[:at] == busy[:at] and quiet[at : at + 1] != busy[at : at + 1]


def test_a_thousand_requests(model_dir: Path, say: Callable[[str], None]) -> None:
    work, aborted = bodies(COUNT, seed=1), bodies(NUM_ABORTED, seed=2)
    servers = (
        Ring(model_dir, RANGES, [*SETTINGS, "--max-num-batched-tokens", "512"]),
        SingleProcess(model_dir, [*SETTINGS, "--max-num-batched-tokens", "2048", "--no-enable-chunked-prefill"]),
    )
    with together(*servers), ThreadPoolExecutor(2) as pool:
        ring, single = (Api(server.url, model_dir) for server in servers)

        def timed(api: Api) -> tuple[list[Any], float]:
            began_at = time.monotonic()
            return asyncio.run(ask(api, work, aborted)), time.monotonic() - began_at

        (answers, took_s), (expected, alone_took_s) = pool.map(timed, (ring, single))
        differ = [i for i, (a, b) in enumerate(zip(answers, expected, strict=True)) if differences(a, b)]
        quiet = {index: single.completion(**work[index]) for index in differ}
        preempted = [api.metric("vllm:num_preemptions_total") for api in (ring, single)]
        unfinished = [ring.metric(f"vllm:num_requests_{state}") for state in ("running", "waiting")]
    wrong = {index: unlike(answers[index], expected[index], quiet[index]) for index in differ}
    num_tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    say(
        f"{len(answers)} answers, {num_tokens} tokens, {NUM_ABORTED} more aborted: {len(answers) - len(differ)} equal, "
        f"{sum(not line for line in wrong.values())} ties; {took_s:.0f} s over stages and {alone_took_s:.0f} s in one "
        f"process at the same time; preemptions {preempted}"
    )
    assert len(answers) == COUNT
    assert {index: line for index, line in wrong.items() if line} == {}
    assert unfinished == [0, 0]
