"""Reads a model's folder once, as vLLM would serve it: configuration, files, tensors, and warnings about them.

`stagewire plan`, the validator, the export and a stage's start all use this module, so they agree on a folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagewire.checkpoint.files import CheckpointFiles, checkpoint_files
from stagewire.checkpoint.index import CheckpointIndex, TensorInfo, read_tensors
from stagewire.checkpoint.manifest import MANIFEST_NAME
from stagewire.checkpoint.model_config import LoadFlags, ModelShape, config_path, read_config, shape_of
from stagewire.checkpoint.ownership import Role, check_absent, is_built, is_lm_head, owns, role_of, shares_embedding
from stagewire.plan.ranges import LayerRange

__all__ = ["Checkpoint", "read_checkpoint"]

_MAX_NAMED = 3
# Older AWQ and GPTQ checkpoints have these instead of quantization_config. vLLM reads them only with --quantization.
_OLD_QUANTIZATION = ("quant_config.json", "quantize_config.json")
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Checkpoint:
    """One model's folder. ``index`` is ``None`` without safetensors.

    ``quantization_file``: one of ``_OLD_QUANTIZATION``, if config.json describes no quantization. ``warnings``: one
    sentence each.
    """

    folder: Path
    config_name: str
    config: Mapping[str, Any]
    shape: ModelShape
    files: CheckpointFiles
    index: CheckpointIndex | None
    quantization_file: str | None
    warnings: tuple[str, ...]

    @property
    def unbuilt(self) -> tuple[TensorInfo, ...]:
        """The tensors that vLLM's model of this depth does not have (layers that only draft). No stage reads them."""
        tensors = self.index.tensors.values() if self.index else ()
        return tuple(tensor for tensor in tensors if not is_built(tensor.name, self.shape.num_layers))


def read_checkpoint(folder: Path, flags: LoadFlags | None = None, *, layers: LayerRange | None = None) -> Checkpoint:
    """Everything about ``folder`` that headers and configuration say.

    Args:
        folder: a local model folder.
        flags: vLLM's arguments about reading it.
        layers: of one stage. Then only the files with tensors of this stage have to be there.

    Raises:
        ConfigError: as ``read_config``, ``checkpoint_files`` and ``read_index`` do, and for an index that places
            tensors that the model needs in files that do not hold them (``check_absent``).
    """
    flags = flags or LoadFlags()
    config, path = read_config(folder, flags), config_path(folder, flags)
    shape = shape_of(config, path)
    files = checkpoint_files(folder, flags.load_format)
    if layers is not None and files.weight_map:
        _check_own(files, shape, layers)
    index = read_tensors(files, is_part=layers is not None and bool(files.weight_map))
    if index is not None:
        check_absent(index, shape, files)
    old = None if config.get("quantization_config") else _old_quantization(folder)
    warnings = (*files.warnings, *_describe_odd(files, shape, index, old))
    return Checkpoint(folder, path.name, config, shape, files, index, old, warnings)


def _check_own(files: CheckpointFiles, shape: ModelShape, layers: LayerRange) -> None:
    is_tied = shape.tie_word_embeddings and not any(map(is_lm_head, files.weight_map))
    for name, file in files.weight_map.items():
        if file in files.missing and owns(name, layers, shape.num_layers, shared_embedding=is_tied):
            raise files.absence(file, name, needed_by=f"the stage with layers {layers} needs it: ")


def _old_quantization(folder: Path) -> str | None:
    return next((name for name in _OLD_QUANTIZATION if (folder / name).is_file()), None)


def _describe_odd(
    files: CheckpointFiles, shape: ModelShape, index: CheckpointIndex | None, quantization_file: str | None
) -> Iterator[str]:
    if quantization_file is not None:
        yield (
            f"{files.folder / quantization_file} says how the weights are quantized and config.json does not: vLLM "
            "looks there only when the method is given (--quantization awq, gptq)"
        )
    if index is None:
        return
    if files.missing:
        yield (
            f"{files.folder} holds {len(files.present)} of the checkpoint's {len(files.weights)} files, among them all "
            "that this stage needs: whether the other stages' files are of the same model cannot be told here"
        )
    yield from _describe_format(files)
    yield from _describe_copies(files, index)
    if not files.missing and not (files.folder / MANIFEST_NAME).is_file():  # a part of a model may have no head
        yield from _describe_head(files, shape, index)


def _describe_format(files: CheckpointFiles) -> Iterator[str]:
    others = [name for name in files.ignored if name.endswith(".safetensors")]
    if files.load_format == "mistral" and others:
        yield (
            f"{files.folder}: because of {files.weights[0]} vLLM reads the weights in Mistral's format and leaves out "
            f"{_some(others)}; give --load-format hf to read those"
        )


def _describe_copies(files: CheckpointFiles, index: CheckpointIndex) -> Iterator[str]:
    """Warns of tensors in several files. vLLM's own loader would read the last copy."""
    odd = [(name, copies) for name, copies in index.copies.items() if name not in files.weight_map]
    stale = [(name, copies) for name, copies in index.copies.items() if name in files.weight_map]
    for found, why in ((odd, "vLLM's order of files"), (stale, str(files.index_name))):
        if found:
            name, copies = found[0]
            yield (
                f"{files.folder}: tensor {name} is in {', '.join(sorted(copies))}, and by {why} the one in {copies[0]} "
                f"counts{f' (so it is with {len(found) - 1} more)' if len(found) > 1 else ''}; remove the other copies"
            )


def _describe_head(files: CheckpointFiles, shape: ModelShape, index: CheckpointIndex) -> Iterator[str]:
    generates = any(name.endswith(_GENERATING) for name in shape.architectures) and not files.modules
    has_head = any(role_of(name) is Role.HEAD for name in index.tensors)
    if generates and shape.is_untied and not has_head:
        yield (
            f"{files.folder}: the configuration says that the head is not the embedding (tie_word_embeddings false), "
            "and no file holds a head: vLLM refuses that when it loads the last stage; is a file missing, or does "
            """--hf-overrides '{"tie_word_embeddings": true}' hold?"""
        )
    if shape.tie_word_embeddings and index.unreadable:
        yield (
            f"{files.folder}: {_some(index.unreadable)} is no part of the checkpoint, and vLLM reads its header all "
            "the same when the head may be the embedding, and fails because there is none: remove the file"
        )
    if shape.tie_word_embeddings and not shares_embedding(index, shape) and not has_head:
        yield (
            f"{files.folder}: a file that the checkpoint does not consist of holds lm_head.weight, which makes vLLM "
            "look for a head that the checkpoint does not hold: remove that file"
        )


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
