"""The closed list of calls that may go round the ring.

A method that is not in `CALLS` does not exist for a peer; a callable never travels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1 import kv_cache_interface as kv
from vllm.v1.worker.worker_base import CompilationTimes

from stagewire.errors import ConfigError
from stagewire.vllm_plugin.seams.versions import is_at_least

__all__ = ["CALLS", "CallSpec", "bind_call", "check_call"]


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

# Table C1 of docs/vllm-seams.md. `is_slow`: may profile, compile, allocate or write a trace, so it gets the start
# deadline.
CALLS: dict[str, CallSpec] = {
    "get_kv_cache_spec": CallSpec({}, _is_kv_specs, is_slow=True),
    "get_supported_kv_cache_layouts": CallSpec({}, _is_layouts, is_slow=True),
    "set_kv_cache_layout": CallSpec(_LAYOUT_ARGS, _is_nothing, **_START),
    "determine_available_memory": CallSpec({}, _is_a(int), **_START),
    "update_max_model_len": CallSpec({"max_model_len": _is_a(int)}, _is_nothing, **_START),
    "initialize_from_config": CallSpec({"kv_cache_configs": _is_kv_configs}, _is_nothing, **_START),
    "compile_or_warm_up_model": CallSpec({}, _is_a(CompilationTimes), **_START),
    # Ours: one threshold for all stages, or rows would be ordered differently (docs/vllm-seams.md, "row order").
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
