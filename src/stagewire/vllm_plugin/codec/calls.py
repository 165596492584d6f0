"""The closed list of calls that may go round the ring, and the properties of each.

A method that is not in `CALLS` does not exist for a peer, and a callable never travels. The head checks a call before
it sends it, and each stage before it runs it. Only the makers of a call name it elsewhere: head/executor.py,
member/member.py and ranks/stage_ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1 import kv_cache_interface as kv
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from stagewire.errors import ConfigError
from stagewire.vllm_plugin.seams.versions import is_at_least
from stagewire.wire.messages import StageState

__all__ = ["CALLS", "MEMORY_PARTS", "PREPARE", "CallSpec", "Runs", "bind_call", "check_call"]

# The call that carries the journal. The ring's thread of the head makes it; vLLM has no such call.
PREPARE = "prepare"


Check = Callable[[Any], bool]

# The parts of a worker's memory that sleep frees, as `wake_up` names them.
MEMORY_PARTS = frozenset({"weights", "kv_cache"})


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


def _is_entries(value: Any) -> bool:
    kinds = [int, str, bytes]  # member/journal.py's Entry
    return isinstance(value, list) and all(
        isinstance(entry, tuple) and list(map(type, entry)) == kinds for entry in value
    )


def _is_nothing(value: Any) -> bool:
    return value is None


def _is_a(*types: type) -> Check:
    return lambda value: isinstance(value, types)


class Runs(Enum):
    """Which object has the method of the call's name."""

    VLLM = "vLLM's worker"
    RANK = "worker.stage_worker.StageWorker"
    HOST = "host.stage_host: the stage as a whole, and not its ranks"


@dataclass(frozen=True)
class CallSpec:
    """One allowed call.

    Args:
        args: a check for each argument, by vLLM's name for it.
        result: a check of what each rank returns.
        runs: which object runs it.
        by_keyword: how many of the last arguments vLLM takes by keyword only.
        is_slow: it may profile, compile, allocate or write a trace, so it has the start deadline.
        is_vital: a stage where it fails ends, because the others cannot use it.
        is_kept: it is kept in the journal. A restarted stage runs it too, to be like the others.
        is_once: no stage runs it twice with the same arguments. A stage that is asked again returns its first answer,
            because a new head does not know what its stages did for the one before.
        voids: calls whose first answers are dropped when this one runs with other arguments.
        undoes: calls that leave the journal when this one succeeds. With ``adapter``: those of the same adapter.
        follows: calls whose entries of the same adapter move to the journal's end, before this one's.
        adapter: finds the LoRA adapter's number in the arguments.
        sleeps: it frees memory that the call with ``wakes`` gives back.
        wakes: finds the parts of the memory in the arguments. The call undoes others only when no part is left asleep.
        reaches: the state of a stage after the call, for its reports.
    """

    args: dict[str, Check]
    result: Check
    runs: Runs = Runs.VLLM
    by_keyword: int = 0
    is_slow: bool = False
    is_vital: bool = False
    is_kept: bool = False
    is_once: bool = False
    voids: tuple[str, ...] = ()
    undoes: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()
    adapter: Callable[[tuple[Any, ...]], int] | None = None
    sleeps: bool = False
    wakes: Callable[[tuple[Any, ...]], set[str]] | None = None
    reaches: StageState | None = None


def _named_adapter(args: tuple[Any, ...]) -> int:
    return int(args[0].lora_int_id)


def _numbered_adapter(args: tuple[Any, ...]) -> int:
    return int(args[0])


def _woken_parts(args: tuple[Any, ...]) -> set[str]:
    return set(MEMORY_PARTS if args[0] is None else args[0])


# Arguments that later versions of vLLM added.
_LAYOUT_ARGS: dict[str, Check] = {"kv_cache_layout": _is_a(str)}
if is_at_least(0, 33):
    _LAYOUT_ARGS["cp_kv_cache_interleave_size"] = _is_a(int)
_PROFILE_ARGS: dict[str, Check] = {"is_start": _is_a(bool), "profile_prefix": _is_a(str, type(None))}
_PROFILE_KEYWORDS: dict[str, Check] = {}
if is_at_least(0, 32):
    _PROFILE_KEYWORDS |= {"delay_iterations": _is_optional_int, "max_iterations": _is_optional_int}
if is_at_least(0, 33):
    _PROFILE_KEYWORDS["profiler_kwargs"] = _is_nothing

_START: dict[str, Any] = {"is_slow": True, "is_kept": True, "is_once": True}

# Table C1 of docs/design/vllm-seams.md.
CALLS: dict[str, CallSpec] = {
    # start-up, in this order
    "get_kv_cache_spec": CallSpec({}, _is_kv_specs, is_slow=True),
    "get_supported_kv_cache_layouts": CallSpec({}, _is_layouts, is_slow=True),
    "set_kv_cache_layout": CallSpec(_LAYOUT_ARGS, _is_nothing, **_START),
    "determine_available_memory": CallSpec({}, _is_a(int), Runs.RANK, **_START),
    "update_max_model_len": CallSpec({"max_model_len": _is_a(int)}, _is_nothing, **_START),
    "initialize_from_config": CallSpec(
        {"kv_cache_configs": _is_kv_configs},
        _is_nothing,
        Runs.RANK,
        voids=("compile_or_warm_up_model",),  # another KV cache, by a new head, is warmed up again
        reaches="kv_cache",
        **_START,
    ),
    # Ours: with different thresholds, stages would order rows differently (docs/design/vllm-seams.md, "Row order").
    "get_reorder_batch_threshold": CallSpec({}, _is_optional_int, Runs.RANK, is_slow=True),
    "set_reorder_batch_threshold": CallSpec({"threshold": _is_optional_int}, _is_nothing, Runs.RANK, **_START),
    "compile_or_warm_up_model": CallSpec({}, _is_a(CompilationTimes), Runs.RANK, reaches="serving", **_START),
    # after a loss
    # Ours: carries the journal. A stage runs those of its calls that it has not run.
    PREPARE: CallSpec({"journal": _is_entries}, _is_nothing, Runs.HOST, is_slow=True),
    # Ours: stages get the live requests anew, as a schedule and the tokens that each has got. On the first of several
    # calls they forget their requests before. The head's own rank gets the schedule itself (`StageRanks.call`).
    "restore_requests": CallSpec(
        {"schedule": _is_a(bytes, SchedulerOutput), "outputs": _is_token_lists, "is_first": _is_a(bool)},
        _is_nothing,
        Runs.RANK,
        is_vital=True,
    ),
    # while it serves
    # Ours: what a stage remembers of requests; for tests.
    "get_stage_state": CallSpec({}, _is_a(dict), Runs.RANK),
    "reset_mm_cache": CallSpec({}, _is_nothing),
    "reset_encoder_cache": CallSpec({}, _is_nothing),
    "synchronize_device": CallSpec({}, _is_nothing),
    "sleep": CallSpec({"level": _is_a(int)}, _is_nothing, is_slow=True, is_kept=True, sleeps=True),
    "wake_up": CallSpec(
        {"tags": _is_optional_texts},
        _is_nothing,
        is_slow=True,
        is_kept=True,
        wakes=_woken_parts,
        undoes=("sleep", "discard", "wake_up"),
    ),
    "discard": CallSpec({"tags": _is_texts}, _is_nothing, is_kept=True, sleeps=True),
    "profile": CallSpec(
        _PROFILE_ARGS | _PROFILE_KEYWORDS, _is_nothing, by_keyword=len(_PROFILE_KEYWORDS), is_slow=True
    ),
    "compute_weight_checksums": CallSpec({}, _is_a(dict)),
    "get_model_inspection": CallSpec({}, _is_a(str)),
    # Ours: before any stage adds an adapter, every stage loads it and returns the digest of its files.
    "check_lora": CallSpec({"lora_request": _is_a(LoRARequest)}, _is_a(str), Runs.RANK),
    "add_lora": CallSpec(
        {"lora_request": _is_a(LoRARequest)}, _is_a(bool), Runs.RANK, is_kept=True, adapter=_named_adapter
    ),
    "remove_lora": CallSpec(
        {"lora_id": _is_a(int)}, _is_a(bool), adapter=_numbered_adapter, undoes=("add_lora", "pin_lora")
    ),
    # A pinned adapter may have stayed while adapters that were added later were evicted. A replay in the old order
    # would evict it before the pin.
    "pin_lora": CallSpec(
        {"lora_id": _is_a(int)}, _is_a(bool), is_kept=True, adapter=_numbered_adapter, follows=("add_lora", "pin_lora")
    ),
    "list_loras": CallSpec({}, _is_ids),
    "release_late_interaction_query_cache": CallSpec({"query_keys": _is_texts}, _is_nothing),
}


def bind_call(method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments in the order of `CALLS`; a missing one is None.

    Raises ConfigError as `check_call` does, and for an argument that the call does not have or that is given twice.
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
        raise ConfigError(f"{method} is not a call that stages run (vllm_plugin/codec/calls.py lists those that are)")
    checks = spec.args.values()
    if len(args) != len(checks) or not all(check(arg) for check, arg in zip(checks, args, strict=True)):
        raise ConfigError(f"{method} with arguments of types {[type(arg).__name__ for arg in args]}")
