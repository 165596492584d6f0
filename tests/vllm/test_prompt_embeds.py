"""Prompts given as embeddings, mixed with ordinary ones: the tokens of one process. One ring.

The vectors reach the head only; the other stages know their number.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from support.stages import Ring, SingleProcess, together
from support.workload import LOGPROB_TOLERANCE, Answer, Request, compare, counter, license_text, requests, run_each

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANGES = ("0-1", "1-4", "4-6")
# A budget that cuts long prompts, and a KV cache that is too small for all of them at once.
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "768", "--max-num-batched-tokens", "128", "--max-num-seqs", "16"),
    *("--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "26", "--kv-cache-memory-bytes", "60M"),
    "--enable-prompt-embeds",
]
CONCURRENCY = 16


@pytest.fixture(scope="module")
def embedding(small_model: Path) -> torch.Tensor:
    """# [vocab_size, hidden_size]"""
    from safetensors import safe_open

    name = "model.embed_tokens.weight"
    index = json.loads((small_model / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(small_model / index[name], "pt") as file:
        weight: torch.Tensor = file.get_tensor(name)
        return weight


@pytest.fixture(scope="module")
def encode(small_model: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(small_model / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


def as_option(vectors: torch.Tensor) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(vectors, buffer)
    return {"prompt": None, "prompt_embeds": base64.b64encode(buffer.getvalue()).decode()}


Work = list[tuple[Request, dict[str, Any]]]


@pytest.fixture(scope="module")
def work(embedding: torch.Tensor, encode: Callable[[str], list[int]]) -> Work:
    """Of three requests one is text, one the same text's embeddings, one vectors that no token has."""
    generator = torch.Generator().manual_seed(0)
    made: Work = []
    for request in requests(8, seed=5, text=license_text(), longest_words=300):
        vectors = embedding[encode(request.prompt)].float()
        noise = torch.randn(vectors.shape, generator=generator) * vectors.std() * 0.3
        made += [(request, {}), (request, as_option(vectors)), (request, as_option(vectors + noise))]
    return made


@pytest.fixture(scope="module")
def pair(small_model: Path) -> Iterator[tuple[Ring, SingleProcess]]:
    ring, single = Ring(small_model, RANGES, SETTINGS), SingleProcess(small_model, SETTINGS)
    with together(ring, single):
        yield ring, single


@pytest.fixture(scope="module")
def ring(pair: tuple[Ring, SingleProcess]) -> Ring:
    return pair[0]


@pytest.fixture(scope="module")
def references(pair: tuple[Ring, SingleProcess], work: Work) -> list[list[Answer]]:
    """One process at the ring's concurrency, and one request after another."""
    return [run_each(pair[1].url, pair[1].model, work, concurrency) for concurrency in (CONCURRENCY, 1)]


def test_embedded_prompts_give_the_tokens_of_one_process(
    ring: Ring, work: Work, references: list[list[Answer]], say: Callable[[str], None]
) -> None:
    for concurrency in (1, CONCURRENCY):
        answers = run_each(ring.url, ring.model, work, concurrency)
        ordered = references if concurrency == CONCURRENCY else references[::-1]
        result = compare(answers, ordered)
        say(
            f"{concurrency} concurrent: {result.num_tokens} tokens equal but for {len(result.ties)} ties, "
            f"log-probabilities within {result.worst_logprob:.1e}"
        )
        assert not result.wrong, "\n".join(result.wrong)
        assert result.worst_logprob <= LOGPROB_TOLERANCE
    preemptions = counter(ring.url, "num_preemptions")
    say(f"{preemptions:.0f} preemptions")
    assert preemptions, "the KV cache is meant to be too small for this load"
    texts, same, noisy = answers[0::3], answers[1::3], answers[2::3]
    assert [a.token_ids for a in same] != [a.token_ids for a in noisy], "the vectors decide, not the text"
    equal = sum(text.token_ids == embedded.token_ids for text, embedded in zip(texts, same, strict=True))
    say(f"{equal} of {len(texts)} texts have the same answer as their own embeddings")
    assert equal >= len(texts) - 1, "a text and its embeddings are one prompt"


def test_a_prompt_of_the_wrong_width_is_refused_and_the_ring_goes_on(ring: Ring) -> None:
    body = {"model": str(ring.model), "max_tokens": 2, **as_option(torch.zeros(4, 7))}
    assert httpx.post(f"{ring.url}/v1/completions", json=body, trust_env=False).status_code == 400
    answer = httpx.post(
        f"{ring.url}/v1/completions",
        json={"model": str(ring.model), "prompt": "One", "max_tokens": 2},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200
