"""Which files are the checkpoint: one table of folders, and the refusals in their words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagewire.checkpoint.files import CONSOLIDATED_INDEX_NAME, INDEX_NAME, checkpoint_files
from stagewire.errors import ConfigError


def write(folder: Path, *names: str, index: dict[str, str] | None = None, index_name: str = INDEX_NAME) -> Path:
    """Files of one byte, and an index."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    if index is not None:
        (folder / index_name).write_text(json.dumps({"weight_map": index}))
    return folder


M = "model.safetensors"
C = "consolidated.safetensors"


@pytest.mark.parametrize(
    ("names", "load_format", "weights"),
    [
        ([M], "auto", [M]),
        ([M, "pytorch_model.bin", "old.pt"], "auto", [M]),
        (["pytorch_model.bin", "old.pt"], "auto", ["pytorch_model.bin"]),
        (["old.pt", "optimizer.pt"], "auto", ["old.pt"]),
        (["training_args.bin", "model.pt"], "auto", []),
        (["pytorch_model.bin", "training_args.bin", "optimizer.bin"], "hf", ["pytorch_model.bin"]),
        ([M, "old.pt"], "pt", ["old.pt"]),
        ([M, "pytorch_model.bin"], "npcache", ["pytorch_model.bin"]),
        ([M, C], "auto", [C]),
        ([M, C], "hf", [C, M]),
        ([M, C], "safetensors", [C, M]),
        ([M, C], "SafeTensors", [C, M]),
        ([M, C], "dummy", [C]),
        ([M], "mistral", []),
        (["pytorch_model.bin"], "safetensors", []),
        ([f"m-{i}.safetensors" for i in (10, 9, 1)], "auto", [f"m-{i}.safetensors" for i in (1, 9, 10)]),
        ([M, "._model.safetensors", ".model.safetensors"], "auto", [M]),
        ([M, f"{M}.incomplete", ".cache/huggingface/download/x.safetensors", f"{M}.part"], "auto", [M]),
        ([M, "original/model.safetensors", "original/consolidated.00.pth"], "auto", [M]),
        (["MODEL.SAFETENSORS"], "auto", []),
        ([], "auto", []),
    ],
)
def test_without_an_index(tmp_path: Path, names: list[str], load_format: str, weights: list[str]) -> None:
    files = checkpoint_files(write(tmp_path, *names), load_format)
    assert list(files.weights) == weights
    assert not files.missing
    assert files.index_name is None


def test_an_index_chooses_the_files(tmp_path: Path) -> None:
    write(tmp_path, "a-2.safetensors", "a-10.safetensors", "b.safetensors")
    write(tmp_path, index={"x": "a-10.safetensors", "y": "a-2.safetensors", "z": "a-10.safetensors"})
    files = checkpoint_files(tmp_path)
    assert files.weights == ("a-2.safetensors", "a-10.safetensors")
    assert files.weight_map["x"] == "a-10.safetensors"
    assert files.ignored == {"b.safetensors": f"{INDEX_NAME} does not name it"}


def test_each_format_has_its_own_index(tmp_path: Path) -> None:
    write(tmp_path, M, "consolidated-1.safetensors", "consolidated-2.safetensors", index={"x": M})
    assert len(checkpoint_files(tmp_path).weights) == 2
    assert checkpoint_files(tmp_path, "hf").weights == (M,)
    write(tmp_path, index={"x": "consolidated-2.safetensors"}, index_name=CONSOLIDATED_INDEX_NAME)
    assert checkpoint_files(tmp_path).weights == ("consolidated-2.safetensors",)


def test_an_index_beside_other_formats_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "pytorch_model.bin", index={"x": M})
    assert checkpoint_files(tmp_path).weights == ("pytorch_model.bin",)


def test_what_cannot_be_read_has_its_reason(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", ".c.safetensors", "d.bin")
    (tmp_path / "b.safetensors").symlink_to("../../blobs/0f0f")
    (tmp_path / "e.safetensors").write_bytes(b"")
    (tmp_path / "f.safetensors").mkdir()
    index = {
        name: name for name in ("b.safetensors", "a.safetensors", "e.safetensors", "f.safetensors", "g.safetensors")
    }
    files = checkpoint_files(write(tmp_path, index=index))
    assert files.present == ("a.safetensors",)
    said = {file: reason.split("(")[0].strip() for file, reason in files.missing.items()}
    assert said == {
        "b.safetensors": "is a link to ../../blobs/0f0f, which does not exist",
        "e.safetensors": "is empty",
        "f.safetensors": "is a folder, not a file",
        "g.safetensors": "is missing",
    }
    with pytest.raises(ConfigError, match=r"b\.safetensors is a link .*blob missing: the download is incomplete"):
        files.check_complete()
    others = checkpoint_files(write(tmp_path, index={".c": ".c.safetensors", "d": "d.bin"}))
    assert set(others.missing.values()) == {"is none of *.safetensors, which is all that vLLM reads here"}


def test_an_index_without_a_single_shard(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"shard .*{M} is missing, where {INDEX_NAME} places tensor x;.*export"):
        checkpoint_files(write(tmp_path, index={"x": M})).check_complete()


def test_an_index_that_is_a_link_to_nothing_is_none(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).symlink_to("../../blobs/0f0f")
    files = checkpoint_files(write(tmp_path, "a.safetensors"))
    assert files.weights == ("a.safetensors",)
    assert "blob missing" in files.warnings[0]


@pytest.mark.parametrize("place", ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "", "./m", "a/b"])
def test_an_index_that_points_elsewhere(tmp_path: Path, place: str) -> None:
    with pytest.raises(
        ConfigError, match=r"places tensor x in '.*expected a file inside|places .*not from sub-folders"
    ):
        checkpoint_files(write(tmp_path, M, index={"x": place}))


def test_consolidated_files_in_a_sub_folder_alone(tmp_path: Path) -> None:
    write(tmp_path, M, f"original/{C}")
    with pytest.raises(ConfigError, match=rf"because of original/{C}.*--load-format safetensors"):
        checkpoint_files(tmp_path)
    assert checkpoint_files(tmp_path, "safetensors").weights == (M,)


def modules(folder: Path, *entries: tuple[object, str]) -> None:
    kinds = [
        {"idx": i, "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (place, kind) in enumerate(entries)
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))


def test_modules_of_sentence_transformers(tmp_path: Path) -> None:
    write(tmp_path, M, f"2_Dense/{M}", "2_Dense/pytorch_model.bin", "2_Dense/config.json", "deep/3_Dense/config.json")
    write(tmp_path, "deep/3_Dense/pytorch_model.bin", f"0_Transformer/{M}", f"9_Other/{M}")
    entries = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense/", "Dense"), ("deep/3_Dense", "Dense")]
    modules(tmp_path, *entries, ("0_Transformer", "Transformer"), ("4_Normalize", "Normalize"))
    files = checkpoint_files(tmp_path)
    assert files.modules == ("1_Pooling", "2_Dense", "deep/3_Dense", "0_Transformer", "4_Normalize")
    assert files.module_weights == (f"2_Dense/{M}", "2_Dense/pytorch_model.bin", "deep/3_Dense/pytorch_model.bin")
    assert not files.warnings


@pytest.mark.parametrize("absent", ["config.json", M])
def test_a_projection_that_is_not_there(tmp_path: Path, absent: str) -> None:
    write(tmp_path, M, *(f"2_Dense/{name}" for name in ("config.json", M) if name != absent))
    modules(tmp_path, ("2_Dense", "Dense"))
    assert f"2_Dense/{absent} is missing" in checkpoint_files(tmp_path).warnings[0]


@pytest.mark.parametrize("place", ["../2_Dense", "/2_Dense", "a/../../b", 7])
def test_modules_outside_of_the_folder(tmp_path: Path, place: object) -> None:
    modules(write(tmp_path, M), (place, "Dense"))
    with pytest.raises(ConfigError, match=r"modules\.json places a module in .*expected a folder inside"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("text", ["{", "7", "[7]"])
def test_modules_that_are_none(tmp_path: Path, text: str) -> None:
    (write(tmp_path, M) / "modules.json").write_text(text)
    with pytest.raises(ConfigError, match=r"modules\.json"):
        checkpoint_files(tmp_path)
