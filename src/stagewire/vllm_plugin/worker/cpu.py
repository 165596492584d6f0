"""Stages on CPUs: how much KV cache by default, how many threads, which libraries to preload.

vLLM's CPU backend expects one engine per machine. It takes 92 % of the machine's memory, binds its worker process to
cores, and preloads OpenMP and an allocator into that process. Stages share machines, and a worker stage runs its
worker in the process that a person started.
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

# The share of the memory that is free when a stage starts. The rest is for weights, activations and other programs.
KV_SHARE = 0.25
MAX_KV_BYTES = 8 << 30
REEXECUTED_ENV = "STAGEWIRE_REEXECUTED"


def apply_kv_budget(engine_args: Any, config: StageConfig) -> None:
    """Sets a KV cache size with which all stages fit on one machine. vLLM's own flags and variables win."""
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
    """Checks the KV cache of all ranks of a stage before it is allocated.

    The kernel grants more memory than there is and kills the process that uses it. Free memory is not checked here: the
    process that this one replaces may still hold memory, and other stages start at the same time.

    Args:
        num_blocks: of the ring's KV cache.
        bytes_per_block: of one block, all ranks of this stage together.

    Raises:
        ConfigError: the cache is larger than all memory of this machine or container.
    """
    needed, total = num_blocks * bytes_per_block, machine.memory_bytes()
    if needed > total:
        raise ConfigError(
            f"the ring's {num_blocks} KV blocks take {needed / 1e9:.2f} GB here and this machine, or this container, "
            f"has {total / 1e9:.2f} GB: give all stages a smaller --kv-cache-memory-bytes, or this one another machine"
        )


def check_kv_room(config: StageConfig, kv_bytes: int | None, num_ranks: int) -> None:
    """Checks the KV cache of one rank after its layers are loaded.

    Args:
        config: the stage's.
        kv_bytes: `--kv-cache-memory-bytes`, given or chosen.
        num_ranks: of the stage.

    Raises:
        ConfigError: the cache is larger than the free memory. vLLM's own check would end the stage with a traceback.
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
    """Turns compilation off when there is no C++ compiler.

    Without one, stock vLLM on CPU fails at its first forward pass (torch's InvalidCxxCompiler).

    Raises:
        ConfigError: there is no compiler, and compilation was asked for.
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
    """Looks for the compiler that torch's inductor uses on Linux (`cpp.cxx` in torch/_inductor/config.py)."""
    return shutil.which(os.environ.get("CXX") or "g++") is not None


@functools.cache
def _kv_budget(num_workers: int) -> int:
    """Bytes for one worker. Cached, because a head resolves its arguments twice and must get one answer.

    ``num_workers``: of all stages, as if each had as many ranks as this one.
    """
    return min(int(_free_at_start() * KV_SHARE / num_workers), MAX_KV_BYTES)


@functools.cache
def _free_at_start() -> int:
    return machine.available_bytes()


def set_threads(config: StageConfig, num_ranks: int) -> None:
    """Sets the number of OpenMP threads of each rank, unless OMP_NUM_THREADS is set.

    The stage takes its share of the CPUs when its predecessor is on this host, else all of them, and divides them
    among its ranks. Spawned processes (EngineCore, followers) read the variable; this process has read it already, so
    torch is told too.
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
    """Frees the copies of the embedding and the output head that this stage never reads.

    Where the CPU has packed kernels, vLLM keeps each of these matrices twice: rows for lookups, and a packed matrix for
    logits. One process with tied weights needs both. Stages before the tail compute no logits, and the tail looks up
    nothing in the head.

    Args:
        model: loaded, on a CPU.
        vllm_config: of this stage.
        is_tail: whether this stage computes logits.
    """
    import torch
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    # LoRA reads the type of the head's rows. Logits in another type than the model's are computed from the rows.
    reads_rows = vllm_config.lora_config is not None or (
        vllm_config.model_config.head_dtype != vllm_config.model_config.dtype
    )
    packed = [
        each for each in model.modules() if isinstance(getattr(each, "quant_method", None), UnquantizedEmbeddingMethod)
    ]
    heads = [each for each in packed if isinstance(each, ParallelLMHead)]
    for module in packed:
        if not is_tail or (heads and module not in heads):
            module.cpu_linear = torch.nn.functional.linear  # right if it is called after all, only slower
        elif heads and not reads_rows:
            module.cpu_linear = None  # freed before the next line packs anew, so that there are never three copies
            dispatch_cpu_unquantized_gemm(module, remove_weight=True)


def reexec_with_libraries() -> None:
    """Runs this process again with the OpenMP and allocator libraries that vLLM wants preloaded.

    vLLM only sets LD_PRELOAD (platforms/cpu.py). That reaches spawned workers, but not a stage that runs its worker in
    its own process. Does nothing when the libraries are loaded, or after one attempt.
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
