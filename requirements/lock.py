"""Write cpu.lock from the environment that runs this script. requirements/README.md says when and how."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
PYTHON_VERSIONS = ("3.11", "3.12", "3.13")
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}  # on PyPI as CUDA builds only
HEADER = (
    "# Made by requirements/lock.py from cpu.in; do not edit. See README.md beside it. Torch is in torch-cpu.txt.\n"
)


def required_names(roots: list[Requirement]) -> set[str]:
    """Canonical names of everything that `roots` need, on every Python of PYTHON_VERSIONS."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(roots)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if name in LEFT_OUT or key in seen:
            continue
        seen.add(key)
        for text in importlib.metadata.distribution(name).requires or []:
            child = Requirement(text)
            if applies(child, requirement.extras):
                todo.append(child)
    return {name for name, _ in seen} - {"torch"}  # it has a file of its own


def applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({"extra": extra, "python_version": version, "python_full_version": f"{version}.0"})
        for extra in ("", *extras)
        for version in PYTHON_VERSIONS
    )


def wheel_hashes(pins: list[str], python_version: str) -> Iterator[tuple[str, str]]:
    """(pin, sha256) of the wheel that pip would take, without installing anything."""
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp, "report.json")
        options = ["--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--only-binary=:all:"]
        options += ["--python-version", python_version, "--target", tmp, "--report", str(report)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *pins], check=True)
        for item in json.loads(report.read_text())["install"]:
            metadata = item["metadata"]
            pin = f"{canonicalize_name(metadata['name'])}=={metadata['version']}"
            yield pin, item["download_info"]["archive_info"]["hashes"]["sha256"]


def main() -> None:
    lines = (line.partition("#")[0].strip() for line in (HERE / "cpu.in").read_text().splitlines())
    names = required_names([Requirement(line) for line in lines if line])
    pins = sorted(f"{name}=={importlib.metadata.version(name)}" for name in names)
    hashes: dict[str, list[str]] = {pin: [] for pin in pins}
    for version in PYTHON_VERSIONS:
        for pin, sha256 in wheel_hashes(pins, version):
            if sha256 not in hashes[pin]:
                hashes[pin].append(sha256)
    entries = (" \\\n    ".join([pin, *(f"--hash=sha256:{h}" for h in sha256s)]) for pin, sha256s in hashes.items())
    (HERE / "cpu.lock").write_text(HEADER + "\n".join(entries) + "\n")


if __name__ == "__main__":
    main()
