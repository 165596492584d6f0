"""A few architectures of the sweep (tests/sweep) with different peculiarities; the whole sweep runs on demand.

A tie is a request that differs where stock vLLM differs from itself in another batch; one request after the other has
none, and is compared as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.stages import child_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SWEEP = Path(__file__).parents[1] / "sweep" / "run.py"

# Name -> what travels between its stages. In the short run: one that sends more than most.
QUICK = {"Gemma4ForCausalLM": ["hidden_states: float32 [128]", "per_layer_inputs: float32 [8, 32]"]}
ARCHITECTURES = {
    **QUICK,
    "GPT2LMHeadModel": ["hidden_states: float32 [128]"],
    "CohereForCausalLM": ["hidden_states: float32 [128]", "residual: float32 [128]"],
    "DeepseekV3ForCausalLM": ["hidden_states: float32 [128]", "residual: float32 [128]"],
    "Lfm2ForCausalLM": ["hidden_states: float32 [128]", "residual: float32 [128]"],
    "GptOssForCausalLM": ["hidden_states: float32 [128]", "residual: float32 [128]"],
}


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the architectures that are asked for."""
    names = [item.name for item in request.session.items if item.path == request.path]
    wanted = [each for each in ARCHITECTURES if any(f"[{each}]" in name for name in names)]
    results = tmp_path_factory.mktemp("sweep") / "results.json"
    command = [sys.executable, str(SWEEP), "--results", str(results), "--only", *wanted]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=850, check=False)
    assert results.is_file(), done.stdout + done.stderr
    rows: dict[str, Any] = json.loads(results.read_text())["rows"]
    return rows


@pytest.mark.parametrize(
    "architecture", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in ARCHITECTURES]
)
def test_three_stages_give_the_tokens_of_one_process(
    architecture: str, rows: dict[str, Any], say: Callable[[str], None]
) -> None:
    row = rows[architecture]
    assert row["status"] == "works", row["detail"]
    assert row["between"] == ARCHITECTURES[architecture]
    say(f"{architecture}: 3 x 40 tokens equal but for {row['ties']} ties, {row['distinct']} different ids")
