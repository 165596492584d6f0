"""Which of vLLM's load formats the range loader stands in for, and the names under which vLLM knows it."""

from __future__ import annotations

__all__ = ["LOAD_FORMAT", "OWN_LOAD_FORMATS", "REPLACED_LOAD_FORMATS", "asked_load_format"]

# vLLM reads whole checkpoints in these; other formats are somebody's choice. vllm_plugin/range_loader.py chooses the
# same files by them, so each has a name of its own there.
LOAD_FORMAT = "stagewire"

REPLACED_LOAD_FORMATS = ("auto", "hf", "safetensors", "mistral")

OWN_LOAD_FORMATS = {name: LOAD_FORMAT if name == "auto" else f"{LOAD_FORMAT}_{name}" for name in REPLACED_LOAD_FORMATS}


def asked_load_format(load_format: str) -> str:
    """The load format that somebody asked for, from the one that external mode has set."""
    return next((name for name, own in OWN_LOAD_FORMATS.items() if own == load_format), load_format)
