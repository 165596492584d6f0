"""What a launcher reads of vLLM's arguments. tests/vllm/test_launch_arguments.py compares it with vLLM's parser."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagewire.errors import ConfigError
from stagewire.launch.early import ADDRESS_FLAGS, TLS_FLAGS, read_early
from support.arguments import SPELLINGS, Spelling


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_every_spelling(spelling: Spelling, tmp_path: Path) -> None:
    found = read_early(spelling.words(tmp_path))
    assert found.num_ranks == spelling.num_ranks
    assert found.given == spelling.given


def test_what_is_typed_is_told_from_what_a_file_says(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("port: 9000\nssl-keyfile: k\n")
    found = read_early(["--config", str(tmp_path / "c.yaml"), "--host", "h"])
    assert found.typed == {"--host"}
    assert found.describe(ADDRESS_FLAGS) == "--host, --port after `--`"
    assert found.describe(TLS_FLAGS) == "--ssl-keyfile in the file of --config"
    assert found.describe(("--uds",)) == ""


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("- a\n- b\n", "expected lines like"), ("a: [\n", "c.yaml"), ("", "expected lines like")],
)
def test_a_file_that_vllm_could_not_read_is_refused_at_once(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_early(["--config", str(path)])


@pytest.mark.parametrize("words", [["--tensor-parallel-size"], ["--ssl-c", "x"], ["-tp", "two"], ["-tp", "0"]])
def test_what_vllm_will_refuse_is_left_to_it(words: list[str]) -> None:
    assert read_early(words).num_ranks == 1
