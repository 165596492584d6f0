"""Keeps a request's random numbers as they are when the token of its row is discarded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCH", "keep_generators_of_discarded_rows"]

PATCH = Patch(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
    "a seeded request whose prompt is computed in chunks ends stock vLLM on CPU: it draws a token for every chunk, "
    "throws it away and rewinds the generator, which CPU generators cannot do; only where a stage's layers run",
    "vLLM does not draw for rows that it discards, or can rewind a CPU generator",
)


def keep_generators_of_discarded_rows() -> None:
    """In a process that runs layers: a row whose token is discarded does not change its request's generator.

    `GPUModelRunner._bookkeeping_sync` calls ``set_offset(get_offset() - 4)`` for such rows, which CPU generators cannot
    do. So their generators are taken out of the batch: then nothing is drawn and nothing is rewound. Generators on
    other devices stay in the batch.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def sample_tokens(self: Any, grammar_output: Any) -> Any:
            batch = self.input_batch
            is_discarded = self.discard_request_mask.np
            aside = {
                row: generator
                for row, generator in batch.generators.items()
                if row < batch.num_reqs and is_discarded[row] and generator.device.type == "cpu"
            }
            for row in aside:
                del batch.generators[row]  # the sampler reads this dict
            try:
                return original(self, grammar_output)
            finally:
                batch.generators.update(aside)

        return sample_tokens

    wrap(GPUModelRunner, "sample_tokens", make)
