"""Sleep and pooling over stages that are compiled, each beside one compiled process. Small random models.

With LoRA vLLM on CPU never compiles, asked for or not (platforms/cpu.py), so there is nothing to compare.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.models import make_llama
from support.stages import Ring, SingleProcess, together
from support.workload import LOGPROB_TOLERANCE, ask_all, compare, license_text, requests, run

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

RANGES = ("0-3", "3-8")
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "128", "--max-num-seqs", "16"),
    *("--kv-cache-memory-bytes", "100M", "--block-size", "32"),
]


@dataclass
class Pair:
    ring: Ring
    stock: SingleProcess


@contextmanager
def compiled(model: Path, settings: Sequence[str], cache: Path) -> Iterator[Pair]:
    """The same model over stages and in one process, each compiled anew."""
    assert shutil.which("g++"), "stock vLLM on CPU compiles with g++: install it"

    def env(name: str) -> Mapping[str, str]:
        own = cache / name
        caches = {"VLLM_CACHE_ROOT": str(own), "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor")}
        return {**caches, "VLLM_SERVER_DEV_MODE": "1"}

    stock, ring = SingleProcess(model, settings, env("stock")), Ring(model, RANGES, settings, env("ring"))
    with together(stock, ring):
        for process in (stock.process, *ring.stages):
            assert "Warming up done" in process.text(), f"{process.name} runs eagerly"
        assert all(list((cache / name).rglob("*.so")) for name in ("stock", "ring"))
        yield Pair(ring, stock)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama8"), model_dir, num_layers=8, initializer_range=0.1)


@pytest.fixture(scope="module")
def generating(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Pair]:
    with compiled(model, SETTINGS, tmp_path_factory.mktemp("cache")) as pair:
        yield pair


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Pair]:
    settings = [*SETTINGS, "--served-model-name", "m", "--runner", "pooling", "--convert", "embed"]
    with compiled(model, settings, tmp_path_factory.mktemp("cache")) as pair:
        yield pair


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_of_compiled_stages(generating: Pair, level: int) -> None:
    steps = [("POST", f"/sleep?level={level}"), ("GET", "/is_sleeping"), ("POST", "/wake_up"), ("GET", "/is_sleeping")]
    work = requests(12, seed=31, text=license_text(), longest_words=200)
    seen = []
    for server in (generating.ring, generating.stock):
        answers = [httpx.request(kind, server.url + path, timeout=300, trust_env=False) for kind, path in steps]
        seen.append([(answer.status_code, answer.json()) for answer in answers])
    assert seen[0] == seen[1]
    assert [seen[0][1][1], seen[0][3][1]] == [{"is_sleeping": True}, {"is_sleeping": False}]
    references = [run(generating.stock.url, generating.stock.model, work, size) for size in (6, 1)]
    found = compare(run(generating.ring.url, generating.ring.model, work, 6), references)
    assert not found.wrong, "\n".join(found.wrong)
    assert found.worst_logprob <= LOGPROB_TOLERANCE


def test_embeddings_of_compiled_stages(embedder: Pair) -> None:
    """Prompts of up to several times the batch's tokens, so that every stage has chunks of every size."""
    words = license_text().split()
    work = [" ".join(words[7 * i : 7 * i + 100 * (i % 4 + 1)]) for i in range(16)]

    async def embed(client: httpx.AsyncClient, text: str) -> Any:
        response = await client.post("/v1/embeddings", json={"model": "m", "input": text})
        assert response.status_code == 200, response.text
        return response.json()["data"][0]["embedding"]

    ours, theirs = (ask_all(url, embed, work, 8) for url in (embedder.ring.url, embedder.stock.url))
    assert len({tuple(vector) for vector in ours}) == len(work)
    assert max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)) < 1e-5
