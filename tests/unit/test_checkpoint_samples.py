"""Samples of weights: which values two folders may not differ in, which are not looked at, and what it costs."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from stagewire.checkpoint.files import checkpoint_files
from stagewire.checkpoint.index import TensorInfo, read_index, read_tensors
from stagewire.checkpoint.samples import (
    MAX_PER_KIND,
    PAGE_BYTES,
    WHOLE_BYTES,
    Samples,
    choose_ranges,
    choose_tensors,
    sample_tensors,
    sample_weights,
)
from stagewire.errors import ConfigError

LARGE = (300, 200)  # 240 kB
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": LARGE,
    "model.layers.0.norm.weight": (200,),
    "model.layers.0.q.weight": LARGE,
    "model.layers.1.norm.weight": (200,),
    "model.layers.1.q.weight": LARGE,
    "lm_head.weight": LARGE,
}


def write(folder: Path, *shards: list[str], seed: int = 0) -> Path:
    """Random float32 tensors, whose values follow from their name and ``seed``."""
    folder.mkdir()
    for number, names in enumerate(shards or [list(SHAPES)]):
        header, data = {}, b""
        for name in names:
            size = 4 * SHAPES[name][0] * (SHAPES[name] + (1,))[1]
            header[name] = {"dtype": "F32", "shape": SHAPES[name], "data_offsets": [len(data), len(data) + size]}
            data += random.Random(f"{name} {seed}").randbytes(size)
        text = json.dumps(header).encode()
        (folder / f"model-{number}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def tensors_of(folder: Path) -> dict[str, TensorInfo]:
    index = read_index(folder)
    assert index is not None
    return dict(index.tensors)


def sample(folder: Path) -> Samples:
    files = checkpoint_files(folder)
    return sample_weights(files, read_tensors(files))


def overwrite(folder: Path, name: str, begin: int, content: bytes) -> None:
    tensor = tensors_of(folder)[name]
    with (folder / tensor.file).open("r+b") as stream:
        stream.seek(tensor.offset + begin)
        stream.write(content)


def test_other_files_are_the_same_weights(tmp_path: Path) -> None:
    names = list(SHAPES)
    expected = sample(write(tmp_path / "one"))
    assert sample(write(tmp_path / "two", names[3:], names[:3])).digest == expected.digest
    assert sample(write(tmp_path / "backwards", names[::-1])).digest == expected.digest
    assert len(expected.digest) == 16
    assert expected.blank == ()


@pytest.mark.parametrize("name", SHAPES)
def test_any_one_tensor_of_another_training(name: str, tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned")
    size = tensors_of(base)[name].num_bytes
    overwrite(tuned, name, 0, random.Random(name).randbytes(size))
    assert sample(tuned).digest != sample(base).digest


@pytest.mark.parametrize("begin", [0, 400, 796])
def test_one_value_of_a_norm(begin: int, tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned")
    overwrite(tuned, "model.layers.1.norm.weight", begin, b"\0\0\x80\x3f")
    assert sample(tuned).digest != sample(base).digest


def test_two_tensors_that_changed_places(tmp_path: Path) -> None:
    base, mixed = write(tmp_path / "base"), write(tmp_path / "mixed")
    contents = {}
    for name in ("model.layers.0.norm.weight", "model.layers.1.norm.weight"):
        tensor = tensors_of(base)[name]
        contents[name] = (base / tensor.file).read_bytes()[tensor.offset : tensor.offset + tensor.num_bytes]
    for name, content in zip(contents, reversed(contents.values()), strict=True):
        overwrite(mixed, name, 0, content)
    assert sample(mixed).digest != sample(base).digest


def test_what_is_not_noticed(tmp_path: Path) -> None:
    """A page of a large tensor that is not looked at: the module's docstring says so."""
    base, edited = write(tmp_path / "base"), write(tmp_path / "edited")
    name = "model.embed_tokens.weight"
    seen = {begin for begin, _ in choose_ranges(name, tensors_of(base)[name].num_bytes)}
    unseen = next(begin for begin in range(0, 240_000, PAGE_BYTES) if begin not in seen)
    overwrite(edited, name, unseen, bytes(PAGE_BYTES))
    assert sample(edited).digest == sample(base).digest


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_a_file_whose_end_was_not_copied(kept: float, tmp_path: Path) -> None:
    """Of its full length, as a copy into a file that was made large first leaves it: with a hole, or with zeros."""
    base, copy = write(tmp_path / "base"), write(tmp_path / "copy")
    path = copy / "model-0.safetensors"
    size = path.stat().st_size
    os.truncate(path, int(size * kept))
    os.truncate(path, size)
    assert sample(copy).digest != sample(base).digest


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.q.weight", "lm_head.weight"])
def test_a_large_tensor_of_zeros_is_named(name: str, tmp_path: Path) -> None:
    """All stages may share one folder: then there is nothing to compare with."""
    folder = write(tmp_path / "model")
    overwrite(folder, name, 0, bytes(tensors_of(folder)[name].num_bytes))
    assert [tensor.name for tensor in sample(folder).blank] == [name]


def test_small_tensors_of_zeros_are_nothing_unusual(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    overwrite(folder, "model.layers.0.norm.weight", 0, bytes(800))
    assert sample(folder).blank == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "is cut short: tensor lm_head.weight needs"),
        (lambda path: path.unlink(), "tensor model.embed_tokens.weight cannot be read: .*No such file"),
    ],
)
def test_a_file_that_changes_meanwhile(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    tensors, files = tensors_of(folder), checkpoint_files(folder)
    change(folder / "model-0.safetensors")
    with pytest.raises(ConfigError, match=said):
        sample_tensors(files, tensors.values())


def test_a_read_may_return_less_than_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "a")
    whole, pread = sample(model), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 1000), offset))
    assert sample(model) == whole


def test_weights_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(random.Random(0).randbytes(300_000))
    before = sample(tmp_path)
    assert before.num_reads == 4
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    assert sample(tmp_path).digest != before.digest


def test_a_module_beside_the_model(tmp_path: Path) -> None:
    """A projection of sentence-transformers, which every stage has."""
    folder = write(tmp_path / "model")
    kinds = ("Transformer", "Pooling", "Dense")
    places = ("", "1_Pooling", "2_Dense")
    modules = [{"idx": i, "path": places[i], "type": f"sentence_transformers.models.{kinds[i]}"} for i in range(3)]
    (folder / "modules.json").write_text(json.dumps(modules))
    write(folder / "2_Dense", ["model.layers.0.norm.weight"])
    (folder / "2_Dense" / "model-0.safetensors").rename(folder / "2_Dense" / "model.safetensors")
    before = sample(folder)
    path = folder / "2_Dense" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert sample(folder).digest != before.digest


# ---- where, and how much -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "count"),
    [
        (0, 0),
        (1, 1),
        (WHOLE_BYTES, 1),
        (WHOLE_BYTES + 1, 4),
        (33_554_432, 4),
        (117_440_512, 5),
        (1_050_673_152, 18),
        (10**12, 18),
    ],
)
def test_ranges(num_bytes: int, count: int) -> None:
    ranges = choose_ranges("model.layers.0.mlp.up_proj.weight", num_bytes)
    # Two pages may be the same.
    assert count - 1 <= len(ranges) <= count
    assert ranges == sorted(ranges)
    assert all(0 <= begin < end <= num_bytes for begin, end in ranges)
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(ranges))
    if ranges:
        assert (ranges[0][0], ranges[-1][1]) == (0, num_bytes)


def test_the_places_are_the_same_everywhere() -> None:
    """Recorded: another rule makes stages of two versions differ, and exports seem damaged."""
    recorded = [(0, 4096), (765952, 770048), (921600, 925696), (999424, 1000000)]
    assert choose_ranges("lm_head.weight", 1_000_000) == recorded


def test_of_many_experts_not_every_one() -> None:
    experts = [f"model.layers.{i}.experts.{j}.up.weight" for i in range(48) for j in range(128)]
    others = [f"model.layers.{i}.q.weight" for i in range(48)] + ["lm_head.weight"]
    tensors = [TensorInfo(name, "BF16", (1, 1), 2, "f", 0) for name in (*others, *experts)]
    chosen = [tensor.name for tensor in choose_tensors(tensors)]
    assert set(others) < set(chosen)
    assert len(chosen) == len(others) + MAX_PER_KIND
    assert {name.split(".")[2] for name in chosen if "experts" in name} == {str(i) for i in range(48)}
    assert chosen == [tensor.name for tensor in choose_tensors(tensors[::-1])]


def test_only_what_is_chosen_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "model")
    pread = os.pread
    read: list[int] = []

    def noted(file: int, num_bytes: int, offset: int) -> bytes:
        read.append(num_bytes)
        return pread(file, num_bytes, offset)

    monkeypatch.setattr(os, "pread", noted)
    found = sample(folder)
    assert (len(read), sum(read)) == (found.num_reads, found.num_bytes)
    assert found.num_bytes <= 4 * 4 * PAGE_BYTES + 2 * 800
