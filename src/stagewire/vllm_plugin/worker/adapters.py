"""The LoRA adapters of one stage: which of them it may read, whether they load, and where it reads them from.

The calls `check_lora` and `add_lora` carry an adapter's name and the head's path. A schedule carries only its number.
So a stage reads an adapter's files during a call, where a failure is an answer, and knows the adapter before a step
names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from stagewire.checkpoint.adapter import digest_adapter, find_adapter
from stagewire.config import StageConfig

__all__ = ["Adapters"]


class Adapters:
    """Checks and adds the adapters of one stage.

    Args:
        config: the stage's. The head reads what stock vLLM reads; other stages read what their command line allows.
        worker: vLLM's wrapper around its worker.
    """

    def __init__(self, config: StageConfig, worker: Any) -> None:
        self._config = config
        self._worker = worker
        # By number, with this stage's own paths.
        self.known: dict[int, LoRARequest] = {}

    def check(self, request: LoRARequest) -> str:
        """Loads the adapter, drops it again, and returns the digest of its files.

        Raises whatever makes the adapter unusable on this stage. Changes nothing.
        """
        own = self._localize(request)
        self._worker.worker.model_runner._ensure_lora_enabled()
        self._worker.worker.model_runner.lora_manager._load_adapter(own)
        return digest_adapter(Path(get_adapter_absolute_path(own.lora_path)))

    def add(self, request: LoRARequest) -> bool:
        own = self._localize(request)
        is_loaded: bool = self._worker.add_lora(own)
        self.known[own.lora_int_id] = own
        return is_loaded

    def _localize(self, request: LoRARequest) -> LoRARequest:
        """The same adapter with this stage's path."""
        if self._config.is_head:
            return request
        folder = find_adapter(
            self._config.stage,
            request.lora_name,
            request.lora_path,
            self._config.lora_roots,
            self._config.lora_modules,
        )
        return LoRARequest(
            lora_name=request.lora_name,
            lora_int_id=request.lora_int_id,
            lora_path=str(folder),
            base_model_name=request.base_model_name,
            load_inplace=request.load_inplace,
            is_3d_lora_weight=request.is_3d_lora_weight,
        )
