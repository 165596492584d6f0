"""The memory that a stage needs: weights, and KV cache per token. Computed from headers and config.json; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from stagewire.checkpoint.index import CheckpointIndex, TensorInfo
from stagewire.checkpoint.kv_cache import Kind, KvLayout
from stagewire.checkpoint.model_config import ModelShape, language_settings
from stagewire.checkpoint.ownership import layer_of, owns, shares_embedding
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange

__all__ = [
    "DTYPES",
    "KV_CACHE_DTYPES",
    "Dtype",
    "Footprint",
    "is_quantized",
    "kv_cache_dtype",
    "measure",
    "served_dtype",
]

_ITEM_BYTES = {"half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4, "fp8": 1}
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
# The names in vLLM's CacheDType with one fixed size per element. The others add scales to each head or token.
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_CAST_WITH_THE_MODEL = frozenset(("F64", "F32", "F16", "BF16"))


@dataclass(frozen=True)
class Dtype:
    """A type of numbers and its bytes per element. ``name`` is for display only."""

    name: str
    item_bytes: int


@dataclass(frozen=True)
class Footprint:
    """Sums over any range of layers in constant time, because the optimiser needs thousands of them.

    ``weights``, ``kv`` and ``states`` are running sums over the layers: bytes, bytes per token, layers with constant
    state. ``every``, ``first`` and ``last`` are bytes of the tensors outside the layers that every stage, the first
    stage and the last stage own. ``both`` are the bytes that ``first`` and ``last`` share.
    """

    weights: Sequence[int]
    kv: Sequence[int]
    states: Sequence[int]
    every: int
    first: int
    last: int
    both: int

    def weight_bytes(self, start: int, end: int) -> int:
        """Bytes in memory of a stage with layers ``start`` to ``end - 1``, with the tensors outside the layers."""
        is_first, is_last = start == 0, end == len(self.weights) - 1
        ends = self.first * is_first + self.last * is_last - self.both * (is_first and is_last)
        return self.every + ends + self.weights[end] - self.weights[start]

    def kv_bytes_per_token(self, start: int, end: int) -> int:
        return self.kv[end] - self.kv[start]

    def num_state_layers(self, start: int, end: int) -> int:
        return self.states[end] - self.states[start]


def served_dtype(shape: ModelShape, option: str) -> Dtype:
    """The type in which vLLM computes, for ``--dtype`` ``option``.

    Under ``auto``, vLLM serves a float32 checkpoint, and one that does not name its dtype, in 16 bits: in bfloat16
    where the device has it (``_resolve_auto_dtype``, vllm/config/model.py).
    """
    if option != "auto":
        return Dtype(option, _ITEM_BYTES[option])
    if shape.torch_dtype in ("float16", "bfloat16"):
        return Dtype(shape.torch_dtype, 2)
    return Dtype("16 bits", 2)


def kv_cache_dtype(config: Mapping[str, Any], served: Dtype, option: str) -> Dtype:
    """The type in which vLLM stores keys and values, for ``--kv-cache-dtype`` ``option``.

    ``auto`` is the served dtype, unless the checkpoint's quantization names a type for the KV cache
    (``get_kv_cache_quant_algo_string``, vllm/utils/torch_utils.py; attention.py for compressed-tensors).
    Raises ``ConfigError`` if the checkpoint names another type than fp8.
    """
    if option != "auto":
        return Dtype(option, 1 if option.startswith("fp8") else _ITEM_BYTES[option])
    algorithm = _own_kv_algorithm(config)
    if algorithm is None:
        return served
    if algorithm != "fp8":
        raise ConfigError(
            f"the checkpoint's quantization_config asks for a KV cache of {algorithm}, whose size is not known here; "
            f"give --kv-cache-dtype, one of {', '.join(KV_CACHE_DTYPES[1:])}"
        )
    return Dtype("fp8", 1)


def measure(index: CheckpointIndex, shape: ModelShape, layout: KvLayout, dtype: Dtype | None, kv: Dtype) -> Footprint:
    """The footprint of a checkpoint.

    ``dtype``: the type to which the weights are cast; ``None`` for a quantized checkpoint, whose tensors keep theirs.
    ``kv``: the type of the KV cache. If the layout does not know the sizes of its caches, they count as 0 bytes.
    """
    shared = shares_embedding(index, shape)
    layers, ends = [0] * shape.num_layers, {"every": 0, "first": 0, "last": 0, "both": 0}
    for tensor in index.tensors.values():
        num_bytes, layer = _bytes_in_memory(tensor, dtype), layer_of(tensor.name)
        if layer is not None and layer < shape.num_layers:
            layers[layer] += num_bytes
            continue
        for owner in _owners(tensor.name, shared) if layer is None else ():
            ends[owner] += num_bytes
    return Footprint(
        weights=_running(layers),
        kv=_running([(layer.elements_per_token or 0) * kv.item_bytes for layer in layout.layers]),
        states=_running([int(Kind.STATE in layer.kind) for layer in layout.layers]),
        **ends,
    )


def is_quantized(config: Mapping[str, Any]) -> bool:
    return _quantization(config) is not None


def _owners(name: str, shared_embedding: bool) -> tuple[str, ...]:
    """The owners of a tensor outside the decoder's layers, found with a pipeline of three stages."""
    first, middle, last = (owns(name, LayerRange(i, i + 1), 3, shared_embedding=shared_embedding) for i in range(3))
    if middle:
        return ("every",)
    return tuple(owner for owner, has in (("first", first), ("last", last), ("both", first and last)) if has)


def _bytes_in_memory(tensor: TensorInfo, dtype: Dtype | None) -> int:
    if dtype is None or tensor.dtype not in _CAST_WITH_THE_MODEL:
        return tensor.num_bytes
    return math.prod(tensor.shape) * dtype.item_bytes


def _own_kv_algorithm(config: Mapping[str, Any]) -> str | None:
    """The type that the checkpoint names for the KV cache, such as ``fp8``; ``None`` if it names none."""
    quantization = _quantization(config)
    if quantization is None:
        return None
    inner = quantization.get("quantization")
    sections = [quantization, inner] if isinstance(inner, dict) else [quantization]
    found = [section.get(key) for key in ("kv_cache_scheme", "kv_cache_quant_algo") for section in sections]
    scheme = next((value for value in found if value), None)
    if isinstance(scheme, dict):
        is_fp8 = scheme.get("num_bits") == 8 and scheme.get("type") == "float"
        return "fp8" if is_fp8 else f"{scheme.get('num_bits')}-bit {scheme.get('type')}"
    return None if scheme is None else str(scheme).lower()


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization settings, at the top level or in the language model's (``get_quantization_config`` in vLLM)."""
    found = (section.get(key) for section in (config, language_settings(config)) for key in _QUANTIZATION_KEYS)
    return next((value for value in found if isinstance(value, dict) and value), None)


def _running(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(values, initial=0))
