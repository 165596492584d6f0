"""The tensors of a checkpoint, from its safetensors headers: names, types, sizes, files. Never a byte of a weight.

Sizes are checked before memory is taken, and every header against its file's length, so that a download that was cut
short is refused here, before any stage starts to load.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from stagewire.checkpoint.model_config import read_config
from stagewire.errors import ConfigError

__all__ = ["INDEX_NAME", "CheckpointIndex", "TensorInfo", "fingerprint", "read_files", "read_index", "read_metadata"]

INDEX_NAME = "model.safetensors.index.json"
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
_WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".gguf", ".npz", ".msgpack", ".h5")
# Who saved it, with what, from where. The dtype is among them because the tensors carry their own, the key was renamed
# in transformers 5, and the handshake compares the dtype that is served.
_SAVED_BY = ("_name_or_path", "_model_name_or_path", "_commit_hash", "_attn_implementation_autoset")
_BOOKKEEPING = frozenset((*_SAVED_BY, "transformers_version", "use_cache", "dtype", "torch_dtype"))
# Here a dtype is part of the format.
_KEPT_WHOLE = "quantization_config"
_FINGERPRINT_DIGITS = 16


@dataclass(frozen=True)
class TensorInfo:
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

    ``total_bytes`` is of the weights alone, ``header_bytes`` what was read of the files to know that.
    """

    tensors: Mapping[str, TensorInfo]
    total_bytes: int
    header_bytes: int


def read_index(model_dir: Path) -> CheckpointIndex | None:
    """The tensors of every shard that model.safetensors.index.json names, or of every *.safetensors without one.

    ``None`` when the folder holds no safetensors at all. Raises ``ConfigError``, naming file and tensor, for a shard
    that is missing, malformed or cut short, and for a tensor that its shard lacks or that two files hold.
    """
    weight_map = _read_weight_map(model_dir / INDEX_NAME)
    _check_present(model_dir, weight_map)
    files = sorted(set(weight_map.values())) or sorted(path.name for path in model_dir.glob("*.safetensors"))
    if not files:
        return None
    return _read_shards(model_dir, files, weight_map)


def read_files(folder: Path, files: Sequence[str]) -> CheckpointIndex:
    """The tensors of these safetensors files (names relative to ``folder``), whatever an index says of them.

    Raises ``ConfigError`` as ``read_index`` does, also for a tensor that two of the files hold.
    """
    return _read_shards(folder, files, {})


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself (``{"format": "pt"}``), empty if nothing. Raises as ``read_index``."""
    metadata = _read_header(path)[0].get("__metadata__")
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def fingerprint(model_dir: Path) -> str:
    """16 hexadecimal digits that are equal exactly when two folders hold the same model, as far as headers tell.

    Hashed are config.json without the fields that do not change the model, and the sorted (name, dtype, shape) of
    every tensor: not the files they are in, so that a copy with other shards matches. Without safetensors, the sorted
    names and sizes of the weight files instead. Nothing of the weights themselves is read: a fine-tuned copy has its
    base model's fingerprint. Raises ``ConfigError`` as ``read_model_shape`` and ``read_index`` do.
    """
    index = read_index(model_dir)
    weights = _list_files(model_dir) if index is None else _list_tensors(index)
    content = {"config": _without_bookkeeping(read_config(model_dir)), "weights": weights}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_DIGITS]


def _read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard; empty when there is no index."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f'{path} must be a JSON object with a "weight_map" ({error!r}); download it again') from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            f'{path}: "weight_map" must be an object of tensor names and shards, found {weight_map!r:.80}'
        )
    for name, file in weight_map.items():
        if not _is_plain_path(file):
            raise ConfigError(f"{path} places tensor {name} in {file!r}; expected a file inside the model's folder")
    return weight_map


def _check_present(model_dir: Path, weight_map: Mapping[str, str]) -> None:
    for file in sorted(set(weight_map.values())):
        if not (model_dir / file).is_file():
            names = sorted(name for name, each in weight_map.items() if each == file)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(
                f"shard {model_dir / file} is missing, where {INDEX_NAME} places tensor {names[0]}{more}; "
                "is the download complete, or was the file renamed?"
            )


def _is_plain_path(file: object) -> bool:
    if not isinstance(file, str) or not file:
        return False
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts


def _read_shards(model_dir: Path, files: Sequence[str], weight_map: Mapping[str, str]) -> CheckpointIndex:
    shards, header_bytes = [], 0
    for file in files:
        shard, begins_at = _read_shard(model_dir, file)
        shards.append(shard)
        header_bytes += begins_at
    tensors = _merge_shards(shards, weight_map)
    _check_weight_map(weight_map, tensors, model_dir)
    return CheckpointIndex(tensors, sum(tensor.num_bytes for tensor in tensors.values()), header_bytes)


def _read_shard(model_dir: Path, file: str) -> tuple[list[TensorInfo], int]:
    """The tensors of one file by their place in it, and where its data begins."""
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
        # Unbuffered, and without the system's reading ahead, which would fetch weights that nobody asked for.
        with path.open("rb", buffering=0) as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            _check_header_length(path, length, file_bytes)
            header = json.loads(_read_exactly(stream, length))
    except FileNotFoundError as error:
        raise ConfigError(f"shard {path} is missing; is the download complete?") from error
    except ConfigError:  # it is a ValueError too, as which it would be caught below
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} has no readable safetensors header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: the safetensors header must be a JSON object, found {type(header).__name__}")
    return header, _LENGTH_BYTES + length, file_bytes


def _read_exactly(stream: IO[bytes], length: int) -> bytes:
    """An unbuffered read may return less than was asked for."""
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
    """``begins_at``: where the file's data begins, which the header's offsets count from."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: tensor {name} needs dtype, shape and data_offsets, found {entry!r:.120}") from error
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers) or begin > end:
        raise ConfigError(f"{path}: tensor {name} has a malformed entry: {entry!r:.120}")
    bits = _DTYPE_BITS.get(dtype)
    if bits is not None and (math.prod(shape) * bits + 7) // 8 != end - begin:
        raise ConfigError(f"{path}: tensor {name} of shape {shape} and type {dtype} cannot have {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), end - begin, file, begins_at + begin)


def _merge_shards(shards: list[list[TensorInfo]], weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    """By name. A name that two files hold is the one the index points at; tensors it does not list are kept."""
    tensors: dict[str, TensorInfo] = {}
    for tensor in (tensor for shard in shards for tensor in shard):
        other = tensors.get(tensor.name)
        if other is not None and tensor.name not in weight_map:
            raise ConfigError(
                f"tensor {tensor.name} is in {other.file} and in {tensor.file}, and no {INDEX_NAME} says which holds; "
                "remove the copy that does not belong to this model"
            )
        if weight_map.get(tensor.name, tensor.file) == tensor.file:
            tensors[tensor.name] = tensor
    return tensors


def _check_weight_map(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], model_dir: Path) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise ConfigError(
                f"{INDEX_NAME} says that tensor {name} is in {model_dir / file}, which does not hold it; "
                "the index and the shards are of different checkpoints: download both again"
            )


def _list_tensors(index: CheckpointIndex) -> list[Any]:
    return [[tensor.name, tensor.dtype, list(tensor.shape)] for _, tensor in sorted(index.tensors.items())]


def _list_files(model_dir: Path) -> list[Any]:
    paths = sorted(path for path in model_dir.glob("*") if path.suffix in _WEIGHT_SUFFIXES)
    return [[path.name, path.stat().st_size] for path in paths]


def _without_bookkeeping(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in _BOOKKEEPING}
        return {key: item if key == _KEPT_WHOLE else _without_bookkeeping(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [_without_bookkeeping(item) for item in value]
    return value
