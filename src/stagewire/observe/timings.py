"""Where the time of each step went, from the instants that every stage appended to it.

Only instants of one stage are subtracted: hosts share no clock. A trace is one JSON line per step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import IO, Protocol

__all__ = ["STEP_TRACE_ENV", "StepLog"]

STEP_TRACE_ENV = "STAGEWIRE_STEP_TRACE"


class Timing(Protocol):
    """`stagewire.wire.messages.StageTiming`, seen from a layer that must not import it."""

    @property
    def stage(self) -> int: ...
    @property
    def received_ns(self) -> int: ...
    @property
    def started_ns(self) -> int: ...
    @property
    def finished_ns(self) -> int: ...
    @property
    def sent_ns(self) -> int: ...
    @property
    def hop_ns(self) -> int: ...


class StepLog:
    """Writes steps to a file, or nowhere.

    A line is ``{"step", "requests", "tokens", "returned_ns", "stages": [[stage, received, started, finished, sent,
    hop], ...]}``, times in nanoseconds of each stage's own monotonic clock; ``returned_ns`` is the head's.
    """

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file

    @classmethod
    def from_environment(cls) -> StepLog:
        path = os.environ.get(STEP_TRACE_ENV)
        return cls(open(path, "a", buffering=1) if path else None)

    def __repr__(self) -> str:
        return f"StepLog({self._file.name if self._file else None})"

    def write(self, step: int, num_requests: int, num_tokens: int, timings: Sequence[Timing]) -> None:
        """``timings``: one per stage in order, then the head's again with the instant of the result's arrival."""
        if self._file is None:
            return
        stages = [[t.stage, t.received_ns, t.started_ns, t.finished_ns, t.sent_ns, t.hop_ns] for t in timings[:-1]]
        line = {
            "step": step,
            "requests": num_requests,
            "tokens": num_tokens,
            "returned_ns": timings[-1].received_ns,
            "stages": stages,
        }
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
