"""A model's folder as a whole: the configuration that counts, what only the index knows, what is odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagewire.checkpoint.files import INDEX_NAME
from stagewire.checkpoint.folder import read_checkpoint
from stagewire.checkpoint.index import config_fingerprint, fingerprint
from stagewire.checkpoint.model_config import LoadFlags, parse_overrides, read_config, read_model_shape
from stagewire.checkpoint.ownership import shares_embedding, stage_tensors
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange
from unit.test_checkpoint_index import Shapes, write_shard

LAYERS: Shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(4)}
ENDS: Shapes = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,)}
HEAD: Shapes = {"lm_head.weight": (6, 4)}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "hidden_size": 4,
    "tie_word_embeddings": False,
}


def make(folder: Path, shards: dict[str, Shapes] | None = None, **changes: Any) -> Path:
    """A folder with config.json, these files, and an index when there are several."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    shards = {"model.safetensors": ENDS | LAYERS | HEAD} if shards is None else shards
    for name, shapes in shards.items():
        write_shard(folder / name, shapes)
    if len(shards) > 1:
        set_index(folder, {name: file for file, shapes in shards.items() for name in shapes})
    return folder


def set_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def half(start: int, end: int) -> Shapes:
    return {name: shape for i, (name, shape) in enumerate(LAYERS.items()) if start <= i < end}


FIRST: Shapes = {"model.embed_tokens.weight": (6, 4)} | half(0, 2)
LAST: Shapes = half(2, 4) | {"model.norm.weight": (4,)}


def halves(folder: Path, last: Shapes = LAST | HEAD, **changes: Any) -> Path:
    return make(folder, {"a.safetensors": FIRST, "b.safetensors": last}, **changes)


# ---- the configuration ---------------------------------------------------------------------------------------------


def test_overrides_count(tmp_path: Path) -> None:
    flags = LoadFlags(hf_overrides=parse_overrides('{"num_hidden_layers": 2, "tie_word_embeddings": true}'))
    checkpoint = read_checkpoint(make(tmp_path), flags)
    assert checkpoint.shape.num_layers == 2
    assert [tensor.name for tensor in checkpoint.unbuilt] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (2, 3)]
    assert config_fingerprint(tmp_path, flags) != config_fingerprint(tmp_path)


def test_overrides_of_a_section_change_it(tmp_path: Path) -> None:
    make(tmp_path, text_config={"num_hidden_layers": 4, "hidden_size": 8}, rope_scaling={"type": "a", "factor": 2})
    flags = LoadFlags(hf_overrides={"text_config": {"num_hidden_layers": 3}, "rope_scaling": {"type": "b"}})
    config = read_config(tmp_path, flags)
    assert config["text_config"] == {"num_hidden_layers": 3, "hidden_size": 8}
    assert config["rope_scaling"] == {"type": "b"}, "vLLM replaces what is no section"


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_overrides_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--hf-overrides"):
        parse_overrides(text)


def test_the_configuration_of_another_folder(tmp_path: Path) -> None:
    make(tmp_path / "model")
    make(tmp_path / "other", {}, num_hidden_layers=3)
    flags = LoadFlags(hf_config_path=str(tmp_path / "other"))
    assert read_model_shape(tmp_path / "model", flags).num_layers == 3
    with pytest.raises(ConfigError, match=r"--hf-config-path .*none does not exist"):
        read_config(tmp_path / "model", LoadFlags(hf_config_path=str(tmp_path / "none")))


PARAMS = {"dim": 4, "n_layers": 4, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 8, "head_dim": 2, "vocab_size": 6}


def test_mistrals_own_format(tmp_path: Path) -> None:
    make(tmp_path, num_hidden_layers=9, only_here=1)
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | {"tied_embeddings": True}))
    assert read_config(tmp_path)["num_hidden_layers"] == 9, "there is no consolidated*.safetensors"
    write_shard(tmp_path / "consolidated.safetensors", {"layers.0.attention.wq.weight": (4, 4)})
    config = read_config(tmp_path)
    assert config["num_hidden_layers"] == 4
    assert config["num_key_value_heads"] == 1
    assert config["tie_word_embeddings"] is True
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["only_here"] == 1, "config.json says what params.json does not"
    assert read_config(tmp_path, LoadFlags(config_format="hf"))["num_hidden_layers"] == 9
    (tmp_path / "config.json").unlink()
    assert read_checkpoint(tmp_path).shape.num_layers == 4


def test_params_alone_are_refused_as_vllm_does(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "old.json")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(ConfigError, match=r"config\.json is missing, and vLLM reads params\.json only beside"):
        read_config(tmp_path)
    assert read_model_shape(tmp_path, LoadFlags(config_format="mistral")).num_layers == 4


def test_a_configuration_whose_blob_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("../../blobs/0f")
    with pytest.raises(ConfigError, match=r"config\.json is a link to \.\./\.\./blobs/0f, .*blob missing"):
        read_config(tmp_path)


def test_a_quantization_in_a_file_of_its_own(tmp_path: Path) -> None:
    described = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}
    (make(tmp_path) / "hf_quant_config.json").write_text(json.dumps(described))
    assert read_config(tmp_path)["quantization_config"] == described
    make(tmp_path, quantization_config={"quant_method": "fp8"})
    assert read_config(tmp_path)["quantization_config"] == {"quant_method": "fp8"}


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json"])
def test_a_quantization_that_vllm_reads_when_told(tmp_path: Path, name: str) -> None:
    (make(tmp_path) / name).write_text("{}")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.quantization_file == name
    assert f"{name} says how the weights are quantized" in checkpoint.warnings[0]


# ---- what only the index knows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.mlp.up_proj.weight_scale",
        "model.layers.4.mlp.up_proj.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "vision_tower.blocks.0.weight",
    ],
)
def test_an_index_may_name_what_vllm_does_not_need(tmp_path: Path, name: str) -> None:
    halves(tmp_path, LAST, tie_word_embeddings=True)
    set_index(tmp_path, dict.fromkeys(FIRST, "a.safetensors") | dict.fromkeys([*LAST, name], "b.safetensors"))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.index is not None
    assert checkpoint.index.absent == (name,)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_an_index_of_another_checkpoint(tmp_path: Path, name: str) -> None:
    halves(tmp_path)
    for file, shapes in (("a.safetensors", FIRST), ("b.safetensors", LAST | HEAD)):
        write_shard(tmp_path / file, {each: shape for each, shape in shapes.items() if each != name})
    with pytest.raises(ConfigError, match=rf"tensor {name} is in .*safetensors, which does not hold it"):
        read_checkpoint(tmp_path)


# ---- a part of the files -------------------------------------------------------------------------------------------


def test_a_stage_needs_its_own_files_only(tmp_path: Path) -> None:
    whole = read_checkpoint(halves(tmp_path))
    assert whole.index is not None
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "a.safetensors").symlink_to("../blobs/0f")
    layers = LayerRange(2, 4)
    checkpoint = read_checkpoint(tmp_path, layers=layers)
    assert checkpoint.index is not None
    assert stage_tensors(checkpoint.index, checkpoint.shape, layers)[0].name == "model.layers.2.mlp.up_proj.weight"
    assert "holds 1 of the checkpoint's 2 files" in checkpoint.warnings[0]
    with pytest.raises(
        ConfigError, match=r"a\.safetensors is a link .*embed_tokens.*the stage with layers 0-2 needs.*export"
    ):
        read_checkpoint(tmp_path, layers=LayerRange(0, 2))
    for read in (read_checkpoint, fingerprint):
        with pytest.raises(ConfigError, match=r"blob missing.*stagewire export"):
            read(tmp_path)


def test_a_tied_last_stage_needs_the_embedding(tmp_path: Path) -> None:
    halves(tmp_path, LAST, tie_word_embeddings=True)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"a\.safetensors is missing.*places tensor model\.embed_tokens\.weight"):
        read_checkpoint(tmp_path, layers=LayerRange(2, 4))


# ---- what is odd ---------------------------------------------------------------------------------------------------


def test_a_head_that_is_neither_tied_nor_there(tmp_path: Path) -> None:
    assert read_checkpoint(make(tmp_path / "right")).warnings == ()
    headless = {"model.safetensors": ENDS | LAYERS}
    assert "no file holds a head" in read_checkpoint(make(tmp_path / "wrong", headless)).warnings[0]
    tied = make(tmp_path / "tied", headless, tie_word_embeddings=True)
    embedder = make(tmp_path / "embedder", headless, architectures=["LlamaModel"])
    assert [read_checkpoint(folder).warnings for folder in (tied, embedder)] == [(), ()]


def test_copies_of_which_one_counts(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    halves(tmp_path)
    write_shard(tmp_path / "b.safetensors", LAST | HEAD | {name: (4, 4)})
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.index is not None
    assert checkpoint.index.tensors[name].file == "a.safetensors"
    assert f"by {INDEX_NAME} the one in a.safetensors counts" in checkpoint.warnings[0]
    (tmp_path / INDEX_NAME).unlink()
    assert "by vLLM's order of files the one in b.safetensors counts" in read_checkpoint(tmp_path).warnings[0]


@pytest.mark.parametrize("name", ["stale.safetensors", ".stale.safetensors"])
def test_vllm_looks_for_a_head_in_files_beside_the_checkpoint(tmp_path: Path, name: str) -> None:
    halves(tmp_path, LAST, tie_word_embeddings=True)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.index is not None
    assert shares_embedding(checkpoint.index, checkpoint.shape)
    write_shard(tmp_path / name, HEAD)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.index is not None
    assert not shares_embedding(checkpoint.index, checkpoint.shape)
    assert "does not consist of holds lm_head.weight" in checkpoint.warnings[0]
    (tmp_path / name).write_bytes(b"\0\5\x16\7" + bytes(100))
    assert f"{name} is no part of the checkpoint, and vLLM reads its header" in read_checkpoint(tmp_path).warnings[0]


def test_two_formats(tmp_path: Path) -> None:
    write_shard(make(tmp_path) / "consolidated.safetensors", {"layers.0.attention.wq.weight": (4, 4)})
    assert "leaves out model.safetensors; give --load-format hf" in read_checkpoint(tmp_path).warnings[0]
