"""LoRA adapters over stages: one ring of three and one stock process, asked the same by all tests of this file."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from support.adapters import make_adapter
from support.models import make_llama
from support.stages import Ring, SingleProcess, start, together
from support.workload import Answer, Request, ask_all, compare, complete, license_text, requests

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANGES = ("0-2", "2-6", "6-8")
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "256", "--max-num-seqs", "32"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "100M", "--block-size", "32"),
    *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "8"),
]
ENV = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1"}
BASE = "base"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama8"), model_dir, num_layers=8, initializer_range=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """allowed/: below the root of the worker stages. elsewhere/: not, but some are named to them one by one."""
    top = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two", "three")):
        make_adapter(top / "allowed" / name, model, seed)
    make_adapter(top / "allowed" / "ends", model, 9, with_ends=True)
    make_adapter(top / "allowed" / "pickled", model, 3, as_pickle=True)
    make_adapter(top / "elsewhere" / "outside", model, 4)
    make_adapter(top / "elsewhere" / "moved", model, 5)
    shutil.copytree(top / "elsewhere" / "moved", top / "worker" / "moved")
    make_adapter(top / "elsewhere" / "twin", model, 6)
    make_adapter(top / "worker" / "twin", model, 7)
    (top / "allowed" / "link").symlink_to(top / "elsewhere" / "outside")
    return top


def modules(top: Path, *names: str) -> list[str]:
    return ["--lora-modules", *(f"{name}={top / name}" for name in names)]


@pytest.fixture(scope="module")
def pair(model: Path, folder: Path) -> Iterator[tuple[Ring, SingleProcess]]:
    head = [*modules(folder / "allowed", "one", "two"), "--served-model-name", BASE]
    worker = [*modules(folder / "worker", "moved", "twin"), "--pipeline-lora-root", str(folder / "allowed")]
    ring = Ring(model, RANGES, SETTINGS, ENV, {0: head, 1: worker, 2: worker})
    stock = SingleProcess(model, [*SETTINGS, *head], ENV)
    with together(ring, stock):
        yield ring, stock


@pytest.fixture(scope="module")
def ring(pair: tuple[Ring, SingleProcess]) -> Ring:
    return pair[0]


@pytest.fixture(scope="module")
def stock(pair: tuple[Ring, SingleProcess]) -> SingleProcess:
    return pair[1]


def ask(url: str, work: Sequence[tuple[str, Request]], concurrency: int) -> list[Answer]:
    """Each request to the model or adapter beside it."""
    return ask_all(url, lambda client, asked: complete(client, *asked), work, concurrency)


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=120, trust_env=False)


def call(url: str, method: str, *args: Any) -> list[Any]:
    """One of vLLM's calls to all workers, through the development mode of its API."""
    response = post(url, "/collective_rpc", method=method, args=list(args))
    response.raise_for_status()
    return list(response.json()["results"])


def loras(url: str) -> set[int]:
    """The adapters that every stage has."""
    (same,) = {frozenset(each) for each in call(url, "list_loras")}
    return set(same)


def load(url: str, folder: Path, name: str, **options: Any) -> httpx.Response:
    return post(url, "/v1/load_lora_adapter", lora_name=name, lora_path=str(folder / name), **options)


def unload(url: str, name: str) -> httpx.Response:
    return post(url, "/v1/unload_lora_adapter", lora_name=name)


def equal(ring: Ring, stock: SingleProcess, work: Sequence[tuple[str, Request]], concurrency: int) -> list[Answer]:
    """The stock process's answers, when the ring's are the same."""
    # One at a time: in a batch with adapters stock vLLM on CPU answers for the base model with an adapter.
    reference = ask(stock.url, work, 1)
    same(ask(ring.url, work, concurrency), reference)
    return reference


def same(answers: Sequence[Answer], reference: Sequence[Answer]) -> None:
    found = compare(answers, [reference])
    assert not found.wrong, found.wrong


def mixed(names: Sequence[str], count: int, seed: int) -> list[tuple[str, Request]]:
    asked = requests(count, seed, license_text(), longest_words=120)
    return [(names[index % len(names)], request) for index, request in enumerate(asked)]


def test_adapters_and_the_base_model_in_one_batch(ring: Ring, stock: SingleProcess, say: Callable[[str], None]) -> None:
    work = mixed([BASE, "one", "two"], 24, seed=1)
    answers = equal(ring, stock, work, 12)
    prompt = Request("The licence says that", 16)
    of_each = [ask(stock.url, [(name, prompt)], 1)[0].token_ids for name in (BASE, "one", "two")]
    assert len(set(of_each)) == 3, "an adapter that changes nothing tests nothing"
    say(f"{len(answers)} requests to the base model and two adapters, {len(set(of_each))} different answers: equal")


def test_an_adapter_of_embedding_and_head(ring: Ring, stock: SingleProcess, folder: Path) -> None:
    """Its tensors belong to the first and the last stage; those between find nothing of theirs in some of them."""
    work = mixed(["ends", BASE], 8, seed=2)
    # Before there is an adapter of the head in a slot: stock vLLM on CPU adds it to the base model's logits.
    of_base = ask(stock.url, work[1::2], 1)
    for url in (ring.url, stock.url):
        assert load(url, folder / "allowed", "ends").status_code == 200
    of_ends = ask(stock.url, work[::2], 1)
    same(ask(ring.url, work, 4), [answer for pair in zip(of_ends, of_base, strict=True) for answer in pair])
    for url in (ring.url, stock.url):
        assert unload(url, "ends").status_code == 200


def test_load_and_unload_at_run_time(ring: Ring, stock: SingleProcess, folder: Path) -> None:
    """Through the real client: unknown, loaded, listed, loaded again in its place, unloaded, unknown."""
    bodies = []
    for url in (ring.url, stock.url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="three", prompt="So", max_tokens=1)
        seen = [load(url, folder / "allowed", "three"), load(url, folder / "allowed", "three")]
        seen.append(load(url, folder / "allowed", "absent"))
        assert "three" in [each.id for each in client.models.list()]
        text = client.completions.create(model="three", prompt="So it goes", max_tokens=12, temperature=0)
        seen.append(post(url, "/v1/load_lora_adapter", lora_name="three", lora_path=str(folder / "allowed" / "one"),
                         load_inplace=True))  # fmt: skip
        other = client.completions.create(model="three", prompt="So it goes", max_tokens=12, temperature=0)
        assert other.choices[0].text != text.choices[0].text
        seen += [unload(url, "three"), unload(url, "three")]
        bodies.append([(each.status_code, each.text.replace("check_lora failed on stage 0: ", "")) for each in seen])
        bodies[-1] += [(0, text.choices[0].text), (0, other.choices[0].text)]
    ours, theirs = bodies
    assert [code for code, _ in ours[:6]] == [200, 400, 404, 200, 200, 404]
    assert ours == theirs


@pytest.mark.slow
def test_more_adapters_than_fit(ring: Ring, stock: SingleProcess, folder: Path) -> None:
    """Four in use, three in memory, two in a step: stages evict and load again, all of them the same ones."""
    names = ["one", "two", "three", "ends"]
    for url in (ring.url, stock.url):
        for name in names[2:]:
            assert load(url, folder / "allowed", name).status_code == 200
    for seed in (3, 4):
        equal(ring, stock, mixed(names, 20, seed), 10)
        assert len(loras(ring.url)) == 3
    for url in (ring.url, stock.url):
        for name in names[2:]:
            assert unload(url, name).status_code == 200


def test_pin_list_and_remove(ring: Ring, stock: SingleProcess) -> None:
    """`--lora-modules` gives ids from 1: the calls give what one process gives, from each stage."""
    for url in (ring.url, stock.url):
        ask(url, mixed(["one", "two"], 2, seed=5), 1)
        assert {1, 2} <= loras(url)
        assert set(call(url, "pin_lora", 1)) == {"True"}
        assert set(call(url, "remove_lora", 2)) == {"True"}
        assert set(call(url, "remove_lora", 2)) == {"False"}
        assert 2 not in loras(url)
        assert post(url, "/collective_rpc", method="pin_lora", args=[99]).status_code == 500
        assert set(call(url, "remove_lora", 1)) == {"True"}, "pinned, and gone all the same: vLLM's rule"
    equal(ring, stock, mixed(["two", "one"], 4, seed=6), 2)  # loaded again by whoever needs them


def test_an_adapter_that_lies_elsewhere_on_the_other_machines(ring: Ring, stock: SingleProcess, folder: Path) -> None:
    """Same bytes, another path: a worker's own --lora-modules say where."""
    for url in (ring.url, stock.url):
        assert load(url, folder / "elsewhere", "moved").status_code == 200
    equal(ring, stock, mixed(["moved"], 4, seed=7), 4)
    for url in (ring.url, stock.url):
        assert unload(url, "moved").status_code == 200


@pytest.mark.parametrize(
    ("place", "name", "expected"),
    [
        ("elsewhere", "outside", "stage 1 does not read adapter 'outside' from .*--pipeline-lora-root"),
        ("allowed", "link", "stage 1 does not read adapter 'link' from .*--pipeline-lora-root"),
        ("allowed", "pickled", "stage 1 does not read .*adapter_model.bin.*unpickling"),
        ("elsewhere", "twin", "adapter 'twin' differs between stages: stage 0 has .*, stage 1 has"),
    ],
)
def test_an_adapter_that_a_stage_refuses_changes_nothing(
    ring: Ring, folder: Path, place: str, name: str, expected: str
) -> None:
    before = loras(ring.url)
    response = load(ring.url, folder / place, name)
    assert response.status_code == 500
    assert re.search(expected, response.json()["error"]["message"]), response.text
    assert loras(ring.url) == before
    assert name not in httpx.get(f"{ring.url}/v1/models", trust_env=False).text
    ask(ring.url, [("one", Request("Still", 2))], 1)


OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
import stagewire

model, adapters, place = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if __name__ == "__main__":
    settings = dict(dtype="float32", max_model_len=512, max_num_batched_tokens=256, max_num_seqs=8, block_size=32,
                    kv_cache_memory_bytes=100_000_000, enforce_eager=True, enable_lora=True, max_lora_rank=8)
    llm = LLM(model, **(stagewire.head(**place, **settings) if place else settings))
    engine = llm.llm_engine
    asked = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    adapter = LoRARequest("one", 7, adapters + "/one")
    done = [llm.generate(["So"], asked), llm.generate(["Once upon a time"], asked, lora_request=[adapter])]
    ids = [list(each[0].outputs[0].token_ids) for each in done]
    listed = [sorted(engine.list_loras())]
    engine.add_lora(LoRARequest("two", 8, adapters + "/two"))
    listed.append(sorted(engine.list_loras()))
    pinned = engine.pin_lora(8)
    removed = [engine.remove_lora(8), engine.remove_lora(8)]
    print("FOUND", json.dumps([ids, listed, pinned, removed]))
"""


@pytest.mark.slow
def test_llm_in_python_names_an_adapter_that_nobody_loaded(model: Path, folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    settings = """--dtype float32 --max-model-len 512 --max-num-batched-tokens 256 --max-num-seqs 8 --block-size 32
        --kv-cache-memory-bytes 100M --enforce-eager --enable-lora --max-lora-rank 8 --pipeline-lora-root"""
    ring = Ring(model, ("0-3", "3-8"), [*settings.split(), str(folder / "allowed")])
    place = {"total_stages": 2, "layer_range": "0-3", "bind_port": ring.ports[0]}
    place["prev_stage_addr"] = f"127.0.0.1:{ring.ports[1]}"
    found = []
    running = []
    try:
        worker = ring.start_stage(1)
        for name, where in (("over stages", place), ("alone", {})):
            command = [sys.executable, str(script), str(model), str(folder / "allowed"), json.dumps(where)]
            running.append(start(name, command, tmp_path / f"{name}.log"))
        for process in running:
            assert process.wait(180) == 0, process.text()[-3000:]
            found += [line for line in process.text().splitlines() if line.startswith("FOUND ")]
        assert worker.wait(30) == 0
    finally:
        for process in running:
            process.kill_group()
        ring.stop()
    ours, theirs = (json.loads(line.removeprefix("FOUND ")) for line in found)
    assert ours == theirs
    assert ours[1:] == [[[7], [8]], True, [True, False]]
