"""Reads the tensors of a checkpoint from its safetensors headers: names, types, sizes, files. Reads no weights.

Sizes are checked before memory is taken. Every header is checked against its file's length, so that an incomplete
download is refused before any stage starts to load.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from stagewire.checkpoint.files import INDEX_NAME, CheckpointFiles, checkpoint_files, natural_key
from stagewire.checkpoint.model_config import LoadFlags, read_config
from stagewire.errors import ConfigError

__all__ = [
    "INDEX_NAME",
    "CheckpointIndex",
    "TensorInfo",
    "config_fingerprint",
    "fingerprint",
    "fingerprint_of",
    "read_files",
    "read_index",
    "read_metadata",
    "read_tensors",
]

_LENGTH_BYTES = 8
# The safetensors library's own limit (MAX_HEADER_SIZE).
_MAX_HEADER_BYTES = 100_000_000
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# Fields of config.json that do not change the model: who saved it, with what, from where. The dtype is among them,
# because each tensor has its own, transformers 5 renamed the key, and the handshake compares the served dtype.
_SAVED_BY = ("_name_or_path", "_model_name_or_path", "_commit_hash", "_attn_implementation_autoset")
_BOOKKEEPING = frozenset((*_SAVED_BY, "transformers_version", "use_cache", "dtype", "torch_dtype"))
# In this section a dtype is part of the format, so it is hashed whole.
_KEPT_WHOLE = "quantization_config"
_FINGERPRINT_DIGITS = 16


class TensorInfo(NamedTuple):  # made in a third of a dataclass's time; a checkpoint may have 50,000 tensors
    """One tensor. ``dtype`` is safetensors' name ("BF16"); ``file`` is relative to the model's folder.

    Its bytes are ``offset`` to ``offset + num_bytes`` of that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: str
    offset: int


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint by name, in the order of the files and of their data.

    ``total_bytes`` is the size of the weights, ``header_bytes`` that of the headers that were read. ``absent``: tensors
    that the index places in a file that does not hold them; vLLM fails only if the model needs them. ``copies``: for
    each tensor in several files, those files, with the one that counts first.

    ``beside``: names of tensors in the folder's other *.safetensors, hidden ones included. ``unreadable``: those of
    these files that have no readable header. vLLM reads no weights from them, but looks there for a ``lm_head.weight``.
    """

    tensors: Mapping[str, TensorInfo]
    total_bytes: int
    header_bytes: int
    absent: tuple[str, ...] = ()
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    unreadable: tuple[str, ...] = ()


def read_index(model_dir: Path, load_format: str = "auto") -> CheckpointIndex | None:
    """The tensors of the checkpoint's files (``files.checkpoint_files``), each from the file that counts.

    ``None`` when the checkpoint is not in safetensors. Raises ``ConfigError``, naming file and tensor, for a shard that
    is missing, malformed or cut short, and for a tensor that two files hold in two shapes without an index.
    """
    return read_tensors(checkpoint_files(model_dir, load_format))


def read_tensors(files: CheckpointFiles, *, is_part: bool = False) -> CheckpointIndex | None:
    """As ``read_index``, for files that are known already. With ``is_part``, missing files are left out."""
    if not files.weights or not files.is_safetensors:
        return None
    if not is_part:
        files.check_complete()
    weight_map = {name: file for name, file in files.weight_map.items() if file not in files.missing}
    index = read_files(files.folder, files.present, weight_map)
    beside, unreadable = _read_beside(files)
    return replace(index, beside=beside, unreadable=unreadable)


def read_files(folder: Path, files: Sequence[str], weight_map: Mapping[str, str] | None = None) -> CheckpointIndex:
    """The tensors of these safetensors files (names relative to ``folder``).

    If several files hold a tensor, the file that ``weight_map`` names counts. If it names none, the last file in vLLM's
    order counts, because vLLM reads it after the others. Raises ``ConfigError`` as ``read_index`` does.
    """
    return _read_shards(folder, sorted(files, key=natural_key), weight_map or {})


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file (``{"format": "pt"}``); empty without any. Raises as ``read_index`` does."""
    metadata = _read_header(path)[0].get("__metadata__")
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def fingerprint(model_dir: Path, flags: LoadFlags | None = None) -> str:
    """`fingerprint_of` the checkpoint in a folder. Raises ``ConfigError`` as ``read_config`` and ``read_index`` do."""
    files = checkpoint_files(model_dir, flags.load_format if flags else "auto")
    return fingerprint_of(files, read_tensors(files), flags)


def fingerprint_of(files: CheckpointFiles, index: CheckpointIndex | None, flags: LoadFlags | None = None) -> str:
    """16 hexadecimal digits, equal exactly when configuration and headers of two folders describe the same model.

    Hashed are config.json without the fields that do not change the model, and the sorted (name, dtype, shape) of every
    tensor. Without safetensors (no ``index``), the names and sizes of the weight files are hashed instead. Which file
    holds a tensor is not hashed, so a copy with other shards matches. Weights are not read: a fine-tuned copy has its
    base model's fingerprint, but other samples (``checkpoint/samples.py``).
    """
    weights = _list_files(files) if index is None else _list_tensors(index)
    return _digest({"config": _without_bookkeeping(read_config(files.folder, flags)), "weights": weights})


def config_fingerprint(model_dir: Path, flags: LoadFlags | None = None) -> str:
    """As ``fingerprint``, but of the configuration alone. A folder with a part of the weights has the same."""
    return _digest(_without_bookkeeping(read_config(model_dir, flags)))


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_DIGITS]


def _read_shards(model_dir: Path, files: Sequence[str], weight_map: Mapping[str, str]) -> CheckpointIndex:
    shards, header_bytes = [], 0
    for file in files:
        shard, begins_at = _read_shard(model_dir, file)
        shards.append(shard)
        header_bytes += begins_at
    tensors, copies = _merge_shards(shards, weight_map)
    absent = tuple(name for name in weight_map if name not in tensors)
    total_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    return CheckpointIndex(tensors, total_bytes, header_bytes, absent, copies)


def _read_beside(files: CheckpointFiles) -> tuple[frozenset[str], tuple[str, ...]]:
    names: set[str] = set()
    unreadable = []
    for path in sorted(files.folder.glob("*.safetensors")):
        if path.name in files.weights or not path.is_file():
            continue
        try:
            names |= _read_header(path)[0].keys()
        except ConfigError:
            unreadable.append(path.name)
    return frozenset(names), tuple(unreadable)


def _read_shard(model_dir: Path, file: str) -> tuple[list[TensorInfo], int]:
    """The tensors of one file in the order of their data, and where the data begins."""
    path = model_dir / file
    header, begins_at, file_bytes = _read_header(path)
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    tensors = [_read_tensor(path, file, name, entry, begins_at) for name, entry in entries]
    for tensor in tensors:
        end = tensor.offset + tensor.num_bytes
        if end > file_bytes:
            raise ConfigError(
                f"{path} is cut short: tensor {tensor.name} ends at byte {end}, "
                f"the file holds {file_bytes}; download it again"
            )
    return sorted(tensors, key=lambda tensor: tensor.offset), begins_at


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, where the data begins, the file's size. Layout: 8 bytes length (little-endian), JSON, data."""
    try:
        # Neither a buffer nor the system's read-ahead may fetch weights that no stage asked for.
        with path.open("rb", buffering=0) as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            _check_header_length(path, length, file_bytes)
            header = json.loads(_read_exactly(stream, length))
    except FileNotFoundError as error:
        raise ConfigError(f"shard {path} is missing; is the download complete?") from error
    except ConfigError:  # also a ValueError, which is caught below
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} has no readable safetensors header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: the safetensors header must be a JSON object, found {type(header).__name__}")
    return header, _LENGTH_BYTES + length, file_bytes


def _read_exactly(stream: IO[bytes], length: int) -> bytes:
    """Reads until ``length`` bytes have come, because an unbuffered read may return less."""
    parts = []
    while length:
        part = stream.read(length)
        if not part:
            raise OSError("the file ended early")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _check_header_length(path: Path, length: int, file_bytes: int) -> None:
    if length > _MAX_HEADER_BYTES:
        raise ConfigError(
            f"{path} claims a header of {length} bytes, more than the {_MAX_HEADER_BYTES} that safetensors allows; "
            "is it a safetensors file? (a Git LFS pointer is not)"
        )
    if file_bytes < _LENGTH_BYTES or length > file_bytes - _LENGTH_BYTES:
        raise ConfigError(
            f"{path} is cut short: a header of {length} bytes was announced, "
            f"the whole file has {file_bytes}; download it again"
        )


def _read_tensor(path: Path, file: str, name: str, entry: Any, begins_at: int) -> TensorInfo:
    """``begins_at``: where the file's data begins. The header's offsets count from there."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: tensor {name} needs dtype, shape and data_offsets, found {entry!r:.120}") from error
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes([begin, end]) and begin <= end):
        raise ConfigError(f"{path}: tensor {name} has a malformed entry: {entry!r:.120}")
    bits = _DTYPE_BITS.get(dtype)
    if bits is not None and (math.prod(shape) * bits + 7) // 8 != end - begin:
        raise ConfigError(f"{path}: tensor {name} of shape {shape} and type {dtype} cannot have {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), end - begin, file, begins_at + begin)


def _are_sizes(numbers: object) -> bool:
    return isinstance(numbers, list) and {int}.issuperset(map(type, numbers)) and min(numbers, default=0) >= 0


def _merge_shards(
    shards: Sequence[Sequence[TensorInfo]], weight_map: Mapping[str, str]
) -> tuple[dict[str, TensorInfo], dict[str, tuple[str, ...]]]:
    """Each tensor by name, in the order of the files, and the files of tensors that are in several."""
    everything = [tensor for shard in shards for tensor in shard]
    tensors = {tensor.name: tensor for tensor in everything}
    if len(tensors) == len(everything):
        return tensors, {}
    found: dict[str, list[TensorInfo]] = {}
    for tensor in everything:
        found.setdefault(tensor.name, []).append(tensor)
    chosen = {name: _choose_copy(copies, weight_map.get(name)) for name, copies in found.items()}
    several = {
        name: (chosen[name].file, *(each.file for each in copies if each is not chosen[name]))
        for name, copies in found.items()
        if len(copies) > 1
    }
    return {tensor.name: tensor for tensor in everything if chosen[tensor.name] is tensor}, several


def _choose_copy(copies: Sequence[TensorInfo], file: str | None) -> TensorInfo:
    named = next((tensor for tensor in copies if tensor.file == file), None)
    if named is None and len({tensor.shape for tensor in copies}) > 1:
        shapes = ", ".join(f"{list(tensor.shape)} in {tensor.file}" for tensor in copies)
        raise ConfigError(
            f"tensor {copies[0].name} has several shapes ({shapes}), and no index says which holds; remove the files "
            "that do not belong to this model"
        )
    return named or copies[-1]


def _list_tensors(index: CheckpointIndex) -> list[Any]:
    return [[tensor.name, tensor.dtype, list(tensor.shape)] for _, tensor in sorted(index.tensors.items())]


def _list_files(files: CheckpointFiles) -> list[Any]:
    return [[file, (files.folder / file).stat().st_size] for file in files.present]


def _without_bookkeeping(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in _BOOKKEEPING}
        return {key: item if key == _KEPT_WHOLE else _without_bookkeeping(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [_without_bookkeeping(item) for item in value]
    return value
