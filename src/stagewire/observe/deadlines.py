"""How long a step may take before its stage counts as hanging, learnt from earlier steps of its size."""

from __future__ import annotations

__all__ = ["StepDeadlines"]

# Of the slowest such step. A step may be slower than all before it: a longer context, another process on the machine.
# A smaller factor finds a hanging stage a little earlier, and restarts stages that do not hang.
FACTOR = 10
# Enough for a machine that pauses, a kernel that is compiled for the first request of its kind, or a long prompt.
MIN_LIMIT_S = 90.0


class StepDeadlines:
    """Steps are alike when they compute about as many tokens, or fewer: a power of two is one size.

    Args:
        limit_s: for a step larger than all that have come back, and at most for any.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._slowest_s: dict[int, float] = {}  # by size

    def __repr__(self) -> str:
        return f"StepDeadlines({self._slowest_s}, at most {self._limit_s:g} s)"

    def add(self, num_tokens: int, spent_s: float) -> None:
        """A step of ``num_tokens`` is back. ``spent_s``: since it was sent, or since the step before it was back."""
        size = num_tokens.bit_length()
        self._slowest_s[size] = max(spent_s, self._slowest_s.get(size, 0.0))

    def limit_s(self, num_tokens: int) -> float:
        """For a step of ``num_tokens``, in seconds from when those before it are back."""
        known = [spent_s for size, spent_s in self._slowest_s.items() if size >= num_tokens.bit_length()]
        return min(self._limit_s, max(MIN_LIMIT_S, FACTOR * max(known))) if known else self._limit_s

    def forget(self) -> None:
        """Call this when a stage may have become another process, which compiles again, or another machine."""
        self._slowest_s.clear()
