"""The bytes of chosen tensors, and no others, out of a checkpoint's files.

The system reads ahead of a sequential reader, which is fast, and at the end of a stage's tensors fetches what belongs
to another stage. So each run of neighbouring tensors is read in two ways: up to the point from which reading ahead
would leave the run, as any file is; from there on without it, and what is needed next is announced instead.
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
# How far announcements run ahead of what was taken, in the page cache and not in this process's memory.
ANNOUNCED_BYTES = 128 << 20
# Linux fetches no more for one announcement than the larger of its window and of the device's largest request
# (mm/readahead.c, force_page_cache_ra), and says nothing of the rest.
ANNOUNCEMENT_BYTES = 1 << 20
# The system's reading ahead reaches twice its window (mm/readahead.c); where the window is not known, a generous one.
_WINDOWS = 2
_UNKNOWN_WINDOW_BYTES = 16 << 20


@dataclass
class _File:
    """One file, open twice: ``ahead`` with the system's reading ahead, ``exact`` without."""

    ahead: int
    exact: int
    window_bytes: int

    @classmethod
    def open(cls, path: Path) -> _File:
        ahead = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            exact = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(ahead)
            raise
        os.posix_fadvise(exact, 0, 0, os.POSIX_FADV_RANDOM)
        return cls(ahead, exact, _window_bytes(ahead))

    def close(self) -> None:
        os.close(self.ahead)
        os.close(self.exact)


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

    _files: dict[str, _File] = field(default_factory=dict)
    _num_announced: int = 0  # tensors

    def __iter__(self) -> Iterator[tuple[TensorInfo, memoryview]]:
        """Each tensor and its bytes; nothing of it is kept here.

        Raises ``ConfigError``, naming file and tensor, when a file is missing or ends before its tensor does.
        """
        run_ends = _find_run_ends(self.tensors)
        announced_to = self._sum_up()
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(NUM_THREADS, "stagewire-read") as pool:
            stack.callback(self._close)
            for tensor, run_end in zip(self.tensors, run_ends, strict=True):
                self._announce(run_ends, announced_to)
                buffer = self.allocate(tensor.num_bytes) if tensor.num_bytes else memoryview(b"")
                self._read(tensor, buffer, run_end, pool)
                self.num_bytes_read += tensor.num_bytes
                yield tensor, buffer
                del buffer  # or it would live on while memory is taken for the next one

    def _read(self, tensor: TensorInfo, buffer: memoryview, run_end: int, pool: ThreadPoolExecutor) -> None:
        file = self._open(tensor)
        split = _exact_from(tensor, run_end, file)
        chunks = [(file.ahead, *chunk) for chunk in _chunks(0, split)]
        chunks += [(file.exact, *chunk) for chunk in _chunks(split, tensor.num_bytes)]

        def read_chunk(chunk: tuple[int, int, int]) -> None:
            descriptor, begin, end = chunk
            _read_fully(descriptor, buffer[begin:end], tensor.offset + begin)

        try:
            if len(chunks) == 1:
                read_chunk(chunks[0])
            else:
                for _ in pool.map(read_chunk, chunks):
                    pass
        except OSError as error:
            raise ConfigError(
                f"{self.folder / tensor.file}: tensor {tensor.name} ({tensor.num_bytes} bytes from byte "
                f"{tensor.offset}) cannot be read: {error}; is the file still being written, or its disk gone?"
            ) from error

    def _sum_up(self) -> list[int]:
        """Bytes of all tensors before each one."""
        sums, total = [], 0
        for tensor in self.tensors:
            sums.append(total)
            total += tensor.num_bytes
        return sums

    def _announce(self, run_ends: Sequence[int], sums: Sequence[int]) -> None:
        """Tells the system what will be read exactly, up to ``ANNOUNCED_BYTES`` beyond what was taken."""
        limit = self.num_bytes_read + ANNOUNCED_BYTES
        while self._num_announced < len(self.tensors) and sums[self._num_announced] < limit:
            tensor = self.tensors[self._num_announced]
            file = self._open(tensor)
            split = _exact_from(tensor, run_ends[self._num_announced], file)
            for begin, end in _chunks(split, tensor.num_bytes, ANNOUNCEMENT_BYTES):
                os.posix_fadvise(file.exact, tensor.offset + begin, end - begin, os.POSIX_FADV_WILLNEED)
            self._num_announced += 1

    def _open(self, tensor: TensorInfo) -> _File:
        file = self._files.get(tensor.file)
        if file is None:
            path = self.folder / tensor.file
            try:
                file = self._files[tensor.file] = _File.open(path)
            except OSError as error:
                raise ConfigError(f"{path}: tensor {tensor.name} cannot be read: {error}") from error
        return file

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _find_run_ends(tensors: Sequence[TensorInfo]) -> list[int]:
    """For each tensor, where in its file the run of chosen tensors without a gap ends that it belongs to."""
    ends: list[int] = []
    following: TensorInfo | None = None
    for tensor in reversed(tensors):
        end = tensor.offset + tensor.num_bytes
        is_joined = following is not None and following.file == tensor.file and following.offset == end
        ends.append(ends[-1] if is_joined else end)
        following = tensor
    return ends[::-1]


def _exact_from(tensor: TensorInfo, run_end: int, file: _File) -> int:
    """From which byte of the tensor on the system may not read ahead."""
    return max(0, min(tensor.num_bytes, run_end - _WINDOWS * file.window_bytes - tensor.offset))


def _chunks(begin: int, end: int, size: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    return ((at, min(at + size, end)) for at in range(begin, end, size))


def _window_bytes(file: int) -> int:
    """The reading-ahead window of the device (or the network mount) that holds an open file."""
    device = os.fstat(file).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (block / "queue", block / ".." / "queue"):  # of a disk, of a partition
        with contextlib.suppress(OSError, ValueError):
            return int((queue / "read_ahead_kb").read_text()) << 10
    with contextlib.suppress(OSError, ValueError):
        bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        return int(bdi.read_text()) << 10
    return _UNKNOWN_WINDOW_BYTES


def _read_fully(file: int, buffer: memoryview, offset: int) -> None:
    """A single read may return less than was asked for, and never returns more than 2 GiB."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}")
        done += count
