"""How long a step may be away before its stage counts as hanging, from what such steps have taken."""

from __future__ import annotations

__all__ = ["StepDeadlines"]

# Of the slowest such step. A step may be slower for reasons that no earlier one had: a longer context, another process
# on the machine. What is gained by a smaller one is little, and what it costs is a stage that is started again.
FACTOR = 10
# A machine that is held up, a kernel that is compiled for the first request of its kind; a prompt of a minute.
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
        """One of ``num_tokens`` is back; it had the ring to itself for ``spent_s``: the steps before it were back."""
        size = num_tokens.bit_length()
        self._slowest_s[size] = max(spent_s, self._slowest_s.get(size, 0.0))

    def limit_s(self, num_tokens: int) -> float:
        """For a step of ``num_tokens``, in seconds from when those before it are back."""
        known = [spent_s for size, spent_s in self._slowest_s.items() if size >= num_tokens.bit_length()]
        return min(self._limit_s, max(MIN_LIMIT_S, FACTOR * max(known))) if known else self._limit_s

    def forget(self) -> None:
        """Stages may be other processes from now on, which compile anew, or other machines."""
        self._slowest_s.clear()
