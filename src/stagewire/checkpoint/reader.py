"""The bytes of chosen tensors, and no others, out of a checkpoint's files.

The system's own reading ahead is off: it would fetch what lies behind a stage's last tensor, which belongs to another
stage. In its place the ranges that are needed next are announced, so that the disk is busy while a tensor is copied.
Memory is the caller's: no torch here. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from stagewire.checkpoint.index import TensorInfo
from stagewire.errors import ConfigError

__all__ = ["TensorReader"]

# A tensor of several chunks is read by several threads; one thread alone does not saturate a fast disk.
CHUNK_BYTES = 8 << 20
NUM_THREADS = 4
# How far reading runs ahead of what was taken, in the page cache and not in this process's memory.
AHEAD_BYTES = 128 << 20


@dataclass
class TensorReader:
    """Reads tensors one after the other.

    Args:
        folder: the checkpoint's.
        tensors: what to read, in the order of ``CheckpointIndex.tensors``, that is of the files and of their data.
        allocate: gives writable memory of so many bytes (at least 1).
    """

    folder: Path
    tensors: Sequence[TensorInfo]
    allocate: Callable[[int], memoryview]
    num_bytes_read: int = 0

    _files: dict[str, int] = field(default_factory=dict)  # to file descriptor
    _num_announced: int = 0  # tensors
    _announced_bytes: int = 0

    def __iter__(self) -> Iterator[tuple[TensorInfo, memoryview]]:
        """Each tensor and its bytes; nothing of it is kept here.

        Raises ``ConfigError``, naming file and tensor, when a file is missing or ends before its tensor does.
        """
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(NUM_THREADS, "stagewire-read") as pool:
            stack.callback(self._close)
            for tensor in self.tensors:
                self._announce()
                buffer = self.allocate(tensor.num_bytes) if tensor.num_bytes else memoryview(b"")
                self._read(tensor, buffer, pool)
                self.num_bytes_read += tensor.num_bytes
                yield tensor, buffer
                del buffer  # or it would live on while memory is taken for the next one

    def _read(self, tensor: TensorInfo, buffer: memoryview, pool: ThreadPoolExecutor) -> None:
        file = self._open(tensor)
        begins = range(0, tensor.num_bytes, CHUNK_BYTES)

        def read_chunk(begin: int) -> None:
            _read_fully(file, buffer[begin : begin + CHUNK_BYTES], tensor.offset + begin)

        try:
            if len(begins) == 1:
                read_chunk(0)
            else:
                for _ in pool.map(read_chunk, begins):
                    pass
        except OSError as error:
            raise ConfigError(
                f"{self.folder / tensor.file}: tensor {tensor.name} ({tensor.num_bytes} bytes from byte "
                f"{tensor.offset}) cannot be read: {error}; is the file still being written, or its disk gone?"
            ) from error

    def _announce(self) -> None:
        """Tells the system what will be read, up to ``AHEAD_BYTES`` beyond what was taken."""
        limit = self.num_bytes_read + AHEAD_BYTES
        while self._num_announced < len(self.tensors) and self._announced_bytes < limit:
            tensor = self.tensors[self._num_announced]
            os.posix_fadvise(self._open(tensor), tensor.offset, tensor.num_bytes, os.POSIX_FADV_WILLNEED)
            self._announced_bytes += tensor.num_bytes
            self._num_announced += 1

    def _open(self, tensor: TensorInfo) -> int:
        file = self._files.get(tensor.file)
        if file is None:
            path = self.folder / tensor.file
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ConfigError(f"{path}: tensor {tensor.name} cannot be read: {error}") from error
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            self._files[tensor.file] = file
        return file

    def _close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def _read_fully(file: int, buffer: memoryview, offset: int) -> None:
    """A single read may return less than was asked for, and never returns more than 2 GiB."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}")
        done += count
