"""scripts/demo_picture.py: what is left on a screen, and how it is drawn. What it records is not started here."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo_picture.py"


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_picture", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("output", "screen"),
    [
        ("one\r\ntwo\r\n", "one\ntwo"),
        ("\x1b[?25lloading\r\x1b[2Kready\r\n\x1b[?25h", "ready"),
        ("a 1\r\nb 1\r\x1b[2K\x1b[1A\x1b[2Ka 2\r\nb 2\r\n", "a 2\nb 2"),
        ("\x1b[31mred\x1b[0m\r\n", "\x1b[31mred\x1b[0m"),
    ],
)
def test_a_screen_has_what_was_written_last(picture: ModuleType, output: str, screen: str) -> None:
    assert picture.screen_of(output) == screen


def test_a_picture_is_drawn_with_the_reader_s_fonts(picture: ModuleType) -> None:
    svg = picture.draw("stagewire up", "stage 0  \x1b[32mready\x1b[0m\n" + "x" * 150, "scripts/demo")
    ElementTree.fromstring(svg)
    assert "ready" in svg
    assert "@font-face" not in svg
    assert "url(http" not in svg.replace('"', "")


def test_what_ends_by_itself_is_told(picture: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with code 3: no model"):
        picture.record([sys.executable, "-c", "print('no model'); raise SystemExit(3)"], tmp_path)


SERVES = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
print("Logs. Ctrl-C stops everything.", flush=True)
signal.sigwait({signal.SIGINT})
print("stopping")
"""


def test_what_serves_is_stopped_and_recorded_to_its_end(picture: ModuleType, tmp_path: Path) -> None:
    output = picture.record([sys.executable, "-c", SERVES], tmp_path)
    assert picture.screen_of(output).splitlines() == ["Logs. Ctrl-C stops everything.", "stopping"]
