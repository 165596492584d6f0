"""Stages on CPUs: how much KV cache by default, how many threads, which libraries to preload.

vLLM's CPU backend sizes for one engine per machine: it takes 92 % of the machine's memory and binds its worker process
to cores, with OpenMP and an allocator preloaded into that process. Stages share machines, and run their worker in
the process that a person started.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from typing import Any

from stagewire import machine
from stagewire.config import StageConfig
from stagewire.errors import ConfigError
from stagewire.ring.transport.hosts import shares_machine

__all__ = [
    "REEXECUTED_ENV",
    "apply_compiler",
    "apply_kv_budget",
    "check_kv_memory",
    "check_kv_room",
    "reexec_with_libraries",
    "release_second_copies",
    "set_threads",
]

# Of the memory that is available when a stage starts; the rest is for weights, activations and everybody else.
KV_SHARE = 0.25
MAX_KV_BYTES = 8 << 30
REEXECUTED_ENV = "STAGEWIRE_REEXECUTED"


def apply_kv_budget(engine_args: Any, config: StageConfig) -> None:
    """A KV cache that lets all stages start on one machine; vLLM's own flags and variables win."""
    from vllm.config import CacheConfig
    from vllm.logger import init_logger

    is_chosen = (
        engine_args.kv_cache_memory_bytes is not None
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or engine_args.gpu_memory_utilization != CacheConfig.gpu_memory_utilization
        or engine_args.num_gpu_blocks_override is not None
    )
    if is_chosen:
        return
    num_ranks = engine_args.tensor_parallel_size
    engine_args.kv_cache_memory_bytes = _kv_budget(config.num_stages * num_ranks)
    init_logger("vllm.stagewire").info_once(
        "Stage %d: KV cache of %.2f GB%s (%.0f %% of %.2f GB of free memory over %d stages; "
        "--kv-cache-memory-bytes changes it)",
        config.stage,
        engine_args.kv_cache_memory_bytes / 1e9,
        f" on each of {num_ranks} ranks" if num_ranks > 1 else "",
        KV_SHARE * 100,
        _free_at_start() / 1e9,
        config.num_stages,
    )


def check_kv_memory(num_blocks: int, bytes_per_block: int) -> None:
    """Of all ranks of a stage, before it is allocated: the kernel grants more than there is, and ends who uses it.

    What is free is not looked at: the stage before this one may just be leaving, and others start at the same moment.

    Raises:
        ConfigError: it is more than all memory of this machine.
    """
    needed, total = num_blocks * bytes_per_block, machine.memory_bytes()
    if needed > total:
        raise ConfigError(
            f"the ring's {num_blocks} KV blocks take {needed / 1e9:.2f} GB here and this machine, or this container, "
            f"has {total / 1e9:.2f} GB: give all stages a smaller --kv-cache-memory-bytes, or this one another machine"
        )


def check_kv_room(config: StageConfig, kv_bytes: int | None, num_ranks: int) -> None:
    """Of one rank, when its layers are loaded. ``kv_bytes``: `--kv-cache-memory-bytes`, given or chosen.

    Raises:
        ConfigError: more than is free; vLLM's own check would end the stage with a traceback.
    """
    free = machine.available_bytes()
    if kv_bytes is not None and kv_bytes > free:
        fits_all = free // (config.num_stages * num_ranks + 1)
        raise ConfigError(
            f"stage {config.stage}'s KV cache of {kv_bytes / 1e9:.2f} GB is more than the {free / 1e9:.2f} GB that are "
            "free on this machine, or in this container, beside its layers: give all stages --kv-cache-memory-bytes "
            f"{fits_all >> 20}M, or this one more memory"
        )


def apply_compiler(engine_args: Any, config: StageConfig) -> None:
    """Runs eagerly where vLLM would compile and there is nothing to compile with.

    Stock vLLM on CPU dies of this at its first forward pass (torch's InvalidCxxCompiler).

    Raises:
        ConfigError: compilation was asked for explicitly.
    """
    if engine_args.enforce_eager or _has_compiler():
        return
    from vllm.logger import init_logger

    defaults = type(engine_args)
    asked = engine_args.optimization_level != defaults.optimization_level or engine_args.compilation_config.mode
    if asked:
        raise ConfigError(
            f"stage {config.stage} is to compile its model but there is no C++ compiler: install g++, "
            "name one in CXX, or give --enforce-eager"
        )
    engine_args.enforce_eager = True
    init_logger("vllm.stagewire").info_once("Stage %d: no C++ compiler here: --enforce-eager", config.stage)


def _has_compiler() -> bool:
    """What torch's inductor looks for on Linux (`cpp.cxx` in torch/_inductor/config.py)."""
    return shutil.which(os.environ.get("CXX") or "g++") is not None


@functools.cache
def _kv_budget(num_workers: int) -> int:
    """Bytes of one worker, as if all stages had as many; one answer per process, because a head resolves its arguments
    twice.
    """
    return min(int(_free_at_start() * KV_SHARE / num_workers), MAX_KV_BYTES)


@functools.cache
def _free_at_start() -> int:
    return machine.available_bytes()


def set_threads(config: StageConfig, num_ranks: int) -> None:
    """OpenMP threads for a stage that a person started: its share of the CPUs when the predecessor is on this host,
    divided among its tensor parallel ranks.

    The variable reaches the head's EngineCore and followers, which are spawned; in this process OpenMP has read it.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    cores = machine.num_cpus()
    own = cores // config.num_stages if shares_machine(config.predecessor) else cores
    threads = max(1, own // num_ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def release_second_copies(model: Any, vllm_config: Any, *, is_tail: bool) -> None:
    """Gives back what vLLM packs for the vocabulary's matrices and a stage never reads, up to a copy of each.

    Where the CPU has packed kernels vLLM keeps two copies of every embedding and head: rows to look up, and a packed
    matrix for logits. One process with tied weights needs both. Before the tail nobody asks for logits; on the tail
    nobody looks up in a head.

    Args:
        model: loaded, on a CPU.
        vllm_config: of this stage.
        is_tail: whether this stage computes logits.
    """
    import torch
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    # Both read the head's own rows: adapters its type, logits in another type its values.
    reads_rows = vllm_config.lora_config is not None or (
        vllm_config.model_config.head_dtype != vllm_config.model_config.dtype
    )
    packed = [
        each for each in model.modules() if isinstance(getattr(each, "quant_method", None), UnquantizedEmbeddingMethod)
    ]
    heads = [each for each in packed if isinstance(each, ParallelLMHead)]
    for module in packed:
        if not is_tail or (heads and module not in heads):
            module.cpu_linear = torch.nn.functional.linear  # right for any use, only slower
        elif heads and not reads_rows:
            module.cpu_linear = None  # freed first, so that there are never three copies
            dispatch_cpu_unquantized_gemm(module, remove_weight=True)


def reexec_with_libraries() -> None:
    """Runs this process again with the OpenMP and allocator libraries that vLLM wants preloaded.

    vLLM only puts them into the environment (platforms/cpu.py), which reaches spawned workers but not a stage that runs
    its worker itself. Does nothing when they are loaded, or after one attempt.
    """
    wanted = os.environ.get("LD_PRELOAD", "")
    if not wanted or os.environ.get(REEXECUTED_ENV) or _is_loaded(wanted):
        return
    os.environ[REEXECUTED_ENV] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_loaded(preload: str) -> bool:
    with open("/proc/self/maps") as maps:
        mapped = maps.read()
    return all(os.path.realpath(path) in mapped for path in preload.split(":") if os.path.exists(path))
