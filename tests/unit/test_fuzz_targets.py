"""The fuzzed targets on a few thousand mutations of recorded messages, the same each time (tests/fuzz/README.md)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from fuzz.targets import TARGETS, seeds


def mutations(inputs: list[bytes], count: int) -> Iterator[bytes]:
    """Bytes changed, cut out, doubled, and taken from another input."""
    rng = random.Random(0)
    for _ in range(count):
        data = bytearray(rng.choice(inputs))
        for _ in range(rng.randrange(1, 6)):
            start = rng.randrange(len(data) + 1)
            piece = slice(start, start + rng.randrange(1, 16))
            match rng.randrange(5):
                case 0 if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
                case 1 if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                case 2:
                    del data[piece]
                case 3:
                    data[start:start] = data[piece]
                case _:
                    other = rng.choice(inputs)
                    data[piece] = other[piece]
        yield bytes(data)


@pytest.mark.parametrize(("name", "count"), [("decode", 20_000), ("tensors", 5_000), ("state", 6_000)])
def test_no_bytes_do_harm(name: str, count: int) -> None:
    inputs = seeds(name)
    for data in inputs:
        TARGETS[name](data)
    for data in mutations(inputs, count):
        TARGETS[name](data)
