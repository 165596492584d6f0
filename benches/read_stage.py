"""Reads one stage's tensors in this process and prints what that cost, as one JSON line. Started by benches/loading.py.

python -m benches.read_stage MODEL RANGE ours|mmap|pread|rows

Each tensor is copied to where a parameter would be, as loading does. `mmap` and `pread` are the two backends of
`safetensors.safe_open`, one `get_tensor` after the other; `rows` are its slices: threads take about 2 MiB of rows each
and copy them into memory that is used again, as our reader does.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benches.load_stage import io_counter, memory
from safetensors import safe_open

from stagewire.checkpoint.index import TensorInfo, read_index
from stagewire.checkpoint.model_config import read_model_shape
from stagewire.checkpoint.ownership import stage_tensors
from stagewire.checkpoint.reader import CHUNK_BYTES, NUM_THREADS, TensorReader
from stagewire.plan.ranges import LayerRange

TICK_S = 0.001


def read_ours(model: Path, tensors: Sequence[TensorInfo]) -> Iterator[torch.Tensor]:
    buffer = memory_for(tensors)
    for _, view in TensorReader(model, tensors, lambda num_bytes: buffer[:num_bytes]):
        yield torch.frombuffer(view, dtype=torch.uint8)


def read_with_library(model: Path, tensors: Sequence[TensorInfo], backend: str) -> Iterator[torch.Tensor]:
    for name, group in itertools.groupby(tensors, key=lambda tensor: tensor.file):
        with safe_open(model / name, "pt", backend=backend) as file:
            for tensor in group:
                yield file.get_tensor(tensor.name).view(-1).view(torch.uint8)


def read_rows(model: Path, tensors: Sequence[TensorInfo]) -> Iterator[torch.Tensor]:
    buffer = memory_for(tensors)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for name, group in itertools.groupby(tensors, key=lambda tensor: tensor.file):
            with safe_open(model / name, "pt", backend="pread") as file:
                for tensor in group:
                    target = torch.frombuffer(buffer, dtype=torch.uint8)[: tensor.num_bytes]
                    num_rows = max(1, CHUNK_BYTES * tensor.shape[0] // tensor.num_bytes)
                    pieces = target.view(tensor.shape[0], -1).split(num_rows)
                    begins = itertools.count(0, num_rows)
                    list(pool.map(copy_rows, itertools.repeat(file.get_slice(tensor.name)), begins, pieces))
                    yield target


def copy_rows(source: Any, begin: int, target: torch.Tensor) -> None:
    """From row ``begin`` on. # target: [num_rows, row_bytes]"""
    target.copy_(source[begin : begin + len(target)].view(len(target), -1).view(torch.uint8))


def memory_for(tensors: Sequence[TensorInfo]) -> memoryview:
    """For the largest of them, not shared and not resident yet."""
    num_bytes = max(tensor.num_bytes for tensor in tensors)
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


SIDES = {
    "ours": read_ours,
    "mmap": lambda model, tensors: read_with_library(model, tensors, "mmap"),
    "pread": lambda model, tensors: read_with_library(model, tensors, "pread"),
    "rows": read_rows,
}


class Ticks:
    """The longest time for which another thread of this process could not run."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._tick)

    def __enter__(self) -> Ticks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _tick(self) -> None:
        last = time.perf_counter()
        while not self._ends.wait(TICK_S):
            now = time.perf_counter()
            self.longest_s = max(self.longest_s, now - last - TICK_S)
            last = now


def anonymous() -> int:
    """Resident memory in bytes that is no file's."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    model, layers, side = Path(sys.argv[1]), LayerRange.parse(sys.argv[2]), sys.argv[3]
    index = read_index(model)
    assert index is not None
    tensors = stage_tensors(index, read_model_shape(model), layers)
    parameter = torch.ones(max(tensor.num_bytes for tensor in tensors), dtype=torch.uint8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, before_anonymous, read = memory("VmRSS"), anonymous(), io_counter("read_bytes")
    peak_anonymous, checksum = 0, 0
    with Ticks() as ticks:
        began_at, used = time.perf_counter(), time.process_time()
        for values in SIDES[side](model, tensors):
            parameter[: values.numel()].copy_(values)
            peak_anonymous = max(peak_anonymous, anonymous() - before_anonymous)
            checksum ^= hash((values.numel(), *parameter[: values.numel() : math.ceil(values.numel() / 16)].tolist()))
            del values
        seconds, used = time.perf_counter() - began_at, time.process_time() - used
    found = {
        "seconds": seconds,
        "cpu_seconds": used,
        "disk_bytes": io_counter("read_bytes") - read,
        "peak_bytes": memory("VmHWM") - before,
        "anonymous_bytes": peak_anonymous,
        "stall_s": ticks.longest_s,
        "checksum": checksum,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
