"""What a pipeline of local stages is started with: each stage's place, command line and environment, and the patience.

Everything here is decided before a process is started. Starts nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagewire.errors import ConfigError
from stagewire.home import complete_environment, own_home
from stagewire.launch.api import Api
from stagewire.launch.logs import LogFolder
from stagewire.launch.resources import Resources
from stagewire.observe.processes import mark_of
from stagewire.observe.status_events import LAUNCHER_PID_ENV, LAUNCHER_SOCKET_ENV
from stagewire.plan.ranges import PARTITION_ENV, LayerRange

__all__ = [
    "CommandBuilder",
    "Launch",
    "StageSpec",
    "Timeouts",
    "VllmCommand",
    "find_vllm",
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

    All stages get the same ``extra``: a worker that a launcher has started ignores the flags of the API. Without a host
    or a port vLLM's own rule decides, a --config file included.
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


def stage_environment(resources: Resources, private_dir: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of one stage.

    ``private_dir`` takes the sockets and files that vLLM would leave in /tmp. The launcher removes it at the end.
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


@dataclass(frozen=True)
class Timeouts:
    """How long a launcher waits, in seconds.

    start: for progress of a stage that starts, since the last one (launch/pace.py).
    look: between two looks at that progress.
    root_cause: for other stages to say that they failed, after the first one did.
    head_stop, drain, stop: for the head to stop, for its open requests on top of that, and for the workers.
    poll: between two questions to the head's HTTP port, which sends no message when it changes.
    back_off: before a stage is started for the third time. The second start comes at once; each later one waits twice
        as long as the one before, ``most_back_off`` at most.
    healthy: a stage that was ready for so long did not end because of how it was started.
    """

    start: float = 600.0
    look: float = 1.0
    root_cause: float = 1.0
    head_stop: float = 2.0
    drain: float = 0.0
    stop: float = 0.7
    poll: float = 0.2
    back_off: float = 1.0
    most_back_off: float = 30.0
    healthy: float = 60.0


@dataclass(frozen=True)
class Launch:
    """A pipeline that is decided and not started.

    Args:
        specs: in the order of their index.
        command: builds a stage's command line.
        resources: of each stage.
        api: the head's, as far as it is known before the head tells.
        source: what is served, for people: the model's folder, or that of its export.
        logs: stage_<i>.log are written there.
        has_chat_template: whether the model's folder has one.
        max_restarts: how often in a row a stage is started again, or its standby takes over, while the ring serves.
        has_standbys: whether a second process of each stage but the head stands by. It takes over once even if
            ``max_restarts`` is 0.
    """

    specs: Sequence[StageSpec]
    command: CommandBuilder
    resources: Sequence[Resources]
    api: Api
    source: Path
    logs: LogFolder
    has_chat_template: bool
    timeouts: Timeouts
    max_restarts: int
    has_standbys: bool
