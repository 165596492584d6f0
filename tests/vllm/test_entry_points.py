"""Where else the flags appear: help, other entry points of vLLM, Python, and compiled models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.models import make_llama
from support.stages import VLLM, Ring, SingleProcess, child_environment
from support.workload import LOGPROB_TOLERANCE, compare, license_text, requests, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

FLAGS = (
    *("--pipeline-stage-mode", "--pipeline-stage-idx", "--pipeline-total-stages", "--pipeline-layer-range"),
    *("--pipeline-local-bind-port", "--pipeline-local-bind-host", "--pipeline-prev-stage-addr"),
    *("--pipeline-prev-stage-service-addr", "--external-pp-worker", "--pipeline-id", "--pipeline-start-timeout"),
    *("--pipeline-step-timeout", "--pipeline-key-file", "--pipeline-allow-insecure"),
)
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "256", "--max-num-seqs", "16"),
    *("--kv-cache-memory-bytes", "200M", "--block-size", "32"),
]


def vllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VLLM, *arguments], capture_output=True, text=True, timeout=120, env=child_environment(), check=False
    )


def test_help_has_a_group_of_its_own() -> None:
    shown = vllm("serve", "--help=Stagewire")
    assert shown.returncode == 0
    for flag in FLAGS:
        assert flag in shown.stdout, flag
    assert "--max-model-len" not in shown.stdout


def test_the_other_server_refuses_a_worker(model_dir: Path) -> None:
    """`python -m ...api_server` would otherwise serve the whole model and ignore the flag."""
    arguments = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)),
        *("--pipeline-stage-mode", "external", "--pipeline-stage-idx", "1", "--pipeline-total-stages", "2"),
        *("--pipeline-layer-range", "15-30", "--pipeline-local-bind-port", "15550", "--external-pp-worker"),
        *("--pipeline-prev-stage-addr", "127.0.0.1:15550", "--port", "15999"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=child_environment(), check=False)
    assert done.returncode != 0
    assert "works with `vllm serve` only" in done.stderr


OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams
import stagewire

model, bind_port, tail_port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if __name__ == "__main__":
    settings = dict(dtype="float32", max_model_len=512, max_num_batched_tokens=256, max_num_seqs=16, block_size=32,
                    kv_cache_memory_bytes=200_000_000, enforce_eager=True)
    place = dict(total_stages=2, layer_range="0-15", bind_port=bind_port, prev_stage_addr=f"127.0.0.1:{tail_port}")
    llm = LLM(model, **stagewire.head(**place, **settings))
    done = llm.generate(["San Francisco is a", "Once upon a time"], SamplingParams(temperature=0, max_tokens=16))
    print("IDS", json.dumps([list(each.outputs[0].token_ids) for each in done]))
"""


def test_llm_in_python_is_the_head(model_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    # max_num_seqs and the other settings are the worker's too: `LLM` and `vllm serve` have different defaults.
    ring = Ring(model_dir, ("0-15", "15-30"), [*SETTINGS, "--enforce-eager"])
    try:
        worker = ring.start_stage(1)
        done = subprocess.run(
            [sys.executable, str(script), str(model_dir), str(ring.ports[0]), str(ring.ports[1])],
            capture_output=True,
            text=True,
            timeout=180,
            env=child_environment(),
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert worker.wait(30) == 0, "the worker stops with its head"
    finally:
        ring.stop()
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("IDS ")]
    first, second = json.loads(line.removeprefix("IDS "))
    assert len(first) == len(second) == 16
    assert first != second


def test_compiled_stages_equal_a_compiled_process(tmp_path: Path, model_dir: Path, say: Callable[[str], None]) -> None:
    """Without --enforce-eager, all stages compile in parallel. (Without a C++ compiler both sides cannot.) A small
    random model: to compile the real one takes minutes (test_settings.py, slow).
    """
    import os
    import shutil

    if shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("stock vLLM on CPU needs a C++ compiler to compile; stages then run eagerly (test_refusals.py)")
    model = make_llama(tmp_path / "llama8", model_dir, num_layers=8, initializer_range=0.1)
    work = requests(8, seed=5, text=license_text(), longest_words=200)
    with SingleProcess(model, SETTINGS, {"OMP_NUM_THREADS": "2"}) as single:
        references = [run(single.url, model, work, size) for size in (8, 1)]
    with Ring(model, ("0-3", "3-8"), SETTINGS) as ring:
        result = compare(run(ring.url, model, work, 8), references)
    say(
        f"compiled, 2 stages: {result.num_tokens} tokens equal but for {len(result.ties)} ties, "
        f"log-probabilities within {result.worst_logprob:.1e}"
    )
    assert not result.wrong, "\n".join(result.wrong)
    assert result.worst_logprob <= LOGPROB_TOLERANCE
