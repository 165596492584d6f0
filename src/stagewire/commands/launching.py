"""What `stagewire up` and `stagewire front` share: the arguments about stages, and what is printed around a launch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from stagewire.commands.usage import usage
from stagewire.launch.api import Api, Served
from stagewire.launch.decision import AUTO, DEFAULT_NUM_STAGES, Wanted
from stagewire.launch.spec import Launch
from stagewire.launch.supervisor import Screen
from stagewire.plan.ranges import PARTITION_ENV

__all__ = ["add_launch_arguments", "announce", "describe_serving", "read_wanted"]


def add_launch_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """What `read_wanted` reads. Returns the group that says where the stages come from."""
    parser.set_defaults(vllm_arguments=())  # what follows `--`
    model, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    model.add_argument("--model", metavar="PATH", help="folder with config.json and the weights")
    pre_split = "output folder of `stagewire export`: one folder for each stage"
    model.add_argument("--pipeline-dir", type=Path, metavar="PATH", help=pre_split)
    as_many = f"default: {DEFAULT_NUM_STAGES}, or as many as ranges; {AUTO}: as many as the visible GPUs are enough for"
    add("--num-stages", type=_number_or_auto, metavar="N", help=as_many)
    layers = "each stage's layers, END not included; default: vLLM's own split"
    add("--ranges", nargs="+", metavar="START-END", help=layers)
    ports = "stage i binds this port + i (default: %(default)s)"
    add("--base-port", type=int, default=Wanted.base_port, help=ports)
    logs = "default: ./%(default)s, or the next free one of that name while another launcher has it"
    add("--log-dir", type=Path, default=Wanted.log_dir, help=logs)
    patience = "since a stage that loads last got on; default: %(default)g seconds"
    add("--start-timeout", type=float, default=Wanted.start_timeout_s, metavar="S", help=patience)
    restarts = (
        "how often in a row a stage that ends while serving is started again, or its standby takes over; "
        "0: never, the others are stopped; a standby still takes over once (default: %(default)s)"
    )
    add("--restarts", type=int, default=Wanted.max_restarts, metavar="N", help=restarts)
    standby = "load every stage but the head a second time, on the same device, to take over when the first one ends"
    add("--standby", action="store_true", help=standby)
    return model


def _number_or_auto(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: expected a number, or {AUTO}") from error


def read_wanted(args: argparse.Namespace, host: str | None, port: int | None) -> Wanted:
    """What was typed about stages. ``host``, ``port``: of the head's API."""
    return Wanted(
        model=args.model,
        pipeline_dir=args.pipeline_dir,
        num_stages=args.num_stages,
        ranges=args.ranges,
        base_port=args.base_port,
        log_dir=args.log_dir,
        start_timeout_s=args.start_timeout,
        max_restarts=args.restarts,
        has_standbys=args.standby,
        host=host,
        port=port,
        vllm_arguments=tuple(args.vllm_arguments),
    )


def announce(launch: Launch, screen: Screen) -> None:
    """The first lines: what is started, and where its logs are."""
    layers = ", ".join(str(spec.layers) for spec in launch.specs)
    note = f" ({launch.logs.note})" if launch.logs.note else ""
    screen.say(f"{launch.source}: layers {layers} on {len(launch.specs)} stages; logs in {launch.logs.path}{note}")
    if partition := os.environ.get(PARTITION_ENV):
        screen.say(f"{PARTITION_ENV}={partition} in the environment is not used: --ranges says which layers each has")


def describe_serving(launch: Launch, api: Api, served: Served) -> str:
    """What to copy once it serves. ``api``: where clients ask."""
    where = f"Logs in {launch.logs.path}{os.sep}stage_*.log. Ctrl-C stops everything."
    return f"{usage(api, served, launch.has_chat_template or api.has_chat_template)}\n{where}"
