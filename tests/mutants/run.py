"""Applies each fault of `mutants/faults.py` to a copy of src and runs the tests that have to notice it.

    cd tests
    ../.venv/bin/python -m mutants.run                  # all of them; within an hour on two cores
    ../.venv/bin/python -m mutants.run NAME NAME        # these
    ../.venv/bin/python -m mutants.run --without-vllm   # those that no test of tests/vllm is needed for: minutes
    ../.venv/bin/python -m mutants.run --list

The working tree is never changed. The copy comes first on PYTHONPATH, so that pytest, and every process that a test
starts, imports it; the faulty module leaves a line for each process that has imported it to its end. First all named
tests run once on the copy without a fault, and must pass. Then a fault counts as caught when a test *fails*: a module
that cannot be imported, a test that was skipped, or an error outside a test does not count. Exit code 0: all caught.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mutants.faults import FAULTS, Fault

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
# A fault may make a test wait for ever. Of one test, and of all that are named for one fault, with their start.
TEST_TIMEOUT_S = 240
RUN_TIMEOUT_S = 900


@dataclass(frozen=True)
class Outcome:
    """Of one run of pytest: ids of the tests that passed, and why the others did not, by id."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)  # skipped, or an error outside the test itself


class Copy:
    """A copy of src, faultless but for a moment."""

    def __init__(self, folder: Path) -> None:
        self.src = folder / "src"
        self._report = folder / "report.xml"
        self._imported = folder / "imported"
        self._imported.touch()
        self._num_writes = 0
        shutil.copytree(ROOT / "src", self.src, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))

    @contextlib.contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        path = self.src / "stagewire" / fault.file
        text = path.read_text()
        self._imported.write_text("")
        self._write(path, fault.apply(text) + self._witness())
        try:
            yield
        finally:
            self._write(path, text)

    def _witness(self) -> str:
        """The last line of a faulty module."""
        return f'\nwith open({str(self._imported)!r}, "a") as _file:\n    _file.write("imported\\n")\n'

    def _write(self, path: Path, text: str) -> None:
        """With a time of its own: Python takes compiled files for current by time, in seconds, and size."""
        path.write_text(text)
        self._num_writes += 1
        os.utime(path, (self._num_writes, self._num_writes))

    @property
    def num_imports(self) -> int:
        """Processes that have imported the faulty module to its end."""
        return len(self._imported.read_text().splitlines())

    def test(self, tests: Sequence[str], *options: str) -> Outcome:
        self._report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={self._report}"]
        command += [f"--timeout={TEST_TIMEOUT_S}", *options, *(f"tests/{test}" for test in tests)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.src), os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            said = process.communicate(timeout=RUN_TIMEOUT_S)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            said = f"no end within {RUN_TIMEOUT_S} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not self._report.exists():
            return Outcome(other={"pytest": said[-2000:]})
        return _read_report(self._report)


def _read_report(path: Path) -> Outcome:
    outcome = Outcome()
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            outcome.passed.append(name)
        else:
            where = outcome.failed if problem.tag == "failure" else outcome.other
            where.setdefault(name, (problem.get("message") or "").partition("\n")[0][:160])
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all faults")
    parser.add_argument("--without-vllm", action="store_true", help="only faults that need no test of tests/vllm")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    given = parser.parse_args(arguments)
    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"no such fault: {', '.join(unknown)}; --list prints those that there are")
    faults = [known[name] for name in given.names] or list(FAULTS)
    if given.without_vllm:
        faults = [fault for fault in faults if not fault.needs_vllm]
    if given.list:
        for fault in faults:
            print(f"{fault.name}: {fault.why}\n    {fault.file}; {', '.join(fault.tests)}")
        return 0
    return run(faults)


def run(faults: Sequence[Fault]) -> int:
    """0: every fault was caught."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stagewire-mutants-") as folder:
        copy = Copy(Path(folder))
        if not _passes_without_a_fault(copy, faults):
            return 1
        num_caught = sum([_is_caught(copy, fault) for fault in faults])
    print(f"{num_caught} of {len(faults)} caught in {time.monotonic() - began:.0f} s", flush=True)
    return 0 if num_caught == len(faults) else 1


def _passes_without_a_fault(copy: Copy, faults: Sequence[Fault]) -> bool:
    """Each file by itself, so that a ring of one is gone before the next begins."""
    began = time.monotonic()
    tests = sorted({test for fault in faults for test in fault.tests})
    num_passed, problems = 0, dict[str, str]()
    for file, own in itertools.groupby(tests, lambda test: test.partition("::")[0]):
        outcome = copy.test(list(own))
        print(f"without a fault: {file}, {len(outcome.passed)} tests pass", flush=True)
        num_passed += len(outcome.passed)
        problems |= outcome.failed | outcome.other
    for name, why in problems.items():
        print(f"does not pass without a fault: {name}: {why}", flush=True)
    print(f"without a fault {num_passed} tests pass, in {time.monotonic() - began:.0f} s", flush=True)
    return not problems


def _is_caught(copy: Copy, fault: Fault) -> bool:
    began = time.monotonic()
    with copy.with_fault(fault):
        outcome = copy.test(fault.tests, "-x")
    took = f"{time.monotonic() - began:.0f} s, {copy.num_imports} processes"
    if outcome.failed and copy.num_imports:
        name, why = next(iter(outcome.failed.items()))
        print(f"caught    {fault.name} ({took})\n          by {name}: {why}", flush=True)
        return True
    what = "NOT CAUGHT" if copy.num_imports else "NOT IMPORTED"
    print(f"{what} {fault.name} ({took}): {fault.why}\n          {outcome}", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
