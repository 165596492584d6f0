"""The head's journal: the calls that a stage must have run to be like the others.

A stage that comes back has its weights and nothing else. The head replays the journal to all stages from the ring's own
thread, because it may take minutes; a stage skips the calls that it has run.
"""

from __future__ import annotations

import threading
from typing import Any

from stagewire.vllm_plugin.codec.calls import CALLS

__all__ = ["PREPARE", "Entry", "Journal"]

# The call that carries the journal. Stages know it from the others by its name (stage_host.py).
PREPARE = "prepare"

# (number of the call, method, arguments as bytes)
Entry = tuple[int, str, bytes]


class Journal:
    """The calls that a stage must have run to be like the others, oldest first. Used by two threads."""

    def __init__(self) -> None:
        self._entries: list[tuple[Entry, tuple[Any, ...]]] = []
        self._woken: set[str] = set()  # parts, since the last sleep
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Journal({[method for _, method, _ in self.entries()]})"

    def entries(self) -> list[Entry]:
        with self._lock:
            return [entry for entry, _ in self._entries]

    def add(self, call_id: int, method: str, args: tuple[Any, ...], args_bytes: bytes) -> None:
        """After it has succeeded on all stages. What undoes an earlier call takes it out."""
        with self._lock:
            match method:
                case "remove_lora":
                    self._drop_adapter(args[0])
                case "wake_up":
                    self._woken |= {"weights", "kv_cache"} if args[0] is None else set(args[0])
                    if self._woken >= {"weights", "kv_cache"}:
                        self._drop(("sleep", "discard", "wake_up"))
                        return
                case "sleep" | "discard":
                    self._woken.clear()
                case "pin_lora":  # in use it may have outlived adapters that were added later, but not in a replay
                    added = [each for each in self._entries if _adapter_of(each[0][1], each[1]) == args[0]]
                    self._entries = [each for each in self._entries if each not in added] + added
            if not CALLS[method].is_kept:
                return
            if CALLS[method].is_once:
                self._drop((method,))
            self._entries.append(((call_id, method, args_bytes), args))

    def _drop(self, methods: tuple[str, ...]) -> None:
        self._entries = [each for each in self._entries if each[0][1] not in methods]

    def _drop_adapter(self, lora_id: int) -> None:
        self._entries = [each for each in self._entries if _adapter_of(each[0][1], each[1]) != lora_id]

    def renumber_adapter(self, lora_id: int, first_id: int) -> int:
        """A call about this adapter was lost half-way: every stage runs its entries again. The next free number."""
        with self._lock:
            for index, ((_, method, data), args) in enumerate(self._entries):
                if _adapter_of(method, args) == lora_id:
                    self._entries[index] = ((first_id, method, data), args)
                    first_id += 1
        return first_id


def _adapter_of(method: str, args: tuple[Any, ...]) -> int | None:
    if method == "add_lora":
        return int(args[0].lora_int_id)
    return int(args[0]) if method == "pin_lora" else None
