"""Makes the placeholders of other stages' layers return what models expect, and accept tied weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.model_executor.models import utils

from stagewire.vllm_plugin.seams.patching import Patch, add, wrap

__all__ = ["PATCHES", "mend_missing_layers"]

PATCHES = (
    Patch(
        "vllm.model_executor.models.utils:PPMissingLayer.forward",
        "some models loop over the layers of all stages; called with hidden states and residual by name, a missing "
        "layer must return both and returns whatever was named first; only in a stage's process",
        "models loop over their own layers",
    ),
    Patch(
        "vllm.model_executor.models.utils:PPMissingLayer.tie_weights",
        "some models tie the output head to the embedding on every stage, also where there is no head; only in a "
        "stage's process",
        "models tie on the last stage alone, or a missing layer can be tied",
    ),
)


def mend_missing_layers() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not args and {"hidden_states", "residual"} <= kwargs.keys():
                return kwargs["hidden_states"], kwargs["residual"]
            return original(self, *args, **kwargs)

        return forward

    def tie_weights(self: Any, _: Any) -> Any:
        return self

    wrap(utils.PPMissingLayer, "forward", make)
    add(utils.PPMissingLayer, "tie_weights", tie_weights)
