"""Embedding models with a projection of sentence-transformers, from folders that hold a part of the model each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from stagewire.checkpoint.export_plan import plan_export
from stagewire.checkpoint.export_writer import run_export
from stagewire.checkpoint.manifest import stage_folder
from stagewire.checkpoint.ownership import owns
from stagewire.plan.ranges import LayerRange
from support.models import make_llama
from support.stages import PreSplitRing, Ring, SingleProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NUM_LAYERS, WIDTH, PROJECTED = 4, 128, 24
RANGES = ("0-2", "2-4")
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", "50M"),
    *("--runner", "pooling", "--served-model-name", "m"),
]
TEXTS = ["What is a pipeline?", "A ring of stages. " * 6, "one"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = make_llama(
        tmp_path_factory.mktemp("modules") / "model",
        model_dir,
        NUM_LAYERS,
        "600KB",
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    places = [("", "Transformer"), ("1_Pooling", "Pooling"), ("deep/2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in places]
    (folder / "modules.json").write_text(json.dumps(modules))
    for place, content in (
        ("1_Pooling", {"word_embedding_dimension": WIDTH, "pooling_mode_lasttoken": True}),
        ("deep/2_Dense", {"in_features": WIDTH, "out_features": PROJECTED, "bias": True}),
    ):
        (folder / place).mkdir(parents=True)
        (folder / place / "config.json").write_text(json.dumps(content))
    projection = {"linear.weight": torch.randn(PROJECTED, WIDTH), "linear.bias": torch.randn(PROJECTED)}
    save_file(projection, folder / "deep/2_Dense/model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> Iterator[list[list[float]]]:
    with SingleProcess(model, SETTINGS) as single:
        yield embed(single.url)


def embed(url: str) -> list[list[float]]:
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": "m", "input": TEXTS}, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return [each["embedding"] for each in answer.json()["data"]]


def check_equal(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(vector) for vector in found] == [PROJECTED] * len(TEXTS)
    assert max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)) < TOLERANCE


def test_an_export_has_the_projection(model: Path, expected: list[list[float]], tmp_path: Path) -> None:
    run_export(plan_export(model, lambda _: [LayerRange.parse(text) for text in RANGES]), tmp_path / "out", print)
    with PreSplitRing(tmp_path / "out", RANGES, SETTINGS) as ring:
        check_equal(embed(ring.url), expected)


@pytest.mark.slow
def test_folders_with_a_stage_s_own_files(model: Path, expected: list[list[float]], tmp_path: Path) -> None:
    """As somebody copies them: the whole folder, less the shards of which a stage reads nothing."""
    weight_map = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    for stage, text in enumerate(RANGES):
        folder, layers = shutil.copytree(model, stage_folder(tmp_path, stage)), LayerRange.parse(text)
        own = {file for name, file in weight_map.items() if owns(name, layers, NUM_LAYERS, shared_embedding=False)}
        others = set(weight_map.values()) - own
        assert others, "this shows nothing"
        for file in others:
            (folder / file).unlink()
    folders = {stage: stage_folder(tmp_path, stage) for stage in range(len(RANGES))}
    with OwnFolders(tmp_path, RANGES, SETTINGS) as ring:
        check_equal(embed(ring.url), expected)
        for stage, process in enumerate(ring.stages):
            assert f"{folders[stage]} holds " in process.text()


class OwnFolders(Ring):
    """Each stage from its own folder below ``model``, with its range."""

    def command(self, stage: int) -> list[str]:
        command = super().command(stage)
        command[command.index(str(self.model))] = str(stage_folder(self.model, stage))
        return command
