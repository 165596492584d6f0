"""Pooling models over stages, each beside one stock process: an embedding model, and a classifier that also scores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from support.inside import until_idle
from support.models import copy_tokenizer, make_llama
from support.stages import Ring, SingleProcess, together
from support.workload import ask_all, license_text

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANGES = ("0-3", "3-5", "5-8")
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "128", "--max-num-seqs", "16"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "100M", "--block-size", "32", "--runner", "pooling"),
]
ENV = {"VLLM_SERVER_DEV_MODE": "1"}
TOLERANCE = 1e-5

Answers = list[dict[str, Any]]


class Pair:
    """The same model over stages and in one process."""

    def __init__(self, model: Path, extra: Sequence[str]) -> None:
        settings = [*SETTINGS, *extra, "--served-model-name", "m"]
        # Stage 0 alone is asked by name, but one command line for all is what people write.
        self.stock = SingleProcess(model, settings, ENV)
        self.ring = Ring(model, RANGES, settings, ENV)

    def both(self, path: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> tuple[Answers, Answers]:
        """Answers of the ring and of the stock process."""
        ours, theirs = (post_all(url, path, bodies, concurrency) for url in (self.ring.url, self.stock.url))
        return ours, theirs


def post_all(url: str, path: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> Answers:
    async def post(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        response = await client.post(path, json={"model": "m", **body})
        assert response.status_code == 200, response.text
        return dict(response.json())

    return ask_all(url, post, bodies, concurrency)


def texts(count: int, num_words: int) -> list[str]:
    words = license_text().split()
    return [" ".join(words[7 * i : 7 * i + num_words * (i % 4 + 1) // 4]) for i in range(count)]


def numbers(value: Any) -> list[float]:
    """Every number of an answer's data, in order."""
    if isinstance(value, (int, float)):
        return [float(value)]
    if isinstance(value, (list, dict)):
        return [n for each in (value.values() if isinstance(value, dict) else value) for n in numbers(each)]
    return []


def worst(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], key: str = "data") -> float:
    """The largest difference of two lists of answers, which must have the same shape and the same usage."""
    assert [each.get("usage") for each in ours] == [each.get("usage") for each in theirs]
    pairs = [(numbers(a[key]), numbers(b[key])) for a, b in zip(ours, theirs, strict=True)]
    assert all(a for a, _ in pairs)
    return max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))


@contextmanager
def running(model: Path, *extra: str) -> Iterator[Pair]:
    made = Pair(model, extra)
    with together(made.stock, made.ring):
        yield made


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Pair]:
    model = make_llama(tmp_path_factory.mktemp("embedder"), model_dir, num_layers=8, initializer_range=0.1)
    with running(model, "--convert", "embed") as pair:
        yield pair


@pytest.fixture(scope="module")
def token_embedder(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Pair]:
    model = make_llama(tmp_path_factory.mktemp("tokens"), model_dir, num_layers=8, initializer_range=0.1)
    with running(model, "--convert", "embed", "--pooler-config", '{"task": "token_embed"}') as pair:
        yield pair


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Pair]:
    import torch
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("classifier")
    settings: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 8,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "num_labels": 1,
        "dtype": "float32",
        "initializer_range": 0.1,
    }
    Qwen3ForSequenceClassification(Qwen3Config(**settings)).save_pretrained(folder, max_shard_size="5MB")
    copy_tokenizer(model_dir, folder)
    with running(folder) as pair:
        yield pair


def test_embeddings_through_the_real_client(embedder: Pair) -> None:
    vectors = []
    for url in (embedder.ring.url, embedder.stock.url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        made = client.embeddings.create(model="m", input=["a short text", "another"], encoding_format="float")
        vectors.append([each.embedding for each in made.data])
    ours, theirs = vectors
    assert [len(each) for each in ours] == [128, 128]
    assert max(abs(x - y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True)) < TOLERANCE
    assert ours[0] != ours[1]


def test_embeddings_of_long_prompts_in_chunks(embedder: Pair, say: Callable[[str], None]) -> None:
    """Prompts of up to several times the batch's tokens, sixteen at once: every stage has the same chunks."""
    bodies = [{"input": text} for text in texts(24, 400)]
    ours, theirs = embedder.both("/v1/embeddings", bodies, 16)
    longest = max(each["usage"]["prompt_tokens"] for each in ours)
    assert longest > 3 * 128
    difference = worst(ours, theirs)
    say(f"{len(bodies)} embeddings, prompts of up to {longest} tokens: largest difference {difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.slow
def test_vectors_of_every_token(token_embedder: Pair) -> None:
    """One result of another length for each request, and nothing for those whose prompt is not through yet."""
    bodies = [{"input": text, "task": "token_embed"} for text in texts(8, 200)]
    ours, theirs = token_embedder.both("/pooling", bodies, 8)
    assert len({len(each["data"][0]["data"]) for each in ours}) > 1
    assert worst(ours, theirs) < TOLERANCE


@pytest.mark.slow
def test_late_interaction_scores(token_embedder: Pair) -> None:
    """The stock process caches queries on its worker; over stages the API server compares the vectors."""
    bodies = [{"text_1": "warranty of any kind", "text_2": texts(6, 40)}]
    ours, theirs = token_embedder.both("/score", bodies, 1)
    assert worst(ours, theirs) < TOLERANCE * max(1.0, *map(abs, numbers(theirs[0]["data"])))


def test_scores_of_an_embedding_model(embedder: Pair) -> None:
    bodies = [{"text_1": "warranty", "text_2": texts(6, 40)}]
    assert worst(*embedder.both("/score", bodies, 1)) < TOLERANCE


def test_calls_of_pooling_models(embedder: Pair) -> None:
    """The call that ends late-interaction scoring; a cache of one stage that could be lost is off."""
    for url, num_workers in ((embedder.ring.url, len(RANGES)), (embedder.stock.url, 1)):
        body = {"method": "release_late_interaction_query_cache", "args": [["no such query"]]}
        response = httpx.post(f"{url}/collective_rpc", json=body, timeout=60, trust_env=False)
        assert response.json() == {"results": [None] * num_workers}


def test_a_client_that_hangs_up_leaves_nothing_behind(embedder: Pair) -> None:
    async def has_hung_up(text: str) -> bool:
        async with httpx.AsyncClient(base_url=embedder.ring.url, trust_env=False) as client:
            body = {"model": "m", "input": text}
            try:
                await client.post("/v1/embeddings", json=body, timeout=httpx.Timeout(60, read=0.03))
            except httpx.ReadTimeout:
                return True
            return False

    async def how_many() -> int:
        return sum(await asyncio.gather(*map(has_hung_up, texts(48, 400))))

    assert asyncio.run(how_many()) > 16, "the first ones may have their answer in time, those behind them have not"
    ours, theirs = embedder.both("/v1/embeddings", [{"input": text} for text in texts(4, 40)], 4)
    assert worst(ours, theirs) < TOLERANCE
    until_idle(embedder.ring)


def test_classes_and_scores_of_a_classifier(classifier: Pair, say: Callable[[str], None]) -> None:
    """Its head belongs to the last stage."""
    classes = worst(*classifier.both("/classify", [{"input": text} for text in texts(12, 300)], 8))
    scores = worst(*classifier.both("/score", [{"text_1": "warranty", "text_2": texts(8, 100)}], 1))
    body = {"query": "warranty", "documents": texts(6, 60)}
    ours, theirs = classifier.both("/rerank", [body], 1)
    assert [each["index"] for each in ours[0]["results"]] == [each["index"] for each in theirs[0]["results"]]
    ranks = worst(ours, theirs, "results")
    say(f"largest difference: classes {classes:.1e}, scores {scores:.1e}, ranks {ranks:.1e}")
    assert max(classes, scores, ranks) < TOLERANCE


@pytest.mark.slow
def test_a_tail_of_two_ranks(embedder: Pair) -> None:
    """Every rank pools when it runs a step, and none of them is asked to sample."""
    settings = [*SETTINGS, "--convert", "embed", "--served-model-name", "m"]
    bodies = [{"input": text} for text in texts(12, 400)]
    own = {1: ["--tensor-parallel-size", "2"]}
    # Two cores: the ring's processes wait for each other's turns.
    with Ring(embedder.ring.model, ("0-4", "4-8"), settings, ENV | {"STAGEWIRE_PEER_PATIENCE_S": "30"}, own) as ring:
        ours = post_all(ring.url, "/v1/embeddings", bodies, 6)
        theirs = post_all(embedder.stock.url, "/v1/embeddings", bodies, 6)
        assert worst(ours, theirs) < TOLERANCE
