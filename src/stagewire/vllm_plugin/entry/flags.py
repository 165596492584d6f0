"""The --pipeline flags on vLLM's command line: what they are, and what happens when they are used.

`with_flags` and `with_translation` wrap two functions of vLLM; seams/command_line.py says which and why. The rules that
the flags must keep are in stagewire.config.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagewire.checkpoint.adapter import ROOT_FLAG
from stagewire.checkpoint.manifest import check_place, read_manifest
from stagewire.config import (
    ALLOW_INSECURE_FLAG,
    DEFAULT_RECOVERY_TIMEOUT_S,
    DEFAULT_START_TIMEOUT_S,
    DEFAULT_STEP_TIMEOUT_S,
    KEY_FILE_FLAG,
    StageConfig,
    is_external,
    parse_stage,
)
from stagewire.errors import ConfigError
from stagewire.vllm_plugin.seams import versions

__all__ = ["parse_flags", "with_flags", "with_translation"]


def add_flags(parser: Any) -> None:
    group = parser.add_argument_group(
        title="Stagewire",
        description="One stage of a pipeline of independent vLLM processes, joined over ZeroMQ.",
    )
    add = group.add_argument
    add(
        "--pipeline-stage-mode",
        choices=["external"],
        default=None,
        help="external: this process is one stage of a pipeline; every stage is started by itself, in any order.",
    )
    add("--pipeline-stage-idx", type=int, help="Index of this stage, from 0 (the head, which serves the API).")
    add("--pipeline-total-stages", type=int, help="How many stages the pipeline has.")
    add(
        "--pipeline-layer-range",
        help="Layers of this stage, half-open: 8-16 is layers 8 to 15. A pre-split stage's folder has its own.",
    )
    add(
        "--pipeline-local-bind-port",
        type=int,
        help="Port on which the next stage reaches this one. Stages of one host may share it.",
    )
    add("--pipeline-local-bind-host", help="Address to listen on. Default: the interface that reaches the predecessor.")
    add("--pipeline-prev-stage-addr", help="HOST:PORT of the predecessor; for stage 0 that is the last stage.")
    add("--pipeline-prev-stage-service-addr", help="Same as --pipeline-prev-stage-addr; either works on any stage.")
    add(
        "--external-pp-worker",
        action="store_true",
        default=False,
        help="This stage has no API: required on every stage but 0.",
    )
    add("--pipeline-id", help="Name of the pipeline, to tell several on one port apart. Same on all stages.")
    add(
        "--pipeline-start-timeout",
        type=float,
        help=f"Seconds to wait for the other stages at start. Default: {DEFAULT_START_TIMEOUT_S}.",
    )
    add(
        "--pipeline-step-timeout",
        type=float,
        help=f"Seconds after which a step that has not come back is given up, and its slowest stage ended. Default: "
        f"{DEFAULT_STEP_TIMEOUT_S}.",
    )
    add(
        "--pipeline-recovery-timeout",
        type=float,
        help="Seconds that requests wait for a lost stage to come back, and a stage for a lost head. Default: "
        f"{DEFAULT_RECOVERY_TIMEOUT_S}.",
    )
    add(
        "--pipeline-health-port",
        type=int,
        help="Port on which a stage without an API answers /live, /health and /ready. Default: none.",
    )
    add(
        "--pipeline-standby",
        action="store_true",
        default=False,
        help="Load this stage's layers and wait until the process that has its port, on this host, ends; then take its "
        "place.",
    )
    add(
        ROOT_FLAG,
        action="extend",
        nargs="+",
        help="Folders of this machine below which a stage without API may read LoRA adapters; stage 0 needs none.",
    )
    add(
        KEY_FILE_FLAG,
        metavar="PATH",
        help="The ring's key, made by `stagewire keys`: encrypts and authenticates all connections between stages. The "
        "same on all stages. Between hosts always give one; stages of one user on loopback need none.",
    )
    add(
        ALLOW_INSECURE_FLAG,
        action="store_true",
        default=False,
        help="Without a key, use addresses beyond private networks too. Whoever reaches them can read everything.",
    )


def with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        return parser

    return add_cli_args


def with_translation(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        if is_external(vars(args)):
            from stagewire.vllm_plugin.entry.external_mode import apply_external_mode
            from stagewire.vllm_plugin.entry.llm_head import prepare_engine

            versions.check_version()
            config = parse_flags(args)
            if getattr(args, "subparser", None) != "serve":
                if not config.is_head:
                    raise ConfigError("--external-pp-worker works with `vllm serve` only")
                prepare_engine()
            apply_external_mode(engine_args, config)
        return engine_args

    return from_cli_args


def parse_flags(args: argparse.Namespace) -> StageConfig:
    """The stage's settings. The manifest of a pre-split stage's folder gives the layer range if no flag does.

    Raises:
        ConfigError: a flag is wrong, or the folder is of another stage.
    """
    flags = vars(args)
    folder = Path(str(flags.get("model") or ""))
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        return parse_stage(flags)
    config = parse_stage({**flags, "pipeline_layer_range": flags.get("pipeline_layer_range") or str(manifest.layers)})
    check_place(manifest, folder, config.stage, config.num_stages, config.layers)
    return config
