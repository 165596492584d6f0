"""A logits processor for `--logits-processors`: a step with a poisoned request raises on the last stage, or lasts."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality


class Poison(LogitsProcessor):  # type: ignore[misc]
    """Poisoned: a request with ``{"vllm_xargs": {"poison": "yes"}}``, or how many seconds the step is to take."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, str] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, _ in batch_update.added:
            self._rows.pop(row, None)
            poison = (params.extra_args or {}).get("poison")
            if poison:
                self._rows[row] = poison
        for one, other, direction in batch_update.moved:
            poisons = {other: self._rows.pop(one, None)}
            poisons |= {one: self._rows.pop(other, None)} if direction is MoveDirectionality.SWAP else {}
            self._rows |= {row: poison for row, poison in poisons.items() if poison}

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for poison in self._rows.values():
            if poison == "yes":
                raise ValueError("poisoned")
            time.sleep(float(poison))
        return logits
