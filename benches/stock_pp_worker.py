"""A worker for stock vLLM's own pipeline parallelism on CPU with --enforce-eager, used by throughput.py.

Stock vLLM allocates a later stage's receive buffers in its warm-up run, which eager mode on CPU skips, and dies at the
first request (`assert self.intermediate_tensors is not None`). This worker allocates them when the model is loaded, as
`GPUModelRunner._dummy_run` would; nothing that runs in a step is changed.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker

__all__ = ["EagerPipelineWorker"]


class EagerPipelineWorker(CPUWorker):  # type: ignore[misc]
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
            return
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
