"""Makes later stages of Gemma 4 use the per-layer inputs that they receive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCH", "mend_gemma4"]

PATCH = Patch(
    "vllm.model_executor.models.gemma4:Gemma4Model.forward",
    "stages after the first do not look at the per-layer inputs that came in, and so compute without them; only in "
    "a process that runs a Gemma 4",
    "vLLM takes them from the intermediate tensors whenever they are there",
)


def mend_gemma4() -> None:
    from vllm.model_executor.models import gemma4

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(
            self: Any,
            input_ids: Any,
            positions: Any,
            intermediate_tensors: Any = None,
            inputs_embeds: Any = None,
            per_layer_inputs: Any = None,
            **kwargs: Any,
        ) -> Any:
            if per_layer_inputs is None and intermediate_tensors is not None:
                per_layer_inputs = intermediate_tensors.tensors.get("per_layer_inputs")
            return original(self, input_ids, positions, intermediate_tensors, inputs_embeds, per_layer_inputs, **kwargs)

        return forward

    wrap(gemma4.Gemma4Model, "forward", make)
