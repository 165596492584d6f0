"""Stages that load from their own folders give the tokens of one process with the full model, which is gone by then."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from stagewire.checkpoint.export_plan import plan_export
from stagewire.checkpoint.export_writer import run_export
from stagewire.checkpoint.manifest import stage_folder
from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange
from stagewire.ring.rules.admission import EXPORT_SETTING, WEIGHTS_SETTING
from support.stages import PreSplitRing, SingleProcess
from support.workload import LOGPROB_TOLERANCE, Answer, compare, license_text, requests, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "256", "--max-num-seqs", "16"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "60M", "--block-size", "32"),
]
RANGES = ("0-2", "2-5", "5-6")
CONCURRENCY = 4
SERVED = "demo"


@pytest.fixture(scope="module")
def exported(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[list[Answer]]]]:
    """The export of a copy that is removed, and one process's answers from that copy."""
    folder = tmp_path_factory.mktemp("presplit")
    source = shutil.copytree(small_model, folder / "source")
    plan = plan_export(source, lambda _: [LayerRange.parse(text) for text in RANGES])
    run_export(plan, folder / "out", lambda _: None)
    work = requests(8, seed=8, text=license_text(), longest_words=200)
    with SingleProcess(source, [*SETTINGS, "--served-model-name", SERVED]) as single:
        answers = [run(single.url, Path(SERVED), work, concurrency) for concurrency in (CONCURRENCY, 1)]
    shutil.rmtree(source)
    yield folder / "out", answers
    shutil.rmtree(folder)


def test_tokens_equal_the_full_model_s(exported: tuple[Path, list[list[Answer]]], say: Callable[[str], None]) -> None:
    pipeline_dir, references = exported
    work = requests(8, seed=8, text=license_text(), longest_words=200)
    with ExitStack() as stack:
        ring = stack.enter_context(PreSplitRing(pipeline_dir, RANGES, [*SETTINGS, "--served-model-name", SERVED]))
        result = compare(run(ring.url, Path(SERVED), work, CONCURRENCY), references)
        logs = [stage.text() for stage in ring.stages]
    say(f"pre-split: {result.num_tokens} tokens, {len(result.ties)} ties, within {result.worst_logprob:.1e}")
    assert not result.wrong, "\n".join(result.wrong)
    assert result.num_tokens > 0
    assert result.worst_logprob <= LOGPROB_TOLERANCE
    lines = ("Stage 0: Loading layers 0-1... (0.03 GB)", "Stage 1: Loading layers 2-4... (0.00 GB)")
    for line, log in zip((*lines, "Stage 2: Loading layer 5... (0.03 GB)"), logs, strict=True):
        assert line in log


def test_a_folder_counts_as_its_source(small_model: Path, tmp_path: Path) -> None:
    """So that full and pre-split stages mix; a fine-tuned copy, equal by its headers, has other values."""
    from stagewire.vllm_plugin.member.identity import identify_model

    def identity(folder: Path, stage: int) -> dict[str, str]:
        config = StageConfig(stage, 3, LayerRange.parse(RANGES[stage]), 15550, Address("127.0.0.1", 15549))
        return identify_model(config, Mock(model=str(folder)))

    tuned = shutil.copytree(small_model, tmp_path / "tuned")
    with next(tuned.glob("*.safetensors")).open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    ids = set()
    for source, name in ((small_model, "a"), (tuned, "b")):
        plan = plan_export(source, lambda _: [LayerRange.parse(text) for text in RANGES])
        (export_id,) = {manifest.export_id for manifest in run_export(plan, tmp_path / name, lambda _: None)}
        ids.add(export_id)
        for stage in range(3):
            expected = identity(source, stage) | {EXPORT_SETTING: export_id}
            assert identity(stage_folder(tmp_path / name, stage), stage) == expected
    assert len(ids) == 2
    plain, other = identity(small_model, 0), identity(tuned, 0)
    assert plain.pop(WEIGHTS_SETTING) != other.pop(WEIGHTS_SETTING)
    assert plain == other
    assert identity(small_model, 0)[EXPORT_SETTING] == ""
    with pytest.raises(ConfigError, match="--pipeline-stage-idx 1 contradicts"):
        identity(stage_folder(tmp_path / "a", 0), 1)


@pytest.mark.parametrize(
    ("is_tied", "stage", "absent"),
    [
        (True, 0, {"norm"}),
        (True, 1, {"embed", "norm", "head"}),
        (True, 2, set()),
        (False, 0, {"norm", "head"}),
        (False, 1, {"embed", "norm", "head"}),
        (False, 2, {"embed"}),
    ],
)
def test_what_is_another_stage_s_is_taken_out_and_stops_whoever_uses_it(
    is_tied: bool, stage: int, absent: set[str]
) -> None:
    import torch
    from torch import nn

    from stagewire.vllm_plugin.loading.presplit import drop_absent

    model: Any = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = nn.Embedding(4, 2)
    model.model.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    model.model.norm = nn.LayerNorm(2)
    model.lm_head = model.model.embed_tokens if is_tied else nn.Linear(2, 4, bias=False)

    def named() -> dict[str, Any]:
        return {"embed": model.model.embed_tokens, "norm": model.model.norm, "head": model.lm_head}

    config = StageConfig(stage, 3, LayerRange(stage, stage + 1), 15550, Address("127.0.0.1", 15549))
    before = named()
    present = ["embed_tokens.weight", "norm.weight", "lm_head.weight"]
    assert drop_absent(model, config, 3, is_tied=is_tied, present=present) == [], "what is in the folder stays"
    drop_absent(model, config, 3, is_tied=is_tied, present=[f"model.layers.{stage}.weight"])
    assert {name for name, module in named().items() if module is not before[name]} == absent
    for name in absent:
        with pytest.raises(ConfigError, match=f"stage {stage}'s model uses .* in another stage's folder"):
            named()[name](torch.zeros(1, dtype=torch.long))
    assert all(isinstance(layer, nn.Linear) for layer in model.model.layers)
