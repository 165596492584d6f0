"""Requests of different lengths on real text, and the comparison of two sets of answers, token by token."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

LOGPROB_TOLERANCE = 2e-3

Asked = TypeVar("Asked")
Given = TypeVar("Given")


@dataclass(frozen=True)
class Request:
    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """``logprobs``: of the chosen tokens; ``top``: per position, token id to log-probability of the likeliest."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[dict[int, float], ...]


def requests(count: int, seed: int, text: str, longest_words: int = 420) -> list[Request]:
    """Windows of ``text``, most short, every eighth long; some share a prefix, so that prefix caching has hits."""
    rng = random.Random(seed)
    words = text.split()
    made: list[Request] = []
    for index in range(count):
        num_words = rng.randrange(longest_words // 2, longest_words) if index % 8 == 7 else rng.randrange(3, 60)
        begin = 0 if index % 5 == 4 else rng.randrange(len(words) - num_words)
        made.append(Request(" ".join(words[begin : begin + num_words]), rng.randrange(8, 33)))
    return made


def license_text() -> str:
    return (Path(__file__).parents[2] / "LICENSE").read_text()


async def complete(client: httpx.AsyncClient, model: str, request: Request, **options: Any) -> Answer:
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 5,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **options,
    }
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    logprobs = choice["logprobs"]
    return Answer(
        tuple(choice["token_ids"]),
        tuple(logprobs["token_logprobs"]),
        tuple({int(name.partition(":")[2]): value for name, value in top.items()} for top in logprobs["top_logprobs"]),
    )


def ask_all(
    url: str,
    ask: Callable[[httpx.AsyncClient, Asked], Awaitable[Given]],
    work: Sequence[Asked],
    concurrency: int,
) -> list[Given]:
    """What ``ask`` gives for each of ``work``, in order, with ``concurrency`` requests open at a time."""

    async def everything() -> list[Given]:
        gate = asyncio.Semaphore(concurrency)
        limits = httpx.Limits(max_connections=concurrency + 4)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:

            async def one(asked: Asked) -> Given:
                async with gate:
                    return await ask(client, asked)

            return list(await asyncio.gather(*map(one, work)))

    return asyncio.run(everything())


def run(url: str, model: Path, work: Sequence[Request], concurrency: int, **options: Any) -> list[Answer]:
    """All answers, in order, with ``concurrency`` requests open at a time."""
    return run_each(url, model, [(request, options) for request in work], concurrency)


def run_each(url: str, model: Path, work: Sequence[tuple[Request, dict[str, Any]]], concurrency: int) -> list[Answer]:
    """Like `run`, every request with options of its own."""

    def ask(client: httpx.AsyncClient, asked: tuple[Request, dict[str, Any]]) -> Awaitable[Answer]:
        request, options = asked
        return complete(client, str(model), request, **options)

    return ask_all(url, ask, work, concurrency)


@dataclass(frozen=True)
class Lazily:
    """Iterates over sets of answers; each is asked for when it is first reached."""

    questions: Sequence[Callable[[], list[Answer]]]
    _found: dict[int, list[Answer]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[list[Answer]]:
        for index, question in enumerate(self.questions):
            if index not in self._found:
                self._found[index] = question()
            yield self._found[index]


def runs(url: str, model: Path, work: Sequence[Request], concurrencies: Sequence[int]) -> Lazily:
    """The answers to the same requests at several concurrencies."""
    return Lazily([partial(run, url, model, work, concurrency) for concurrency in concurrencies])


@dataclass(frozen=True)
class Comparison:
    num_tokens: int
    ties: list[str]  # where an id differs and the reference itself does, between two batch sizes
    wrong: list[str]
    worst_logprob: float


def counter(url: str, name: str) -> float:
    """One of vLLM's counters, as a server's /metrics has it now."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    found = re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def compare(answers: Sequence[Answer], references: Iterable[Sequence[Answer]]) -> Comparison:
    """Compares answers with one process's.

    Args:
        answers: of the ring.
        references: the same requests on one process, at several batch sizes; the first is the one to equal. Iterated
            over more than once.

    An id may differ only where the references themselves differ at that token after equal tokens before it, and must be
    one of theirs; from there on the two texts are different ones and are not compared further. Only then are the others
    looked at: see `Lazily`.
    """
    ties: list[str] = []
    wrong: list[str] = []
    num_tokens, worst = 0, 0.0
    first = next(iter(references))
    for index, answer in enumerate(answers):
        expected = first[index]
        if len(answer.token_ids) != len(expected.token_ids):
            wrong.append(f"request {index}: {len(answer.token_ids)} tokens, expected {len(expected.token_ids)}")
            continue
        for at, (found, wanted) in enumerate(zip(answer.token_ids, expected.token_ids, strict=True)):
            num_tokens += 1
            if found == wanted:
                worst = max(worst, abs(answer.logprobs[at] - expected.logprobs[at]))
                continue
            own = [reference[index].token_ids for reference in references]
            rivals = {token_ids[at] for token_ids in own if token_ids[:at] == answer.token_ids[:at]}
            logits = f"{_logit(expected, at, wanted)} / {_logit(answer, at, found)}"
            line = f"request {index} token {at}: {found}, expected {wanted}; log-probabilities {logits}"
            (ties if len(rivals) > 1 and found in rivals else wrong).append(line)
            break
    return Comparison(num_tokens, ties, wrong, worst)


def _logit(answer: Answer, at: int, token: int) -> str:
    return " ".join(f"{each}: {value:.5f}" for each, value in sorted(answer.top[at].items(), key=lambda p: -p[1])[:2])
