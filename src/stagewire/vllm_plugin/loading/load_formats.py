"""The load formats of vLLM that the range loader replaces, and the names by which vLLM finds that loader."""

from __future__ import annotations

__all__ = ["LOAD_FORMAT", "OWN_LOAD_FORMATS", "REPLACED_LOAD_FORMATS", "asked_load_format"]

# vLLM reads whole checkpoints in the replaced formats; other formats are left to vLLM. loading/range_loader.py chooses
# files by the format that was asked for, so each replaced format has a name of its own.
LOAD_FORMAT = "stagewire"

REPLACED_LOAD_FORMATS = ("auto", "hf", "safetensors", "mistral")

OWN_LOAD_FORMATS = {name: LOAD_FORMAT if name == "auto" else f"{LOAD_FORMAT}_{name}" for name in REPLACED_LOAD_FORMATS}


def asked_load_format(load_format: str) -> str:
    """The load format that the user asked for, from the one that external mode has set."""
    return next((name for name, own in OWN_LOAD_FORMATS.items() if own == load_format), load_format)
