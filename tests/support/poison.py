"""A logits processor for `--logits-processors`: the last stage's step raises while a poisoned request is in it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor


class Poison(LogitsProcessor):  # type: ignore[misc]
    """Poisoned: a request with ``{"vllm_xargs": {"poison": "yes"}}``."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: set[int] = set()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.discard(row)
        for row, params, _, _ in batch_update.added:
            self._rows.discard(row)
            if (params.extra_args or {}).get("poison"):
                self._rows.add(row)
        for one, other, _ in batch_update.moved:
            moved = {other for row in (one,) if row in self._rows} | {one for row in (other,) if row in self._rows}
            self._rows = (self._rows - {one, other}) | moved

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self._rows:
            raise ValueError("poisoned")
        return logits
