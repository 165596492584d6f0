"""Where else the flags appear: help and the other entry point of vLLM; and compiled models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import stages
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


def test_help_has_a_group_of_its_own(tmp_path: Path) -> None:
    shown = stages.run("help", [VLLM, "serve", "--help=Stagewire"], tmp_path / "help.log")
    assert shown.wait() == 0
    for flag in FLAGS:
        assert flag in shown.text(), flag
    assert "--max-model-len" not in shown.text()


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


@pytest.mark.slow
def test_compiled_stages_equal_a_compiled_process(tmp_path: Path, model_dir: Path, say: Callable[[str], None]) -> None:
    """Without --enforce-eager, all stages compile in parallel. (Without a C++ compiler both sides cannot.) A small
    random model: to compile the real one takes minutes (test_settings.py). In the short run the guide's commands
    compile (test_quickstart.py), with torch's eager backend.
    """
    import os
    import shutil

    if shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("stock vLLM on CPU needs a C++ compiler to compile; stages then run eagerly (test_refusals.py)")
    model = make_llama(tmp_path / "llama4", model_dir, num_layers=4, initializer_range=0.1)
    work = requests(8, seed=5, text=license_text(), longest_words=200)
    with SingleProcess(model, SETTINGS) as single:
        references = [run(single.url, model, work, size) for size in (8, 1)]
    with Ring(model, ("0-1", "1-4"), SETTINGS) as ring:
        result = compare(run(ring.url, model, work, 8), references)
    say(
        f"compiled, 2 stages: {result.num_tokens} tokens equal but for {len(result.ties)} ties, "
        f"log-probabilities within {result.worst_logprob:.1e}"
    )
    assert not result.wrong, "\n".join(result.wrong)
    assert result.worst_logprob <= LOGPROB_TOLERANCE
