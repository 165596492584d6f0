"""Images over stages: the tokens of one process. A model with M-RoPE and one without, both small and random.

Pixels and the encoder stay at the head; the other stages get what positions need, and load no encoder.
"""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from stagewire.checkpoint.index import read_index
from stagewire.checkpoint.model_config import read_model_shape
from stagewire.checkpoint.ownership import stage_tensors
from stagewire.plan.ranges import LayerRange
from support.models import make_blip2, make_isaac
from support.stages import Ring, SingleProcess, together
from support.workload import LOGPROB_TOLERANCE, Answer, ask_all, compare, license_text

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANGES = ("0-2", "2-5", "5-6")
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "256", "--max-num-seqs", "16"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "40M", "--block-size", "32"),
]
CONCURRENCY = 8
NUM_REQUESTS = 12
# How each is made, and how many images a prompt may have.
MODELS = [
    pytest.param((make_blip2, 1), id="BLIP-2", marks=pytest.mark.slow),
    pytest.param((make_isaac, 3), id="Isaac, M-RoPE"),
]


def picture(width: int, height: int, seed: int) -> dict[str, Any]:
    """Coloured noise in blocks, as a part of a chat message."""
    from PIL import Image

    rng = random.Random(seed)
    small = Image.frombytes("RGB", (8, 8), rng.randbytes(8 * 8 * 3))
    buffer = io.BytesIO()
    small.resize((width, height)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def messages(max_images: int) -> list[list[dict[str, Any]]]:
    """Messages with and without images, of several sizes, some twice, before, between and after text."""
    rng = random.Random(1)
    words = license_text().split()
    made = []
    for index in range(NUM_REQUESTS):
        begin = rng.randrange(len(words) - 200)
        parts = [text(" ".join(words[begin : begin + rng.randrange(3, 120)]))]
        for _ in range(min(max_images, (0, 1, 1, 2, 3)[index % 5])):
            size = rng.choice([(320, 320), (512, 256), (200, 420)])
            parts.insert(rng.randrange(len(parts) + 1), picture(*size, seed=rng.randrange(6)))
            parts.insert(rng.randrange(len(parts) + 1), text("and then"))
        made.append(parts)
    return made


async def chat(client: httpx.AsyncClient, model: Path, content: list[dict[str, Any]]) -> Answer:
    body = {
        "model": str(model),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 2,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    content_logprobs = choice["logprobs"]["content"]
    return Answer(
        tuple(choice["token_ids"]),
        tuple(each["logprob"] for each in content_logprobs),
        tuple(
            {int(top["token"].partition(":")[2]): top["logprob"] for top in each["top_logprobs"]}
            for each in content_logprobs
        ),
    )


def run(url: str, model: Path, work: list[list[dict[str, Any]]], concurrency: int) -> list[Answer]:
    return ask_all(url, lambda client, content: chat(client, model, content), work, concurrency)


@dataclass
class Pair:
    """A ring, and what one process answers: at the ring's concurrency, and at another."""

    ring: Ring
    work: list[list[dict[str, Any]]]
    references: list[list[Answer]]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Pair]:
    make, max_images = request.param
    model = make(tmp_path_factory.mktemp("images"), model_dir)
    work = messages(max_images)
    ring, single = Ring(model, RANGES, SETTINGS), SingleProcess(model, SETTINGS)
    with together(ring, single):
        references = [run(single.url, model, work, concurrency) for concurrency in (CONCURRENCY, 1)]
        yield Pair(ring, work, references)


def test_images_give_the_tokens_of_one_process(pair: Pair, say: Callable[[str], None]) -> None:
    for concurrency in (1, CONCURRENCY):
        answers = run(pair.ring.url, pair.ring.model, pair.work, concurrency)
        ordered = pair.references if concurrency == CONCURRENCY else pair.references[::-1]
        result = compare(answers, ordered)
        distinct = len({token for answer in answers for token in answer.token_ids})
        say(
            f"{concurrency} concurrent: {result.num_tokens} tokens, {distinct} different ones, equal but for "
            f"{len(result.ties)} ties, log-probabilities within {result.worst_logprob:.1e}"
        )
        assert not result.wrong, "\n".join(result.wrong)
        assert result.worst_logprob <= LOGPROB_TOLERANCE
        assert distinct >= 100, "a model that repeats itself would hide a difference"


def test_the_image_decides(pair: Pair) -> None:
    """Or equal tokens would say nothing about images."""
    sizes = ((320, 320, 0), (320, 320, 1), (512, 256, 0))
    work = [[picture(*size), text("What is this?")] for size in sizes] + [[text("What is this?")]]
    answers = run(pair.ring.url, pair.ring.model, work, len(work))
    assert len({answer.token_ids for answer in answers}) >= 3


def test_only_the_head_loads_the_encoder(pair: Pair) -> None:
    index, shape = read_index(pair.ring.model), read_model_shape(pair.ring.model)
    assert index is not None
    towers = {name for name in index.tensors if re.search("vision|qformer", name)}
    assert towers
    for stage, process in enumerate(pair.ring.stages):
        own = {tensor.name for tensor in stage_tensors(index, shape, LayerRange.parse(RANGES[stage]))}
        assert own & towers == (towers if stage == 0 else set())
        found = re.search(r"loaded layers? .*: (\d+) tensors", process.text())
        assert found is not None
        assert int(found[1]) == len(own), f"stage {stage} built modules that it has no use for"
