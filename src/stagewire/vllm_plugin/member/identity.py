"""What a stage tells the others about itself, and what must be equal on all of them.

The values are those that vLLM has resolved, and not the flags. So two spellings of one setting agree, and defaults that
differ between stages do not. Table C5 of docs/design/vllm-seams.md has the reasons, and what may differ. The ring
compares the values; this module only collects them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Set
from pathlib import Path
from typing import Any

from stagewire.checkpoint import hub
from stagewire.checkpoint.files import CheckpointFiles, checkpoint_files
from stagewire.checkpoint.index import CheckpointIndex, config_fingerprint, fingerprint_of, read_tensors
from stagewire.checkpoint.manifest import check_place, check_samples, read_manifest
from stagewire.checkpoint.model_config import CONFIG_NAME, PARAMS_NAME, LoadFlags
from stagewire.checkpoint.samples import sample_weights
from stagewire.config import StageConfig
from stagewire.ring.ring import new_incarnation
from stagewire.ring.rules.admission import EXPORT_SETTING, MODEL_SETTING, WEIGHTS_SETTING
from stagewire.version import __version__
from stagewire.vllm_plugin.loading.load_formats import asked_load_format
from stagewire.vllm_plugin.worker.speculation import describe_speculation
from stagewire.wire.messages import StageIdentity

__all__ = ["identify_model", "make_identity"]

logger = logging.getLogger("vllm.stagewire")

_CONFIG = "configuration of the model"


def make_identity(config: StageConfig, vllm_config: Any) -> StageIdentity:
    """The identity of this process as one stage of the pipeline.

    Raises ``ConfigError`` for a pre-split stage's folder that is damaged, or that belongs to another stage than
    ``config``.
    """
    return StageIdentity(
        stage=config.stage,
        num_stages=config.num_stages,
        layer_start=config.layers.start,
        layer_end=config.layers.end,
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
        incarnation=new_incarnation(),
        pipeline_id=config.pipeline_id or "",
        shared={name: str(value) for name, value in _shared(config, vllm_config).items()},
    )


def _shared(config: StageConfig, vllm_config: Any) -> dict[str, Any]:
    """Setting to value. The names appear in refusals, so they are flags where there is one."""
    from vllm.version import __version__ as vllm_version

    model, cache, scheduler = vllm_config.model_config, vllm_config.cache_config, vllm_config.scheduler_config
    return {
        **identify_model(config, model, _load_flags(vllm_config)),
        "vLLM version": vllm_version.partition("+")[0],
        "Stagewire version": __version__,
        "--dtype": str(model.dtype).removeprefix("torch."),
        "--quantization": model.quantization,
        "--max-model-len": model.max_model_len,
        "--block-size": cache.block_size,
        "--enable-prefix-caching": cache.enable_prefix_caching,
        "--max-num-seqs": scheduler.max_num_seqs,
        "--max-num-batched-tokens": scheduler.max_num_batched_tokens,
        "--seed": model.seed,
        "--logprobs-mode": model.logprobs_mode,
        "--logits-processors": model.logits_processors,
        "--reasoning-parser": vllm_config.structured_outputs_config.reasoning_parser,
        "--mamba-cache-mode": cache.mamba_cache_mode,
        "--hf-overrides": json.dumps(model.hf_overrides, sort_keys=True, default=_by_name),
        "--use-fp64-gumbel": model.use_fp64_gumbel,
        "--disable-sliding-window": model.disable_sliding_window,
        "--reasoning-config": vllm_config.reasoning_config,
        "--speculative-config": describe_speculation(vllm_config),
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        # Also true if the limits of all kinds of items are 0. Read before `drop_towers` changes the settings.
        "--language-model-only": model.multimodal_config is not None and not model.supports_multimodal_inputs,
        "--runner": model.runner_type,
        "--convert": model.convert_type,
        "--pooler-config": _fields(model.pooler_config, without={"enable_flash_late_interaction"}),
        "--enable-lora": _fields(vllm_config.lora_config),
    }


def _fields(settings: Any, without: Set[str] = frozenset()) -> str:
    """One of vLLM's dataclasses of settings as text; "off" for None."""
    if settings is None:
        return "off"
    names = [field.name for field in dataclasses.fields(settings) if field.name not in without]
    return ", ".join(f"{name}={getattr(settings, name)}" for name in names)


def _by_name(value: Any) -> str:
    """A callable override by its name, which is the same on every stage."""
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else str(value)


def _load_flags(vllm_config: Any) -> LoadFlags:
    model = vllm_config.model_config
    flags = hub.with_config_folder(LoadFlags.of(model), model.revision)
    return dataclasses.replace(flags, load_format=asked_load_format(str(vllm_config.load_config.load_format)))


def identify_model(config: StageConfig, model: Any, flags: LoadFlags | None = None) -> dict[str, str]:
    """Hashes of the model's configuration, of the weights' headers and of samples of their values.

    Stages may keep the checkpoint under different paths. A pre-split stage has the hashes of its source, so it may join
    stages that load the full checkpoint. A value that this stage cannot tell is empty.

    Raises ``ConfigError`` as ``make_identity`` does.
    """
    path = Path(model.model)
    if not path.is_dir():
        # The commit is enough: the hub's client has compared every file with the commit's hashes.
        return {MODEL_SETTING: _hub_commit(model), _CONFIG: "", WEIGHTS_SETTING: "", EXPORT_SETTING: ""}
    manifest, configuration = read_manifest(path), config_fingerprint(path, flags)
    files = checkpoint_files(path, flags.load_format if flags else "auto")
    if manifest is None and files.missing:
        logger.warning(
            "Stage %d: %s lacks %d of its weight files: it cannot be told whether the other stages have the same "
            "model, only whether they have the same configuration",
            config.stage,
            path,
            len(files.missing),
        )
        return {MODEL_SETTING: "", _CONFIG: configuration, WEIGHTS_SETTING: "", EXPORT_SETTING: ""}
    index = read_tensors(files)
    own = _sample(config.stage, files, index)
    if manifest is None:
        whole = fingerprint_of(files, index, flags)
        return {MODEL_SETTING: whole, _CONFIG: configuration, WEIGHTS_SETTING: own, EXPORT_SETTING: ""}
    check_place(manifest, path, config.stage, config.num_stages, config.layers)
    check_samples(path, manifest, own)
    if not manifest.source_samples:
        logger.warning(
            "Stage %d: %s was exported before exports had samples of the weights' values: it cannot be told whether "
            "stages that load a full checkpoint have the same; export it again",
            config.stage,
            path,
        )
    return {
        MODEL_SETTING: manifest.source_fingerprint,
        _CONFIG: configuration,
        WEIGHTS_SETTING: manifest.source_samples,
        EXPORT_SETTING: manifest.export_id,
    }


def _sample(stage: int, files: CheckpointFiles, index: CheckpointIndex | None) -> str:
    samples = sample_weights(files, index)
    if samples.blank:
        first = samples.blank[0]
        logger.warning(
            "Stage %d: %s holds nothing but zeros wherever it was looked at for %d large tensors, the first of them "
            "%s: is the copy complete?",
            stage,
            files.folder / first.file,
            len(samples.blank),
            first.name,
        )
    return samples.digest


def _hub_commit(model: Any) -> str:
    """Name and commit, because a branch may have moved between two stages' downloads."""
    names = (CONFIG_NAME, PARAMS_NAME)
    config = next(filter(None, (hub.find_file(model.model, model.revision, name) for name in names)), None)
    return f"{model.model}@{config.parent.name if config else model.revision}"
