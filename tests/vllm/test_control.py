"""What an operator asks of a running engine: sleep, caches, profiles, checksums. A ring beside one stock process."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.models import make_llama
from support.stages import Ring, SingleProcess, together
from support.workload import Request, license_text, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANGES = ("0-2", "2-6", "6-8")
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "256", "--max-num-seqs", "16"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "100M", "--block-size", "32"),
]
ENV = {"VLLM_SERVER_DEV_MODE": "1"}
NOTHING = hashlib.sha256().hexdigest()
WORK = [Request(" ".join(license_text().split()[i : i + 60]), 16) for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama8"), model_dir, num_layers=8, initializer_range=0.1)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each stage's traces."""
    return tmp_path_factory.mktemp("traces")


def profiler(folder: Path) -> list[str]:
    settings = {"profiler": "torch", "torch_profiler_dir": str(folder), "torch_profiler_with_stack": False}
    return ["--profiler-config", json.dumps(settings)]


@pytest.fixture(scope="module")
def pair(model: Path, traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ring, SingleProcess]]:
    own = {stage: profiler(traces / str(stage)) for stage in range(len(RANGES))}
    ring = Ring(model, RANGES, SETTINGS, ENV, own)
    stock = SingleProcess(model, [*SETTINGS, *profiler(tmp_path_factory.mktemp("stock traces"))], ENV)
    with together(ring, stock):
        yield ring, stock


@pytest.fixture(scope="module")
def ring(pair: tuple[Ring, SingleProcess]) -> Ring:
    return pair[0]


@pytest.fixture(scope="module")
def stock(pair: tuple[Ring, SingleProcess]) -> SingleProcess:
    return pair[1]


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=300, trust_env=False)


def get(url: str, path: str) -> httpx.Response:
    return httpx.get(url + path, timeout=60, trust_env=False)


def results(url: str, method: str) -> list[Any]:
    response = post(url, "/collective_rpc", method=method)
    response.raise_for_status()
    return list(response.json()["results"])


def checksums(url: str) -> list[dict[str, str]]:
    """Of each worker; vLLM puts its place in front of every name."""
    parts = results(url, "compute_weight_checksums")
    prefixes = [f"dp0:pp{stage}:pcp0:tp0:" for stage in range(len(parts))]
    assert all(name.startswith(own) for own, part in zip(prefixes, parts, strict=True) for name in part)
    return [{name.rpartition(":")[2]: value for name, value in part.items()} for part in parts]


def prefix_hits(url: str) -> float:
    lines = get(url, "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total{"))


def tokens(running: Ring | SingleProcess) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in run(running.url, running.model, WORK, 2)]


@pytest.mark.parametrize("level", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_sleep_and_wake(ring: Ring, stock: SingleProcess, level: int) -> None:
    """On CPU vLLM only pauses: what it answers, the ring answers, and the tokens afterwards are the same."""
    seen = []
    for url in (ring.url, stock.url):
        found = [post(url, f"/sleep?level={level}"), get(url, "/is_sleeping"), post(url, "/wake_up")]
        seen.append([(each.status_code, each.json()) for each in [*found, get(url, "/is_sleeping")]])
    assert seen[0] == seen[1]
    assert seen[0][1][1] == {"is_sleeping": True}
    assert seen[0][3][1] == {"is_sleeping": False}
    assert tokens(ring) == tokens(stock)


def test_waking_up_in_parts(ring: Ring, stock: SingleProcess) -> None:
    seen = []
    for url in (ring.url, stock.url):
        steps = ["/sleep", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"]
        seen.append([post(url, step).json() for step in steps] + [get(url, "/is_sleeping").json()])
    assert seen[0] == seen[1]
    assert tokens(ring) == tokens(stock)


def test_what_cpus_cannot_give_back_is_refused_alike(ring: Ring, stock: SingleProcess) -> None:
    """vLLM on CPU raises in `discard`, on every stage; the engine goes on."""
    codes = []
    for url in (ring.url, stock.url):
        paused = post(url, "/sleep?level=0")
        released = post(url, "/release_kv_cache_memory")
        codes.append((paused.status_code, released.status_code, post(url, "/wake_up").status_code))
    assert codes[0] == codes[1]
    assert codes[0][1] == 500
    assert tokens(ring) == tokens(stock)


def test_caches_are_reset(ring: Ring, stock: SingleProcess) -> None:
    for running in (ring, stock):
        tokens(running)
        before = prefix_hits(running.url)
        tokens(running)
        warm = prefix_hits(running.url)
        assert warm > before
        response = post(running.url, "/reset_prefix_cache")
        assert (response.status_code, response.json()) == (200, {"success": True})
        first = run(running.url, running.model, WORK[:1], 1)
        assert prefix_hits(running.url) == warm, "nothing is left of what was cached"
        for path in ("/reset_mm_cache", "/reset_encoder_cache"):
            assert post(running.url, path).status_code == 200
        assert run(running.url, running.model, WORK[:1], 1)[0].token_ids == first[0].token_ids
    assert tokens(ring) == tokens(stock)


def test_weights_and_modules_of_all_stages(ring: Ring, stock: SingleProcess) -> None:
    """Every stage's checksums together are the whole model's: the same weights, each where it belongs."""
    (whole,) = checksums(stock.url)
    parts = checksums(ring.url)
    together = {name: value for part in parts for name, value in part.items()}
    # Where the CPU has packed kernels, matrices that are only multiplied by are kept packed and their own tensors are
    # empty: of linear layers in vLLM too, of the output head over stages alone.
    packed = {name for name, value in together.items() if value == NOTHING}
    assert packed - {"lm_head.weight"} == {name for name, value in whole.items() if value == NOTHING}
    assert together == whole | dict.fromkeys(packed, NOTHING)
    layers = [{int(name.split(".")[2]) for name in part if name.startswith("model.layers.")} for part in parts]
    assert layers == [set(range(2)), set(range(2, 6)), set(range(6, 8))]
    inspected = results(ring.url, "get_model_inspection")
    assert all("LlamaDecoderLayer" in text for text in inspected)
    assert results(ring.url, "synchronize_device") == [None] * len(RANGES)


def test_every_stage_writes_its_profile_where_its_own_config_says(
    ring: Ring, stock: SingleProcess, traces: Path
) -> None:
    expected = tokens(stock)
    for url in (ring.url, stock.url):
        assert post(url, "/start_profile", profile_prefix="first").status_code == 200
        assert post(url, "/start_profile").status_code == 409, "one at a time, says vLLM"
    assert tokens(ring) == tokens(stock) == expected
    for url in (ring.url, stock.url):
        assert post(url, "/stop_profile").status_code == 200
    for stage in range(len(RANGES)):
        files = sorted((traces / str(stage)).glob(f"first_*rank{stage}.*.pt.trace.json.gz"))
        assert len(files) == 1, sorted((traces / str(stage)).iterdir())
        events = json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"]
        names = {event.get("name", "") for event in events}
        assert any(name.startswith("aten::") for name in names), f"stage {stage} recorded no work"


@pytest.mark.slow
def test_a_profile_of_some_steps_only(ring: Ring, traces: Path) -> None:
    """The iteration limits of vLLM's call travel: each stage stops by itself and writes its trace."""
    response = post(ring.url, "/start_profile", profile_prefix="second", delay_iterations=2, max_iterations=3)
    assert response.status_code == 200
    tokens(ring)
    assert post(ring.url, "/stop_profile").status_code == 200
    for stage in range(len(RANGES)):
        assert list((traces / str(stage)).glob(f"second_*rank{stage}.*.pt.trace.json.gz")), sorted(
            (traces / str(stage)).iterdir()
        )
    assert post(ring.url, "/start_profile", delay_iterations=-1).status_code >= 400
