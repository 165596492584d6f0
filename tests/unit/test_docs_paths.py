"""Every path, function and constant that the documentation names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "stagewire"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
# Of the package or of the repository: with a slash or the ending of a module. vLLM's own files begin with its name.
NAMED = re.compile(r"`((?:\.?[\w-]+/)*[\w-]+\.(?:py|sh|md|toml|json|lock|yml)|(?:\.?[\w-]+/)+)`")
ELSEWHERE = re.compile(r"vllm/|site-packages/|stagewire_logs|zeromq_pp_full_model_logs/|\.venv/|dist/|build/")
# What a model's folder or an export has, and what a page tells a reader to make.
OF_MODELS = {
    "config.json",
    "params.json",
    "modules.json",
    "stagewire.json",
    "hf_quant_config.json",
    "quant_config.json",
    "quantize_config.json",
    "model.safetensors.index.json",
    "consolidated.safetensors.index.json",
}
CODE = re.compile(r"`([^`]+)`")
METHOD = re.compile(r"_?[A-Z]\w+\.\w+")
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")
FUNCTION = re.compile(r"_?[a-z]+(?:_[a-z]+)*")


def find(name: str) -> Path | None:
    """A path as a page names it: below the package, below the repository, or a test by its name alone."""
    for folder in (SOURCE, ROOT, ROOT / "tests" / "vllm", ROOT / "tests" / "unit", ROOT / "tests" / "process"):
        if (folder / name).exists():
            return folder / name
    return None


@cache
def definitions(path: Path) -> frozenset[str]:
    """Functions, methods as ``Class.method``, classes and constants of a module, or of all modules of a folder."""
    if path.is_dir():
        return frozenset().union(*(definitions(each) for each in path.rglob("*.py")))
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {node.name, *(f"{node.name}.{each.name}" for each in node.body if hasattr(each, "name"))}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it names what was
        return
    named = {name for name in NAMED.findall(page.read_text()) if not ELSEWHERE.match(name) and name not in OF_MODELS}
    assert sorted(name for name in named if find(name) is None) == []


def test_every_test_that_a_page_names_exists() -> None:
    """A function, or a file by its name alone."""
    paths = list((ROOT / "tests").rglob("test_*.py"))
    found = {path.stem for path in paths}
    found |= {
        name for path in paths for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = {(name, page.name) for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert sorted((name, page) for name, page in named if name not in found) == []


@pytest.mark.parametrize("folder", ["src", "tests", "benches", "scripts", "tools", "requirements", ".ci"])
def test_every_page_that_the_code_names_exists(folder: str) -> None:
    texts = [
        path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in ("", ".py", ".sh", ".txt")
    ]
    named = {(name, path.name) for path in texts for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())}
    assert sorted((name, where) for name, where in named if not (ROOT / name).is_file()) == []


def rows_with_places(page: Path) -> Iterator[tuple[str, list[Path], list[str]]]:
    """Of each table's row that names modules of the package: the row, the modules, and what else is in backticks."""
    for line in page.read_text().splitlines():
        words = CODE.findall(line) if line.startswith("| ") else []
        modules = [path for word in words if NAMED.fullmatch(f"`{word}`") and (path := find(word)) is not None]
        modules = [path for path in modules if path.is_relative_to(SOURCE)]
        yield line, modules, [word for word in words if not NAMED.fullmatch(f"`{word}`")]


@pytest.mark.parametrize("name", ["reference/deadlines.md", "design/architecture.md"])
def test_every_function_and_constant_is_where_a_table_says(name: str) -> None:
    missing = []
    for line, modules, words in rows_with_places(ROOT / "docs" / name):
        here: frozenset[str] = frozenset().union(*(definitions(path) for path in modules))
        for word in words:
            if CONSTANT.fullmatch(word) and not word.startswith(("STAGEWIRE_", "PR_")):
                if word not in definitions(SOURCE):
                    missing.append((word, line))
            elif modules and (METHOD.fullmatch(word) or FUNCTION.fullmatch(word)) and word not in here:
                missing.append((word, line))
    assert missing == []


def test_the_map_has_every_module() -> None:
    """Patches have a file each and no row."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    modules = [path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]
    patches = SOURCE / "vllm_plugin" / "seams"
    missing = [str(path) for path in modules if f"`{path}`" not in page and not (SOURCE / path).is_relative_to(patches)]
    assert missing == []
