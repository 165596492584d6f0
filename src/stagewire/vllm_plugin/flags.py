"""The --pipeline flags on vLLM's command line: what they are, and what happens when they are used.

`with_*` wrap three functions of vLLM (compat.py says which and why).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagewire.checkpoint import hub
from stagewire.checkpoint.adapter import ROOT_FLAG, check_roots
from stagewire.checkpoint.folder import read_checkpoint
from stagewire.checkpoint.kv_cache import check_own_kv
from stagewire.checkpoint.manifest import MANIFEST_NAME, check_files, check_place, read_manifest
from stagewire.checkpoint.model_config import CONFIG_NAME, PARAMS_NAME, LoadFlags, read_config, read_model_shape
from stagewire.checkpoint.ownership import describe_load, stage_bytes
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
from stagewire.errors import ConfigError, StagewireError
from stagewire.observe.status import LAUNCHER_SOCKET_ENV, HeadApi, Phase, StatusSender
from stagewire.observe.streams import keep_writing
from stagewire.plan.ranges import check_own_range
from stagewire.ring.transport.security import secure_stage
from stagewire.vllm_plugin import compat
from stagewire.vllm_plugin.stopping import begin

__all__ = ["announce_load", "with_flags", "with_stages", "with_translation"]

# On a worker's command line these are a mistake (it has no HTTP server); other API flags only do nothing there.
_ADDRESS_FLAGS = re.compile(r"--(host|port|uds|ssl-.*)")


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
            from stagewire.vllm_plugin.engine_args import apply_external_mode
            from stagewire.vllm_plugin.offline import prepare_engine

            compat.check_version()
            config = _parse_stage(args)
            if getattr(args, "subparser", None) != "serve":
                if not config.is_head:
                    raise ConfigError("--external-pp-worker works with `vllm serve` only")
                prepare_engine()
            apply_external_mode(engine_args, config)
        return engine_args

    return from_cli_args


def with_stages(original: Callable[..., Any]) -> Callable[..., Any]:
    def cmd(args: argparse.Namespace) -> None:
        try:
            if not is_external(vars(args)):
                _refuse_stage_alone(args)
                original(args)
                return
            _serve(original, args)
        except StagewireError as error:
            _die(vars(args).get("pipeline_stage_idx"), error)

    return cmd


def _die(stage: int | None, error: StagewireError) -> None:
    sys.stderr.write(f"{'Stagewire' if stage is None else f'Stage {stage}'}: {error}\n")
    if stage is not None:
        StatusSender(stage).send(Phase.FAILED, str(error), error.exit_code)
    sys.stderr.flush()
    sys.exit(error.exit_code)


def _serve(original: Callable[..., Any], args: argparse.Namespace) -> None:
    keep_writing()
    compat.check_version()
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    config = _parse_stage(args)
    signals = begin(config.stage)
    status = StatusSender(config.stage)
    status.send(Phase.IMPORTING)
    _check_entry_point(config, args)
    if config.is_head:
        status.tell_api(_api_of(args))
    check_roots(config.lora_roots)
    secure_stage(config)
    flags = hub.with_config_folder(LoadFlags.of(args), args.revision)
    _check_checkpoint(config, args, flags)
    vllm_config = _resolve(args)
    from stagewire.vllm_plugin.stage_worker import check_model

    check_model(config, vllm_config)
    if vllm_config.model_config.runner_type == "pooling":
        # Scoring in the API server: queries cached on the last stage would be lost with it.
        args.enable_flash_late_interaction = False
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from stagewire.vllm_plugin import cpu

        cpu.set_threads(config, vllm_config.parallel_config.tensor_parallel_size)
        if not config.is_head:
            cpu.reexec_with_libraries()
    else:
        sys.stdout.write(f"Stage {config.stage}: async scheduling and the V2 model runner are off in external mode\n")
    text = announce_load(config, vllm_config.model_config.model, flags)
    status.send(Phase.LOADING, text)
    if config.is_head:
        from stagewire.vllm_plugin.head import serve_head

        serve_head(original, args, config, signals)
        return
    from stagewire.vllm_plugin.stage_host import serve_stage

    serve_stage(config, vllm_config, status, signals)


def _parse_stage(args: argparse.Namespace) -> StageConfig:
    """The flags, and for a pre-split stage's folder what its manifest says of the layers."""
    flags = vars(args)
    folder = Path(str(flags.get("model") or ""))
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        return parse_stage(flags)
    config = parse_stage({**flags, "pipeline_layer_range": flags.get("pipeline_layer_range") or str(manifest.layers)})
    check_place(manifest, folder, config.stage, config.num_stages, config.layers)
    return config


def _refuse_stage_alone(args: argparse.Namespace) -> None:
    """A stage's folder without a stage's flags: vLLM would only find out that weights are missing, if at all."""
    folder = Path(str(getattr(args, "model_tag", None) or getattr(args, "model", None) or ""))
    if (folder / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"{folder} is one stage of a pre-split model ({MANIFEST_NAME} is in it): add --pipeline-stage-mode "
            "external and its other flags, run `stagewire up --pipeline-dir` on the folder above, or serve the full "
            "checkpoint"
        )


def announce_load(config: StageConfig, model: str, flags: LoadFlags) -> str:
    """Prints the stage's line (``Stage 0: Loading layers 0-7... (4.54 GB)``); returns its short form for progress."""
    path = Path(model)
    is_read = path.is_dir() and flags.reads_whole_checkpoints
    checkpoint = read_checkpoint(path, flags, layers=config.layers) if is_read else None
    if checkpoint is None or checkpoint.index is None:
        line = f"Stage {config.stage}: Loading {config.layers.describe()}..."
        short = config.layers.describe()
    else:
        num_bytes = stage_bytes(checkpoint.index, checkpoint.shape, config.layers)
        line = describe_load(config.stage, config.layers, num_bytes)
        short = f"{config.layers.describe()} ({num_bytes / 1e9:.2f} GB)"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    return short


def _check_checkpoint(config: StageConfig, args: argparse.Namespace, flags: LoadFlags) -> None:
    """The range against the configuration, and a folder's index against its files, in a moment and before vLLM."""
    path = Path(args.model)
    folder = path if path.is_dir() else _hub_folder(args.model, args.revision)
    if folder is not path and not (folder / CONFIG_NAME).is_file():
        flags = dataclasses.replace(flags, config_format="mistral")
    manifest = read_manifest(folder)
    if manifest is not None:
        check_files(folder, manifest)
    check_own_range(config.stage, config.num_stages, config.layers, read_model_shape(folder, flags).num_layers)
    problems = check_own_kv(read_config(folder, flags), config.layers)
    if problems:
        raise ConfigError(
            f"stage {config.stage} cannot run --pipeline-layer-range {config.layers}: {'; '.join(problems)}; "
            f"`stagewire plan --model {args.model} --num-stages {config.num_stages}` gives a split that works"
        )
    if folder is path and flags.reads_whole_checkpoints:
        for warning in read_checkpoint(path, flags, layers=config.layers).warnings:
            sys.stdout.write(f"Stage {config.stage}: warning: {warning}\n")


def _hub_folder(model: str, revision: str | None) -> Path:
    """Where the cache has config.json of a name on a model hub."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"there is no model folder {model}: give the path of a HuggingFace checkpoint, or a hub name")
    config = hub.find_file(model, revision, CONFIG_NAME) or hub.find_file(model, revision, PARAMS_NAME)
    if config is None:
        raise ConfigError(f"{model} on the hub has no {CONFIG_NAME}: give a model in HuggingFace format")
    return config.parent


def _resolve(args: argparse.Namespace) -> Any:
    """vLLM's whole configuration, so that everything a stage can know alone is refused before anything starts."""
    from vllm.usage.usage_lib import UsageContext

    from vllm import AsyncEngineArgs

    engine_args = AsyncEngineArgs.from_cli_args(args)
    try:
        return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except (ValueError, NotImplementedError, OSError) as error:
        if isinstance(error, StagewireError):
            raise
        raise ConfigError(f"vLLM does not accept these settings: {_first_reason(error)}") from error


def _first_reason(error: Exception) -> str:
    """One line; pydantic's own text has several, with a link to its documentation."""
    from pydantic import ValidationError

    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return " ".join(text.split())


def _check_entry_point(config: StageConfig, args: argparse.Namespace) -> None:
    for name in ("headless", "grpc"):
        if getattr(args, name, False):
            raise ConfigError(f"--{name} cannot be combined with --pipeline-stage-mode external")
    if getattr(args, "config", None) is not None:  # vLLM takes the words from its command line once it has read it
        raise ConfigError(f"vLLM does not read --config={args.config} written like this: write --config {args.config}")
    if (getattr(args, "api_server_count", None) or 1) != 1:
        raise ConfigError("--api-server-count: the head has one API server")
    if config.is_head:
        return
    typed = [arg.partition("=")[0].replace("_", "-") for arg in sys.argv[1:] if arg.startswith("--")]
    wrong = [flag for flag in typed if _ADDRESS_FLAGS.fullmatch(flag)]
    if wrong and LAUNCHER_SOCKET_ENV not in os.environ:  # a launcher gives all stages the same arguments
        raise ConfigError(
            f"{', '.join(wrong)} on stage {config.stage}: only stage 0 serves HTTP; drop it here, or give it to stage 0"
        )
    _mention_ignored(config, args)


def _api_of(args: argparse.Namespace) -> HeadApi:
    """As vLLM's API server will read them; the first of several keys."""
    keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
    return HeadApi(
        host=args.host or "",
        port=args.port,
        uds=args.uds or "",
        is_tls=bool(args.ssl_certfile),
        needs_client_certificate=args.ssl_cert_reqs == ssl.CERT_REQUIRED,
        api_key=keys[0] if keys else "",
        has_chat_template=args.chat_template is not None,
        drain_s=float(args.shutdown_timeout or 0),
    )


def _mention_ignored(config: StageConfig, args: argparse.Namespace) -> None:
    ignored = []
    for field in dataclasses.fields(compat.frontend_args()):
        if field.name == "lora_modules":
            continue  # they say where this stage reads adapters
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if hasattr(args, field.name) and getattr(args, field.name) != default:
            ignored.append("--" + field.name.replace("_", "-"))
    if ignored:
        sys.stdout.write(f"Stage {config.stage}: ignored, because only stage 0 serves HTTP: {', '.join(ignored)}\n")
