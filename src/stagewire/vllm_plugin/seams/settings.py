"""Carries a stage's settings to every process of vLLM, in ``vllm_config.additional_config["stagewire"]``.

vLLM hashes `additional_config` as JSON into the key of its compile cache. So the dictionary holds only what changes
the compiled graph. Ports, addresses and ids are in an attribute, which JSON leaves out.
"""

from __future__ import annotations

from typing import Any

from stagewire.config import StageConfig

__all__ = ["KEY", "RingSettings"]

KEY = "stagewire"


class RingSettings(dict[str, Any]):
    """The dictionary has the stage, the number of stages and the layer range. ``config`` has all settings."""

    config: StageConfig

    @classmethod
    def of(cls, config: StageConfig) -> RingSettings:
        settings = cls(stage=config.stage, num_stages=config.num_stages, layers=str(config.layers))
        settings.config = config
        return settings

    @staticmethod
    def read(vllm_config: Any) -> StageConfig:
        """The stage's config. Raises KeyError outside external mode."""
        settings = vllm_config.additional_config[KEY]
        assert isinstance(settings, RingSettings)
        return settings.config
