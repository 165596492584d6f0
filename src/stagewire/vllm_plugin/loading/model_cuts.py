"""Prepares vLLM's models to be cut into stages.

Each process that runs layers applies this before its model is built. Stock pipeline parallelism has the same faults;
the patches and their reasons are in seams/.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.config.multimodal import BaseDummyOptions
from vllm.multimodal import MULTIMODAL_REGISTRY

from stagewire.vllm_plugin.seams.gemma4 import mend_gemma4
from stagewire.vllm_plugin.seams.missing_layers import mend_missing_layers
from stagewire.vllm_plugin.seams.tied_heads import mend_tied_heads
from stagewire.vllm_plugin.seams.transformers_backend import mend_transformers_backend

__all__ = ["drop_towers", "install"]


def install(model_config: Any) -> None:
    """Installs the patches that this model needs. Raises ConfigError when a patch's target has moved."""
    mend_missing_layers()
    mend_tied_heads()
    if model_config.using_transformers_backend():
        mend_transformers_backend()
    if model_config.architecture.startswith("Gemma4"):
        mend_gemma4()


def drop_towers(vllm_config: Any) -> None:
    """Leaves the encoders of images and other items out of every stage but the head, by vLLM's own means.

    With a limit of 0 items per prompt, a model does not build its towers, and vLLM neither processes items nor profiles
    encoders. The limit is not set as an argument: vLLM would then resolve a text model, without what images need in
    every layer. Models whose images attend in both directions read the limits again when they are built, so they keep
    their towers.
    """
    model = vllm_config.model_config
    if model.multimodal_config is None or not model.supports_multimodal_inputs or model.is_mm_prefix_lm:
        return
    limits = MULTIMODAL_REGISTRY.get_processing_info(model).supported_mm_limits
    config = copy.copy(model.multimodal_config)
    config.limit_per_prompt = type(config.limit_per_prompt)({modality: BaseDummyOptions(0) for modality in limits})
    config.enable_mm_embeds = False
    model.multimodal_config = config
