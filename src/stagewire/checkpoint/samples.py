"""Samples a checkpoint's weights, to tell from a fraction of the bytes whether two folders hold the same values.

Headers do not tell: a base model and its fine-tune have the same ones, and so has a file that was only half copied.

- Small tensors (norms, biases, most scales) are read whole.
- Of a larger tensor, the first page, the last page and some in between are read. Its name and size decide which.
- Of kinds with very many members, such as the matrices of experts, some members are left out.

Different values in pages that are not read, for instance in a few rows of an embedding, are not noticed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stagewire.checkpoint.files import CheckpointFiles
from stagewire.checkpoint.index import CheckpointIndex, TensorInfo
from stagewire.errors import ConfigError

__all__ = [
    "MAX_PER_KIND",
    "PAGE_BYTES",
    "WHOLE_BYTES",
    "Samples",
    "choose_ranges",
    "choose_tensors",
    "sample_tensors",
    "sample_weights",
]

PAGE_BYTES = 4096
# Up to this size a tensor is read whole. A norm of 16,384 values in float32 has this size.
WHOLE_BYTES = 64 << 10
# Pages between the first and the last one: one for so many bytes of the tensor, within these bounds.
_BYTES_FOR_A_PAGE = 32 << 20
_LEAST_BETWEEN, _MOST_BETWEEN = 2, 16
# Names that differ only in numbers are of one kind. No decoder has so many layers, so only experts are left out.
MAX_PER_KIND = 256
_NUMBER = re.compile(r"\d+")
# How many tensors are announced to the system ahead of reading, so that a disk works on many reads at once.
_ANNOUNCED = 512
_DIGITS = 16
_FLOATS = ("F16", "BF16", "F32", "F64", "F8_")


@dataclass(frozen=True)
class Samples:
    """``digest``: 16 hexadecimal digits over all samples. ``num_reads`` and ``num_bytes``: how much was read.

    ``blank``: large matrices whose samples were all zeros.
    """

    digest: str
    blank: tuple[TensorInfo, ...]
    num_reads: int
    num_bytes: int


def sample_weights(files: CheckpointFiles, index: CheckpointIndex | None) -> Samples:
    """Samples of the whole checkpoint. Equal for the same tensors, whatever files they are in.

    Without safetensors (no ``index``) each file of weights counts as one tensor of bytes. Raises ``ConfigError`` for a
    file that cannot be read, or that ends before its tensor does.
    """
    return sample_tensors(files, _as_tensors(files, files.present) if index is None else index.tensors.values())


def sample_tensors(files: CheckpointFiles, tensors: Iterable[TensorInfo]) -> Samples:
    """Samples of these tensors, and of the checkpoint's modules, which every stage has. Raises as `sample_weights`."""
    return _read(files.folder, choose_tensors([*tensors, *_as_tensors(files, files.module_weights)]))


def _as_tensors(files: CheckpointFiles, names: Iterable[str]) -> list[TensorInfo]:
    sizes = {name: (files.folder / name).stat().st_size for name in names}
    return [TensorInfo(name, "U8", (size,), size, name, 0) for name, size in sizes.items()]


def choose_tensors(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """The tensors to sample: at most ``MAX_PER_KIND`` of each kind, spread evenly over the sorted names."""
    kinds: dict[str, list[TensorInfo]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        kinds.setdefault(_NUMBER.sub("#", tensor.name), []).append(tensor)
    return [tensor for members in kinds.values() for tensor in members[:: -(-len(members) // MAX_PER_KIND)]]


def choose_ranges(name: str, num_bytes: int) -> list[tuple[int, int]]:
    """The (begin, end) in bytes to read of a tensor, in order and without overlap."""
    if num_bytes <= WHOLE_BYTES:
        return [(0, num_bytes)] if num_bytes else []
    last = (num_bytes - 1) // PAGE_BYTES
    count = max(_LEAST_BETWEEN, min(num_bytes // _BYTES_FOR_A_PAGE, _MOST_BETWEEN))
    between = {1 + _number(name, num_bytes, i) % (last - 1) for i in range(count)}
    return [(page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, num_bytes)) for page in sorted({0, *between, last})]


def _number(name: str, num_bytes: int, i: int) -> int:
    """A hash that is the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(f"{name} {num_bytes} {i}".encode()).digest()[:8], "big")


def _read(folder: Path, tensors: Sequence[TensorInfo]) -> Samples:
    """Reads in the order of the files' bytes, and hashes in the order of names."""
    ranges = {tensor.name: choose_ranges(tensor.name, tensor.num_bytes) for tensor in tensors}
    hashes: dict[str, bytes] = {}
    blank: list[TensorInfo] = []
    num_bytes = 0
    for tensor, content in _contents(folder, sorted(tensors, key=lambda each: (each.file, each.offset)), ranges):
        hashes[tensor.name] = hashlib.sha256(content).digest()
        num_bytes += len(content)
        if _should_have_values(tensor) and not any(content):
            blank.append(tensor)
    whole = hashlib.sha256()
    for name in sorted(hashes):
        whole.update(f"{len(name)} {name} ".encode() + hashes[name])
    return Samples(whole.hexdigest()[:_DIGITS], tuple(blank), sum(map(len, ranges.values())), num_bytes)


def _should_have_values(tensor: TensorInfo) -> bool:
    """Whether zeros alone are suspicious. They are usual in a bias or in the zero points of a quantized matrix."""
    return tensor.num_bytes > WHOLE_BYTES and len(tensor.shape) > 1 and tensor.dtype.startswith(_FLOATS)


def _contents(
    folder: Path, tensors: Sequence[TensorInfo], ranges: Mapping[str, Sequence[tuple[int, int]]]
) -> Iterator[tuple[TensorInfo, bytes]]:
    """Each tensor with its samples, joined."""
    files: dict[str, int] = {}
    num_announced = 0
    with ExitStack() as stack:
        for i, tensor in enumerate(tensors):
            for ahead in tensors[num_announced : i + _ANNOUNCED]:
                _announce(_open(folder, ahead, files, stack), ahead, ranges[ahead.name])
            num_announced = i + _ANNOUNCED
            file = files[tensor.file]
            yield tensor, b"".join(_pread(folder, file, tensor, begin, end) for begin, end in ranges[tensor.name])


def _open(folder: Path, tensor: TensorInfo, files: dict[str, int], stack: ExitStack) -> int:
    if tensor.file not in files:
        try:
            file = os.open(folder / tensor.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"{folder / tensor.file}: tensor {tensor.name} cannot be read: {error}") from error
        stack.callback(os.close, file)
        # Without this, the system would read ahead what belongs to other stages.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        files[tensor.file] = file
    return files[tensor.file]


def _announce(file: int, tensor: TensorInfo, ranges: Sequence[tuple[int, int]]) -> None:
    for begin, end in ranges:
        os.posix_fadvise(file, tensor.offset + begin, end - begin, os.POSIX_FADV_WILLNEED)


def _pread_fully(file: int, num_bytes: int, offset: int) -> bytes:
    """Returns less only at the end of the file, where a single ``pread`` may return less anywhere."""
    content = os.pread(file, num_bytes, offset)
    while len(content) < num_bytes and (piece := os.pread(file, num_bytes - len(content), offset + len(content))):
        content += piece
    return content


def _pread(folder: Path, file: int, tensor: TensorInfo, begin: int, end: int) -> bytes:
    try:
        content = _pread_fully(file, end - begin, tensor.offset + begin)
    except OSError as error:
        raise ConfigError(f"{folder / tensor.file}: tensor {tensor.name} cannot be read: {error}") from error
    if len(content) < end - begin:
        raise ConfigError(
            f"{folder / tensor.file} is cut short: tensor {tensor.name} needs {end} bytes from byte {tensor.offset}; "
            "download it again"
        )
    return content
