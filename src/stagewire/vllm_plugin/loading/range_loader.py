"""Loads the tensors that a stage owns and reads no others, whatever files they lie in.

A subclass of vLLM's default loader: what a model asks for besides its folder (secondary weights, patterns of its own)
and the check that every parameter was initialised stay vLLM's. checkpoint/files.py says which files of a folder are the
model, by vLLM's rule. External mode chooses this loader (entry/external_mode.py). Load formats that do not read whole
checkpoints are left alone.
"""

from __future__ import annotations

import contextlib
import copy
import mmap
import os
import sys
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.transformers_utils.repo_utils import is_mistral_model_repo

from stagewire.checkpoint import hub
from stagewire.checkpoint.files import CONSOLIDATED_INDEX_NAME, INDEX_NAME, CheckpointFiles, checkpoint_files
from stagewire.checkpoint.index import TensorInfo, read_files, read_tensors
from stagewire.checkpoint.manifest import read_manifest
from stagewire.checkpoint.ownership import Role, layer_of, owns, role_of
from stagewire.checkpoint.reader import TensorReader
from stagewire.config import StageConfig
from stagewire.errors import ConfigError
from stagewire.observe.status_events import Phase, StatusSender
from stagewire.vllm_plugin.loading.load_formats import OWN_LOAD_FORMATS, asked_load_format
from stagewire.vllm_plugin.loading.presplit import drop_absent
from stagewire.vllm_plugin.seams import interfaces
from stagewire.vllm_plugin.seams.settings import RingSettings
from stagewire.vllm_plugin.seams.tied_heads import heads_without_embedding, load_head

__all__ = ["RangeLoader", "register"]

NEWS_INTERVAL_S = 0.5
# Smaller buffers cost little.
REUSED_BYTES = 1 << 20

_DTYPES = {
    "BOOL": torch.bool,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


def register() -> None:
    """In the process that loads: vLLM's table of loaders is per process."""
    from vllm.model_executor import model_loader

    for load_format in OWN_LOAD_FORMATS.values():
        if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(load_format) is not RangeLoader:
            register_model_loader(load_format)(RangeLoader)


class _Found(NamedTuple):
    """Names of files relative to ``folder``; ``weight_map``: which of them a tensor comes from, where an index says."""

    folder: Path
    files: Sequence[str]
    is_safetensors: bool
    weight_map: Mapping[str, str]


class RangeLoader(DefaultModelLoader):
    """See the module."""

    def __init__(self, load_config: LoadConfig) -> None:
        # What vLLM decides by load format is decided as for the one that was asked for.
        load_config = copy.copy(load_config)
        load_config.load_format = asked_load_format(str(load_config.load_format))
        super().__init__(load_config)
        self._stage: StageConfig | None = None
        self._own: _Ownership | None = None
        self._heads: list[nn.Module] = []
        self._progress: _Progress | None = None

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self._stage = RingSettings.read(get_current_vllm_config())
        if os.path.isdir(model_config.model):
            self._drop_absent(self._stage, model, model_config)
        self._own = _Ownership(self._stage, model, model_config)
        self._heads = heads_without_embedding(model)
        self._progress = _Progress(self._stage)
        self.counter_before_loading_weights = time.perf_counter()
        super().load_weights(model, model_config)
        self._progress.report()

    def _drop_absent(self, stage: StageConfig, model: nn.Module, model_config: ModelConfig) -> None:
        """From a folder with a part of the model only, what vLLM builds of other stages' is taken out."""
        files = checkpoint_files(Path(model_config.model), str(self.load_config.load_format))
        if not files.missing and read_manifest(files.folder) is None:
            return
        index = read_tensors(files, is_part=True)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        names = list(index.tensors) if index else []
        mapped = [mapped for name in names if (mapped := interfaces.mapped_name(mapper, name)) is not None]
        num_layers = model_config.get_total_num_hidden_layers()
        drop_absent(model, stage, num_layers, is_tied=_is_tied(model_config), present=mapped)

    def _find(self, source: DefaultModelLoader.Source) -> _Found:
        """The files of a folder by our own rule, of a hub's repository those with own tensors, of others vLLM's."""
        path = source.model_or_path
        is_whole = source.allow_patterns_overrides is None
        if is_whole and source.subfolder is None and os.path.isdir(path):
            return self._find_own(checkpoint_files(Path(path), str(self.load_config.load_format)))
        if is_whole and not os.path.isdir(path):
            found = self._download_own(source)
            if found is not None:
                return found
        folder, files, is_safetensors, *_ = self._prepare_weights(
            path, source.subfolder, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
        )
        return _Found(Path(folder), [os.path.relpath(file, folder) for file in files], is_safetensors, {})

    def _find_own(self, files: CheckpointFiles) -> _Found:
        assert self._own is not None
        absent = [name for name, file in files.weight_map.items() if file in files.missing]
        for name in self._own.choose_names(absent):
            raise files.absence(files.weight_map[name], name, needed_by="this stage needs it: ")
        return _Found(files.folder, files.present, files.is_safetensors, files.weight_map)

    def _download_own(self, source: DefaultModelLoader.Source) -> _Found | None:
        """``None`` for a repository without an index of the format that vLLM would load."""
        assert self._own is not None
        load_format = str(self.load_config.load_format)
        if load_format == "auto" and is_mistral_model_repo(source.model_or_path, revision=source.revision):
            load_format = "mistral"
        found = hub.download_own(
            source.model_or_path,
            source.revision,
            source.subfolder,
            self.load_config.download_dir,
            self._own.choose_names,
            CONSOLIDATED_INDEX_NAME if load_format == "mistral" else INDEX_NAME,
        )
        return None if found is None else _Found(found[0], sorted(set(found[1].values())), True, found[1])

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """``source``'s own tensors. A checkpoint without safetensors is read by vLLM, whole."""
        assert self._progress is not None
        found = self._find(source)
        if not found.is_safetensors or self.load_config.safetensors_load_strategy == "torchao":
            kind = "torchao's own format" if found.is_safetensors else "not safetensors"
            self._progress.say(f"{source.model_or_path} is {kind}: vLLM's own loader reads it, and reads all of it")
            whole: Generator[tuple[str, torch.Tensor], None, None] = super()._get_weights_iterator(source)
            return whole
        return self._read_own(source, found)

    def _read_own(
        self, source: DefaultModelLoader.Source, found: _Found
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        assert self._own is not None
        assert self._progress is not None
        folder = found.folder
        placed = {name: file for name, file in found.weight_map.items() if file in found.files}
        index = read_files(folder, found.files, placed)
        chosen = self._own.choose(index.tensors.values(), source.prefix)
        is_unused = getattr(source, "is_unused_weight", None)  # since vLLM 0.32
        if is_unused is not None:
            chosen = [tensor for tensor in chosen if not is_unused(tensor.name)]
        for tensor in chosen:
            _dtype_of(tensor, folder)
        memory = _Memory(sum(tensor.num_bytes for tensor in chosen))
        reader = TensorReader(folder, chosen, memory.take, self._progress.advance)
        self._progress.begin(chosen, index.header_bytes)
        for tensor, buffer in reader:
            loaded = _as_torch(tensor, buffer, folder)
            if self._heads and role_of(tensor.name) is Role.EMBEDDING:
                for head in self._heads:
                    load_head(head, loaded)
            yield source.prefix + tensor.name, loaded
            del buffer, loaded


def _is_tied(model_config: ModelConfig) -> bool:
    """As vLLM resolved it, after its own look at the checkpoint (maybe_untie_word_embeddings)."""
    configs = (model_config.hf_config, model_config.hf_text_config)
    return any(getattr(config, "tie_word_embeddings", False) for config in configs)


class _Ownership:
    """Which tensors this stage reads.

    The table of checkpoint/ownership.py decides by name. What it gives to another stage and is in no layer is read all
    the same when this stage's model has built it: some models keep embeddings on every stage.
    """

    def __init__(self, stage: StageConfig, model: nn.Module, model_config: ModelConfig) -> None:
        self._layers = stage.layers
        self._num_layers = model_config.get_total_num_hidden_layers()
        self._is_tied = _is_tied(model_config)
        self._built = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        self._built |= {name.rpartition(".")[0] for name, _ in model.named_buffers()}
        self._mapper = getattr(model, "hf_to_vllm_mapper", None)

    def choose(self, tensors: Iterable[TensorInfo], prefix: str) -> list[TensorInfo]:
        tensors = list(tensors)
        names = set(self.choose_names([prefix + tensor.name for tensor in tensors]))
        return [tensor for tensor in tensors if prefix + tensor.name in names]

    def choose_names(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._is_own(name)]

    def _is_own(self, name: str) -> bool:
        if owns(name, self._layers, self._num_layers, shared_embedding=self._is_tied):
            return True
        layer = layer_of(name)
        return (layer is None or layer >= self._num_layers) and self._is_built(name)

    def _is_built(self, name: str) -> bool:
        mapped = interfaces.mapped_name(self._mapper, name)
        if mapped is None:
            return False
        module = mapped.rpartition(".")[0]
        return any(built == module or built.endswith(f".{module}") for built in self._built)


class _Progress:
    """Says how far loading is, to whoever started this stage, and at the end what was read. Only rank 0 speaks."""

    def __init__(self, stage: StageConfig) -> None:
        self._stage = stage
        self._is_speaker = get_tensor_model_parallel_rank() == 0
        self._status = StatusSender(stage.stage)
        self._began_at = time.perf_counter()
        self._said_at = 0.0
        self._num_tensors = 0
        self._own_bytes = 0
        self._header_bytes = 0
        self._done_bytes = 0
        self._lock = threading.Lock()  # several threads read

    def say(self, text: str) -> None:
        if not self._is_speaker:
            return
        sys.stdout.write(f"Stage {self._stage.stage}: {text}\n")
        sys.stdout.flush()

    def begin(self, tensors: Sequence[TensorInfo], header_bytes: int) -> None:
        self._num_tensors += len(tensors)
        self._own_bytes += sum(tensor.num_bytes for tensor in tensors)
        self._header_bytes += header_bytes

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done_bytes += num_bytes
            now = time.perf_counter()
            if self._is_speaker and now - self._said_at >= NEWS_INTERVAL_S:
                self._said_at = now
                done, own = self._done_bytes, self._own_bytes
                text = f"{self._stage.layers.describe()}: {done / 1e9:.2f} of {own / 1e9:.2f} GB"
                self._status.advance(Phase.LOADING, text, done, own)

    def report(self) -> None:
        """Nothing when vLLM's own loading read it: what that read is not known here."""
        if not self._own_bytes:
            return
        took_s = time.perf_counter() - self._began_at
        share = (self._done_bytes + self._header_bytes) / self._own_bytes
        self.say(
            f"loaded {self._stage.layers.describe()}: {self._num_tensors} tensors, {self._done_bytes / 1e9:.2f} GB "
            f"read in {took_s:.1f} s ({share:.0%} of own bytes)"
        )


class _Memory:
    """Where tensors lie on their way into parameters.

    Fresh memory costs more than reading into it, so what no tensor refers to any more is used again; in huge pages,
    where the system has them. Spare memory is never more than what is still to be read, so that a loading stage never
    holds more than its weights and the tensor at hand.

    Args:
        num_bytes: of all tensors to come.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left_bytes = num_bytes
        self._buffers: list[mmap.mmap] = []

    def take(self, num_bytes: int) -> memoryview:
        self._left_bytes -= num_bytes
        buffer = self._find(num_bytes)
        self._release(buffer)
        return memoryview(buffer)[:num_bytes]

    def _find(self, num_bytes: int) -> mmap.mmap:
        for buffer in self._buffers:
            if num_bytes <= len(buffer) <= 2 * num_bytes and _is_free(buffer):
                return buffer
        buffer = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
        if num_bytes >= REUSED_BYTES:
            self._buffers.append(buffer)
        return buffer

    def _release(self, taken: mmap.mmap) -> None:
        """Gives back spare memory, the oldest first, until no more of it is left than bytes to read."""
        spare_bytes = sum(map(len, self._buffers))
        for buffer in self._buffers[:]:
            if spare_bytes > self._left_bytes and buffer is not taken:
                self._buffers.remove(buffer)
                spare_bytes -= len(buffer)


def _is_free(buffer: mmap.mmap) -> bool:
    """Whether nobody has a view of this memory. A tensor on it has one, and keeps it for all that share its storage.

    Python refuses to resize memory that somebody has a view of. Resizing to the same size changes nothing.
    """
    try:
        buffer.resize(len(buffer))
    except BufferError:
        return False
    return True


def _as_torch(tensor: TensorInfo, buffer: memoryview, folder: Path) -> torch.Tensor:
    """Shares the buffer's memory. # [*tensor.shape]"""
    dtype = _dtype_of(tensor, folder)
    if not tensor.num_bytes:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(tensor.shape)


def _dtype_of(tensor: TensorInfo, folder: Path) -> Any:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ConfigError(
            f"{folder / tensor.file}: tensor {tensor.name} is of type {tensor.dtype}, which has no torch type here "
            f"(known: {', '.join(sorted(_DTYPES))}); give --load-format auto to read it with vLLM's own loader"
        )
    return dtype
