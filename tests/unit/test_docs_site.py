"""docs/ as a site: mkdocs builds it strictly. Every page is in the navigation, and every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a browser would fetch from another host when it shows a page; links that a reader may follow are fine.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(https?:)?//|<link[^>]*stylesheet[^>]*href=\"(https?:)?//"
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    docs = ROOT / "docs"
    pages = [path.relative_to(docs).with_suffix(".html") for path in docs.rglob("*.md")]
    assert len(pages) > 20
    assert [str(page) for page in pages if not (site / page).is_file()] == []


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    found = {path.name for path in site.rglob("*.html") if FETCHED.search(path.read_text())}
    assert found == set()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_of_other_pages_lead_somewhere(name: str) -> None:
    """Those that mkdocs does not see; it checks the links within docs/."""
    targets = [link for link in LINK.findall((ROOT / name).read_text()) if "://" not in link]
    assert [link for link in targets if not (ROOT / link).exists()] == []
