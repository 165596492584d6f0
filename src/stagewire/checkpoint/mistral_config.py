"""Translates params.json of Mistral's own format to the keys of config.json, as far as a plan needs them. Pure.

Follows ``adapt_config_dict`` of vLLM 0.32 (transformers_utils/configs/mistral.py). Keys that only the computation
needs, such as those of a vision tower, keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["from_params"]

_RENAMED = {
    "dim": "hidden_size",
    "norm_eps": "rms_norm_eps",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "tied_embeddings": "tie_word_embeddings",
}
_DEFAULTS = {
    "model_type": "transformer",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 128_000,
}
_RENAMED_EXPERTS = {"num_experts": "n_routed_experts", "expert_hidden_dim": "moe_intermediate_size"}


def from_params(params: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of ``params`` (params.json). ``defaults`` (a config.json beside it) fill in missing keys."""
    config = {**_DEFAULTS, **{_RENAMED.get(key, key): value for key, value in params.items()}}
    windows = config.get("sliding_window")
    if isinstance(windows, list) and windows:
        words = ["full_attention" if window is None else "sliding_attention" for window in windows]
        config["layer_types"] = words * (int(config.get("num_hidden_layers") or 0) // len(words))
        config["sliding_window"] = next((window for window in windows if window is not None), None)
    if isinstance(quantization := config.pop("quantization", None), dict):
        config["quantization_config"] = quantization
    config = _with_architecture(config)
    multimodal = config.get("multimodal") or {}
    if config.get("vision_encoder") or multimodal.get("vision_encoder_args"):
        config = _nested(config, "pixtral", "PixtralForConditionalGeneration")
    elif (multimodal.get("whisper_model_args") or {}).get("encoder_args"):
        config = _nested(config, "voxtral", "VoxtralForConditionalGeneration")
    return {**defaults, **config}


def _with_architecture(config: dict[str, Any]) -> dict[str, Any]:
    experts = config.get("moe") or {}
    if config["model_type"] == "mamba":
        return {**config, "architectures": ["Mamba2ForCausalLM"]}
    if experts.get("num_shared_experts"):
        renamed = {_RENAMED_EXPERTS.get(key, key): value for key, value in experts.items()}
        return {**config, **renamed, "model_type": "deepseek_v3", "architectures": ["MistralLarge3ForCausalLM"]}
    return {**config, "architectures": ["MixtralForCausalLM" if experts else "MistralForCausalLM"]}


def _nested(config: dict[str, Any], model_type: str, architecture: str) -> dict[str, Any]:
    outer: dict[str, Any] = {
        key: config[key] for key in ("quantization_config", "tie_word_embeddings") if key in config
    }
    return {"model_type": model_type, "architectures": [architecture], "text_config": config, **outer}
