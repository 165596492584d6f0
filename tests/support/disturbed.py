"""Streaming clients of mixed features, whose answers are compared with those of an undisturbed run."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from support.workload import license_text

Body = dict[str, Any]


def mixed_bodies(count: int, seed: int, longest_words: int = 250) -> list[Body]:
    """Greedy, seeded, penalised, with log-probabilities of prompts and answers, constrained; every eighth long."""
    rng = random.Random(seed)
    words = license_text().split()
    bodies: list[Body] = []
    for index in range(count):
        num_words = rng.randrange(longest_words // 2, longest_words) if index % 8 == 7 else rng.randrange(3, 50)
        begin = 0 if index % 5 == 4 else rng.randrange(len(words) - num_words)
        body: Body = {
            "prompt": " ".join(words[begin : begin + num_words]),
            "max_tokens": rng.randrange(12, 48),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        match index % 6:
            case 1:
                body |= {"temperature": 0.9, "top_p": 0.95, "seed": index}
            case 2:
                body |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 3}
            case 3:
                body |= {"temperature": 1.0, "seed": 100 + index, "presence_penalty": 0.5}
            case 4:
                body |= {"structured_outputs": {"regex": r"[a-z ]{40,80}"}, "ignore_eos": False}
            case 5:
                body |= {"logprobs": 2, "prompt_logprobs": 1, "stream": False}  # vLLM does not stream them
        bodies.append(body)
    return bodies


@dataclass
class Stream:
    """What one client has received so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str = ""


class Clients:
    """All bodies as streams, ``concurrency`` open at a time, in a thread of their own; `progress` counts tokens."""

    def __init__(self, url: str, model: str, bodies: Sequence[Body], concurrency: int) -> None:
        self.streams = [Stream() for _ in bodies]
        self._url, self._model, self._bodies, self._concurrency = url, model, bodies, concurrency
        self._changed = threading.Condition()
        self._num_tokens = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def wait_for_tokens(self, count: int, timeout_s: float = 120) -> None:
        """Until all clients together have received ``count`` more tokens than before."""
        with self._changed:
            wanted = self._num_tokens + count
            assert self._changed.wait_for(lambda: self._num_tokens >= wanted or self.is_done, timeout_s), (
                self._num_tokens
            )

    @property
    def is_done(self) -> bool:
        return all(stream.finish_reason or stream.error for stream in self.streams)

    @property
    def num_open(self) -> int:
        """Requests that are with the server, as far as their clients know."""
        is_over = [bool(stream.finish_reason or stream.error) for stream in self.streams]
        return min(self._concurrency, is_over.count(False))

    def finish(self, timeout_s: float = 300) -> list[Stream]:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), [len(stream.token_ids) for stream in self.streams]
        return self.streams

    async def _run(self) -> None:
        gate = asyncio.Semaphore(self._concurrency)
        limits = httpx.Limits(max_connections=self._concurrency + 4)
        async with httpx.AsyncClient(base_url=self._url, timeout=3600, limits=limits, trust_env=False) as http:

            async def one(body: Body, stream: Stream) -> None:
                async with gate:
                    try:
                        await self._stream(http, body, stream)
                    except httpx.HTTPError as error:
                        stream.error = repr(error)

            await asyncio.gather(*(one(*pair) for pair in zip(self._bodies, self.streams, strict=True)))
        with self._changed:
            self._changed.notify_all()

    async def _stream(self, http: httpx.AsyncClient, body: Body, stream: Stream) -> None:
        asked = {"model": self._model, "stream": True, **body}
        if not asked["stream"]:
            response = await http.post("/v1/completions", json=asked)
            if response.status_code == 200:
                self._take(response.json()["choices"][0], stream)
            else:
                stream.error = f"{response.status_code} {response.text}"
            return
        async with http.stream("POST", "/v1/completions", json=asked) as response:
            if response.status_code != 200:
                stream.error = f"{response.status_code} {(await response.aread()).decode()}"
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    stream.error = str(event["error"])
                    return
                self._take(event["choices"][0], stream)
        if not stream.finish_reason:
            stream.error = "the stream ended without a reason"

    def _take(self, choice: dict[str, Any], stream: Stream) -> None:
        ids = choice.get("token_ids") or []
        stream.token_ids += ids
        stream.text += choice.get("text") or ""
        if choice.get("logprobs"):
            stream.logprobs += choice["logprobs"]["token_logprobs"]
        if choice.get("prompt_logprobs"):
            stream.prompt_logprobs.append(choice["prompt_logprobs"])
        stream.finish_reason = stream.finish_reason or choice.get("finish_reason")
        with self._changed:
            self._num_tokens += len(ids)
            self._changed.notify_all()


def differences(found: Sequence[Stream], expected: Sequence[Stream], tolerance: float = 2e-3) -> list[str]:
    """In words; empty when every stream holds what the undisturbed one held, no token twice and none missing."""
    problems = []
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if mine.error:
            problems.append(f"{index}: {mine.error}")
        elif mine.token_ids != theirs.token_ids:
            at = next(
                (n for n, pair in enumerate(zip(mine.token_ids, theirs.token_ids, strict=False)) if pair[0] != pair[1]),
                -1,
            )
            problems.append(f"{index}: {len(mine.token_ids)} and {len(theirs.token_ids)} ids, first difference at {at}")
        elif (mine.text, mine.finish_reason) != (theirs.text, theirs.finish_reason):
            problems.append(f"{index}: text or reason: {mine.finish_reason} and {theirs.finish_reason}")
        elif not _close(mine.logprobs, theirs.logprobs, tolerance):
            problems.append(f"{index}: log-probabilities {mine.logprobs} and {theirs.logprobs}")
        elif not _close(_prompt_values(mine), _prompt_values(theirs), tolerance):
            problems.append(f"{index}: other prompt log-probabilities")
    return problems


def _prompt_values(stream: Stream) -> list[float]:
    """Of each prompt token that has any, its own value: vLLM lists it first. The first token has none."""
    positions = [position for each in stream.prompt_logprobs for position in each if position]
    return [next(iter(position.values()))["logprob"] for position in positions]


def _close(some: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    return len(some) == len(others) and all(abs(a - b) <= tolerance for a, b in zip(some, others, strict=True))
