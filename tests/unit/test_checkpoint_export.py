"""A pre-split export: every byte where it has to be, whatever happened while it was written.

The checkpoint is made on the spot: several types, several files, tensors that two and that all stages need.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from stagewire.checkpoint.export_plan import ExportPlan, plan_export
from stagewire.checkpoint.export_writer import JOURNAL_NAME, Disk, run_export, verify_export
from stagewire.checkpoint.files import checkpoint_files
from stagewire.checkpoint.index import fingerprint, read_index
from stagewire.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_files,
    check_place,
    check_samples,
    encode_manifest,
    read_export,
    read_manifest,
    stage_folder,
)
from stagewire.checkpoint.model_config import LoadFlags, read_model_shape
from stagewire.checkpoint.ownership import Role, role_of, stage_bytes, stage_tensors
from stagewire.checkpoint.samples import sample_weights
from stagewire.errors import ConfigError, InternalError
from stagewire.launch import decision
from stagewire.launch.decision import Wanted
from stagewire.plan.ranges import LayerRange

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "offline_pipelining" / "serve_pipeline.py"
NUM_LAYERS = 6
BITS = {"F64": 64, "F32": 32, "BF16": 16, "U8": 8}
Tensors = dict[str, tuple[str, tuple[int, ...]]]
# Odd sizes and a narrow type in front of wider ones: what is cut out is not aligned by luck.
EMBEDDING: Tensors = {"model.embed_tokens.weight": ("BF16", (11, 3))}
HEAD: Tensors = {"lm_head.weight": ("BF16", (11, 3))}
UNKNOWN: Tensors = {"model.thing.quux": ("F32", (5,)), "model.thing.empty": ("F32", (0, 4))}
LAYERS: list[Tensors] = [
    {
        f"model.layers.{i}.zero_points": ("U8", (3,)),
        f"model.layers.{i}.q_proj.weight": ("BF16", (3, 5)),
        f"model.layers.{i}.scale": ("F64", (1,)),
        f"model.layers.{i}.bias": ("F32", ()),
    }
    for i in range(NUM_LAYERS)
]
OTHERS = ("tokenizer.json", "chat_template.jinja", "modeling_own.py", "sub/extra.json")
NORM: Tensors = {"model.norm.weight": ("BF16", (3,))}


def quiet(text: str) -> None:
    """Progress that nobody reads."""


def shard(tensors: Tensors, rng: random.Random) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rng.randbytes(begin)


def make_checkpoint(
    folder: Path,
    *,
    is_tied: bool = True,
    seed: int = 0,
    unknown: Tensors | None = None,
    num_shards: int = 3,
    others: tuple[str, ...] = OTHERS,
) -> Path:
    rng = random.Random(seed)
    parts: list[Tensors] = [EMBEDDING, *LAYERS, NORM, unknown or {}, {} if is_tied else HEAD]
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors" if num_shards > 1 else "model.safetensors"
        own: Tensors = {}
        for part in parts[len(parts) * number // num_shards : len(parts) * (number + 1) // num_shards]:
            own |= part
        (folder / name).write_bytes(shard(own, rng))
        weight_map |= dict.fromkeys(own, name)
    if num_shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"num_hidden_layers": NUM_LAYERS, "tie_word_embeddings": is_tied, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"the {name} of {seed}")
    return folder


def plan_for(model: Path, *ranges: str) -> ExportPlan:
    return plan_export(model, lambda num_layers: [LayerRange.parse(text) for text in ranges])


def export(model: Path, output: Path, *ranges: str, **options: Any) -> list[Manifest]:
    return run_export(plan_for(model, *(ranges or ("0-2", "2-3", "3-6"))), output, quiet, **options)


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    index = read_index(folder)
    assert index is not None
    return {
        name: (each.dtype, each.shape, (folder / each.file).read_bytes()[each.offset : each.offset + each.num_bytes])
        for name, each in index.tensors.items()
    }


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


# ---- what is in it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 3, 7])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("ranges", [("0-3", "3-6"), ("0-1", "1-5", "5-6"), tuple(f"{i}-{i + 1}" for i in range(6))])
def test_every_tensor_is_where_it_belongs(
    num_shards: int, is_tied: bool, ranges: tuple[str, ...], tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "m", is_tied=is_tied, unknown=UNKNOWN, num_shards=num_shards)
    source = tensor_bytes(model)
    manifests = export(model, tmp_path / "out", *ranges)
    copies = dict.fromkeys(source, 0)
    last = len(ranges) - 1
    for stage in range(len(ranges)):
        own = tensor_bytes(stage_folder(tmp_path / "out", stage))
        assert own == {name: source[name] for name in own}
        for name in own:
            copies[name] += 1
        assert {int(name.split(".")[2]) for name in own if ".layers." in name} == {
            *range(manifests[stage].layers.start, manifests[stage].layers.end)
        }
        assert ("model.embed_tokens.weight" in own) == (stage == 0 or (stage == last and is_tied))
        assert ("lm_head.weight" in own) == (stage == last and not is_tied)
        assert ("model.norm.weight" in own) == (stage == last)
    expected = dict.fromkeys(source, 1) | dict.fromkeys(UNKNOWN, len(ranges))
    if is_tied:
        expected["model.embed_tokens.weight"] = 2
    assert copies == expected
    sums = plan_for(model, *ranges).sums
    assert sum(sums.stage_bytes) == sum(len(source[name][2]) * count for name, count in copies.items())


def test_a_tensor_too_many_or_too_few_is_our_bug(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stagewire.checkpoint import export_plan

    monkeypatch.setattr(export_plan, "stage_tensors", lambda *args: stage_tensors(*args)[1:])
    with pytest.raises(InternalError, match="bytes of tensors, expected"):
        plan_for(model, "0-3", "3-6")


def test_the_safetensors_library_reads_it(model: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    export(model, tmp_path / "out")
    source = tensor_bytes(model)
    for path in (tmp_path / "out").rglob("*.safetensors"):
        whole = path.read_bytes()
        header_bytes = int.from_bytes(whole[:8], "little")
        assert header_bytes % 8 == 0
        header = json.loads(whole[8 : 8 + header_bytes])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            assert entry["data_offsets"][0] % (BITS[entry["dtype"]] // 8) == 0, f"{name} is not aligned"
        for name, read in safetensors.deserialize(whole):
            assert bytes(read["data"]) == source[name][2]


def test_the_folder_is_in_the_hub_s_format(model: Path, tmp_path: Path) -> None:
    for name in (
        "pytorch_model.bin",
        "older.safetensors",
        "._model.safetensors",
        "model.safetensors.incomplete",
        "pytorch_model.bin.index.json",
        ".hidden",
        "m.gguf",
    ):
        (model / name).write_bytes(b"no part of it")
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("secret")
    export(model, tmp_path / "out")
    stage = tmp_path / "out" / "stage_2"
    assert {path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()} == {
        *("config.json", "tokenizer.json", "chat_template.jinja", "modeling_own.py", "sub/extra.json"),
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "model.safetensors.index.json",
        MANIFEST_NAME,
    }
    for name in ("config.json", "modeling_own.py", "sub/extra.json"):
        assert (stage / name).read_bytes() == (model / name).read_bytes()
    weight_map = json.loads((stage / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == set(tensor_bytes(stage))
    alone = tmp_path / "out" / "stage_1"
    assert [path.name for path in alone.glob("model[.-]*")] == ["model.safetensors"], "one file needs no index"


def add_modules(folder: Path, *places: str) -> None:
    """modules.json of sentence-transformers, and a projection in each of the sub-folders."""
    kinds = [{"path": place, "type": "sentence_transformers.models.Dense"} for place in places]
    transformer = {"path": "", "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps([transformer, *kinds]))
    for place in places:
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "config.json").write_text('{"in_features": 3, "out_features": 2}')
        (folder / place / "model.safetensors").write_bytes(
            shard({"linear.weight": ("F32", (2, 3))}, random.Random(place))
        )


def test_sub_folders_that_modules_name_are_the_model(model: Path, tmp_path: Path) -> None:
    """Without them vLLM answers all the same, with other vectors."""
    add_modules(model, "2_Dense", "deep/er/3_Dense", "4_Linked")
    (model / "1_Pooling").mkdir()
    for name in ("1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (model / name).write_text("{}")
    (model / "4_Linked").rename(tmp_path / "elsewhere")
    (model / "4_Linked").symlink_to(tmp_path / "elsewhere")
    (model / "5_Unnamed").mkdir()
    (model / "5_Unnamed" / "model.safetensors").write_bytes(b"of something else")
    export(model, tmp_path / "out")
    verify_export(tmp_path / "out", quiet)
    named = ["2_Dense", "deep/er/3_Dense", "4_Linked"]
    files = [f"{place}/{name}" for place in named for name in ("config.json", "model.safetensors")]
    files += ["modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json"]
    for stage in range(3):
        folder = stage_folder(tmp_path / "out", stage)
        assert [(folder / name).read_bytes() for name in files] == [(model / name).read_bytes() for name in files]
        assert checkpoint_files(folder).module_weights == checkpoint_files(model).module_weights
        assert not (folder / "5_Unnamed").exists()


def test_a_projection_is_copied_whatever_its_size(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_modules(model, "2_Dense")
    monkeypatch.setattr("stagewire.checkpoint.export_plan._MAX_COPIED_BYTES", 10)
    plan = plan_for(model, "0-3", "3-6")
    assert "2_Dense/model.safetensors" in plan.sources
    assert "2_Dense/config.json" in plan.left_out


def test_layers_that_only_draft_are_left_out_and_said(model: Path, tmp_path: Path) -> None:
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    drafters: Tensors = {"model.layers.6.eh_proj.weight": ("F32", (4, 4)), "mtp.fc.weight": ("F32", (2,))}
    (model / "mtp.safetensors").write_bytes(shard(drafters, random.Random(0)))
    index.write_text(json.dumps({"weight_map": weight_map | dict.fromkeys(drafters, "mtp.safetensors")}))
    plan = plan_for(model, "0-3", "3-6")
    assert {tensor.name for tensor in plan.sums.nowhere} == set(drafters)
    run_export(plan, tmp_path / "out", quiet)
    assert not {*drafters} & {*tensor_bytes(tmp_path / "out" / "stage_0"), *tensor_bytes(tmp_path / "out" / "stage_1")}


def test_mistral_s_own_format_stays_one(tmp_path: Path) -> None:
    """vLLM knows it by its names, the configuration too."""
    model = tmp_path / "model"
    model.mkdir()
    params = {"dim": 4, "n_layers": 4, "n_heads": 2, "vocab_size": 6, "head_dim": 2}
    (model / "params.json").write_text(json.dumps(params))
    layers: list[Tensors] = [{f"layers.{i}.attention.wq.weight": ("F32", (4, 4))} for i in range(4)]
    ends: Tensors = {"tok_embeddings.weight": ("F32", (6, 4)), "norm.weight": ("F32", (4,))}
    first, last = ends | layers[0], layers[1] | layers[2] | layers[3] | {"output.weight": ("F32", (6, 4))}
    for number, tensors in enumerate((first, last)):
        (model / f"consolidated-{number}.safetensors").write_bytes(shard(tensors, random.Random(number)))
    export(model, tmp_path / "out", "0-2", "2-4")
    one, two = (tmp_path / "out" / f"stage_{stage}" for stage in range(2))
    assert {path.name for path in two.glob("*.safetensors*")} == {
        *(f"consolidated-0000{number}-of-00002.safetensors" for number in (1, 2)),
        "consolidated.safetensors.index.json",
    }
    for folder in (one, two):
        assert checkpoint_files(folder).load_format == "mistral"
        assert read_model_shape(folder).num_layers == 4


@pytest.mark.parametrize("name", ["._model.safetensors", ".DS_Store", ".cache/x", "2_Dense/._config.json"])
def test_hidden_files_do_not_exist(model: Path, tmp_path: Path, name: str) -> None:
    """What macOS and download tools leave in a folder that is copied."""
    add_modules(model, "2_Dense")
    export(model, tmp_path / "out")
    path = stage_folder(tmp_path / "out", 1) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\0\5\x16\7")
    verify_export(tmp_path / "out", quiet)
    manifest = read_manifest(stage_folder(tmp_path / "out", 1))
    assert manifest is not None
    check_files(stage_folder(tmp_path / "out", 1), manifest)


def test_a_hub_s_cache_of_links(model: Path, tmp_path: Path) -> None:
    links = tmp_path / "snapshot"
    shutil.copytree(model, links)
    for path in [each for each in links.rglob("*") if each.is_file()]:
        blob = tmp_path / "blobs" / hashlib.sha256(path.name.encode()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        shutil.move(path, blob)
        path.symlink_to(blob)
    assert export(links, tmp_path / "a")[0].export_id == export(model, tmp_path / "b")[0].export_id
    assert not [path for path in (tmp_path / "a").rglob("*") if path.is_symlink()]


def test_the_manifest_and_the_load_line(model: Path, tmp_path: Path) -> None:
    manifests = export(model, tmp_path / "out")
    index, shape = read_index(model), read_model_shape(model)
    assert index is not None
    assert read_export(tmp_path / "out") == manifests
    for stage, manifest in enumerate(manifests):
        folder = stage_folder(tmp_path / "out", stage)
        check_files(folder, manifest)
        assert (manifest.stage, manifest.num_stages, manifest.num_layers) == (stage, 3, NUM_LAYERS)
        assert manifest.source_fingerprint == fingerprint(model)
        assert manifest.source_samples == sample_weights(checkpoint_files(model), index).digest
        assert manifest.export_id == manifests[0].export_id
        for name, record in manifest.files.items():
            content = (folder / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (record.num_bytes, record.sha256)
        own = read_index(folder)
        assert own is not None
        expected = stage_bytes(index, shape, manifest.layers)
        assert stage_bytes(own, read_model_shape(folder), manifest.layers) == expected == own.total_bytes
        check_samples(folder, manifest, sample_weights(checkpoint_files(folder), own).digest)


@pytest.mark.parametrize("is_tied_by_config", [True, False])
def test_an_untied_model_s_stages_agree_with_the_whole(is_tied_by_config: bool, tmp_path: Path) -> None:
    """A head of its own unties, whatever the config says; the first stage does not see the head."""
    model = make_checkpoint(tmp_path / "m", is_tied=False)
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": is_tied_by_config}
    (model / "config.json").write_text(json.dumps(config))
    index = read_index(model)
    assert index is not None
    for manifest in export(model, tmp_path / "out"):
        own = read_index(stage_folder(tmp_path / "out", manifest.stage))
        assert own is not None
        shape = read_model_shape(stage_folder(tmp_path / "out", manifest.stage))
        assert stage_bytes(own, shape, manifest.layers) == stage_bytes(index, shape, manifest.layers)


def test_the_export_id_follows_the_content(model: Path, tmp_path: Path) -> None:
    tuned = make_checkpoint(tmp_path / "tuned", seed=1)
    assert fingerprint(tuned) == fingerprint(model)
    manifest = export(model, tmp_path / "a")[0]
    assert export(tuned, tmp_path / "e")[0].source_samples != manifest.source_samples
    first = manifest.export_id
    assert export(model, tmp_path / "b")[0].export_id == first
    assert export(tuned, tmp_path / "c")[0].export_id != first
    assert export(model, tmp_path / "d", "0-3", "3-6")[0].export_id != first


def test_a_folder_that_was_copied_by_half(model: Path, tmp_path: Path) -> None:
    """Of its full length, so that the manifest's sizes are right."""
    manifest = export(model, tmp_path / "out")[1]
    folder = stage_folder(tmp_path / "out", 1)
    index = read_index(folder)
    assert index is not None
    last = list(index.tensors.values())[-1]
    os.truncate(folder / last.file, last.offset)
    os.truncate(folder / last.file, last.offset + last.num_bytes)
    check_files(folder, manifest)
    with pytest.raises(ConfigError, match=r"does not hold the weights that were exported .* copied by half\?"):
        check_samples(folder, manifest, sample_weights(checkpoint_files(folder), index).digest)


def test_a_manifest_from_before_there_were_samples(model: Path, tmp_path: Path) -> None:
    manifest = replace(export(model, tmp_path / "out")[0], source_samples="", own_samples="")
    folder = stage_folder(tmp_path / "out", 0)
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    assert read_manifest(folder) == manifest
    check_samples(folder, manifest, "anything")


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "stages", "sub/stages"])
def test_an_output_inside_the_source(where: str, model: Path, tmp_path: Path) -> None:
    before = snapshot(model)
    with pytest.raises(ConfigError, match="give a folder outside of it"):
        export(model, model / where)
    link = tmp_path / "link"
    link.symlink_to(model)
    with pytest.raises(ConfigError, match="give a folder outside of it"):
        export(model, link / where)
    assert snapshot(model) == before


def test_a_checkpoint_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": NUM_LAYERS}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="executing what is in them; convert the checkpoint first"):
        plan_for(tmp_path, "0-3", "3-6")


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (("0-6",), "a pipeline has at least 2"),
        (("0-3", "4-6"), "layer 3 has no owner"),
        (("0-3", "3-5"), "must end at 6"),
    ],
)
def test_ranges_that_do_not_do(ranges: tuple[str, ...], message: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_for(model, *ranges)


def test_a_stage_is_not_exported_again(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="is a pre-split stage itself"):
        export(tmp_path / "out" / "stage_0", tmp_path / "again")


def test_what_is_free_is_asked_first(model: Path, tmp_path: Path) -> None:
    class Full(Disk):
        def free_bytes(self, folder: Path) -> int:
            return 1000

    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=rf"not enough space in {output}: the export needs \d.* 1.00 kB are free"):
        export(model, output, disk=Full())
    assert [path.name for path in output.iterdir()] == [JOURNAL_NAME], "nothing was written"


def test_only_what_is_missing_needs_space(model: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    class Asked(Disk):
        def free_bytes(self, folder: Path) -> int:
            asked.append(1)
            return 20_000

    manifests = export(model, tmp_path / "out")
    assert export(model, tmp_path / "out", disk=Asked()) == manifests
    assert not asked, "a whole export needs nothing"
    (tmp_path / "out" / "stage_1" / "tokenizer.json").unlink()
    assert export(model, tmp_path / "out", disk=Asked()) == manifests, "one small file is 16 kB with its overhead"
    assert asked


@pytest.mark.parametrize("num_bytes", [0, 40])
def test_a_file_that_was_cut_after_the_export_is_written_again(num_bytes: int, model: Path, tmp_path: Path) -> None:
    manifests = export(model, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    os.truncate(tmp_path / "out" / "stage_1" / "model.safetensors", num_bytes)
    assert export(model, tmp_path / "out") == manifests
    assert snapshot(tmp_path / "out").items() >= {n: c for n, c in before.items() if n != JOURNAL_NAME}.items()


def test_two_exports_at_once(model: Path, tmp_path: Path) -> None:
    class Nested(Disk):
        def create(self, path: Path) -> IO[bytes]:
            with pytest.raises(ConfigError, match="another export is writing"):
                export(model, tmp_path / "out")
            return super().create(path)

    export(model, tmp_path / "out", disk=Nested())


def _other_weights(model: Path) -> None:
    path = model / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def _other_config(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"num_hidden_layers": NUM_LAYERS, "rope_theta": 5}))


def _touched(model: Path) -> None:
    os.utime(model / "tokenizer.json", ns=(1, 1))


def _one_more_file(model: Path) -> None:
    (model / "added.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_weights, r"model-00001-of-00003.safetensors had modification time \(ns\) \d+, now \d+"),
        (_other_config, "another model"),
        (_touched, "tokenizer.json had modification time"),
        (_one_more_file, "added.json is new"),
    ],
)
def test_a_source_that_changed_is_not_mixed_in(
    change: Callable[[Path], None], message: str, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    export(model, output)
    before = snapshot(output)
    change(model)
    with pytest.raises(ConfigError, match=rf"{message}.*--overwrite"):
        export(model, output)
    assert snapshot(output) == before
    manifests = export(model, output, is_overwriting=True)
    assert read_export(output) == manifests
    verify_export(output, quiet)


def test_a_source_that_changes_meanwhile(model: Path, tmp_path: Path) -> None:
    class Racing(Disk):
        def sync(self, stream: IO[bytes]) -> None:
            super().sync(stream)
            if "model-" in str(stream.name):
                os.utime(model / "model-00001-of-00003.safetensors", ns=(1, 1))

    with pytest.raises(ConfigError, match="changed while it was exported"):
        export(model, tmp_path / "out", disk=Racing())


def test_a_source_that_was_moved_is_the_same(model: Path, tmp_path: Path) -> None:
    manifests = export(model, tmp_path / "out")
    shutil.move(model, tmp_path / "elsewhere")
    assert export(tmp_path / "elsewhere", tmp_path / "out") == manifests


def test_other_ranges_and_fewer_stages(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(model, output)
    with pytest.raises(ConfigError, match=r"begun with layers 0-2 2-3 3-6, now it would be 0-3 3-6; .*--overwrite"):
        export(model, output, "0-3", "3-6")
    export(model, output, "0-3", "3-6", is_overwriting=True)
    assert sorted(path.name for path in output.iterdir()) == ["stage_0", "stage_1", JOURNAL_NAME]
    verify_export(output, quiet)


@pytest.mark.parametrize("is_overwriting", [True, False])
def test_a_folder_of_somebody_else(is_overwriting: bool, model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "stage_1" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years")
    with pytest.raises(ConfigError, match="stage_1"):
        export(model, tmp_path / "out", is_overwriting=is_overwriting)
    assert snapshot(tmp_path / "out" / "stage_1") == {"thesis.txt": b"years"}


def test_a_journal_that_is_no_journal(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL_NAME
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"[]\n", *lines[3:]]))
    with pytest.raises(ConfigError, match=r"is damaged.*--overwrite"):
        export(model, tmp_path / "out")


# ---- kills ---------------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """The process is gone: nothing after this may run."""


class DyingDisk(Disk):
    """Counts operations, and dies before or in the middle of the one with a given number."""

    def __init__(self, at: int = -1, how: str = "before") -> None:
        self.count, self.at, self.how = 0, at, how
        self.operations: list[str] = []
        self.renamed: list[Path] = []

    def _do(self, name: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        self.operations.append(name)
        self.count += 1
        if self.count - 1 != self.at:
            return act()
        if self.how == "middle" and half is not None:
            half()
        raise KilledError

    def make_folder(self, path: Path) -> None:
        self._do("make_folder", lambda: Disk.make_folder(self, path))

    def create(self, path: Path) -> IO[bytes]:
        stream: IO[bytes] = self._do("create", lambda: Disk.create(self, path))
        return stream

    def write(self, stream: IO[bytes], data: bytes | memoryview) -> None:
        half = memoryview(data)[: len(data) // 2]
        self._do("write", lambda: Disk.write(self, stream, data), lambda: Disk.write(self, stream, half))

    def sync(self, stream: IO[bytes]) -> None:
        self._do("sync", lambda: None)  # the tests' own speed; a kill does not lose what the system has

    def rename(self, old: Path, new: Path) -> None:
        self.renamed.append(new)
        self._do("rename", lambda: old.replace(new))

    def remove(self, path: Path) -> None:
        self._do("remove", lambda: Disk.remove(self, path))


def _kill_points(run: Callable[[Disk], object]) -> list[tuple[int, str]]:
    """Before every operation of a whole run, which is after the one before it; writes also in the middle."""
    disk = DyingDisk()
    run(disk)
    return [
        (at, how)
        for at, name in enumerate(disk.operations)
        for how in ("before", "middle")
        if how != "middle" or name == "write"
    ]


def _assert_refused_or_whole(output: Path, ranges: int) -> None:
    """What a server meets right after the kill: a finished stage, or a clear no. Never half a stage."""
    for stage in range(ranges):
        folder = stage_folder(output, stage)
        try:
            manifest = read_manifest(folder)
        except ConfigError as error:
            assert "unfinished export" in str(error)  # noqa: PT017
        else:
            if manifest is None:
                assert not folder.exists() or not any(
                    path for path in folder.iterdir() if path.name != f"{MANIFEST_NAME}.partial"
                )
            else:
                check_files(folder, manifest)


def test_a_kill_anywhere_is_resumed(tmp_path: Path) -> None:
    plan = plan_for(make_checkpoint(tmp_path / "m", num_shards=2, others=OTHERS[-1:]), "0-3", "3-6")
    whole = tmp_path / "whole"
    points = _kill_points(lambda disk: run_export(plan, whole, quiet, disk=disk))
    assert len(points) > 80
    expected = {name: content for name, content in snapshot(whole).items() if name != JOURNAL_NAME}
    output = tmp_path / "out"
    for at, how in points:
        shutil.rmtree(output, ignore_errors=True)
        with pytest.raises(KilledError):
            run_export(plan, output, quiet, disk=DyingDisk(at, how))
        _assert_refused_or_whole(output, 2)
        journal = (output / JOURNAL_NAME).read_bytes() if (output / JOURNAL_NAME).exists() else b""
        recorded = {json.loads(line)["file"] for line in journal.splitlines(keepends=True)[1:] if line.endswith(b"\n")}
        finished = {output / name for name in recorded if (output / name).exists()}
        second = DyingDisk()
        manifests = run_export(plan, output, quiet, disk=second)
        assert not finished & set(second.renamed), f"{at} {how}: a finished file was written again"
        found = {name: content for name, content in snapshot(output).items() if name != JOURNAL_NAME}
        assert found == expected, f"{at} {how}"
        assert read_export(output) == manifests


def test_a_kill_while_overwriting(tmp_path: Path) -> None:
    """The new export may be begun again with --overwrite, the old one be asked for again; never a mixture."""
    old = make_checkpoint(tmp_path / "old", num_shards=1, others=())
    plan = plan_for(make_checkpoint(tmp_path / "new", seed=1, num_shards=1, others=OTHERS[-1:]), "0-3", "3-6")
    template, output = tmp_path / "template", tmp_path / "out"
    export(old, template, "0-2", "2-4", "4-6")
    shutil.copytree(template, output)
    points = _kill_points(lambda disk: run_export(plan, output, quiet, disk=disk, is_overwriting=True))
    expected = {name: content for name, content in snapshot(output).items() if name != JOURNAL_NAME}
    for at, how in points:
        shutil.rmtree(output)
        shutil.copytree(template, output)
        with pytest.raises(KilledError):
            run_export(plan, output, quiet, disk=DyingDisk(at, how), is_overwriting=True)
        _assert_refused_or_whole(output, 3)
        run_export(plan, output, quiet, is_overwriting=True, disk=DyingDisk())
        found = {name: content for name, content in snapshot(output).items() if name != JOURNAL_NAME}
        assert found == expected, f"{at} {how}"


def test_a_real_kill(tmp_path: Path) -> None:
    """SIGKILL of the tool at random moments, until it has come to its end."""
    model = make_checkpoint(tmp_path / "m")
    big = {f"model.layers.{i}.big": ("F32", (500_000,)) for i in range(NUM_LAYERS)}
    (model / "model-00003-of-00003.safetensors").unlink()
    (model / "model.safetensors.index.json").unlink()
    (model / "model-00003-of-00003.safetensors").write_bytes(shard({**big, **NORM}, random.Random(5)))
    source, output = tensor_bytes(model), tmp_path / "out"
    command = [sys.executable, str(TOOL), "--model", str(model), "--pipeline-parallel-size", "3"]
    command += ["--output-dir", str(output)]
    rng, kills = random.Random(3), 0
    for _ in range(60):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            # Not before it writes: the interpreter's own start would take most of the kills.
            for _ in range(rng.randrange(1, 9)):
                process.stdout.readline()
            time.sleep(rng.random() * 0.004)
            process.send_signal(signal.SIGKILL)
            process.stdout.read()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert subprocess.run(command, check=False, timeout=60, capture_output=True).returncode == 0
    assert kills >= 2
    verify_export(output, quiet)
    for stage in range(3):
        own = tensor_bytes(stage_folder(output, stage))
        assert own == {name: source[name] for name in own}


# ---- reading it back -----------------------------------------------------------------------------------------------


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def _each_file(output: Path) -> Iterator[Path]:
    yield from (path for path in sorted(output.glob("stage_*/**/*")) if path.is_file())


def test_verify_finds_one_flipped_bit_in_any_file(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(model, output)
    lines: list[str] = []
    verify_export(output, lines.append)
    assert len(lines) == 3
    for path in _each_file(output):
        at = random.Random(path.name).randrange(path.stat().st_size)
        _flip(path, at)
        with pytest.raises(ConfigError) as caught:
            verify_export(output, quiet)
        assert str(path) in str(caught.value), "the file is named"
        _flip(path, at)
    verify_export(output, quiet)


def test_verify_names_file_and_difference(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(model, output)
    (output / "stage_0" / "tokenizer.json").unlink()
    (output / "stage_1" / "added.txt").write_text("x")
    (output / "stage_2" / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        verify_export(output, quiet)
    for line in (
        f"{output}/stage_0/tokenizer.json is missing",
        f"{output}/stage_1/added.txt is not part of the export",
        f"{output}/stage_2/config.json has 2 bytes, stagewire.json says ",
    ):
        assert line in str(caught.value)


def test_verify_of_one_stage_alone(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out")
    alone = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "out" / "stage_1", alone)
    assert verify_export(alone, quiet)[0].stage == 1
    _flip(alone / "model.safetensors", -1)
    with pytest.raises(ConfigError, match=r"model.safetensors has sha256 \w{64}, stagewire.json says \w{64}"):
        verify_export(alone, quiet)


def _resign(path: Path, **changes: Any) -> None:
    """Changes a manifest as another program would, checksum and all."""
    from stagewire.checkpoint import manifest

    content = json.loads(path.read_text()) | changes
    del content["checksum"]
    path.write_bytes(manifest._encode(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff", "is damaged"),
        (b'{"format_version": 2}', "format version 2, this Stagewire reads 1"),
        (b'{"format_version": 1, "complete": true}', "its checksum is"),
    ],
)
def test_a_damaged_manifest(content: bytes, message: str, model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out")
    (tmp_path / "out" / "stage_1" / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_manifest(tmp_path / "out" / "stage_1")


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": 7},
        {"stage": "1"},
        {"layer_range": "8"},
        {"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}},
        {"files": {"config.json": {"bytes": 1}}},
        {"files": 3},
    ],
    ids=str,
)
def test_a_manifest_that_another_program_wrote(changes: dict[str, Any], model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out")
    _resign(tmp_path / "out" / "stage_1" / MANIFEST_NAME, **changes)
    with pytest.raises(ConfigError, match="is damaged"):
        read_manifest(tmp_path / "out" / "stage_1")


def test_a_range_that_was_edited_by_hand(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out")
    path = tmp_path / "out" / "stage_1" / MANIFEST_NAME
    path.write_text(path.read_text().replace('"2-3"', '"2-4"'))
    with pytest.raises(ConfigError, match="is damaged"):
        read_manifest(tmp_path / "out" / "stage_1")


def test_a_full_checkpoint_has_no_manifest(model: Path) -> None:
    assert read_manifest(model) is None
    assert read_manifest(model / "config.json") is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((2, None, None), "--pipeline-stage-idx 2 contradicts .* stage 1 of 3 .* 2-3: give --pipeline-stage-idx 1"),
        ((1, 4, None), "--pipeline-total-stages 4 contradicts .* give --pipeline-total-stages 3"),
        ((1, 3, LayerRange(2, 4)), "--pipeline-layer-range 2-4 contradicts .* give --pipeline-layer-range 2-3"),
    ],
)
def test_a_place_that_contradicts(
    place: tuple[int | None, int | None, LayerRange | None], message: str, model: Path, tmp_path: Path
) -> None:
    manifest = export(model, tmp_path / "out")[1]
    check_place(manifest, tmp_path, 1, 3, LayerRange(2, 3))
    with pytest.raises(ConfigError, match=message):
        check_place(manifest, tmp_path, *place)


def _stranger(output: Path) -> None:
    (output / "stage_1" / "more.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda output: (output / "stage_1" / "config.json").unlink(), "config.json is missing"),
        (lambda output: _flip(output / "stage_1" / "config.json", 3), "config.json was changed after the export"),
        (lambda output: os.truncate(output / "stage_1" / "model.safetensors", 9), "has 9 bytes, stagewire.json says"),
        (_stranger, "more.safetensors is not part of this pre-split stage"),
    ],
)
def test_a_folder_that_is_not_what_its_manifest_says(
    damage: Callable[[Path], None], message: str, model: Path, tmp_path: Path
) -> None:
    manifest = export(model, tmp_path / "out")[1]
    damage(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        check_files(tmp_path / "out" / "stage_1", manifest)


def test_a_set_that_is_not_whole(model: Path, tmp_path: Path) -> None:
    output, other = tmp_path / "out", tmp_path / "other"
    export(model, output)
    export(make_checkpoint(tmp_path / "tuned", seed=1), other)
    shutil.rmtree(output / "stage_1")
    shutil.copytree(other / "stage_1", output / "stage_1")
    with pytest.raises(ConfigError, match=r"stage_1 is of export \w{16}, stage_0 of export \w{16}"):
        read_export(output)
    shutil.rmtree(output / "stage_1")
    shutil.copytree(output / "stage_2", output / "stage_1")
    with pytest.raises(ConfigError, match="stage_1 holds stage 2"):
        read_export(output)
    shutil.rmtree(output / "stage_1")
    with pytest.raises(ConfigError, match="stage_1 is missing"):
        read_export(output)
    with pytest.raises(ConfigError, match="is no pre-split stage"):
        read_export(tmp_path)


# ---- the launcher and the tool -------------------------------------------------------------------------------------


def _stages(
    pipeline_dir: Path, num_stages: int | None = None, ranges: list[str] | None = None
) -> tuple[tuple[LayerRange, ...], list[Path]]:
    stages = decision._choose_stages(Wanted(pipeline_dir=pipeline_dir, ranges=ranges), num_stages, LoadFlags())
    return stages.ranges, stages.folders


def test_the_launcher_takes_stages_and_ranges_from_it(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(model, output)
    ranges, folders = _stages(output)
    assert [str(layers) for layers in ranges] == ["0-2", "2-3", "3-6"]
    assert folders == [output / f"stage_{stage}" for stage in range(3)]
    assert _stages(output, num_stages=3, ranges=["0-2", "2-3", "3-6"]) == (ranges, folders)
    with pytest.raises(ConfigError, match=f"--num-stages 2 contradicts {output}, which was exported for 3 stages"):
        _stages(output, num_stages=2)
    with pytest.raises(ConfigError, match=r"--ranges 0-3 3-6 contradicts .* 0-2 2-3 3-6"):
        _stages(output, ranges=["0-3", "3-6"])
    (output / "stage_2" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        _stages(output)


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Isolated, without site-packages: what a bare clone has."""
    command = [sys.executable, "-I", "-S", str(TOOL), *map(str, arguments)]
    return subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)


def test_the_tool_needs_the_standard_library_only(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", unknown=UNKNOWN)
    options = ["--model", model, "--pipeline-parallel-size", 2, "--output-dir", tmp_path / "out"]
    done = run_tool(*options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "+ 66 again in the last stage (model.embed_tokens.weight, shared with the head)" in done.stdout
    assert "+ 20 because every stage has model.thing.quux, model.thing.empty, of unknown role" in done.stdout
    again = run_tool(*options)
    assert again.returncode == 0
    assert "tokenizer.json" not in again.stdout, "nothing is left to write"
    verified = run_tool("--verify", "--output-dir", tmp_path / "out")
    assert verified.returncode == 0
    assert "all as exported" in verified.stdout
    _flip(tmp_path / "out" / "stage_1" / "tokenizer.json", 0)
    spoilt = run_tool("--verify", "--output-dir", tmp_path / "out")
    assert spoilt.returncode == 2
    assert "tokenizer.json has sha256" in spoilt.stderr
    assert role_of("model.thing.quux") is Role.UNKNOWN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --pipeline-parallel-size N"),
        (["--pipeline-parallel-size", 3, "--ranges", "0-3", "3-6"], "3 but --ranges has 2"),
        (["--pipeline-parallel-size", 7], "7 stages need at least 7 layers"),
        (["--ranges", "0-3", "3-7"], "the model has 6 layers"),
        (["--ranges", "0-3", "3-6", "--verify"], "--verify exports nothing: drop --model, --ranges, or --verify"),
    ],
)
def test_the_tool_refuses(options: list[object], message: str, model: Path, tmp_path: Path) -> None:
    done = run_tool("--model", model, "--output-dir", tmp_path / "out", *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_memory_is_bounded(tmp_path: Path) -> None:
    """400 MB in one sparse file, exported with 48 MB of address space more than an idle interpreter's."""
    model = make_checkpoint(tmp_path / "m", num_shards=1)
    (model / "model.safetensors").unlink()
    header: dict[str, Any] = {}
    num_bytes = 400_000_000 // NUM_LAYERS // 4 * 4
    for i in range(NUM_LAYERS):
        span = [i * num_bytes, (i + 1) * num_bytes]
        header[f"model.layers.{i}.w"] = {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": span}
    text = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + NUM_LAYERS * num_bytes)
    limited = (
        "import resource, runpy, sys\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 48_000_000,) * 2)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    options = ["--model", str(model), "--ranges", "0-5", "5-6", "--output-dir", str(tmp_path / "out")]
    command = [sys.executable, "-I", "-S", "-c", limited, str(TOOL), *options]
    done = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert plan_for(model, "0-5", "5-6").sums.stage_bytes == (5 * num_bytes, num_bytes)
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors")) > 399_000_000
