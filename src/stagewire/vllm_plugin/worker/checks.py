"""Whether stages can serve a model with the settings that it was given."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from stagewire.config import StageConfig
from stagewire.errors import ConfigError
from stagewire.plan.ranges import check_own_range
from stagewire.vllm_plugin.seams import interfaces
from stagewire.vllm_plugin.worker.speculation import check_speculation

__all__ = ["check_inputs", "check_model"]


def check_model(config: StageConfig, vllm_config: VllmConfig) -> None:
    """Refuses a model that stages cannot serve.

    vLLM refuses a model without pipeline support earlier, by its own check of ``pipeline_parallel_size``.

    Raises:
        ConfigError: the ring does not carry this kind of model or one of its settings, or the layer range does not fit.
    """
    model = vllm_config.model_config
    if model.is_encoder_decoder:
        raise ConfigError(f"{model.architecture} is an encoder-decoder model: its encoder would run on every stage")
    check_speculation(vllm_config)
    check_inputs(config, vllm_config)
    if interfaces.returns_routed_experts(vllm_config):
        raise ConfigError("--enable-return-routed-experts: routed experts are not carried between stages yet")
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if vllm_config.lora_config is not None and ranks > 1:
        raise ConfigError(
            f"--enable-lora with --tensor-parallel-size {ranks}: adapters are not cut over a stage's ranks yet; give "
            "every stage one rank"
        )
    if vllm_config.lora_config is not None and vllm_config.speculative_config is not None:
        raise ConfigError(
            "--enable-lora with --speculative-config: drafts with adapters were not shown to be right yet"
        )
    if vllm_config.lora_config is not None and model.runner_type == "pooling":
        raise ConfigError("--enable-lora: adapters of pooling models are not carried between stages yet")
    if model.runner_type not in ("generate", "pooling"):
        raise ConfigError(f"--runner {model.runner_type}: stages serve generation and pooling models")
    check_own_range(config.stage, config.num_stages, config.layers, model.get_total_num_hidden_layers())


def check_inputs(config: StageConfig, vllm_config: Any) -> None:
    """Raises ConfigError for a head of several ranks whose requests may bring images or embeddings of prompts.

    Every rank of the first stage embeds the prompt. The followers get the encoded schedule, which carries neither.
    """
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    if not config.is_head or num_ranks == 1:
        return
    model = vllm_config.model_config
    own = f"--tensor-parallel-size {num_ranks} on stage 0"
    if model.enable_prompt_embeds:
        raise ConfigError(
            f"--enable-prompt-embeds with {own}: its other ranks are not given the vectors yet; "
            "give --tensor-parallel-size 1 there (other stages may have more), or drop --enable-prompt-embeds"
        )
    if model.supports_multimodal_inputs:
        raise ConfigError(
            f"{model.architecture} takes images or other items, with {own}: its other ranks are not given the items "
            "yet; give --tensor-parallel-size 1 there (other stages may have more), or --language-model-only everywhere"
        )
