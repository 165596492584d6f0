"""The table of faults is kept true: each still has its place in the code, and its tests are in the short run."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from mutants.faults import FAULTS, Fault

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src" / "stagewire"
NAMES = [fault.name for fault in FAULTS]


@cache
def short_tests(file: str) -> dict[str, bool]:
    """``name`` or ``Class::name`` of each test in a file, and whether it is in the short run."""
    tree = ast.parse((TESTS / file).read_text())
    is_short = "mark.slow" not in "".join(
        ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)
    )
    found: dict[str, bool] = {}
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for each in inner:
            if isinstance(each, ast.FunctionDef):
                marks = [ast.unparse(decorator) for decorator in each.decorator_list]
                found[prefix + each.name] = is_short and "pytest.mark.slow" not in marks
    return found


def test_there_are_enough_and_none_twice() -> None:
    assert len(FAULTS) >= 40
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    assert [change for change, count in Counter((f.file, f.old, f.new) for f in FAULTS).items() if count > 1] == []


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_it_applies(fault: Fault) -> None:
    """When a change of src makes this fail, write the same fault for the new code into tests/mutants/faults.py, and see
    `python -m mutants.run NAME` catch it (in tests/). Take it out when the code can no longer be wrong in that way.
    """
    changed = fault.apply((SOURCE / fault.file).read_text())
    compile(changed, fault.file, "exec")


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_its_tests_are_in_the_short_run(fault: Fault) -> None:
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert short_tests(file).get(name), f"{test} is not there, or slow"


def test_a_fault_without_its_place_is_refused() -> None:
    fault = Fault("name", "file.py", "a", "b", "why", ("unit/test_mutants.py::test_it_applies",))
    assert fault.apply("1 a 2") == "1 b 2"
    for text in ("a a", ""):
        with pytest.raises(ValueError, match="expected once"):
            fault.apply(text)
