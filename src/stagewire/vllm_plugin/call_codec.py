"""The closed list of calls that may go round the ring, and their values as bytes.

A method that is not in `CALLS` does not exist for a peer; a callable never travels. Values are encoded by type from an
allow-list: plain data, torch dtypes, LoRA requests, and the dataclasses and enums of vLLM's KV cache interface by name.
Decoding builds only those, with fields that the class has; nothing is imported or executed by name. The types of an
object's fields are not checked: the handshake has already compared the vLLM versions.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import msgspec
import torch
from vllm.lora.request import LoRARequest
from vllm.v1 import kv_cache_interface as kv
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.worker.worker_base import CompilationTimes

from stagewire.errors import ConfigError, ProtocolError
from stagewire.vllm_plugin.compat import is_at_least
from stagewire.wire.codec import Frame

__all__ = ["CALLS", "CallSpec", "bind_call", "check_call", "decode_value", "encode_value"]


def _is_layouts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_kv_specs(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(spec, kv.KVCacheSpec) for spec in value.values())


def _is_kv_configs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(config, kv.KVCacheConfig) for config in value)


def _is_optional_int(value: Any) -> bool:
    return value is None or isinstance(value, int)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_optional_texts(value: Any) -> bool:
    return value is None or _is_texts(value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, set) and all(isinstance(item, int) for item in value)


def _is_token_lists(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(tokens, list) and all(type(token) is int for token in tokens) for tokens in value
    )


def _is_nothing(value: Any) -> bool:
    return value is None


def _is_a(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


@dataclass(frozen=True)
class CallSpec:
    """One allowed call: a check per argument by vLLM's name for it, one for the result, and how it is made.

    ``by_keyword``: how many of the last arguments vLLM takes by keyword only. ``is_slow``: it may take minutes.
    ``is_kept``: a stage that comes back must run it too, to be like the others. ``is_once``: and no stage runs it
    twice; asked again, it answers as it did (a new head does not know what its stages did for the one before).
    """

    args: dict[str, Callable[[Any], bool]]
    result: Callable[[Any], bool]
    is_slow: bool = False
    by_keyword: int = 0
    is_kept: bool = False
    is_once: bool = False


# Arguments that calls have got in the course of vLLM's versions.
_LAYOUT_ARGS: dict[str, Callable[[Any], bool]] = {"kv_cache_layout": _is_a(str)}
if is_at_least(0, 33):
    _LAYOUT_ARGS["cp_kv_cache_interleave_size"] = _is_a(int)
_PROFILE_ARGS: dict[str, Callable[[Any], bool]] = {"is_start": _is_a(bool), "profile_prefix": _is_a(str, type(None))}
_PROFILE_KEYWORDS: dict[str, Callable[[Any], bool]] = {}
if is_at_least(0, 32):
    _PROFILE_KEYWORDS |= {"delay_iterations": _is_optional_int, "max_iterations": _is_optional_int}
if is_at_least(0, 33):
    _PROFILE_KEYWORDS["profiler_kwargs"] = _is_nothing

_START: dict[str, Any] = {"is_slow": True, "is_kept": True, "is_once": True}

# Table C1 of docs/design/vllm-seams.md. `is_slow`: may profile, compile, allocate or write a trace, so it gets the
# start deadline.
CALLS: dict[str, CallSpec] = {
    "get_kv_cache_spec": CallSpec({}, _is_kv_specs, is_slow=True),
    "get_supported_kv_cache_layouts": CallSpec({}, _is_layouts, is_slow=True),
    "set_kv_cache_layout": CallSpec(_LAYOUT_ARGS, _is_nothing, **_START),
    "determine_available_memory": CallSpec({}, _is_a(int), **_START),
    "update_max_model_len": CallSpec({"max_model_len": _is_a(int)}, _is_nothing, **_START),
    "initialize_from_config": CallSpec({"kv_cache_configs": _is_kv_configs}, _is_nothing, **_START),
    "compile_or_warm_up_model": CallSpec({}, _is_a(CompilationTimes), **_START),
    # Ours: one threshold for all stages, or rows would be ordered differently (docs/design/vllm-seams.md, "row order").
    "get_reorder_batch_threshold": CallSpec({}, _is_optional_int, is_slow=True),
    "set_reorder_batch_threshold": CallSpec({"threshold": _is_optional_int}, _is_nothing, **_START),
    # Ours: after a loss all stages forget their requests and get the live ones anew: a schedule of them, and the tokens
    # that each has got; the first of several calls also forgets.
    "restore_requests": CallSpec(
        {"schedule": _is_a(bytes), "outputs": _is_token_lists, "is_first": _is_a(bool)}, _is_nothing
    ),
    # Ours: what a stage still remembers of requests; for tests and status.
    "get_stage_state": CallSpec({}, _is_a(dict)),
    "reset_mm_cache": CallSpec({}, _is_nothing),
    "reset_encoder_cache": CallSpec({}, _is_nothing),
    "synchronize_device": CallSpec({}, _is_nothing),
    "sleep": CallSpec({"level": _is_a(int)}, _is_nothing, is_slow=True, is_kept=True),
    "wake_up": CallSpec({"tags": _is_optional_texts}, _is_nothing, is_slow=True, is_kept=True),
    "discard": CallSpec({"tags": _is_texts}, _is_nothing, is_kept=True),
    "profile": CallSpec(
        _PROFILE_ARGS | _PROFILE_KEYWORDS,
        _is_nothing,
        is_slow=True,
        by_keyword=len(_PROFILE_KEYWORDS),
    ),
    "compute_weight_checksums": CallSpec({}, _is_a(dict)),
    "get_model_inspection": CallSpec({}, _is_a(str)),
    # Ours: whether every stage can load an adapter, and from the same bytes, before any stage takes it in.
    "check_lora": CallSpec({"lora_request": _is_a(LoRARequest)}, _is_a(str)),
    "add_lora": CallSpec({"lora_request": _is_a(LoRARequest)}, _is_a(bool), is_kept=True),
    "remove_lora": CallSpec({"lora_id": _is_a(int)}, _is_a(bool)),
    "pin_lora": CallSpec({"lora_id": _is_a(int)}, _is_a(bool), is_kept=True),
    "list_loras": CallSpec({}, _is_ids),
    "release_late_interaction_query_cache": CallSpec({"query_keys": _is_texts}, _is_nothing),
}


def bind_call(method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments in the order of `CALLS`; one that is missing is None.

    Raises ConfigError as `check_call` does.
    """
    names = list(CALLS[method].args) if method in CALLS else []
    values = dict(zip(names, args, strict=False)) | dict(kwargs)
    if len(values) != len(args) + len(kwargs) or not values.keys() <= set(names):
        raise ConfigError(f"{method} with {len(args)} arguments and {sorted(kwargs)}: expected {names}")
    bound = tuple(values.get(name) for name in names)
    check_call(method, bound)
    return bound


def check_call(method: str, args: tuple[Any, ...]) -> None:
    """Raises ConfigError for a method that is not on the list, or arguments of other types."""
    spec = CALLS.get(method)
    if spec is None:
        raise ConfigError(f"{method} is not a call that stages run (vllm_plugin/call_codec.py lists those that are)")
    checks = spec.args.values()
    if len(args) != len(checks) or not all(check(arg) for check, arg in zip(checks, args, strict=True)):
        raise ConfigError(f"{method} with arguments of types {[type(arg).__name__ for arg in args]}")


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
# What building plain objects from somebody else's parts can raise.
_DECODE_ERRORS = (
    *(msgspec.MsgspecError, RecursionError, ValueError, TypeError, LookupError, ArithmeticError),
    *(AttributeError, AssertionError),
)
_DECODER = msgspec.msgpack.Decoder()


def encode_value(value: Any) -> bytes:
    """Bytes of an allowed value.

    Raises:
        TypeError: a type outside the allow-list; the model or call that needs it is not supported.
    """
    return _ENCODER.encode(_pack(value))


def decode_value(data: Frame) -> Any:
    """The value of `encode_value`.

    Raises:
        ProtocolError: anything else.
    """
    try:
        return _unpack(_DECODER.decode(data))
    except ProtocolError:
        raise
    except _DECODE_ERRORS as error:
        raise ProtocolError(f"malformed call value: {error}") from error


def _pack(value: Any) -> Any:
    """Plain scalars as they are; everything else is a list that begins with its kind."""
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
        "(vllm_plugin/call_codec.py lists those that may)"
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
