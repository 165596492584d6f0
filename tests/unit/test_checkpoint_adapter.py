"""Which adapter folders a worker stage reads: a path from a peer is a wish, its own command line decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagewire.checkpoint.adapter import check_roots, digest_adapter, find_adapter
from stagewire.errors import ConfigError


def make(folder: Path, weights: str = "adapter_model.safetensors", text: str = "weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / weights).write_text(text)
    return folder


@pytest.fixture
def top(tmp_path: Path) -> Path:
    for name in ("root/a", "root/deep/b", "other/c", "rootless/a"):
        make(tmp_path / name)
    (tmp_path / "root/link").symlink_to(tmp_path / "other/c")
    (tmp_path / "alias").symlink_to(tmp_path / "root")
    return tmp_path


def find(top: Path, path: str, roots: tuple[str, ...] = ("root",), named: tuple[tuple[str, str], ...] = ()) -> str:
    found = find_adapter(2, "x", path, [str(top / root) for root in roots], [(n, str(top / p)) for n, p in named])
    return str(found.resolve().relative_to(top.resolve()))


@pytest.mark.parametrize(
    ("path", "roots", "expected"),
    [
        ("{top}/root/a", ("root",), "root/a"),
        ("{top}/root/deep/b", ("other", "root"), "root/deep/b"),
        ("{top}/root/./deep/../a", ("root",), "root/a"),
        ("{top}/root/a", ("alias",), "root/a"),
        ("{top}/alias/a", ("root",), "root/a"),
        ("{top}/root/a", ("root/a",), "root/a"),
        ("a", ("other", "root"), "root/a"),
        ("deep/b", ("root",), "root/deep/b"),
        ("{top}/root/link", ("root", "other"), "other/c"),
    ],
)
def test_below_a_root(top: Path, path: str, roots: tuple[str, ...], expected: str) -> None:
    assert find(top, path.format(top=top), roots) == expected


@pytest.mark.parametrize(
    ("path", "roots"),
    [
        ("{top}/root/a", ()),
        ("{top}/other/c", ("root",)),
        ("{top}/rootless/a", ("root",)),
        ("{top}/root/../other/c", ("root",)),
        ("../other/c", ("root",)),
        ("{top}/root/link", ("root",)),
        ("/etc", ("root",)),
        ("~/a", ()),
        ("some-user/some-adapter", ()),
        ("", ()),
    ],
)
def test_elsewhere_is_refused_with_the_flag(top: Path, path: str, roots: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"stage 2 does not read adapter 'x' .*--pipeline-lora-root"):
        find(top, path.format(top=top), roots)


def test_a_relative_path_is_found_in_the_root_that_has_it(top: Path) -> None:
    """The first root lacks it."""
    assert find(top, "a", ("other", "root")) == "root/a"


def test_own_lora_modules_name_a_path(top: Path) -> None:
    assert find(top, "/head/x", (), (("x", "other/c"),)) == "other/c"
    assert find(top, f"{top}/root/a", ("root",), (("x", "other/c"),)) == "root/a", "the same path wins"
    with pytest.raises(ConfigError, match="--lora-modules x=PATH"):
        find(top, "/head/x", (), (("y", "other/c"),))


@pytest.mark.parametrize("weights", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_are_refused(top: Path, weights: str) -> None:
    make(top / "root/p", weights)
    with pytest.raises(ConfigError, match=rf"from {weights} .*: that format is loaded by unpickling"):
        find(top, "p")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_its_files(top: Path, missing: str) -> None:
    (top / "root/a" / missing).unlink()
    with pytest.raises(ConfigError, match=rf"stage 2 has no adapter 'x' at .*root/a: expected .*{missing}"):
        find(top, f"{top}/root/a")


def test_digest_is_of_settings_and_weights(tmp_path: Path) -> None:
    one = make(tmp_path / "one")
    same, other = make(tmp_path / "same"), make(tmp_path / "other", text="other weights")
    settings = make(tmp_path / "settings")
    (settings / "adapter_config.json").write_text('{"r": 8}')
    assert digest_adapter(one) == digest_adapter(same)
    assert len({digest_adapter(each) for each in (one, other, settings)}) == 3
    with pytest.raises(OSError, match="adapter_config"):
        digest_adapter(tmp_path)


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    check_roots([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"--pipeline-lora-root .*nowhere: there is no such folder"):
        check_roots([str(tmp_path), str(tmp_path / "nowhere")])
