"""`vllm serve` of one stage, from its parsed flags to the process that serves. All stages start this way.

Owns the order of the checks. What is checked, and what serves, is in other modules.
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
from stagewire.checkpoint.adapter import check_roots
from stagewire.checkpoint.folder import read_checkpoint
from stagewire.checkpoint.kv_cache import check_own_kv
from stagewire.checkpoint.manifest import MANIFEST_NAME, check_files, read_manifest
from stagewire.checkpoint.model_config import CONFIG_NAME, PARAMS_NAME, LoadFlags, read_config, read_model_shape
from stagewire.checkpoint.ownership import describe_load, stage_bytes
from stagewire.config import StageConfig, is_external
from stagewire.errors import ConfigError, StagewireError
from stagewire.observe.status_events import LAUNCHER_SOCKET_ENV, HeadApi, Phase, StatusSender
from stagewire.observe.streams import keep_writing
from stagewire.plan.ranges import check_own_range
from stagewire.ring.transport.security import secure_stage
from stagewire.vllm_plugin.entry.flags import parse_flags
from stagewire.vllm_plugin.head.stopping import begin
from stagewire.vllm_plugin.seams import interfaces, versions

__all__ = ["announce_load", "with_stages"]

# A worker stage has no HTTP server. It refuses these flags, and only mentions other flags of the API server.
_ADDRESS_FLAGS = re.compile(r"--(host|port|uds|ssl-.*)")


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
    """Checks first what takes milliseconds, then imports vLLM and resolves its configuration, then loads weights.

    `original` starts the head's API server, which reads ``args`` again.
    """
    keep_writing()
    versions.check_version()
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    config = parse_flags(args)
    signals = begin(config.stage)
    status = StatusSender(config.stage)
    status.send(Phase.IMPORTING)
    _check_entry_point(config, args)
    if config.is_head:
        status.tell_api(_api_of(args))
    check_roots(config.lora_roots)
    secured = secure_stage(config)
    flags = hub.with_config_folder(LoadFlags.of(args), args.revision)
    _check_checkpoint(config, args, flags)

    vllm_config = _resolve(args)
    _check_model(config, vllm_config)
    if vllm_config.model_config.runner_type == "pooling":
        # For the API server; `StageWorker` does the same. This scoring caches queries on the last stage, which would
        # lose them in a restart.
        args.enable_flash_late_interaction = False
    _prepare_process(config, vllm_config)
    status.send(Phase.LOADING, announce_load(config, vllm_config.model_config.model, flags))

    if config.is_head:  # EngineCore owns the ring. It reads the key itself, so that no key is in vLLM's configuration
        from stagewire.vllm_plugin.head.api_server import serve_head

        serve_head(original, args, config, signals)
        return
    from stagewire.vllm_plugin.host.stage_host import serve_stage

    serve_stage(config, vllm_config, secured, status, signals)


def _check_model(config: StageConfig, vllm_config: Any) -> None:
    from stagewire.vllm_plugin.worker.checks import check_model

    check_model(config, vllm_config)


def _prepare_process(config: StageConfig, vllm_config: Any) -> None:
    """Sets the threads of a stage on CPU; says what is off on other devices.

    May replace a worker stage's process by a new one that has vLLM's CPU libraries preloaded.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        sys.stdout.write(f"Stage {config.stage}: async scheduling and the V2 model runner are off in external mode\n")
        return
    from stagewire.vllm_plugin.worker import cpu

    cpu.set_threads(config, vllm_config.parallel_config.tensor_parallel_size)
    if not config.is_head:
        cpu.reexec_with_libraries()


def _refuse_stage_alone(args: argparse.Namespace) -> None:
    """Raises ConfigError for a pre-split stage's folder without stage flags.

    vLLM would notice late that weights are missing, or never.
    """
    folder = Path(str(getattr(args, "model_tag", None) or getattr(args, "model", None) or ""))
    if (folder / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"{folder} is one stage of a pre-split model ({MANIFEST_NAME} is in it): add --pipeline-stage-mode "
            "external and its other flags, run `stagewire up --pipeline-dir` on the folder above, or serve the full "
            "checkpoint"
        )


def announce_load(config: StageConfig, model: str, flags: LoadFlags) -> str:
    """Prints ``Stage 0: Loading layers 0-7... (4.54 GB)``. Returns ``layers 0-7 (4.54 GB)``, for progress.

    Both lack the size where the checkpoint's tensors cannot be listed, as for a name on the hub.
    """
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
    """Compares the layer range with the model's configuration, and a folder's index with its files. Reads no weights.

    Raises:
        ConfigError: they do not fit.
    """
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
    """The folder of the hub's cache with the model's configuration, downloaded if need be. Raises ConfigError."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"there is no model folder {model}: give the path of a HuggingFace checkpoint, or a hub name")
    config = hub.find_file(model, revision, CONFIG_NAME) or hub.find_file(model, revision, PARAMS_NAME)
    if config is None:
        raise ConfigError(f"{model} on the hub has no {CONFIG_NAME}: give a model in HuggingFace format")
    return config.parent


def _resolve(args: argparse.Namespace) -> Any:
    """vLLM's whole configuration. Raises ConfigError for settings that vLLM refuses, before anything is started."""
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
    """One line. Pydantic's own text has several, and a link to its documentation."""
    from pydantic import ValidationError

    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return " ".join(text.split())


def _check_entry_point(config: StageConfig, args: argparse.Namespace) -> None:
    for name in ("headless", "grpc"):
        if getattr(args, name, False):
            raise ConfigError(f"--{name} cannot be combined with --pipeline-stage-mode external")
    if getattr(args, "config", None) is not None:  # vLLM removes a --config that it has read
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
    """Where and how the head will answer HTTP, by vLLM's parsed arguments. Holds the first of several API keys."""
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
    for field in dataclasses.fields(interfaces.frontend_args()):
        if field.name == "lora_modules":
            continue  # a worker stage uses it: it says where adapters lie on this machine
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if hasattr(args, field.name) and getattr(args, field.name) != default:
            ignored.append("--" + field.name.replace("_", "-"))
    if ignored:
        sys.stdout.write(f"Stage {config.stage}: ignored, because only stage 0 serves HTTP: {', '.join(ignored)}\n")
