"""Every patch of vLLM. The other modules of this package hold the records and the functions that install them.

tests/vllm/test_seams.py has one test per seam.
"""

from __future__ import annotations

from stagewire.vllm_plugin.seams import (
    command_line,
    container_memory,
    dead_engine,
    discarded_rows,
    early_answers,
    engine_stop_grace,
    engine_watch,
    gemma4,
    interrupted_start,
    lora,
    missing_layers,
    neighbours_logprobs,
    stop_deadline,
    tied_heads,
    transformers_backend,
)

__all__ = ["PATCHES"]

PATCHES = (
    *command_line.PATCHES,
    *early_answers.PATCHES,
    engine_stop_grace.PATCH,
    engine_watch.PATCH,
    stop_deadline.PATCH,
    dead_engine.PATCH,
    interrupted_start.PATCH,
    discarded_rows.PATCH,
    *neighbours_logprobs.PATCHES,
    container_memory.PATCH,
    gemma4.PATCH,
    *missing_layers.PATCHES,
    tied_heads.PATCH,
    transformers_backend.PATCH,
    *lora.PATCHES,
)
