"""Options of the test suite, and the model that the tests of real vLLM use."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import schedule, stages
from support.forkserver import ForkServer
from support.models import make_llama


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


@pytest.hookimpl(trylast=True)  # after the terminal reporter is there
def pytest_configure(config: pytest.Config) -> None:
    # Ignored under nohup, and in the background of a script; what tests start is to find them as ever.
    for number, handler in ((signal.SIGHUP, lambda *_: None), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    if config.getoption("numprocesses", None) and config.option.verbose <= 0:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        config.pluginmanager.register(schedule.Progress(reporter))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # An address in a name differs from worker to worker, which are to run the same tests.
    unnamed = [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]+", item.nodeid)]
    assert not unnamed, f"give these tests names of their own: {unnamed[:3]}"
    items.sort(key=schedule.place_of)
    if config.getoption("--all"):
        return
    items[:], others = schedule.without_slow(items, config.args)
    if others:
        config.hook.pytest_deselected(items=others)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return schedule.make_scheduler(config, log)


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
def say(
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> Callable[[str], None]:
    """Prints a measured figure to the terminal, past pytest's capture; a worker's, when its test is over."""
    is_worker = hasattr(request.config, "workerinput")

    def tell(text: str) -> None:
        if is_worker:
            record_property(schedule.SAID, text)
            return
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


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Six random layers with the demo model's tokenizer, for all that does not depend on what the text says.

    Its weights are spread enough for answers that depend on the prompt and have no ties.
    """
    return make_llama(tmp_path_factory.mktemp("llama6"), model_dir, num_layers=6, initializer_range=0.1)
