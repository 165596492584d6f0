"""Whether PyPI would take an sdist and a wheel of Stagewire, and whether they have every file of src/.

    python packaging/check_distributions.py SDIST WHEEL CHECKOUT

The metadata are parsed as PyPI parses them (`packaging.metadata`). What is wrong ends this with status 1; what a reader
of the project's page would miss is a note. Called by scripts/release-check.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt
from packaging.metadata import Metadata
from trove_classifiers import classifiers as known_classifiers

IN_SDIST = ("README.md", "LICENSE", "pyproject.toml")
IN_WHEEL = ("dist-info/entry_points.txt", "dist-info/licenses/LICENSE")


class Links(HTMLParser):
    """Where a page's links and images lead."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.num_headings = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num_headings += tag in ("h1", "h2")
        self.targets += [value for name, value in attrs if name in ("href", "src", "srcset") and value]


def check_metadata(text: bytes, version: str) -> Iterator[str]:
    try:
        metadata = Metadata.from_email(text, validate=True)
    except ExceptionGroup as errors:
        yield from (f"metadata: {error}" for error in errors.exceptions)
        return
    if str(metadata.version) != version:
        yield f"pyproject.toml says version {metadata.version}, stagewire.__version__ says {version}"
    unknown = set(metadata.classifiers or ()) - set(known_classifiers)
    yield from (f"PyPI does not know the classifier {each!r}" for each in sorted(unknown))
    if metadata.description_content_type != "text/markdown":
        yield f"the description is {metadata.description_content_type}, expected text/markdown"
    if not read_page(metadata.description or "").num_headings:
        yield "the description renders without a heading"


def read_page(description: str) -> Links:
    links = Links()
    links.feed(MarkdownIt("commonmark").enable("table").render(description))
    return links


def check_files(sdist: set[str], wheel: set[str], checkout: Path) -> Iterator[str]:
    """``sdist``: without the folder that all of it is in."""
    root = checkout / "src"
    files = [path for path in (root / "stagewire").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    source = {str(path.relative_to(root)) for path in files}
    packed = {name for name in wheel if ".dist-info/" not in name}
    yield from (f"src/{name} is not in the wheel" for name in sorted(source - packed))
    yield from (f"{name} is in the wheel and not in src" for name in sorted(packed - source))
    yield from (f"{name} is not in the wheel" for name in IN_WHEEL if not any(each.endswith(name) for each in wheel))
    yield from (f"{name} is not in the sdist" for name in IN_SDIST if name not in sdist)


def find_notes(text: bytes, checkout: Path) -> Iterator[str]:
    metadata = Metadata.from_email(text)
    relative = [each for each in read_page(metadata.description or "").targets if not re.match(r"[a-z]+:|#", each)]
    if relative:
        yield f"{len(relative)} links of README.md are relative and lead nowhere on PyPI: {', '.join(relative[:3])} ..."
    if not metadata.project_urls:
        yield "PyPI will show no links: pyproject.toml has no [project.urls] (Repository, Issues, Changelog)"
    if f"## [{metadata.version}] - unreleased" in (checkout / "CHANGELOG.md").read_text():
        yield f"CHANGELOG.md says that {metadata.version} is unreleased"


def main(sdist_path: str, wheel_path: str, checkout: Path) -> None:
    with zipfile.ZipFile(wheel_path) as wheel:
        in_wheel = set(wheel.namelist())
        (metadata_name,) = (name for name in in_wheel if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata_name)
    with tarfile.open(sdist_path) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    module = (checkout / "src" / "stagewire" / "version.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.+)"$', module, re.M)
    problems = [*check_metadata(text, version), *check_files(in_sdist, in_wheel, checkout)]
    if problems:
        sys.exit("\n".join(problems))
    sys.stdout.writelines(f"  note: {note}\n" for note in find_notes(text, checkout))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
