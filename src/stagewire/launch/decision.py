"""From what a person asks for to a pipeline that can be started: the stages, their layers, folders and resources.

Reads the model's folder and asks the machine; refuses what cannot work. Starts nothing; claims the folder for the logs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stagewire.checkpoint import hub
from stagewire.checkpoint.kv_cache import check_kv, read_layout
from stagewire.checkpoint.manifest import check_files, read_export, stage_folder
from stagewire.checkpoint.model_config import LoadFlags, read_config, read_model_shape
from stagewire.errors import ConfigError
from stagewire.launch.api import DEFAULT_PORT, Api, chat_template_exists
from stagewire.launch.early import ADDRESS_FLAGS, OWN_FLAGS, START_TIMEOUT_FLAG, EarlyArguments, read_early
from stagewire.launch.logs import LogFolder
from stagewire.launch.resources import assign_resources, count_stages, is_cpu_build
from stagewire.launch.restarts import DEFAULT_MAX_RESTARTS
from stagewire.launch.spec import Launch, Timeouts, VllmCommand, find_vllm, place_stages
from stagewire.plan.ranges import LayerRange, check_ranges, split_evenly

__all__ = ["AUTO", "DEFAULT_NUM_STAGES", "Wanted", "decide"]

DEFAULT_NUM_STAGES = 4
DEFAULT_START_TIMEOUT_S = 600.0
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Wanted:
    """What a person asks for. Exactly one of ``model`` and ``pipeline_dir`` is given.

    Args:
        model: folder of the full checkpoint.
        pipeline_dir: output folder of `stagewire export`.
        num_stages: None: as many as ranges, or the default; AUTO: as many as the visible GPUs are enough for.
        ranges: each stage's layers, as typed; None: vLLM's own split.
        host: that the head's API binds; None: vLLM's own rule. The same for ``port``.
        vllm_arguments: for every stage's `vllm serve`.
    """

    model: str | None = None
    pipeline_dir: Path | None = None
    num_stages: int | Literal["auto"] | None = None
    ranges: Sequence[str] | None = None
    base_port: int = 15550
    log_dir: Path = Path("stagewire_logs")
    start_timeout_s: float = DEFAULT_START_TIMEOUT_S
    max_restarts: int = DEFAULT_MAX_RESTARTS
    has_standbys: bool = False
    host: str | None = None
    port: int | None = None
    vllm_arguments: Sequence[str] = field(default=(), repr=False)  # an API key may be among them


@dataclass(frozen=True)
class _Stages:
    """Each stage's layers, and the folder that it loads from: that of the full checkpoint, or its own."""

    ranges: tuple[LayerRange, ...]
    folders: list[Path]


def decide(wanted: Wanted, environ: Mapping[str, str] = os.environ) -> Launch:
    """Everything that can be known before a process is started. The caller closes the launch's ``logs``.

    Args:
        environ: says which GPUs and libraries there are.

    Raises:
        ConfigError: a wrong setting.
    """
    early = read_early(wanted.vllm_arguments)
    _check_arguments(wanted, early)
    is_cpu = is_cpu_build()
    stages = _choose_stages(wanted, _count_stages(wanted, early, environ, is_cpu), early.load)
    model_dir = stages.folders[0]
    specs = place_stages(stages.ranges, wanted.base_port)
    resources = assign_resources(len(specs), environ, is_cpu, early.num_ranks)
    folders = [str(folder) for folder in stages.folders]
    return Launch(
        specs,
        VllmCommand(find_vllm(), folders, wanted.host, wanted.port, _vllm_arguments(wanted, early)),
        resources,
        Api(wanted.host, wanted.port or DEFAULT_PORT),
        source=wanted.pipeline_dir or model_dir,
        has_chat_template=chat_template_exists(model_dir),
        logs=LogFolder.claim(wanted.log_dir),
        timeouts=Timeouts(start=wanted.start_timeout_s),
        max_restarts=wanted.max_restarts,
        has_standbys=wanted.has_standbys,
    )


def _check_arguments(wanted: Wanted, early: EarlyArguments) -> None:
    """Refuses what the launcher gives to each stage itself, and an address that is given twice."""
    own = {"--host": wanted.host, "--port": wanted.port}
    twice = [flag for flag in ADDRESS_FLAGS if flag in early.typed and own.get(flag) is not None]
    for flag in [*(flag for flag in OWN_FLAGS if flag in early.typed), *twice]:
        raise ConfigError(f"{flag} after `--`: `stagewire up` sets it for each stage; see `stagewire up --help`")
    if wanted.max_restarts < 0:
        raise ConfigError(f"--restarts {wanted.max_restarts}: a number of 0 or more")


def _vllm_arguments(wanted: Wanted, early: EarlyArguments) -> tuple[str, ...]:
    """Stages wait for each other as long as the launcher waits, which counts from the last progress of a stage."""
    is_longer = wanted.start_timeout_s > DEFAULT_START_TIMEOUT_S and START_TIMEOUT_FLAG not in early.given
    return (*wanted.vllm_arguments, *([START_TIMEOUT_FLAG, f"{wanted.start_timeout_s:g}"] if is_longer else []))


def _count_stages(wanted: Wanted, early: EarlyArguments, environ: Mapping[str, str], is_cpu: bool) -> int | None:
    """What was asked for; None where ranges or an export say it, or the default holds."""
    if wanted.num_stages != AUTO:
        return wanted.num_stages
    if wanted.ranges is not None or wanted.pipeline_dir is not None:
        return None
    return count_stages(environ, is_cpu, early.num_ranks) or DEFAULT_NUM_STAGES


def _choose_stages(wanted: Wanted, num_stages: int | None, flags: LoadFlags) -> _Stages:
    if wanted.pipeline_dir is not None:
        return _read_pre_split(wanted.pipeline_dir.expanduser(), wanted.ranges, num_stages)
    model_dir = Path(wanted.model or "").expanduser()
    flags = hub.with_config_folder(flags, None)
    config = read_config(model_dir, flags)
    ranges = _choose_ranges(wanted.ranges, num_stages, read_model_shape(model_dir, flags).num_layers)
    check_kv(read_layout(config), ranges)
    return _Stages(ranges, [model_dir] * len(ranges))


def _read_pre_split(pipeline_dir: Path, texts: Sequence[str] | None, num_stages: int | None) -> _Stages:
    """One whole export. Raises ``ConfigError`` when it is not, or when flags contradict it."""
    manifests = read_export(pipeline_dir)
    ranges = tuple(manifest.layers for manifest in manifests)
    if num_stages not in (None, len(ranges)):
        raise ConfigError(
            f"--num-stages {num_stages} contradicts {pipeline_dir}, which was exported for {len(ranges)} stages: "
            "leave it out, or export again for another number"
        )
    if texts is not None and tuple(map(LayerRange.parse, texts)) != ranges:
        raise ConfigError(
            f"--ranges {' '.join(texts)} contradicts {pipeline_dir}, which was exported with "
            f"{' '.join(map(str, ranges))}: leave it out, or export again with other ranges"
        )
    folders = [stage_folder(pipeline_dir, stage) for stage in range(len(ranges))]
    for folder, manifest in zip(folders, manifests, strict=True):
        check_files(folder, manifest)
    return _Stages(ranges, folders)


def _choose_ranges(texts: Sequence[str] | None, num_stages: int | None, num_layers: int) -> tuple[LayerRange, ...]:
    if texts is None:
        count = DEFAULT_NUM_STAGES if num_stages is None else num_stages
        if not 1 <= count <= num_layers:
            raise ConfigError(
                f"--num-stages {count}: the model has {num_layers} layers, and each stage needs one: use 1 to "
                f"{num_layers} stages"
            )
        return split_evenly(num_layers, count)
    ranges = tuple(LayerRange.parse(text) for text in texts)
    if num_stages not in (None, len(ranges)):
        raise ConfigError(
            f"--num-stages {num_stages} but --ranges has {len(ranges)}: give one of them, or the same number"
        )
    check_ranges(ranges, num_layers)
    return ranges
