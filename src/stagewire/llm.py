"""Stage 0 from Python: the keyword arguments that make `vllm.LLM` the head of a ring."""

from __future__ import annotations

from typing import Any

__all__ = ["head"]


def head(
    *, total_stages: int, layer_range: str, bind_port: int, prev_stage_addr: str, **options: Any
) -> dict[str, Any]:
    """Keyword arguments for ``LLM(model, **stagewire.head(...))``; the other stages run `vllm serve` as ever.

    Args:
        total_stages: number of stages.
        layer_range: layers of stage 0, half-open: ``"0-8"``.
        bind_port: where stage 1 reaches this process.
        prev_stage_addr: ``HOST:PORT`` of the last stage.
        options: stock arguments of `LLM`, and ``bind_host``, ``pipeline_id``, ``start_timeout``, ``step_timeout``,
            ``recovery_timeout``, ``key_file``, ``allow_insecure``.

    Raises:
        ConfigError: what is wrong with them.
    """
    from stagewire.vllm_plugin.entry.llm_head import head_arguments

    return head_arguments(total_stages, layer_range, bind_port, prev_stage_addr, options)
