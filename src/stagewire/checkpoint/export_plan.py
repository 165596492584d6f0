"""Plans a pre-split export: every file of every stage, byte for byte, before one is written.

A file is a head of its own bytes followed by pieces of the checkpoint's files. So its size is known beforehand, and the
writer needs memory for one buffer only. Reads headers, directories and samples; writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagewire.checkpoint.files import CheckpointFiles, is_partial_download, is_weight
from stagewire.checkpoint.folder import Checkpoint, read_checkpoint
from stagewire.checkpoint.index import CheckpointIndex, TensorInfo, fingerprint_of, read_metadata
from stagewire.checkpoint.kv_cache import check_kv, read_layout
from stagewire.checkpoint.manifest import MANIFEST_NAME
from stagewire.checkpoint.model_config import LoadFlags, read_config, read_model_shape
from stagewire.checkpoint.ownership import Role, role_of, shares_embedding, stage_tensors
from stagewire.checkpoint.samples import sample_tensors, sample_weights
from stagewire.errors import ConfigError, InternalError
from stagewire.plan.ranges import LayerRange, check_ranges

__all__ = ["ExportPlan", "OutputFile", "Piece", "SourceFile", "TensorSums", "plan_export"]

_HEADER_ALIGNMENT = 8
# model.safetensors.index.json, pytorch_model.bin.index.json, model.safetensors.index.fp32.json
_WEIGHT_INDEX = (".safetensors.index.", ".bin.index.")
# vLLM recognises the load format by these names.
_HF_STEM = "model"
_STEMS = {"mistral": "consolidated"}
# Tokenizers have up to 40 MB. No stage needs larger files that are not weights: `ExportPlan.left_out` names them.
_MAX_COPIED_BYTES = 200_000_000


@dataclass(frozen=True)
class Piece:
    """``num_bytes`` bytes from ``offset`` on in ``file``, a name relative to the model's folder."""

    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class OutputFile:
    """One file of a stage: ``head``, then ``pieces``. ``name`` is relative to the stage's folder."""

    stage: int
    name: str
    head: bytes
    pieces: tuple[Piece, ...] = ()

    @property
    def key(self) -> str:
        return f"stage_{self.stage}/{self.name}"

    @property
    def num_bytes(self) -> int:
        return len(self.head) + sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True)
class SourceFile:
    """One file of the checkpoint, as it was when the plan was made."""

    name: str
    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, model_dir: Path, name: str) -> SourceFile:
        try:
            status = (model_dir / name).stat()
        except OSError as error:
            raise ConfigError(f"{model_dir / name} cannot be read ({error.strerror})") from error
        return cls(name, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class TensorSums:
    """Tensor bytes of each stage, and the tensors because of which their sum differs from the checkpoint's."""

    checkpoint_bytes: int
    stage_bytes: tuple[int, ...]
    twice: tuple[TensorInfo, ...]  # on the first and the last stage: the embedding, if it is also the head
    everywhere: tuple[TensorInfo, ...]  # on every stage: tensors of unknown role
    nowhere: tuple[TensorInfo, ...] = ()  # on no stage: layers that only draft

    def check(self) -> None:
        """Raises ``InternalError`` unless the stages' sums equal what the checkpoint and these tensors give."""
        again = sum(tensor.num_bytes for tensor in self.twice)
        again += sum(tensor.num_bytes for tensor in self.everywhere) * (len(self.stage_bytes) - 1)
        left_out = sum(tensor.num_bytes for tensor in self.nowhere)
        if sum(self.stage_bytes) != self.checkpoint_bytes - left_out + again:
            raise InternalError(
                f"the stages hold {sum(self.stage_bytes)} bytes of tensors, expected {self.checkpoint_bytes} of the "
                f"checkpoint, less {left_out} that no stage builds, and {again} that several stages need"
            )


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export writes.

    ``files`` are in the order of writing. ``left_out`` are files of the checkpoint that are too large to be copied.
    ``source_samples`` and ``stage_samples`` (one per stage) go into the manifests. ``warnings`` are the checkpoint's.
    """

    model_dir: Path
    ranges: tuple[LayerRange, ...]
    num_layers: int
    source_fingerprint: str
    source_samples: str
    stage_samples: tuple[str, ...]
    sources: Mapping[str, SourceFile]
    files: tuple[OutputFile, ...]
    sums: TensorSums
    left_out: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def layout(self) -> str:
        """A digest of names, heads and pieces. An unfinished export continues only with the same layout."""
        digest = hashlib.sha256()
        for file in self.files:
            pieces = [[piece.file, piece.offset, piece.num_bytes] for piece in file.pieces]
            digest.update(json.dumps([file.key, hashlib.sha256(file.head).hexdigest(), pieces]).encode())
        return digest.hexdigest()


def plan_export(
    model_dir: Path, choose_ranges: Callable[[int], Sequence[LayerRange]], flags: LoadFlags | None = None
) -> ExportPlan:
    """Plans the export of a checkpoint. ``choose_ranges`` gets the model's depth and returns one range per stage.

    Raises ``ConfigError`` as ``read_checkpoint`` does, for a checkpoint without safetensors, for a folder that is a
    pre-split stage itself, and for ranges that do not cover the model over at least two stages or that vLLM cannot run
    (``check_kv``).
    """
    shape = read_model_shape(model_dir, flags)
    if (model_dir / MANIFEST_NAME).exists():
        raise ConfigError(
            f"{model_dir} is a pre-split stage itself ({MANIFEST_NAME} is in it): export from the full checkpoint"
        )
    ranges = tuple(choose_ranges(shape.num_layers))
    check_ranges(ranges, shape.num_layers)
    check_kv(read_layout(read_config(model_dir, flags)), ranges)
    if len(ranges) < 2:
        raise ConfigError("1 stage: a pipeline has at least 2; one process serves the full checkpoint, as it is")
    checkpoint = read_checkpoint(model_dir, flags)
    index = _safetensors_of(checkpoint)
    others, left_out = _other_files(checkpoint.files)
    tensors = [stage_tensors(index, shape, layers) for layers in ranges]
    sums = _sum_up(checkpoint, index, tensors)
    sums.check()
    copies = [(name, Piece(name, 0, source.num_bytes)) for name, source in others.items()]
    stages = [_stage_files(checkpoint.files, stage, own, copies) for stage, own in enumerate(tensors)]
    shards = {tensor.file for tensor in index.tensors.values()}
    return ExportPlan(
        model_dir=model_dir,
        ranges=ranges,
        num_layers=shape.num_layers,
        source_fingerprint=fingerprint_of(checkpoint.files, index, flags),
        source_samples=sample_weights(checkpoint.files, index).digest,
        stage_samples=tuple(sample_tensors(checkpoint.files, own).digest for own in tensors),
        sources=others | {name: SourceFile.of(model_dir, name) for name in sorted(shards)},
        files=tuple(file for files in stages for file in files),
        sums=sums,
        left_out=tuple(left_out),
        warnings=checkpoint.warnings,
    )


def _safetensors_of(checkpoint: Checkpoint) -> CheckpointIndex:
    if checkpoint.index is None:
        raise ConfigError(
            f"{checkpoint.folder} {checkpoint.files.describe_nothing()}: other formats (.bin, .pt) are pickles, which "
            "cannot be cut without executing what is in them; convert the checkpoint first, for instance with "
            "transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return checkpoint.index


def _sum_up(checkpoint: Checkpoint, index: CheckpointIndex, stages: Sequence[Sequence[TensorInfo]]) -> TensorSums:
    is_shared = shares_embedding(index, checkpoint.shape)
    tensors = index.tensors.values()
    return TensorSums(
        checkpoint_bytes=index.total_bytes,
        stage_bytes=tuple(sum(tensor.num_bytes for tensor in own) for own in stages),
        twice=tuple(tensor for tensor in tensors if is_shared and role_of(tensor.name) is Role.EMBEDDING),
        everywhere=tuple(tensor for tensor in tensors if role_of(tensor.name) is Role.UNKNOWN),
        nowhere=checkpoint.unbuilt,
    )


# ---- what is copied whole ------------------------------------------------------------------------------------------


def _other_files(files: CheckpointFiles) -> tuple[dict[str, SourceFile], list[str]]:
    """The files that are copied, by name, and the names of those that are too large.

    Copied are tokenizer, templates, custom code and the projections of sentence-transformers, but no other weights, no
    hidden files and no unfinished downloads.
    """
    copied: dict[str, SourceFile] = {}
    left_out: list[str] = []
    for name in sorted({*_walk(files.folder, files.modules), *files.module_weights}):
        if name not in files.module_weights and not _is_copied(name):
            continue
        source = SourceFile.of(files.folder, name)
        if source.num_bytes > _MAX_COPIED_BYTES and name not in files.module_weights:
            left_out.append(name)
        else:
            copied[name] = source
    return copied, left_out


def _is_copied(name: str) -> bool:
    return not (is_weight(name) or is_partial_download(name) or any(part in name for part in _WEIGHT_INDEX))


def _walk(model_dir: Path, modules: Sequence[str]) -> Iterator[str]:
    """Files below the folder. Links to files are included, because a hub's cache consists of them.

    Links to folders are followed only if modules.json names them.
    """
    tops = [model_dir, *(model_dir / place for place in modules if (model_dir / place).is_symlink())]
    for folder, folders, names in (entry for top in tops for entry in os.walk(top)):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for name in names:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(model_dir).as_posix()


# ---- a stage's files -----------------------------------------------------------------------------------------------


def _stage_files(
    source: CheckpointFiles, stage: int, tensors: Sequence[TensorInfo], copies: Sequence[tuple[str, Piece]]
) -> Iterator[OutputFile]:
    """The small files first. Then one file of weights for each of the checkpoint's that holds some of the stage's."""
    if not tensors:
        raise ConfigError(
            f"stage {stage} would own no tensor at all: are the layers named as config.json counts them? "
            "Such a checkpoint cannot be cut"
        )
    for name, piece in copies:
        yield OutputFile(stage, name, b"", (piece,))
    by_source: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        by_source.setdefault(tensor.file, []).append(tensor)
    stem = _STEMS.get(source.load_format, _HF_STEM)
    names = _shard_names(stem, len(by_source))
    if len(names) > 1:
        yield OutputFile(stage, f"{stem}.safetensors.index.json", _index_of(by_source, names))
    for name, (file, own) in zip(names, by_source.items(), strict=True):
        yield _shard(stage, name, read_metadata(source.folder / file), own)


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _index_of(by_source: Mapping[str, Sequence[TensorInfo]], names: Sequence[str]) -> bytes:
    """The index of a stage's weights, as `save_pretrained` writes it."""
    total = sum(tensor.num_bytes for tensors in by_source.values() for tensor in tensors)
    weight_map = {
        tensor.name: name for name, tensors in zip(names, by_source.values(), strict=True) for tensor in tensors
    }
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _shard(stage: int, name: str, metadata: Mapping[str, str], tensors: Sequence[TensorInfo]) -> OutputFile:
    """A safetensors file: 8 bytes length, JSON padded to 8 bytes, the data without gaps.

    The widest types come first, as the library writes them. So each tensor is aligned in a mapped file, whatever
    tensors were left out before it. Within one width, the checkpoint's order stays.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_element_bytes(tensor), tensor.offset))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for tensor in ordered:
        end = begin + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    pieces = tuple(Piece(tensor.file, tensor.offset, tensor.num_bytes) for tensor in ordered)
    return OutputFile(stage, name, len(text).to_bytes(8, "little") + text, pieces)


def _element_bytes(tensor: TensorInfo) -> float:
    count = math.prod(tensor.shape)
    return tensor.num_bytes / count if count else 0
