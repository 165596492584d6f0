"""Where the time of each step went, from the instants that every stage appended to it.

Subtracts instants of one stage only: hosts share no clock. A trace is one JSON line per step. A summary says what the
last steps took, for people and planners.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Protocol

__all__ = ["STEP_TRACE_ENV", "StageTimes", "StepLog", "StepStatistics", "StepSummary"]

STEP_TRACE_ENV = "STAGEWIRE_STEP_TRACE"
# Enough for a steady median, few enough to follow a change of load within seconds.
NUM_DECODE_STEPS = 128
RATE_WINDOW_S = 10.0


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


@dataclass(frozen=True)
class StepSummary:
    """What the last steps took, as a whole.

    Args:
        num_answered: steps whose result came back, since the start.
        per_s: such steps in the last ten seconds.
        since_last_s: since the last of them; None before the first.
        num_decode: how many of the last decode steps the medians are of.
        num_requests: median of the requests in a step; None without decode steps.
        round_ms: median time from the head's start of a step until its result was back; None without decode steps.
    """

    num_answered: int
    per_s: float
    since_last_s: float | None
    num_decode: int
    num_requests: float | None
    round_ms: float | None


@dataclass(frozen=True)
class StageTimes:
    """One stage over the same decode steps. ``compute_ms``: median of its layers, and on the tail sampling.

    ``hop_us``: one way on the wire from its predecessor, half of the shortest round trip in that time; None while
    unknown. A longer round trip waited for a busy thread.
    """

    compute_ms: float
    hop_us: float | None


@dataclass(frozen=True)
class _Decode:
    num_requests: int
    round_ns: int
    compute_ns: list[int]
    hop_ns: list[int]


class StepStatistics:
    """The last steps. Written by the thread that runs the model, read by the ring's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_answered = 0
        self._returned_s: deque[float] = deque(maxlen=1024)
        self._decode: deque[_Decode] = deque(maxlen=NUM_DECODE_STEPS)

    def __repr__(self) -> str:
        return f"StepStatistics(answered={self._num_answered}, decode={len(self._decode)})"

    def add(self, num_requests: int, is_decode: bool, timings: Sequence[Timing]) -> None:
        """A step whose result is back.

        Args:
            num_requests: that took part in it.
            is_decode: one token for each of them, and no wait for a grammar bitmask, so that steps are comparable.
            timings: one per stage in order, then the head's again with the instant of the result's arrival.
        """
        *stages, back = timings
        with self._lock:
            self._num_answered += 1
            self._returned_s.append(back.received_ns / 1e9)
            if is_decode:
                compute_ns = [timing.finished_ns - timing.started_ns for timing in stages]
                hop_ns = [back.hop_ns, *(timing.hop_ns for timing in stages[1:])]
                round_ns = back.received_ns - stages[0].received_ns
                self._decode.append(_Decode(num_requests, round_ns, compute_ns, hop_ns))

    def summary(self, now_s: float) -> StepSummary:
        """``now_s``: the head's monotonic clock, as in the timings."""
        with self._lock:
            num_answered, returned_s, decode = self._num_answered, list(self._returned_s), list(self._decode)
        recent = [each for each in returned_s if now_s - each <= RATE_WINDOW_S]
        # All that are remembered may be recent: then the time begins with the first of them.
        span_s = RATE_WINDOW_S if len(recent) < len(returned_s) or not recent else max(1.0, now_s - recent[0])
        return StepSummary(
            num_answered=num_answered,
            per_s=len(recent) / span_s,
            since_last_s=now_s - returned_s[-1] if returned_s else None,
            num_decode=len(decode),
            num_requests=statistics.median(each.num_requests for each in decode) if decode else None,
            round_ms=statistics.median(each.round_ns for each in decode) / 1e6 if decode else None,
        )

    def per_stage(self) -> list[StageTimes]:
        """In order; empty while no decode step has come back."""
        with self._lock:
            decode = list(self._decode)
        compute_ns = zip(*(each.compute_ns for each in decode), strict=True)
        hop_ns = zip(*(each.hop_ns for each in decode), strict=True)
        return [
            StageTimes(statistics.median(own) / 1e6, _hop_us(hops))
            for own, hops in zip(compute_ns, hop_ns, strict=True)
        ]


def _hop_us(hops_ns: Sequence[int]) -> float | None:
    known = [each for each in hops_ns if each]
    return min(known) / 1e3 if known else None
