"""Warnings that are given once, and a bound on how many.

A stranger can send any number of different things. This stage remembers, and says, a bounded number of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from stagewire.ring.rules.actions import Action, Log

__all__ = ["Notices"]

MAX_REMEMBERED = 1000


@dataclass
class Notices:
    _said: set[Hashable] = field(default_factory=set)

    def is_news(self, what: Hashable) -> bool:
        """Whether this was not said before, and may be said."""
        if what in self._said or len(self._said) >= MAX_REMEMBERED:
            return False
        self._said.add(what)
        return True

    def warn_once(self, what: Hashable, text: str) -> list[Action]:
        return [Log(text, is_warning=True)] if self.is_news(what) else []
