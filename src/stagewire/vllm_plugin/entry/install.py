"""Hooks Stagewire into vLLM's command line."""

from __future__ import annotations

from stagewire.vllm_plugin.entry.flags import with_flags, with_translation
from stagewire.vllm_plugin.entry.serve import with_stages
from stagewire.vllm_plugin.seams import command_line

__all__ = ["install_flag_patches"]


def install_flag_patches() -> None:
    """Called in every vLLM process; patches those with a command line. Never raises."""
    command_line.install(with_flags, with_translation, with_stages)
