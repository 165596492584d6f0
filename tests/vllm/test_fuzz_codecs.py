"""What vLLM's objects travel as, on a few thousand mutations, the same each time (tests/fuzz/README.md)."""

from __future__ import annotations

import pytest

from fuzz.targets import TARGETS, seeds
from unit.test_fuzz_targets import mutations


@pytest.mark.parametrize("name", ["schedule", "output", "grammar", "call_value"])
def test_no_bytes_do_harm(name: str) -> None:
    inputs = seeds(name)
    for data in inputs:
        TARGETS[name](data)
    for data in mutations(inputs, 5_000):
        TARGETS[name](data)
