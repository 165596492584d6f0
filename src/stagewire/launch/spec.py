"""What a local stage is started with: its place, its command line, its environment.

Everything here is decided before a process is started. Asks the machine for cores, GPUs and a compiler; starts nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagewire import machine
from stagewire.errors import ConfigError
from stagewire.home import complete_environment, own_home
from stagewire.launch.cores import assign_cores
from stagewire.launch.gpus import visible_gpus
from stagewire.observe.processes import mark_of
from stagewire.observe.status_events import LAUNCHER_PID_ENV, LAUNCHER_SOCKET_ENV
from stagewire.plan.ranges import PARTITION_ENV, LayerRange

__all__ = [
    "CommandBuilder",
    "Resources",
    "StageSpec",
    "VllmCommand",
    "assign_resources",
    "count_stages",
    "find_vllm",
    "is_cpu_build",
    "place_stages",
    "stage_environment",
]


@dataclass(frozen=True)
class StageSpec:
    """One local stage's place in the pipeline."""

    index: int
    num_stages: int
    layers: LayerRange
    bind_port: int
    prev_port: int
    stands_by: bool = False

    @property
    def is_head(self) -> bool:
        return self.index == 0


CommandBuilder = Callable[[StageSpec], list[str]]


def place_stages(ranges: Sequence[LayerRange], base_port: int) -> list[StageSpec]:
    """Stage i binds ``base_port + i``; the head's predecessor is the tail."""
    count = len(ranges)
    if not 1 <= base_port <= 65536 - count:
        raise ConfigError(f"--base-port {base_port}: {count} stages need ports {base_port} to {base_port + count - 1}")
    return [StageSpec(i, count, layers, base_port + i, base_port + (i - 1) % count) for i, layers in enumerate(ranges)]


@dataclass(frozen=True)
class VllmCommand:
    """Builds each stage's `vllm serve` command line. ``model``: of all stages, or one folder for each.

    All stages get the same ``extra``: a worker under a launcher passes over what is of the API alone. Without a host or
    a port vLLM's own rule decides, a --config file among it.
    """

    vllm: str
    model: str | Sequence[str]
    host: str | None
    port: int | None
    extra: tuple[str, ...] = ()

    def __call__(self, spec: StageSpec) -> list[str]:
        model = self.model if isinstance(self.model, str) else self.model[spec.index]
        command = [self.vllm, "serve", model, "--pipeline-stage-mode", "external"]
        command += ["--pipeline-stage-idx", str(spec.index), "--pipeline-total-stages", str(spec.num_stages)]
        command += ["--pipeline-layer-range", str(spec.layers), "--pipeline-local-bind-port", str(spec.bind_port)]
        predecessor = f"127.0.0.1:{spec.prev_port}"
        if spec.is_head:
            command += ["--pipeline-prev-stage-addr", predecessor]
            command += ["--port", str(self.port)] if self.port is not None else []
            return command + (["--host", self.host] if self.host else []) + list(self.extra)
        command += ["--pipeline-prev-stage-service-addr", predecessor, "--external-pp-worker"]
        command += ["--pipeline-standby"] if spec.stands_by else []
        return command + list(self.extra)


def find_vllm() -> str:
    """The `vllm` command of the environment that runs us."""
    vllm = Path(sys.executable).parent / "vllm"
    if not vllm.exists():
        raise ConfigError(f"no `vllm` command beside {sys.executable}: install vLLM into this environment")
    return str(vllm)


def is_cpu_build() -> bool:
    """vLLM's own rule for choosing its CPU platform."""
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


def stage_environment(resources: Resources, private_dir: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of one stage.

    ``private_dir`` takes the sockets and files that vLLM would leave in /tmp; the launcher removes it at the end.
    """
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **{name: value for name, value in environ.items() if name != PARTITION_ENV},
        **complete_environment(environ, own_home),
        **resources.environ,
        LAUNCHER_SOCKET_ENV: f"{private_dir}/status.sock",
        LAUNCHER_PID_ENV: mark_of(os.getpid()),
        "TMPDIR": private_dir,
        "VLLM_RPC_BASE_PATH": private_dir,
    }
