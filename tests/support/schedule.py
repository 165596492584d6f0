"""How a whole run is cut into pieces for the workers of pytest-xdist, and what is told of it while it goes on.

A piece is a test file, so that what its tests share is started once. tests/process is one piece: these tests mostly
wait, and so they keep one worker busy while the others compute; beside one another they would disturb the times that
they measure. A worker that is through with its piece takes the next one: what takes longest is first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

# Of tests/vllm; all others take less.
LONGEST_FIRST = (
    *("test_recovery.py", "test_api_features.py", "test_quickstart.py", "test_tensor_parallel.py", "test_parity.py"),
    *("test_speculation.py", "test_serving.py", "test_bad_rings.py", "test_lora.py", "test_front.py"),
    *("test_range_loader.py", "test_stops.py", "test_control.py", "test_multimodal.py", "test_pooling.py"),
    *("test_launcher.py", "test_cut_links.py", "test_architectures.py", "test_prompt_embeds.py", "test_presplit.py"),
    *("test_offline_features.py", "test_entry_points.py", "test_ring_keys.py"),
)
SAID = "said"  # the name of the property of a test that the fixture `say` fills
TELL_EVERY_S = 30.0


def piece_of(nodeid: str) -> str:
    """The name of a test's piece."""
    path = nodeid.partition("::")[0]
    return "tests/process" if path.startswith("tests/process/") else path


def place_of(item: pytest.Item) -> tuple[bool, bool, int]:
    """Where a test comes in a run. Cheap tests first, so that a mistake shows in seconds and not in minutes."""
    names = dict(zip(LONGEST_FIRST, range(len(LONGEST_FIRST)), strict=True))
    return "vllm" in item.keywords, "process" in item.keywords, names.get(item.path.name, len(names))


def without_slow(items: Iterable[pytest.Item], named: Iterable[str]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests of the short run, and the others. Whoever is named on the command line is no other."""
    names = tuple(each.partition("::")[2] for each in named if "::" in each)
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        is_named = item.nodeid.partition("::")[2].startswith(names)
        (others if "slow" in item.keywords and not is_named else kept).append(item)
    return kept, others


def make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For pytest-xdist; pieces in the order in which their first tests are."""
    from xdist.scheduler import LoadScopeScheduling

    class ByPiece(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return piece_of(nodeid)

    config.option.loadscopereorder = False
    return ByPiece(config, log)


class Progress:
    """One line in place of a letter for each test, rewritten on a terminal and repeated now and then elsewhere."""

    def __init__(self, reporter: TerminalReporter) -> None:
        self._reporter = reporter
        self._is_terminal = sys.stdout.isatty()
        self._began = self._told = time.monotonic()
        self._total = self._done = self._failed = 0

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._total = len(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No letter for any test: the line counts them."""
        if hasattr(report, "wasxfail") or (report.passed and report.when != "call"):
            return None
        is_error = report.failed and report.when != "call"
        category = "error" if is_error else report.outcome
        # Words are for the closing summary.
        return category, "", "" if report.passed else category.upper()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, text in report.user_properties:
            if name == SAID and report.when == "teardown":
                self._print(f"  {Path(report.nodeid.partition('::')[0]).stem}: {text}")
        if report.failed:
            self._failed += 1
            self._print(f"FAILED {report.nodeid} ({report.when})")
        if report.when == "teardown":
            self._done += 1
            self._show(report.nodeid)

    def _show(self, nodeid: str) -> None:
        now = time.monotonic()
        minutes, seconds = divmod(int(now - self._began), 60)
        line = f"{self._done} of {self._total} tests, {self._failed} failed, {minutes}:{seconds:02} min"
        if self._is_terminal:
            room = self._reporter._tw.fullwidth - len(line) - 4
            self._reporter.rewrite(f"{line}  {nodeid[-room:]}", erase=True)
        elif now - self._told > TELL_EVERY_S or self._done == self._total:
            self._told = now
            self._reporter.write_line(line)

    def _print(self, text: str) -> None:
        if self._is_terminal:
            self._reporter.rewrite("", erase=True)
        self._reporter.write_line(text)
