"""`LLM` in Python as the head against `LLM` alone: generate, chat and beam search, with prefix caching off."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support.api import differences
from support.stages import Ring, start

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "256", "--max-num-seqs", "16"),
    *("--kv-cache-memory-bytes", "60M", "--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching"),
]
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
import stagewire

def outputs(done):
    return [[[list(o.token_ids), o.text, o.finish_reason, o.cumulative_logprob] for o in each.outputs] for each in done]

def prompt_logprobs(done):
    return [[sorted((token, p.logprob) for token, p in each.items()) for each in d.prompt_logprobs[1:]] for d in done]

if __name__ == "__main__":
    model, *ports = sys.argv[1:]
    settings = dict(dtype="float32", max_model_len=512, max_num_batched_tokens=256, max_num_seqs=16, block_size=32,
                    kv_cache_memory_bytes=60_000_000, enforce_eager=True, enable_prefix_caching=False,
                    disable_log_stats=False)
    if ports:
        place = dict(total_stages=2, layer_range="0-2", bind_port=int(ports[0]),
                     prev_stage_addr=f"127.0.0.1:{ports[1]}")
        settings = stagewire.head(**place, **settings)
    llm = LLM(model, **settings)
    prompts = ["San Francisco is a", "Once upon a time", "The three primary colours are red, green and " * 8]
    greedy = dict(temperature=0, max_tokens=16)
    beams = llm.beam_search([{"prompt": p} for p in prompts[:2]], BeamSearchParams(beam_width=3, max_tokens=6))
    found = {
        "generate": outputs(llm.generate(prompts, SamplingParams(**greedy, logprobs=1))),
        "seeded": outputs(llm.generate(prompts, SamplingParams(temperature=1, seed=5, n=2, max_tokens=12, logprobs=0))),
        "prompt_logprobs": prompt_logprobs(llm.generate(prompts, SamplingParams(**greedy, prompt_logprobs=1))),
        "structured": outputs(llm.generate(prompts, SamplingParams(
            **greedy, structured_outputs=StructuredOutputsParams(choice=["a city", "a person"])))),
        "chat": outputs(llm.chat([{"role": "user", "content": "Name three cities."}], SamplingParams(**greedy))),
        "beam_search": [[[list(s.tokens), s.cum_logprob] for s in each.sequences] for each in beams],
        "again": outputs(llm.generate(prompts[2:], SamplingParams(**greedy))),
        "cached": sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits"),
    }
    print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the script prints, over two stages and in one process; both run at the same time."""
    script = tmp_path_factory.mktemp("offline") / "offline.py"
    script.write_text(SCRIPT)
    ring = Ring(small_model, ("0-2", "2-6"), SETTINGS)
    commands = {"over_stages": [*map(str, ring.ports)], "alone": []}
    try:
        worker = ring.start_stage(1)
        running = [
            start(name, [sys.executable, str(script), str(small_model), *ports], script.with_name(f"{name}.log"))
            for name, ports in commands.items()
        ]
        for process in running:
            assert process.wait(300) == 0, process.text()[-3000:]
        assert worker.wait(30) == 0, "the worker stops with its head"
    finally:
        ring.stop()
    over_stages, alone = (
        json.loads(line.removeprefix("FOUND "))
        for process in running
        for line in process.text().splitlines()
        if line.startswith("FOUND ")
    )
    return over_stages, alone


@pytest.mark.parametrize(
    "name", ["generate", "seeded", "prompt_logprobs", "structured", "chat", "beam_search", "again"]
)
def test_llm_in_python(found: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    over_stages, alone = found
    assert alone[name]
    assert differences(over_stages[name], alone[name]) == []


def test_prefix_caching_off(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The same long prompt several times, and nothing came from a cache."""
    over_stages, alone = found
    assert over_stages["cached"] == alone["cached"] == 0
    assert over_stages["again"][0] == [[*over_stages["generate"][2][0][:3], None]]
