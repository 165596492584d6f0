"""Decides which files of a folder are the checkpoint, as vLLM 0.32 does for the same arguments.

Loader, tools and export all ask this module. The rule is vLLM's (``DefaultModelLoader._prepare_weights``,
default_loader.py, and ``filter_duplicate_safetensors_files``, weight_utils.py); docs/reference/checkpoint-files.md has
it as a table. Reads names and the index, never a weight. Standard library only, because the tools run from a bare
clone.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from stagewire.errors import ConfigError

__all__ = [
    "CONSOLIDATED_INDEX_NAME",
    "INDEX_NAME",
    "LOAD_FORMATS",
    "CheckpointFiles",
    "checkpoint_files",
    "describe_absence",
    "is_mistral",
    "is_partial_download",
    "is_weight",
    "natural_key",
    "read_modules",
]

INDEX_NAME = "model.safetensors.index.json"
CONSOLIDATED_INDEX_NAME = "consolidated.safetensors.index.json"
MODULES_NAME = "modules.json"
_CONSOLIDATED = "consolidated*.safetensors"
# Of weights in any format.
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".npz", ".msgpack", ".h5"),
    *(".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel"),
)
# Unfinished downloads of huggingface_hub, browsers and download tools, and their locks.
_PARTIAL_SUFFIXES = (".incomplete", ".partial", ".part", ".crdownload", ".download", ".aria2", ".tmp", ".lock")
# vLLM's filter_files_not_needed_for_inference.
_TRAINING_FILES = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
# vLLM reads the first of these for a projection layer of sentence-transformers (_load_dense_weights, adapters.py).
_MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DENSE = "Dense"
_TRANSFORMER = "Transformer"
_MAX_NAMED = 3


@dataclass(frozen=True)
class _Format:
    """A load format. ``patterns`` are tried in order; the first one that matches a file is the only one used."""

    patterns: tuple[str, ...]
    index_name: str = INDEX_NAME


_SAFETENSORS = _Format(("*.safetensors",))
_FORMATS = {
    "hf": _Format(("*.safetensors", "*.bin", "*.pt")),
    "safetensors": _SAFETENSORS,
    "fastsafetensors": _SAFETENSORS,
    "instanttensor": _SAFETENSORS,
    "mistral": _Format((_CONSOLIDATED,), CONSOLIDATED_INDEX_NAME),
    "pt": _Format(("*.pt",)),
    "npcache": _Format(("*.bin", "*.pt")),
}
# "auto" means "mistral" or "hf", by the names of the files.
LOAD_FORMATS = ("auto", *_FORMATS)


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint. All names are relative to ``folder``, with ``/``.

    Attributes:
        folder: the model's.
        load_format: one of ``LOAD_FORMATS``, with ``auto`` resolved.
        weights: the files from which vLLM reads the model's tensors, in vLLM's order (numbers by value). Those in
            ``missing`` are included. Empty when the folder holds none.
        is_safetensors: whether ``weights`` are safetensors.
        index_name: the index by which ``weights`` were chosen, ``None`` without one.
        weight_map: tensor name to file, from that index; empty without one.
        missing: the files of ``weights`` that cannot be read, with the reason in words that fit behind a path.
        modules: sub-folders that modules.json of sentence-transformers names.
        module_weights: the files of weights in ``modules``.
        warnings: what is unusual but not wrong, one sentence each.
        ignored: files in ``folder`` that look like weights but are not part of the checkpoint, with the reason.
    """

    folder: Path
    load_format: str
    weights: tuple[str, ...] = ()
    is_safetensors: bool = False
    index_name: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    module_weights: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)

    @property
    def present(self) -> tuple[str, ...]:
        return tuple(file for file in self.weights if file not in self.missing)

    def describe_nothing(self) -> str:
        """Says why ``weights`` has no safetensors, in words that fit behind the folder."""
        found = self.weights[:1] or tuple(self.ignored)[:1]
        reason = self.ignored.get(found[0], "") if found else ""
        example = f" ({found[0]}{f': {reason}' if reason else ''})" if found else ""
        return f"holds no safetensors weights that vLLM reads in load format {self.load_format}{example}"

    def check_complete(self) -> None:
        """Raises ``ConfigError`` if a file is missing. It names the first one and a tensor that belongs in it."""
        for file in self.missing:
            raise self.absence(file)

    def absence(self, file: str, tensor: str | None = None, *, needed_by: str = "") -> ConfigError:
        """The error for one of ``missing``: its path, the tensors that the index places there, what to do."""
        names = sorted(name for name, each in self.weight_map.items() if each == file)
        first = tensor or (names[0] if names else None)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        place = f", where {self.index_name} places tensor {first}{more}" if first else ""
        others = [each for each in self.missing if each != file]
        also = f" (so it is with {len(others)} more: {', '.join(others[:_MAX_NAMED])})" if others else ""
        return ConfigError(
            f"shard {self.folder / file} {self.missing[file]}{place}{also}; {needed_by}"
            "download it again, or copy it here; for a machine that should hold a part of the model only, "
            "`stagewire export` writes that part"
        )


def checkpoint_files(folder: Path, load_format: str = "auto") -> CheckpointFiles:
    """The files of the checkpoint in ``folder``.

    Args:
        folder: a local model folder.
        load_format: vLLM's ``--load-format``. A format that reads no whole checkpoints (``dummy``, ``sharded_state``)
            counts as ``auto``.

    Raises:
        ConfigError: an index or modules.json is malformed or points outside of the folder, or vLLM would take the
            checkpoint for another format than its files have.
    """
    chosen = _resolve_format(folder, load_format)
    names = _root_names(folder)
    modules = read_modules(folder)
    pattern, matched = _match(names, _FORMATS[chosen].patterns)
    common: dict[str, Any] = {"folder": folder, "load_format": chosen, "modules": tuple(modules)}
    common["module_weights"] = tuple(_module_weights(folder, modules))
    warnings = list(_module_warnings(folder, modules))
    if not matched and _is_index_alone(folder, _FORMATS[chosen]):
        pattern = _FORMATS[chosen].patterns[0]  # the index says what is missing
    elif not matched:
        _refuse_consolidated_elsewhere(folder, chosen, load_format)
        return CheckpointFiles(**common, ignored=_ignored(names, (), chosen, None), warnings=tuple(warnings))
    is_safetensors = pattern.endswith(".safetensors")
    if not is_safetensors:
        weights = [name for name in matched if not name.endswith(_TRAINING_FILES)]
        return _finish(common, weights, pattern, names, warnings, is_safetensors=False)
    index_name = _FORMATS[chosen].index_name
    weight_map = _read_weight_map(folder / index_name)
    if weight_map is None:
        if (folder / index_name).is_symlink():
            warnings.append(
                f"{folder / index_name} {describe_absence(folder / index_name)}: every {pattern} in the folder is read "
                "instead, as vLLM does without an index"
            )
        return _finish(common, matched, pattern, names, warnings, is_safetensors=True)
    _check_places(folder / index_name, weight_map)
    weights = list(dict.fromkeys(weight_map.values()))
    found: dict[str, Any] = {"index_name": index_name, "weight_map": weight_map}
    return _finish(common, weights, pattern, names, warnings, is_safetensors=True, **found)


def is_mistral(folder: Path) -> bool:
    """Whether vLLM takes the folder for Mistral's own format: a file in it or in a sub-folder has that name."""
    return next(_consolidated_files(folder), None) is not None


def is_weight(name: str) -> bool:
    """Whether a file has the name of weights, in any format."""
    return name.endswith(_WEIGHT_SUFFIXES)


def is_partial_download(name: str) -> bool:
    return name.endswith(_PARTIAL_SUFFIXES)


def natural_key(file: str) -> tuple[list[str | int], str]:
    """vLLM's order of files: ``model-10`` after ``model-9`` (``_natural_sort_key``, weight_utils.py)."""
    parts = re.split(r"(\d+)", os.path.basename(file))  # every other one is a number
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file


def describe_absence(path: Path) -> str:
    """Says why a file cannot be read, in words that fit behind its path; empty when it can be read."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which does not exist (blob missing: the download is incomplete)"
    if not path.exists():
        return "is missing"
    if path.is_dir():
        return "is a folder, not a file"
    if path.stat().st_size == 0:
        return "is empty (0 bytes: the download is incomplete)"
    return ""


def read_modules(folder: Path) -> dict[str, str]:
    """The modules that modules.json of sentence-transformers names: sub-folder to type, without the model itself.

    Raises ``ConfigError`` for a modules.json that is no list of modules, or that points outside of the folder.
    """
    path = folder / MODULES_NAME
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); is the download complete?") from error
    entries = content.get("modules", []) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path} must be a list of modules with a path and a type, found {content!r:.80}")
    modules = {}
    for entry in entries:
        place = entry.get("path") or ""
        if not isinstance(place, str) or not _is_inside(place):
            raise ConfigError(
                f"{path} places a module in {place!r}; expected a folder inside the model's folder: correct the path, "
                "or remove the entry"
            )
        if (name := PurePosixPath(place).as_posix()) != ".":
            modules[name] = str(entry.get("type") or "")
    return modules


# ---- weights -------------------------------------------------------------------------------------------------------


def _resolve_format(folder: Path, load_format: str) -> str:
    load_format = load_format.lower()
    if load_format in _FORMATS:
        return load_format
    return "mistral" if is_mistral(folder) else "hf"


def _consolidated_files(folder: Path) -> Iterator[str]:
    """vLLM's search: the whole tree with hidden sub-folders, but without broken links."""
    paths = (path for path in sorted(folder.rglob(_CONSOLIDATED)) if path.is_file())
    return (path.relative_to(folder).as_posix() for path in paths)


def _refuse_consolidated_elsewhere(folder: Path, chosen: str, load_format: str) -> None:
    file = next(_consolidated_files(folder), None) if chosen == "mistral" else None
    if file is not None and load_format != "mistral":
        raise ConfigError(
            f"vLLM takes {folder} for a checkpoint in Mistral's format because of {file}, and then finds no "
            f"{_CONSOLIDATED} in the folder itself: give --load-format safetensors to serve the other files, or move "
            f"{file} out of the folder"
        )


def _root_names(folder: Path) -> list[str]:
    """What glob would find directly in the folder: no hidden names, but broken links too."""
    try:
        return sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=natural_key)
    except OSError:
        return []


def _match(names: Sequence[str], patterns: Iterable[str]) -> tuple[str, list[str]]:
    for pattern in patterns:
        if matched := [name for name in names if fnmatch.fnmatchcase(name, pattern)]:
            return pattern, matched
    return "", []


def _is_index_alone(folder: Path, form: _Format) -> bool:
    return form.patterns[0].endswith(".safetensors") and (folder / form.index_name).is_file()


def _finish(
    common: Mapping[str, Any],
    weights: Sequence[str],
    pattern: str,
    names: Sequence[str],
    warnings: Sequence[str],
    *,
    is_safetensors: bool,
    index_name: str | None = None,
    weight_map: Mapping[str, str] | None = None,
) -> CheckpointFiles:
    folder, chosen = common["folder"], common["load_format"]
    ordered = tuple(sorted(weights, key=natural_key))
    absences = {file: describe_absence(folder / file) or _mismatch(file, pattern) for file in ordered}
    return CheckpointFiles(
        **common,
        weights=ordered,
        is_safetensors=is_safetensors,
        index_name=index_name,
        weight_map=weight_map or {},
        missing={file: reason for file, reason in absences.items() if reason},
        warnings=tuple(warnings),
        ignored=_ignored(names, ordered, chosen, index_name),
    )


def _mismatch(file: str, pattern: str) -> str:
    is_found = fnmatch.fnmatchcase(file, pattern) and not file.startswith(".")
    return "" if is_found else f"is none of {pattern}, which is all that vLLM reads here"


def _ignored(names: Sequence[str], weights: Sequence[str], chosen: str, index_name: str | None) -> dict[str, str]:
    others = [name for name in names if name not in weights]
    return {name: _reason(name, chosen, index_name) for name in others if is_weight(name.lower())}


def _reason(name: str, chosen: str, index_name: str | None) -> str:
    if not is_weight(name):
        return "its ending is not in lower case, which vLLM does not look for"
    if name.endswith(_TRAINING_FILES):
        return "left over from training"
    if index_name is not None and name.endswith(".safetensors"):
        return f"{index_name} does not name it"
    return f"not what vLLM reads in load format {chosen}"


def _read_weight_map(path: Path) -> dict[str, str] | None:
    """Tensor name -> shard; ``None`` when there is no index."""
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f'{path} must be a JSON object with a "weight_map" ({error!r}); download it again') from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            f'{path}: "weight_map" must be an object of tensor names and shards, found {weight_map!r:.80}'
        )
    return weight_map


def _check_places(path: Path, weight_map: Mapping[str, object]) -> None:
    seen: set[str] = set()  # thousands of tensors are in a few files
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or (file not in seen and not _is_inside(file)):
            raise ConfigError(f"{path} places tensor {name} in {file!r}; expected a file inside the model's folder")
        if "/" in file:
            raise ConfigError(
                f"{path} places tensor {name} in {file!r}; vLLM takes weights from the folder itself, not from "
                "sub-folders: move the file up, and correct the index"
            )
        seen.add(file)


def _is_inside(place: str) -> bool:
    path = PurePosixPath(place)
    return not path.is_absolute() and ".." not in path.parts


# ---- modules of sentence-transformers ------------------------------------------------------------------------------


def _module_weights(folder: Path, modules: Mapping[str, str]) -> Iterator[str]:
    """The files of weights of each module. A second Transformer is another model, so it is left out."""
    for place, kind in modules.items():
        if kind.rpartition(".")[2] != _TRANSFORMER:
            names = (f"{place}/{name}" for name in _MODULE_WEIGHTS)
            yield from (name for name in names if (folder / name).is_file())


def _module_warnings(folder: Path, modules: Mapping[str, str]) -> Iterator[str]:
    for place, kind in modules.items():
        if kind.rpartition(".")[2] != _DENSE:
            continue
        absent = describe_absence(folder / place / "config.json")
        what = "config.json"
        if not absent and not any(not describe_absence(folder / place / name) for name in _MODULE_WEIGHTS):
            what, absent = _MODULE_WEIGHTS[0], describe_absence(folder / place / _MODULE_WEIGHTS[0])
        if absent:
            yield (
                f"{folder / place / what} {absent}: {MODULES_NAME} names this projection, and vLLM leaves it out "
                "without a word, so that vectors differ from the model's; download the folder again"
            )
