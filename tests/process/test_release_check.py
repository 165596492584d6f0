"""scripts/release-check: this checkout passes it, and what is missing or wrong is named."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the check has built."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [ROOT / "scripts" / "release-check", folder], capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ready for release: ")
    return folder


def check_changed(dist: Path, folder: Path, name: str, old: bytes, new: bytes | None) -> str:
    """What the check of the files says when one of the wheel's is changed, or not there (``new`` is None)."""
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    changed = folder / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(changed, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith(name):
                assert old in content
                content = content.replace(old, new or b"")
            if new is not None or not entry.filename.endswith(name):
                target.writestr(entry, content)
    script = ROOT / "packaging" / "check_distributions.py"
    done = subprocess.run(
        [sys.executable, script, sdist, changed, ROOT], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        ("stagewire/plan/ranges.py", b"", None, "src/stagewire/plan/ranges.py is not in the wheel"),
        ("stagewire/py.typed", b"", None, "src/stagewire/py.typed is not in the wheel"),
        ("/METADATA", b"Requires-Dist: psutil", b"Requires-Dist: :psutil", "is invalid for 'requires-dist'"),
        ("/METADATA", b"Typing :: Typed", b"Typing :: Typewritten", "does not know the classifier 'Typing :: Typewri"),
        ("/METADATA", b"Version: 0", b"Version: 10", "stagewire.__version__ says 0"),
        ("/METADATA", b"text/markdown", b"text/plain", "the description is text/plain, expected text/markdown"),
    ],
)
def test_what_is_wrong_is_named(
    dist: Path, tmp_path: Path, name: str, old: bytes, new: bytes | None, complaint: str
) -> None:
    assert complaint in check_changed(dist, tmp_path, name, old, new)
