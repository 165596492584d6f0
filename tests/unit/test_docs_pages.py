"""Pages that scripts/docs_pages.py makes are what it makes now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "docs_pages.py"


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pages", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_flags_is_that_of_the_parsers(pages: ModuleType) -> None:
    assert pages.PAGE.read_text() == pages.render(), "run .venv/bin/python scripts/docs_pages.py"


def test_every_subcommand_and_stage_flag_is_there(pages: ModuleType) -> None:
    text = pages.render()
    for name in ("### up", "### front", "### status", "### plan", "### export", "### keys", "### demo-model"):
        assert f"\n{name}\n" in text
    assert "| `--pipeline-stage-mode {external}` |" in text
    assert "| `--external-pp-worker` |" in text
