"""Encodes arguments and results of calls to bytes and back.

Only types on an allow-list are encoded: plain data, torch dtypes, LoRA requests, and the dataclasses and enums of
vLLM's KV cache interface by name. Decoding builds only these, with fields that the class has. It imports and executes
nothing by name. It does not check the types of an object's fields, because the handshake compared the vLLM versions.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import msgspec
import torch
from vllm.lora.request import LoRARequest
from vllm.v1 import kv_cache_interface as kv
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.worker.worker_base import CompilationTimes

from stagewire.errors import ProtocolError
from stagewire.wire.codec import Frame

__all__ = ["decode_value", "encode_value"]


_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in vars(kv).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == kv.__name__
}
_ENUMS: dict[str, type[enum.Enum]] = {
    cls.__name__: cls
    for cls in [*vars(kv).values(), MambaAttentionBackendEnum]
    if isinstance(cls, type) and issubclass(cls, enum.Enum)
}
_ENCODER = msgspec.msgpack.Encoder()
# What building objects from a peer's bytes can raise.
_DECODE_ERRORS = (
    *(msgspec.MsgspecError, RecursionError, ValueError, TypeError, LookupError, ArithmeticError),
    *(AttributeError, AssertionError),
)
_DECODER = msgspec.msgpack.Decoder()


def encode_value(value: Any) -> bytes:
    """The bytes of an allowed value.

    Raises:
        TypeError: the type is not on the allow-list, so the model or call that needs it is not supported.
    """
    return _ENCODER.encode(_pack(value))


def decode_value(data: Frame) -> Any:
    """The value that `encode_value` took.

    Raises:
        ProtocolError: the bytes are not of `encode_value`.
    """
    try:
        return _unpack(_DECODER.decode(data))
    except ProtocolError:
        raise
    except _DECODE_ERRORS as error:
        raise ProtocolError(f"malformed call value: {error}") from error


def _pack(value: Any) -> Any:
    """Plain scalars stay as they are; everything else becomes a list that begins with its kind."""
    if isinstance(value, enum.Enum):
        return ["enum", type(value).__name__, value.name]
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, Fraction):
        return ["fraction", value.numerator, value.denominator]
    if isinstance(value, MultipleOf):
        return ["multiple_of", value.base]
    if isinstance(value, CompilationTimes):
        return ["compilation_times", *value]
    if type(value) is LoRARequest:
        return ["lora_request", *(_pack(getattr(value, name)) for name in LoRARequest.__struct_fields__)]
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = "list" if isinstance(value, list) else "tuple" if isinstance(value, tuple) else "set"
        return [kind, *(_pack(item) for item in value)]
    if isinstance(value, dict):
        return ["dict", *([_pack(key), _pack(item)] for key, item in value.items())]
    if _CLASSES.get(type(value).__name__) is type(value):
        names = [field.name for field in dataclasses.fields(_CLASSES[type(value).__name__]) if field.init]
        fields = {name: _pack(getattr(value, name)) for name in names}
        return ["object", type(value).__name__, fields]
    raise TypeError(
        f"{type(value).__module__}.{type(value).__qualname__} is not a type that may travel the ring "
        "(vllm_plugin/codec/values.py lists those that may)"
    )


def _unpack(packed: Any) -> Any:
    if not isinstance(packed, list):
        if isinstance(packed, dict):
            raise ProtocolError("a bare map in a call value")
        return packed
    if not packed or packed[0] not in _UNPACKERS:
        raise ProtocolError(f"unknown kind of value: {packed[0] if packed else 'none'!r}")
    return _UNPACKERS[packed[0]](packed[1:])


def _unpack_object(parts: list[Any]) -> Any:
    name, fields = parts
    if name not in _CLASSES:
        raise ProtocolError(f"class {name!r} is not allowed on the wire")
    cls = _CLASSES[name]
    allowed = {field.name for field in dataclasses.fields(cls) if field.init}
    if not set(fields) <= allowed:
        raise ProtocolError(f"{name} with fields {sorted(set(fields) - allowed)}: another vLLM version?")
    return cls(**{key: _unpack(item) for key, item in fields.items()})


_UNPACKERS: dict[str, Callable[[list[Any]], Any]] = {
    "enum": lambda parts: _ENUMS[parts[0]][parts[1]],
    "dtype": lambda parts: _DTYPES[parts[0]],
    "fraction": lambda parts: Fraction(parts[0], parts[1]),
    "multiple_of": lambda parts: MultipleOf(parts[0]),
    "compilation_times": lambda parts: CompilationTimes(*parts),
    "lora_request": lambda parts: msgspec.convert(parts, LoRARequest),
    "list": lambda parts: [_unpack(item) for item in parts],
    "tuple": lambda parts: tuple(_unpack(item) for item in parts),
    "set": lambda parts: {_unpack(item) for item in parts},
    "dict": lambda parts: {_unpack(key): _unpack(item) for key, item in parts},
    "object": _unpack_object,
}
