"""tools/offline_pipelining/run_from_full_model.sh, as somebody has it who has just cloned the project.

What it starts is a stand-in that prints its arguments; with real stages it runs in tests/vllm/test_launcher.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parents[2] / "tools" / "offline_pipelining" / "run_from_full_model.sh"


def make_command(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the script and an environment of its own."""
    script = tmp_path / "tools" / "offline_pipelining" / SCRIPT.name
    script.parent.mkdir(parents=True)
    script.write_bytes(SCRIPT.read_bytes())
    make_command(tmp_path / ".venv" / "bin" / "stagewire", 'echo "$@"')
    return tmp_path


def run(clone: Path, *words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    script = clone / "tools" / "offline_pipelining" / SCRIPT.name
    whole = {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}", **(env or {})}
    return subprocess.run(
        ["bash", str(script), *words], cwd=clone, env=whole, capture_output=True, text=True, check=False
    )


def test_an_unedited_path_is_refused(clone: Path) -> None:
    done = run(clone)
    assert done.returncode == 2
    assert "FULL_MODEL_PATH is still /path/to/" in done.stderr
    assert not done.stdout


def test_the_edited_line_and_the_defaults(clone: Path) -> None:
    script = clone / "tools" / "offline_pipelining" / SCRIPT.name
    script.write_text(script.read_text().replace("/path/to/Llama-3-8B", "/models/mine"))
    done = run(clone, "--base-port", "19000")
    words = (
        "up --model /models/mine --num-stages auto --port 8000 --log-dir zeromq_pp_full_model_logs --base-port 19000"
    )
    assert (done.returncode, done.stdout.split()) == (0, words.split())


def test_a_number_of_stages_is_handed_on(clone: Path) -> None:
    words = run(clone, env={"FULL_MODEL_PATH": "/models/mine", "NUM_STAGES": "3"}).stdout.split()
    assert words[words.index("--num-stages") + 1] == "3"


def test_without_an_environment_it_says_what_to_run(clone: Path) -> None:
    (clone / ".venv" / "bin" / "stagewire").unlink()
    done = run(clone, env={"FULL_MODEL_PATH": "/models/mine", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 2
    assert f"run {clone / 'scripts' / 'setup'}" in done.stderr
