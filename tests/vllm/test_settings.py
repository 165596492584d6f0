"""vLLM's own settings that change numerics or layout, given to every stage and to the one process alike."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from stagewire.ring.rules.timeouts import PROBE_PATIENCE_ENV
from support.cpu import needs_fp8_kv_cache
from support.stages import Ring, SingleProcess, together
from support.workload import LOGPROB_TOLERANCE, compare, license_text, requests, run, runs

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

COMMON = [
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32", "--kv-cache-memory-bytes", "200M"),
]
EAGER = [*COMMON, "--enforce-eager"]
# vLLM's attention on CPU takes blocks of multiples of 32 tokens and KV caches in the model's dtype or fp8.
MATRIX = {
    "budget 32, blocks of 64": [*EAGER, "--max-num-batched-tokens", "32", "--block-size", "64"],
    "blocks of 64": [*EAGER, "--block-size", "64"],
    "budget 32": [*EAGER, "--max-num-batched-tokens", "32"],
    "KV cache in fp8_e4m3": [*EAGER, "--kv-cache-dtype", "fp8_e4m3"],
    "KV cache in fp8_e5m2": [*EAGER, "--kv-cache-dtype", "fp8_e5m2"],
    "compiled, budget 32, blocks of 64": [*COMMON, "--max-num-batched-tokens", "32", "--block-size", "64"],
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[needs_fp8_kv_cache] if "fp8" in name else [])
        for name, settings in MATRIX.items()
    ],
)
def test_settings_that_change_numerics_or_layout(
    settings: Sequence[str], model_dir: Path, say: Callable[[str], None]
) -> None:
    # vLLM chooses another budget for one process than external mode does; a given one comes last and wins.
    settings = ["--max-num-batched-tokens", "256", *settings]
    work = requests(16, seed=21, text=license_text(), longest_words=150)
    ring, single = Ring(model_dir, ("0-8", "8-13", "13-30"), settings), SingleProcess(model_dir, settings)
    with together(ring, single):
        references = runs(single.url, model_dir, work, (16, 1))
        result = compare(run(ring.url, model_dir, work, 16), references)
    say(
        f"{result.num_tokens} tokens equal but for {len(result.ties)} ties, "
        f"log-probabilities within {result.worst_logprob:.1e}"
    )
    assert not result.wrong, "\n".join(result.wrong)
    assert result.worst_logprob <= LOGPROB_TOLERANCE


def test_a_second_start_finds_compiled_code(model_dir: Path, tmp_path: Path, say: Callable[[str], None]) -> None:
    """Stages compile side by side, and a second start traces the model again but builds no library."""
    assert shutil.which("g++"), "stock vLLM on CPU compiles with g++: install it"
    env = {
        PROBE_PATIENCE_ENV: "30",
        "VLLM_CACHE_ROOT": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    work = requests(4, seed=22, text=license_text(), longest_words=60)
    took_s: list[float] = []
    warm_ups: list[list[tuple[datetime, datetime]]] = []
    libraries: list[set[Path]] = []
    answers = []
    for _ in range(2):
        began_at = time.monotonic()
        with Ring(model_dir, ("0-10", "10-20", "20-30"), [*COMMON, "--max-num-batched-tokens", "256"], env) as ring:
            took_s.append(time.monotonic() - began_at)
            answers.append([answer.token_ids for answer in run(ring.url, model_dir, work, 4)])
            warm_ups.append([_warm_up(stage.text()) for stage in ring.stages])
        libraries.append(set(tmp_path.rglob("*.so")))
    first, second = ([(end - begin).seconds for begin, end in stages] for stages in warm_ups)
    say(
        f"ready after {took_s[0]:.1f} s, the second time {took_s[1]:.1f} s; "
        f"compiling and warming up: {first} s for each stage, the second time {second} s; "
        f"{len(libraries[0])} libraries built, the second time {len(libraries[1] - libraries[0])}"
    )
    assert answers[0] == answers[1]
    assert max(begin for begin, _ in warm_ups[0]) < min(end for _, end in warm_ups[0]), "one after another"
    assert libraries[0]
    assert libraries[1] == libraries[0]
    assert sum(second) < sum(first)
    assert took_s[1] < took_s[0]


def _warm_up(log: str) -> tuple[datetime, datetime]:
    """When a stage began and ended to compile, as vLLM's log says it."""
    marks = ("Warming up model for the compilation", "Warming up done")
    times = [re.search(rf"INFO (\d\d-\d\d \d\d:\d\d:\d\d) .*{mark}", log) for mark in marks]
    begin, end = (datetime.strptime(f"2000-{found[1]}", "%Y-%m-%d %H:%M:%S") for found in times if found)
    return begin, end
