"""Safetensors headers: what is read, what is refused before a stage starts, what makes two folders one model."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewire.checkpoint.index import TensorInfo, fingerprint, read_index
from stagewire.errors import ConfigError

Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {"model.embed_tokens.weight": (6, 4), "model.layers.0.w": (4,), "model.layers.1.w": (4,)}


def header_of(shapes: Shapes) -> dict[str, Any]:
    """Float32 tensors, one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    return header


def shard_bytes(header: object, num_data_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_data_bytes)


def write_shard(path: Path, shapes: Shapes) -> None:
    path.write_bytes(shard_bytes(header_of(shapes), sum(4 * math.prod(shape) for shape in shapes.values())))


def write_sharded(model_dir: Path, *shards: Shapes) -> Path:
    """A folder with config.json, one file for each of ``shards``, and the index."""
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards):
        file = f"model-{number}.safetensors"
        write_shard(model_dir / file, shapes)
        weight_map |= dict.fromkeys(shapes, file)
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model_dir


def write_single(model_dir: Path, shapes: Shapes) -> Path:
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    write_shard(model_dir / "model.safetensors", shapes)
    return model_dir


def shard_by_shard(shapes: Shapes) -> list[Shapes]:
    return [{name: shape} for name, shape in shapes.items()]


def test_with_and_without_an_index(tmp_path: Path) -> None:
    sharded = read_index(write_sharded(tmp_path / "a", *shard_by_shard(SHAPES)))
    single = read_index(write_single(tmp_path / "b", SHAPES))
    assert sharded is not None
    assert single is not None
    assert sharded.total_bytes == single.total_bytes == 4 * (24 + 4 + 4)
    name = "model.layers.1.w"
    for index, file in ((sharded, "model-2.safetensors"), (single, "model.safetensors")):
        path = (tmp_path / "a" if index is sharded else tmp_path / "b") / file
        # The last tensor of its file.
        assert index.tensors[name] == TensorInfo(name, "F32", (4,), 16, file, path.stat().st_size - 16)
    sizes = [path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors")]
    assert sharded.header_bytes == sum(sizes) - sharded.total_bytes


def test_several_files_without_an_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", {"x": (2,)})
    write_shard(tmp_path / "b.safetensors", {"y": (2,)})
    index = read_index(tmp_path)
    assert index is not None
    assert {name: tensor.file for name, tensor in index.tensors.items()} == {"x": "a.safetensors", "y": "b.safetensors"}


def test_scalars_and_types_of_less_than_a_byte(tmp_path: Path) -> None:
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "none": {"dtype": "F16", "shape": [0, 8], "data_offsets": [4, 4]},
        "fp4": {"dtype": "F4", "shape": [6], "data_offsets": [4, 7]},
        "of the future": {"dtype": "F3", "shape": [8], "data_offsets": [7, 10]},
    }
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(header, 10))
    index = read_index(tmp_path)
    assert index is not None
    assert [tensor.num_bytes for tensor in index.tensors.values()] == [4, 0, 3, 3]


def test_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert read_index(tmp_path) is None


def test_files_outside_the_index_are_not_read(tmp_path: Path) -> None:
    write_sharded(tmp_path, *shard_by_shard(SHAPES))
    write_shard(tmp_path / "older.safetensors", {"tok_embeddings.weight": (6, 4)})
    index = read_index(tmp_path)
    assert index is not None
    assert set(index.tensors) == set(SHAPES)


@pytest.mark.parametrize("number", [0, 1])
def test_the_index_says_which_of_two_copies_holds(tmp_path: Path, number: int) -> None:
    write_sharded(tmp_path, {"x": (2,), "y": (1,)}, {"x": (3,), "z": (1,)})
    weight_map = {"x": f"model-{number}.safetensors", "y": "model-0.safetensors", "z": "model-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    index = read_index(tmp_path)
    assert index is not None
    assert index.tensors["x"].shape == (2 + number,)


def test_of_two_copies_without_an_index_vllm_reads_the_last(tmp_path: Path) -> None:
    for name in ("x-2", "x-10"):
        write_shard(tmp_path / f"{name}.safetensors", {"x": (2,), name: (1,)})
    index = read_index(tmp_path)
    assert index is not None
    assert index.tensors["x"].file == "x-10.safetensors"
    assert index.copies == {"x": ("x-10.safetensors", "x-2.safetensors")}


def test_two_copies_of_different_shapes_without_an_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", {"x": (2,)})
    write_shard(tmp_path / "b.safetensors", {"x": (3,)})
    with pytest.raises(ConfigError, match=r"tensor x has several shapes \(\[2\] in a\.safetensors, \[3\] in b\."):
        read_index(tmp_path)


def test_a_shard_is_missing(tmp_path: Path) -> None:
    write_sharded(tmp_path, *shard_by_shard(SHAPES))
    (tmp_path / "model-1.safetensors").unlink()
    expected = r"model-1\.safetensors is missing, where .* places tensor model\.layers\.0\.w;"
    with pytest.raises(ConfigError, match=expected):
        read_index(tmp_path)


def test_a_shard_lacks_a_tensor(tmp_path: Path) -> None:
    write_sharded(tmp_path, *shard_by_shard(SHAPES))
    write_shard(tmp_path / "model-1.safetensors", {"other": (4,)})
    index = read_index(tmp_path)
    assert index is not None
    assert index.absent == ("model.layers.0.w",)
    assert "other" in index.tensors


@settings(deadline=None)
@given(cut=st.integers(min_value=0))
def test_every_cut_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    model_dir = write_single(tmp_path_factory.mktemp("model"), SHAPES)
    path = model_dir / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: cut % len(content)])
    said = r"model\.safetensors (is cut short|is empty \(0 bytes)"
    with pytest.raises(ConfigError, match=said):
        read_index(model_dir)


def test_a_cut_names_the_tensor(tmp_path: Path) -> None:
    path = write_single(tmp_path, SHAPES) / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ConfigError, match=rf"tensor model\.layers\.1\.w ends at byte {size}, the file holds {size - 1}"
    ):
        read_index(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (struct.pack("<Q", 100_000_001) + b"{}", "header of 100000001 bytes"),
        (struct.pack("<Q", 2) + b"{,", "no readable safetensors header"),
        (struct.pack("<Q", 2) + b"\xff\xff", "no readable safetensors header"),
        (shard_bytes([], 0), "must be a JSON object, found list"),
        (shard_bytes({"x": 1}, 0), "tensor x needs dtype, shape and data_offsets"),
        (shard_bytes({"x": {"dtype": "F32"}}, 0), "tensor x needs"),
        (shard_bytes({"x": ENTRY | {"data_offsets": [0]}}, 8), "tensor x needs"),
        (shard_bytes({"x": ENTRY | {"data_offsets": [8, 0]}}, 8), "tensor x has a malformed entry"),
        (shard_bytes({"x": ENTRY | {"data_offsets": [-8, 0]}}, 8), "tensor x has a malformed entry"),
        (shard_bytes({"x": ENTRY | {"shape": [True]}}, 8), "tensor x has a malformed entry"),
        (shard_bytes({"x": ENTRY | {"shape": "2"}}, 8), "tensor x has a malformed entry"),
        (shard_bytes({"x": ENTRY | {"dtype": 1}}, 8), "tensor x has a malformed entry"),
        (shard_bytes({"x": ENTRY | {"shape": [3]}}, 8), "type F32 cannot have 8 bytes"),
    ],
)
def test_a_malformed_shard(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_index(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "weight_map"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "must be an object of tensor names"),
        ('{"weight_map": []}', "must be an object of tensor names"),
        ('{"weight_map": {"x": 1}}', "places tensor x in 1"),
        ('{"weight_map": {"x": "../other/model.safetensors"}}', "expected a file inside"),
        ('{"weight_map": {"x": "/etc/hostname"}}', "expected a file inside"),
    ],
)
def test_a_malformed_index(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_index(tmp_path)


def change_config(model_dir: Path, **changes: object) -> Path:
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model_dir


def test_fingerprint_of_the_same_model(tmp_path: Path) -> None:
    expected = fingerprint(write_single(tmp_path / "single", SHAPES))
    assert len(expected) == 16
    assert int(expected, 16) >= 0
    backwards = dict(reversed(SHAPES.items()))
    assert fingerprint(write_sharded(tmp_path / "sharded", *shard_by_shard(backwards))) == expected
    resaved = change_config(
        write_single(tmp_path / "resaved", SHAPES), _name_or_path="x", transformers_version="5", dtype="float32"
    )
    assert fingerprint(resaved) == expected


def test_fingerprint_of_another_model(tmp_path: Path) -> None:
    folders = [
        write_single(tmp_path / "base", SHAPES),
        write_single(tmp_path / "shape", SHAPES | {"model.layers.1.w": (2, 2)}),
        write_single(tmp_path / "more", SHAPES | {"lm_head.weight": (6, 4)}),
        change_config(write_single(tmp_path / "config", SHAPES), rope_theta=10000.0),
        change_config(write_single(tmp_path / "q1", SHAPES), quantization_config={"dtype": "a"}),
        change_config(write_single(tmp_path / "q2", SHAPES), quantization_config={"dtype": "b"}),
    ]
    assert len({fingerprint(folder) for folder in folders}) == len(folders)


def test_fingerprint_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"xx")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("not a weight")
    assert fingerprint(tmp_path) == before
    (tmp_path / "pytorch_model.bin").write_bytes(b"xxx")
    assert fingerprint(tmp_path) != before
