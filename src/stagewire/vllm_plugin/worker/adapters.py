"""The LoRA adapters of one stage: which it may read, whether they load, and where it reads them from.

An adapter reaches a worker stage by the calls `check_lora` and `add_lora`, which carry the name and the head's path;
schedules carry only its number. So a stage reads files when it was told to by a call whose failure is an answer, and
knows every adapter of a step before the step comes.
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
    """See the module.

    Args:
        config: whose; the head reads what stock vLLM reads, other stages what their own command line allows.
        worker: vLLM's, or the wrapper around it.
    """

    def __init__(self, config: StageConfig, worker: Any) -> None:
        self._config = config
        self._worker = worker
        # By number, as this stage reads them.
        self.known: dict[int, LoRARequest] = {}

    def check(self, request: LoRARequest) -> str:
        """Loads the adapter and drops it again. Returns the digest of its files.

        Raises whatever makes it unusable on this stage. Changes nothing.
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
