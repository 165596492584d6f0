"""scripts/demo: what is started for what is typed. Its setup and `stagewire` are stand-ins; that prints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo"


@pytest.mark.parametrize(
    ("typed", "started"),
    [
        ([], "up --model MODEL --num-stages 4 -- --enforce-eager"),
        (["--port", "1"], "up --model MODEL --num-stages 4 --port 1 -- --enforce-eager"),
        (["--model=x"], "up --num-stages 4 --model=x"),
        (["--model", "x", "--ranges", "0-1", "1-2"], "up --model x --ranges 0-1 1-2"),
        (["--pipeline-dir", "out"], "up --pipeline-dir out"),
        (["--", "--dtype", "float32"], "up --model MODEL --num-stages 4 -- --dtype float32"),
        (["--", "--model", "x"], "up --model MODEL --num-stages 4 -- --model x"),
        (["--log-dir", "a -- b"], "up --model MODEL --num-stages 4 --log-dir a -- b -- --enforce-eager"),
    ],
    ids=str,
)
def test_what_is_typed_is_not_given_twice(typed: list[str], started: str, tmp_path: Path) -> None:
    demo = tmp_path / "scripts" / "demo"
    stand_ins = {demo: SCRIPT.read_text(), demo.with_name("setup"): "#!/usr/bin/env bash\n"}
    stand_ins[tmp_path / ".venv" / "bin" / "stagewire"] = '#!/usr/bin/env bash\necho "$@"\n'
    for path, text in stand_ins.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    done = subprocess.run([demo, *typed], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == started.replace("MODEL", str(tmp_path / ".demo" / "model"))
