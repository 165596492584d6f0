"""Options of the test suite, and the model that the tests of real vLLM use."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import stages
from support.forkserver import ForkServer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Cheap tests first, so that a mistake shows in seconds and not after the real model has run.
    items.sort(key=lambda item: ("vllm" in item.keywords, "process" in item.keywords))
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="minutes long: run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> Iterator[None]:
    with contextlib.closing(ForkServer(stages.VLLM)) as stages.fork_server:
        yield


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """Of this user only, with a path that is short enough for sockets (pytest's own are not)."""
    with tempfile.TemporaryDirectory(prefix="stagewire-test-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a measured figure to the terminal, past pytest's capture."""

    def tell(text: str) -> None:
        with capfd.disabled():
            print(f"\n  {text}", flush=True)

    return tell


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The demo model: `scripts/test` fetches it, `STAGEWIRE_TEST_MODEL` names another place."""
    default = Path(__file__).parents[1] / ".demo" / "model"
    path = Path(os.environ.get("STAGEWIRE_TEST_MODEL", default))
    assert (path / "config.json").is_file(), f"no model at {path}: run scripts/test, which fetches it"
    return path
