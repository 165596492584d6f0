"""What of this machine each local stage may use: cores or GPUs, and the libraries that its process is started with.

Asks the machine; starts nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagewire import machine
from stagewire.errors import ConfigError
from stagewire.launch.gpus import visible_gpus

__all__ = ["Resources", "assign_cores", "assign_resources", "count_stages", "is_cpu_build", "preload_libraries"]


def is_cpu_build() -> bool:
    """By vLLM's own rule for choosing its CPU platform."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True


@dataclass(frozen=True)
class Resources:
    """What one stage may use of this machine. ``cores`` is empty for a stage that is not pinned."""

    environ: Mapping[str, str]
    cores: tuple[int, ...] = ()


def assign_resources(num_stages: int, environ: Mapping[str, str], is_cpu: bool, num_ranks: int = 1) -> list[Resources]:
    """A share of the cores for each stage on CPU, a GPU for each of its tensor parallel ranks elsewhere.

    Raises:
        ConfigError: fewer GPUs than ranks of all stages.
    """
    if not is_cpu:
        return [Resources(own) for own in _take_gpus(num_stages, num_ranks, environ)]
    preload = preload_libraries(environ.get("LD_PRELOAD", ""))
    cores, num_cpus = sorted(os.sched_getaffinity(0)), machine.num_cpus()
    # A limit on CPU time is none on certain cores: pinned, a stage would miss what others leave idle.
    shares = [()] * num_stages if num_cpus < len(cores) else assign_cores(cores, num_stages, num_ranks)
    threads = max(1, num_cpus // (num_stages * num_ranks))
    return [
        Resources(
            {
                "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or str(len(own) // num_ranks or threads),
                # The whole process is pinned, if at all; vLLM would pin only its worker, to cores of its own choice.
                "VLLM_CPU_OMP_THREADS_BIND": environ.get("VLLM_CPU_OMP_THREADS_BIND") or "nobind",
                **({"LD_PRELOAD": preload} if preload else {}),
            },
            own,
        )
        for own in shares
    ]


def assign_cores(cores: Sequence[int], num_stages: int, num_ranks: int = 1) -> list[tuple[int, ...]]:
    """Contiguous groups, as even as possible, one for each stage; the first stages get the cores left over.

    With fewer cores than processes (``num_ranks`` for each stage) every group is empty: such stages run one thread each
    and are not pinned, because several processes pinned to one core wait for it in turn while another core is idle.
    """
    if len(cores) < num_stages * num_ranks:
        return [()] * num_stages
    size, left_over = divmod(len(cores), num_stages)
    ends = [size * (stage + 1) + min(stage + 1, left_over) for stage in range(num_stages)]
    return [tuple(cores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def count_stages(environ: Mapping[str, str], is_cpu: bool, num_ranks: int = 1) -> int:
    """For how many stages of ``num_ranks`` the visible GPUs are enough; 0 on CPU.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names a GPU that is not there, or one twice.
    """
    return 0 if is_cpu else len(visible_gpus(environ).names) // num_ranks


def _take_gpus(num_stages: int, num_ranks: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    visible = visible_gpus(environ)
    wanted = num_stages * num_ranks
    if len(visible.names) < wanted:
        each = "one each" if num_ranks == 1 else f"{num_ranks} each (--tensor-parallel-size)"
        fits = max(1, len(visible.names) // num_ranks)
        raise ConfigError(
            f"{num_stages} stages need {wanted} GPUs, {each}: {visible.text}; use --num-stages {fits}, or say in "
            f"{visible.variable} which GPUs to use"
        )
    groups = [visible.names[stage * num_ranks : (stage + 1) * num_ranks] for stage in range(num_stages)]
    return [{visible.variable: ",".join(own), **visible.environ} for own in groups]


def preload_libraries(already: str) -> str:
    """LD_PRELOAD with the OpenMP and allocator libraries that vllm/platforms/cpu.py would choose.

    vLLM puts them into the environment of processes that it spawns; a stage that runs its worker itself needs them
    from the start. The packages are found without importing them.
    """
    preload = already
    if not any(name in preload for name in ("libomp", "libgomp", "libiomp")):
        torch = _package_dir("torch")
        found = _first_match(torch, ("../torch.libs/libgomp*.so*", "lib/libgomp*.so*")) if torch else None
        preload = ":".join(filter(None, (preload, found)))
    if "libtcmalloc" not in preload:
        vllm = _package_dir("vllm")
        found = _first_match(vllm, ("libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*")) if vllm else None
        preload = ":".join(filter(None, (found, preload)))
    return preload


def _package_dir(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _first_match(package: Path, patterns: Sequence[str]) -> str | None:
    for pattern in patterns:
        folder, _, name = pattern.rpartition("/")
        for path in sorted((package / folder).resolve().glob(name)):
            return str(path)
    return None
