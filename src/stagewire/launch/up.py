"""`stagewire up`: a whole pipeline on this machine, from one command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from stagewire.checkpoint import hub
from stagewire.checkpoint.kv_cache import check_kv, read_layout
from stagewire.checkpoint.manifest import check_files, read_export, stage_folder
from stagewire.checkpoint.model_config import LoadFlags, read_config, read_model_shape
from stagewire.errors import ConfigError
from stagewire.folders import private_folder
from stagewire.launch.api import DEFAULT_PORT, Api, Served, chat_template_exists, usage
from stagewire.launch.early import ADDRESS_FLAGS, OWN_FLAGS, START_TIMEOUT_FLAG, EarlyArguments, read_early
from stagewire.launch.logs import LogFolder
from stagewire.launch.loop import run_loop
from stagewire.launch.screen import Screen, open_screen
from stagewire.launch.spec import (
    CommandBuilder,
    Resources,
    StageSpec,
    VllmCommand,
    assign_resources,
    count_stages,
    find_vllm,
    is_cpu_build,
    place_stages,
)
from stagewire.launch.supervisor import DEFAULT_MAX_RESTARTS, Supervisor, Timeouts
from stagewire.plan.ranges import PARTITION_ENV, LayerRange, check_ranges, split_evenly

__all__ = ["AUTO", "EPILOG", "Launch", "add_arguments", "add_launch_arguments", "decide", "run"]

DEFAULT_NUM_STAGES = 4
AUTO = "auto"
DEFAULT_START_TIMEOUT_S = 600.0
EPILOG = """\
Everything after `--` goes to every stage's `vllm serve`, for instance: stagewire up --model DIR -- --dtype float32

Ctrl-C, SIGTERM and the end of the terminal stop every stage in order; told twice, all end at once. Under nohup
or setsid the end of the terminal stops nothing.
Exit codes: 0 stopped while serving; 128 + signal stopped before that; 1, 2 or 3 the code of the stage that
failed (1 an error of a stage or a kill, 2 a setting, 3 another stage or the network)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launch_arguments(parser)
    parser.add_argument("--host", help="address that the API binds; default: vLLM's")
    parser.add_argument("--port", type=int, help="port of the API; default: vLLM's, 8000")


def add_launch_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """What `decide` reads, but the API's address; returns the group that says where the stages come from."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="PATH", help="folder with config.json and the weights")
    model.add_argument(
        "--pipeline-dir",
        type=Path,
        metavar="PATH",
        help="output folder of `stagewire export`: one folder for each stage",
    )
    parser.add_argument(
        "--num-stages",
        type=_number_or_auto,
        metavar="N",
        help=f"default: {DEFAULT_NUM_STAGES}, or as many as ranges; {AUTO}: as many as the visible GPUs are enough for",
    )
    parser.add_argument(
        "--ranges",
        nargs="+",
        metavar="START-END",
        help="each stage's layers, END not included; default: vLLM's own split",
    )
    parser.add_argument(
        "--base-port", type=int, default=15550, help="stage i binds this port + i (default: %(default)s)"
    )
    parser.add_argument(
        "--log-dir",
        type=Path,
        default=Path("stagewire_logs"),
        help="default: ./%(default)s, or the next free one of that name while another launcher has it",
    )
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=DEFAULT_START_TIMEOUT_S,
        metavar="S",
        help="since a stage that loads last got on; default: %(default)g seconds",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=DEFAULT_MAX_RESTARTS,
        metavar="N",
        help="how often in a row a stage that ends while serving is started again, or its standby takes over; "
        "0: never, the others are stopped; a standby still takes over once (default: %(default)s)",
    )
    parser.add_argument(
        "--standby",
        action="store_true",
        help="load every stage but the head a second time, on the same device, to take over when the first one ends",
    )
    return model


def _number_or_auto(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: expected a number, or {AUTO}") from error


@dataclass(frozen=True)
class Launch:
    """A pipeline that is decided and not started."""

    specs: Sequence[StageSpec]
    command: CommandBuilder
    resources: Sequence[Resources]
    api: Api
    source: Path
    logs: LogFolder
    has_template: bool
    start_timeout_s: float
    max_restarts: int
    has_standbys: bool

    def usage(self, api: Api, served: Served) -> str:
        """What to copy once it serves; ``api`` is where clients ask."""
        where = f"Logs in {self.logs.path}{os.sep}stage_*.log. Ctrl-C stops everything."
        return f"{usage(api, served, self.has_template)}\n{where}"

    def supervisor(self, screen: Screen, private_dir: str, serving: Callable[[Api, Served], str]) -> Supervisor:
        layers = ", ".join(str(spec.layers) for spec in self.specs)
        note = f" ({self.logs.note})" if self.logs.note else ""
        screen.say(f"{self.source}: layers {layers} on {len(self.specs)} stages; logs in {self.logs.path}{note}")
        if partition := os.environ.get(PARTITION_ENV):
            screen.say(
                f"{PARTITION_ENV}={partition} in the environment is not used: --ranges says which layers each has"
            )
        timeouts = Timeouts(start=self.start_timeout_s)
        parts = (self.specs, self.command, self.resources, self.api, screen, private_dir, self.logs, serving)
        return Supervisor(*parts, timeouts, max_restarts=self.max_restarts, has_standbys=self.has_standbys)


def run(args: argparse.Namespace, extra: Sequence[str]) -> int:
    """Blocks until the pipeline has stopped; returns the exit code.

    Raises:
        StagewireError: a wrong setting, a stage that failed, a ring that is not ready in time.
    """
    launch = decide(args, extra)
    with closing(launch.logs), private_folder() as folder:
        supervisor = launch.supervisor(open_screen(launch.specs), folder, launch.usage)
        return run_loop(supervisor.run())


def decide(args: argparse.Namespace, extra: Sequence[str], environ: Mapping[str, str] = os.environ) -> Launch:
    """Everything that can be known before a process is started; takes the folder for the logs.

    Args:
        args: of `add_launch_arguments`, and ``host`` and ``port`` of the head's API.
        extra: for every stage's `vllm serve`.
        environ: says which GPUs and libraries there are.

    Raises:
        ConfigError: a wrong setting.
    """
    early = read_early(extra)
    _check_extra(args, early)
    if args.restarts < 0:
        raise ConfigError(f"--restarts {args.restarts}: a number of 0 or more")
    num_stages = args.num_stages
    if num_stages == AUTO:
        is_given = args.ranges is not None or args.pipeline_dir is not None
        num_stages = None if is_given else count_stages(environ, is_cpu_build(), early.num_ranks) or DEFAULT_NUM_STAGES
    ranges, folders = _choose_stages(args, num_stages, early.load)
    model_dir = folders[0]
    specs = place_stages(ranges, args.base_port)
    resources = assign_resources(len(specs), environ, is_cpu_build(), early.num_ranks)
    # Stages wait for each other at least as long as ever: here the time counts from the last progress.
    if args.start_timeout > DEFAULT_START_TIMEOUT_S and START_TIMEOUT_FLAG not in early.given:
        extra = [*extra, START_TIMEOUT_FLAG, f"{args.start_timeout:g}"]
    command = VllmCommand(find_vllm(), [str(folder) for folder in folders], args.host, args.port, tuple(extra))
    api = Api(args.host, args.port or DEFAULT_PORT)
    source = args.pipeline_dir or model_dir
    limits = (args.start_timeout, args.restarts, args.standby)
    logs = LogFolder.claim(args.log_dir)
    return Launch(specs, command, resources, api, source, logs, chat_template_exists(model_dir), *limits)


def _choose_stages(
    args: argparse.Namespace, num_stages: int | None, flags: LoadFlags
) -> tuple[tuple[LayerRange, ...], list[Path]]:
    """Each stage's layers, and the folder that it loads from: the full checkpoint's, or its own."""
    if args.pipeline_dir is not None:
        return _read_pre_split(args.pipeline_dir.expanduser(), args.ranges, num_stages)
    model_dir = Path(args.model).expanduser()
    flags = hub.with_config_folder(flags, None)
    config = read_config(model_dir, flags)
    ranges = _choose_ranges(args.ranges, num_stages, read_model_shape(model_dir, flags).num_layers)
    check_kv(read_layout(config), ranges)
    return ranges, [model_dir] * len(ranges)


def _read_pre_split(
    pipeline_dir: Path, texts: Sequence[str] | None, num_stages: int | None
) -> tuple[tuple[LayerRange, ...], list[Path]]:
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
    return ranges, folders


def _choose_ranges(texts: Sequence[str] | None, num_stages: int | None, num_layers: int) -> tuple[LayerRange, ...]:
    if texts is None:
        return split_evenly(num_layers, DEFAULT_NUM_STAGES if num_stages is None else num_stages)
    ranges = tuple(LayerRange.parse(text) for text in texts)
    if num_stages not in (None, len(ranges)):
        raise ConfigError(
            f"--num-stages {num_stages} but --ranges has {len(ranges)}: give one of them, or the same number"
        )
    check_ranges(ranges, num_layers)
    return ranges


def _check_extra(args: argparse.Namespace, early: EarlyArguments) -> None:
    """Refuses what the launcher gives to each stage itself, and an address that is given twice."""
    twice = [flag for flag in ADDRESS_FLAGS if flag in early.typed and getattr(args, flag.strip("-"), None) is not None]
    for flag in [*(flag for flag in OWN_FLAGS if flag in early.typed), *twice]:
        raise ConfigError(f"{flag} after `--`: `stagewire up` sets it for each stage; see `stagewire up --help`")
