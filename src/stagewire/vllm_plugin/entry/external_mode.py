"""Turns a stage's flags into vLLM's own arguments, and refuses what external mode does not support.

vLLM's `EngineArgs.from_cli_args` drops what is not one of its fields. The flags are translated right there, so every
entry point that parses them either obeys or refuses them. Opens no socket and reads no weights.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from typing import Any

from stagewire.config import StageConfig
from stagewire.errors import ConfigError
from stagewire.home import complete_environment, own_home
from stagewire.plan.ranges import PARTITION_ENV
from stagewire.vllm_plugin.loading import load_formats
from stagewire.vllm_plugin.seams.settings import KEY, RingSettings
from stagewire.wire.messages import MAX_RANKS

logger = logging.getLogger("vllm.stagewire")

__all__ = ["apply_external_mode", "set_process_environment"]

# vLLM derives these from the GPU and the world size, so stages with the same flags could differ in buffer sizes. Every
# stage uses the single-process defaults of `vllm serve` instead.
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_MAX_NUM_SEQS_CPU = 128
DEFAULT_MAX_NUM_SEQS = 256


_BY_RING = "the ring does this between stages"
_NOT_YET = "not carried between stages yet"
_ONE_ENGINE = "a pipeline is one engine; start several pipelines behind a load balancer instead"

# Fields of EngineArgs that may not differ from their default in external mode, and why. Refused, never ignored.
REFUSED: dict[str, str] = {
    "pipeline_parallel_size": f"{_BY_RING}: --pipeline-total-stages says how many there are",
    "distributed_executor_backend": _BY_RING,
    "scheduler_cls": "external mode brings its own scheduler class",
    "worker_cls": "external mode drives vLLM's own worker",
    "worker_extension_cls": "calls outside the closed list never travel",
    "nnodes": _BY_RING,
    "node_rank": _BY_RING,
    "data_parallel_size": _ONE_ENGINE,
    "data_parallel_rank": _ONE_ENGINE,
    "data_parallel_start_rank": _ONE_ENGINE,
    "data_parallel_size_local": _ONE_ENGINE,
    "data_parallel_address": _ONE_ENGINE,
    "data_parallel_rpc_port": _ONE_ENGINE,
    "data_parallel_hybrid_lb": _ONE_ENGINE,
    "data_parallel_external_lb": _ONE_ENGINE,
    "data_parallel_multi_port_external_lb": _ONE_ENGINE,
    "enable_expert_parallel": "expert parallelism needs a common process group of all stages",
    "enable_eplb": "expert parallelism needs a common process group of all stages",
    "enable_elastic_ep": "expert parallelism needs a common process group of all stages",
    "prefill_context_parallel_size": _NOT_YET,
    "decode_context_parallel_size": _NOT_YET,
    "enable_dbo": _NOT_YET,
    "ubatch_size": _NOT_YET,
    "enable_hc_sp": _NOT_YET,
    "enable_batch_sharded_sampling": _NOT_YET,
    "enable_fault_tolerance": "it is vLLM's own, for data parallel engines",
    "kv_transfer_config": "KV connectors keep state that stages would have to share",
    "kv_offloading_size": "KV connectors keep state that stages would have to share",
    "ec_transfer_config": "encoder connectors call functions by value, which never travel",
    "weight_transfer_config": "weights may not change under a running ring",
    "enable_return_routed_experts": _NOT_YET,
    "return_sampling_mask": _NOT_YET,
    "watermark_config": "it forces the V2 model runner",
    "diffusion_config": _NOT_YET,
    "enable_trace_replay": _NOT_YET,
    "mm_encoder_only": _NOT_YET,
    "kv_sharing_fast_prefill": _NOT_YET,
    "mm_processor_cache_type": "only 'lru' keeps images out of memory that stages would have to share",
    "mm_tensor_ipc": "images reach the head's own process through vLLM's ordinary messages",
    "video_pruning_rate": "it moves positions after the encoder has run, which only the head would know",
}


def apply_external_mode(engine_args: Any, config: StageConfig) -> None:
    """Turns stock arguments into those of one stage, in place. Also sets this process's environment.

    Args:
        engine_args: vLLM's EngineArgs or AsyncEngineArgs as the user gave them.
        config: the stage's place.

    Raises:
        ConfigError: a setting that contradicts external mode.
    """
    _refuse(engine_args)
    set_process_environment()
    from vllm.platforms import current_platform

    from stagewire.vllm_plugin.head.executor import RingExecutor
    from stagewire.vllm_plugin.head.scheduler import RingScheduler
    from stagewire.vllm_plugin.worker.speculation import check_method

    for method in (engine_args.spec_method, (engine_args.speculative_config or {}).get("method")):
        check_method(method)

    if KEY in engine_args.additional_config:
        raise ConfigError(f"--additional-config {KEY}: this key is Stagewire's own")
    engine_args.additional_config = {**engine_args.additional_config, KEY: RingSettings.of(config)}
    engine_args.pipeline_parallel_size = config.num_stages
    engine_args.distributed_executor_backend = RingExecutor
    engine_args.scheduler_cls = RingScheduler
    engine_args.async_scheduling = False
    if engine_args.load_format in load_formats.REPLACED_LOAD_FORMATS:
        engine_args.load_format = load_formats.OWN_LOAD_FORMATS[engine_args.load_format]
    if engine_args.max_num_batched_tokens is None:
        engine_args.max_num_batched_tokens = DEFAULT_MAX_NUM_BATCHED_TOKENS
    if engine_args.max_num_seqs is None:
        is_cpu = current_platform.is_cpu()
        engine_args.max_num_seqs = DEFAULT_MAX_NUM_SEQS_CPU if is_cpu else DEFAULT_MAX_NUM_SEQS
    if current_platform.is_cpu():
        from stagewire.vllm_plugin.worker import cpu

        cpu.apply_kv_budget(engine_args, config)
        cpu.apply_compiler(engine_args, config)


def set_process_environment() -> None:
    """Sets what every process of a stage needs: the V1 runner, and spawned children, which inherit no socket.

    Raises:
        ConfigError: the environment asks for another runner or API server, or no folder can be written.
    """
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise ConfigError("VLLM_USE_V2_MODEL_RUNNER=1: stages need the V1 model runner; unset it")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ConfigError("VLLM_USE_RUST_FRONTEND: the ring's status needs the Python API server; unset it")
    if partition := os.environ.pop(PARTITION_ENV, ""):
        sys.stderr.write(
            f"Stagewire: {PARTITION_ENV}={partition} in the environment is not used: each stage has the layers of its "
            "own --pipeline-layer-range\n"
        )
    give_home()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def give_home() -> None:
    """Adds a missing home, user name or temporary folder to this process's environment, which its children inherit.

    Raises:
        ConfigError: no folder can be written.
    """
    added = complete_environment(os.environ, own_home)
    if added:
        logger.warning(
            "This user's home, name or temporary folder is missing or cannot be written: vLLM gets %s",
            ", ".join(f"{name}={value}" for name, value in added.items()),
        )
    os.environ.update(added)


def _refuse(engine_args: Any) -> None:
    defaults = {field.name: _default(field) for field in dataclasses.fields(engine_args)}
    for name, reason in REFUSED.items():
        if name not in defaults:
            continue  # no field of this minor version of vLLM
        value = getattr(engine_args, name)
        # The command line leaves some booleans None where the dataclass has False.
        if value is not None and value is not False and value != defaults[name]:
            raise ConfigError(f"{_flag(name)} cannot be combined with --pipeline-stage-mode external: {reason}")
    if engine_args.tensor_parallel_size > MAX_RANKS:
        raise ConfigError(
            f"--tensor-parallel-size {engine_args.tensor_parallel_size}: a stage has at most {MAX_RANKS} ranks, all on "
            "one machine; use more stages"
        )
    if engine_args.async_scheduling:
        raise ConfigError(
            "--async-scheduling cannot be combined with --pipeline-stage-mode external: "
            "sampled tokens come back through the ring, one step late"
        )


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
