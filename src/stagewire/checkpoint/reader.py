"""The bytes of chosen tensors, and no others, out of a checkpoint's files.

The system reads ahead of a sequential reader. That is fast, but at the end of a stage's tensors it fetches what belongs
to another stage. So a run of neighbouring tensors is read in two ways. Up to the point from which reading ahead would
leave the run, it is read as any file is. From there on the system may not read ahead, and is told what is needed next.
It is also told of the beginning of a run, which it takes some reads to recognise as one.

safetensors' own `safe_open` does not do this (`benches.loading --reading-only`). Its memory map is faster from the page
cache, but it fetches what lies around a run, keeps the pages of a whole file resident, and ends the process with SIGBUS
where a file has become shorter. Its `pread` backend takes two to four times as long.

Memory is the caller's: no torch here. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from stagewire.checkpoint.index import TensorInfo
from stagewire.errors import ConfigError

__all__ = ["TensorReader"]

# A tensor of several chunks is copied by several threads; one thread alone does not saturate a fast disk.
CHUNK_BYTES = 2 << 20
NUM_THREADS = min(4, len(os.sched_getaffinity(0)))
# How far announcements run ahead of what was taken, in the page cache and not in this process's memory.
ANNOUNCED_BYTES = 128 << 20
# Linux fetches no more for one announcement than the larger of its window and of the device's largest request
# (mm/readahead.c, force_page_cache_ra), and says nothing of the rest.
ANNOUNCEMENT_BYTES = 1 << 20
# The system's reading ahead reaches twice its window (mm/readahead.c); where the window is not known, a generous one.
_WINDOWS = 2
_UNKNOWN_WINDOW_BYTES = 16 << 20
# How much of a file's beginning may be in memory from somebody's look at its header.
_HEADER_REACH_BYTES = 1 << 20


@dataclass
class _File:
    """One file, open twice: ``ahead`` with the system's reading ahead, ``exact`` without."""

    ahead: int
    exact: int
    size: int
    window_bytes: int
    may_be_marked: bool = True

    @classmethod
    def open(cls, path: Path) -> _File:
        ahead = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            exact = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(ahead)
            raise
        os.posix_fadvise(exact, 0, 0, os.POSIX_FADV_RANDOM)
        return cls(ahead, exact, os.fstat(ahead).st_size, _window_bytes(ahead))

    def close(self) -> None:
        os.close(self.ahead)
        os.close(self.exact)


@dataclass(frozen=True)
class _Run:
    """Chosen tensors without a gap between them: where in their file they begin and end."""

    begin: int
    end: int


@dataclass
class TensorReader:
    """Reads tensors one after the other.

    Args:
        folder: the checkpoint's.
        tensors: what to read, in the order of ``CheckpointIndex.tensors``, that is of the files and of their data.
        allocate: gives writable memory of so many bytes (at least 1).
        on_read: called with the bytes that came, piece by piece, by any thread.
    """

    folder: Path
    tensors: Sequence[TensorInfo]
    allocate: Callable[[int], memoryview]
    on_read: Callable[[int], None] = lambda _: None
    num_bytes_read: int = 0

    _files: dict[str, _File] = field(default_factory=dict)
    _num_announced: int = 0  # tensors

    def __iter__(self) -> Iterator[tuple[TensorInfo, memoryview]]:
        """Each tensor and its bytes; nothing of it is kept here.

        Raises ``ConfigError``, naming file and tensor, when a file is missing or ends before its tensor does.
        """
        runs = _find_runs(self.tensors)
        announced_to = self._sum_up()
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(NUM_THREADS, "stagewire-read") as pool:
            stack.callback(self._close)
            for tensor, run in zip(self.tensors, runs, strict=True):
                self._announce(runs, announced_to)
                buffer = self.allocate(tensor.num_bytes) if tensor.num_bytes else memoryview(b"")
                self._read(tensor, buffer, run, pool)
                self.num_bytes_read += tensor.num_bytes
                yield tensor, buffer
                del buffer  # or it would live on while memory is taken for the next one

    def _read(self, tensor: TensorInfo, buffer: memoryview, run: _Run, pool: ThreadPoolExecutor) -> None:
        file = self._open(tensor)
        split = _exact_from(tensor, run, file)
        chunks = [(file.ahead, *chunk) for chunk in _chunks(0, split, CHUNK_BYTES)]
        chunks += [(file.exact, *chunk) for chunk in _chunks(split, tensor.num_bytes, CHUNK_BYTES)]

        def read_chunk(chunk: tuple[int, int, int]) -> None:
            descriptor, begin, end = chunk
            _read_fully(descriptor, buffer[begin:end], tensor.offset + begin, self.on_read)

        try:
            copies = []
            for chunk in chunks:
                if len(chunks) == 1 or _await(file, chunk, tensor.offset):
                    read_chunk(chunk)  # the disk is what takes the time, and takes less of it with a core to itself
                else:
                    copies.append(pool.submit(read_chunk, chunk))
            for copy in copies:
                copy.result()
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

    def _announce(self, runs: Sequence[_Run], sums: Sequence[int]) -> None:
        """Tells the system what it will not find out by itself, up to ``ANNOUNCED_BYTES`` beyond what was taken."""
        limit = self.num_bytes_read + ANNOUNCED_BYTES
        while self._num_announced < len(self.tensors) and sums[self._num_announced] < limit:
            tensor, run = self.tensors[self._num_announced], runs[self._num_announced]
            file = self._open(tensor)
            split = _exact_from(tensor, run, file)
            if split < tensor.num_bytes:
                _forget_header(file, tensor)
            lead = max(0, min(split, run.begin + file.window_bytes - tensor.offset))
            for begin, end in [
                *_chunks(0, lead, ANNOUNCEMENT_BYTES),
                *_chunks(split, tensor.num_bytes, ANNOUNCEMENT_BYTES),
            ]:
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


def _find_runs(tensors: Sequence[TensorInfo]) -> list[_Run]:
    """For each tensor the run of neighbouring chosen tensors that it belongs to."""
    runs: list[_Run] = []
    first = 0
    for i, tensor in enumerate(tensors):
        following = tensors[i + 1] if i + 1 < len(tensors) else None
        end = tensor.offset + tensor.num_bytes
        if following is None or following.file != tensor.file or following.offset != end:
            runs += [_Run(tensors[first].offset, end)] * (i + 1 - first)
            first = i + 1
    return runs


def _exact_from(tensor: TensorInfo, run: _Run, file: _File) -> int:
    """From which byte of the tensor on the system may not read ahead; where the file ends it cannot."""
    if run.end >= file.size:
        return tensor.num_bytes
    return max(0, min(tensor.num_bytes, run.end - _WINDOWS * file.window_bytes - tensor.offset))


def _chunks(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + size, end)) for at in range(begin, end, size))


def _forget_header(file: _File, tensor: TensorInfo) -> None:
    """Drops a file's beginning from memory if the tensor is there and is read exactly.

    Who reads a header as any file leaves a mark in the pages behind it (vLLM does, for the dtype of the
    weights). Reading a marked page makes the system fetch a window more after what was announced, which is after the
    run, and POSIX_FADV_RANDOM does not prevent it (mm/readahead.c, page_cache_async_ra).
    """
    if file.may_be_marked and tensor.offset < _HEADER_REACH_BYTES:
        os.posix_fadvise(file.exact, 0, _HEADER_REACH_BYTES, os.POSIX_FADV_DONTNEED)
    file.may_be_marked = False


def _await(file: _File, chunk: tuple[int, int, int], offset: int) -> bool:
    """Waits for a whole chunk that the system is fetching, by its last byte; whether there was anything to wait for.

    A copy that runs into the front of the fetching sleeps for every piece of it, and waking from another core's
    interrupt costs more than the piece. The first byte makes the system fetch the next window meanwhile.
    """
    descriptor, begin, end = chunk
    if file.window_bytes < end - begin:
        return False  # nothing fetches so far ahead; the copying threads ask for it themselves
    os.pread(descriptor, 1, offset + begin)
    last = bytearray(1)
    try:
        os.preadv(file.exact, [last], offset + end - 1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            return False  # a file system that cannot say
    else:
        return False
    os.pread(file.exact, 1, offset + end - 1)
    return True


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


def _read_fully(file: int, buffer: memoryview, offset: int, on_read: Callable[[int], None]) -> None:
    """A single read may return less than was asked for, and never returns more than 2 GiB."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}")
        done += count
        on_read(count)
