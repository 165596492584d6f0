"""Checkpoints of 8 bits over uneven stages: every stage finds its weights' scales, and the tokens are one process's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.models import make_int8_llama
from support.stages import Ring, SingleProcess, together
from support.workload import LOGPROB_TOLERANCE, compare, license_text, requests, run, runs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "128", "--max-num-seqs", "16"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "60M", "--block-size", "32"),
]


@pytest.mark.slow
def test_tokens_of_a_quantised_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, say: Callable[[str], None]
) -> None:
    model = make_int8_llama(tmp_path_factory.mktemp("int8"), model_dir)
    work = requests(16, seed=41, text=license_text(), longest_words=150)
    ring, single = Ring(model, ("0-1", "1-4", "4-6"), SETTINGS), SingleProcess(model, SETTINGS)
    with together(ring, single):
        references = runs(single.url, model, work, (16, 1))
        result = compare(run(ring.url, model, work, 16), references)
        for server in (ring.stages[1], single.process):
            assert "quantization=compressed-tensors" in server.text() or server is not single.process
    say(
        f"{result.num_tokens} tokens equal but for {len(result.ties)} ties, "
        f"log-probabilities within {result.worst_logprob:.1e}"
    )
    assert not result.wrong, "\n".join(result.wrong)
    assert result.worst_logprob <= LOGPROB_TOLERANCE
    assert len({token for answer in next(iter(references)) for token in answer.token_ids}) > 10
