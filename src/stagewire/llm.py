"""Stage 0 from Python: the keyword arguments that make `vllm.LLM` the head of a ring.

Imports vLLM only when `head` is called.
"""

from __future__ import annotations

from typing import Any

__all__ = ["head"]


def head(
    *, total_stages: int, layer_range: str, bind_port: int, prev_stage_addr: str, **options: Any
) -> dict[str, Any]:
    """Keyword arguments for ``LLM(model, **stagewire.head(...))``. The other stages run `vllm serve` as usual.

    Args:
        total_stages: number of stages.
        layer_range: layers of stage 0, half-open: ``"0-8"`` is layers 0 to 7.
        bind_port: port on which stage 1 reaches this process.
        prev_stage_addr: ``HOST:PORT`` of the last stage.
        options: stock arguments of `LLM`, and ``bind_host``, ``pipeline_id``, ``start_timeout``, ``step_timeout``,
            ``recovery_timeout`` (all three in seconds), ``key_file``, ``allow_insecure``.

    Raises:
        ConfigError: an argument is wrong (the message names its flag), or this version of vLLM is not supported.
    """
    from stagewire.vllm_plugin.entry.llm_head import head_arguments

    return head_arguments(total_stages, layer_range, bind_port, prev_stage_addr, options)
