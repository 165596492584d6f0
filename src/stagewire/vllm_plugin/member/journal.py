"""The head's journal: the calls that a stage must have run to be like the others.

A restarted stage has its weights and nothing else. The head's ring thread replays the journal to all stages, because
that may take minutes. All stages get the same journal, and each skips the calls that it has run. The table in
codec/calls.py says which calls the journal keeps, and which calls take others out.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

from stagewire.vllm_plugin.codec.calls import CALLS, MEMORY_PARTS

__all__ = ["Entry", "Journal", "adapter_of"]


class Entry(NamedTuple):
    """One call as it travels. ``args_bytes``: of `codec.values.encode_value`."""

    call_id: int
    method: str
    args_bytes: bytes


@dataclass(frozen=True)
class _Kept:
    entry: Entry
    adapter: int | None


class Journal:
    """The entries, oldest first. Used by the thread that runs the model and by the ring's thread."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._asleep: set[str] = set(MEMORY_PARTS)  # the parts that may be asleep, as far as this journal knows
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Journal({[entry.method for entry in self.entries()]})"

    def entries(self) -> list[Entry]:
        with self._lock:
            return [kept.entry for kept in self._kept]

    def add(self, call_id: int, method: str, args: tuple[Any, ...], args_bytes: bytes) -> None:
        """Records a call that has succeeded on all stages. ``args``: in the order of `CALLS`."""
        spec, adapter = CALLS[method], adapter_of(method, args)
        with self._lock:
            if spec.sleeps:
                self._asleep = set(MEMORY_PARTS)
            if spec.wakes is not None:
                self._asleep -= spec.wakes(args)
            if spec.undoes and not (spec.wakes and self._asleep):
                self._take(spec.undoes, adapter)
                if method in spec.undoes:
                    return
            followed = self._take(spec.follows, adapter)
            if not spec.is_kept:
                return
            if spec.is_once:
                self._take((method,), adapter)
            self._kept += [*followed, _Kept(Entry(call_id, method, args_bytes), adapter)]

    def _take(self, methods: tuple[str, ...], adapter: int | None) -> list[_Kept]:
        """Takes out the entries of these methods that are about this adapter (None: about none), and returns them."""
        taken = [each for each in self._kept if each.entry.method in methods and each.adapter == adapter]
        self._kept = [each for each in self._kept if each not in taken]
        return taken

    def renumber_adapter(self, adapter: int, first_id: int) -> int:
        """Gives the entries about this adapter new numbers from ``first_id`` on. Returns the next free number.

        A call about the adapter was lost on its way, so stages may differ. By new numbers all run the entries again.
        """
        with self._lock:
            for index, kept in enumerate(self._kept):
                if kept.adapter == adapter:
                    self._kept[index] = _Kept(kept.entry._replace(call_id=first_id), adapter)
                    first_id += 1
        return first_id


def adapter_of(method: str, args: tuple[Any, ...]) -> int | None:
    """The number of the LoRA adapter that a call is about; None for calls about none."""
    find = CALLS[method].adapter
    return None if find is None else find(args)
