"""What vLLM's models need to be cut into stages, beyond what they do by themselves.

Stock pipeline parallelism has these faults too; the records with reasons are in seams/. Applied by each stage's
process before its model is built.
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
    """Those of this model. Raises ConfigError when a target is not what it was."""
    mend_missing_layers()
    mend_tied_heads()
    if model_config.using_transformers_backend():
        mend_transformers_backend()
    if model_config.architecture.startswith("Gemma4"):
        mend_gemma4()


def drop_towers(vllm_config: Any) -> None:
    """On every stage but the head: no encoder, no processor and no profiling of them, by vLLM's own means.

    A limit of no items per prompt makes a model leave out the towers that it has marked as such. Set here and not as an
    argument, which would tell vLLM that images never come: then it turns off what images need in every layer. Models
    whose images attend in both directions look at the limits once more when they are built, and so keep their towers.
    """
    model = vllm_config.model_config
    if model.multimodal_config is None or not model.supports_multimodal_inputs or model.is_mm_prefix_lm:
        return
    limits = MULTIMODAL_REGISTRY.get_processing_info(model).supported_mm_limits
    config = copy.copy(model.multimodal_config)
    config.limit_per_prompt = type(config.limit_per_prompt)({modality: BaseDummyOptions(0) for modality in limits})
    config.enable_mm_embeds = False
    model.multimodal_config = config
