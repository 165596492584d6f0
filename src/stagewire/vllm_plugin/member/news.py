"""News of the ring, from the process that has it to the head's API server: one datagram a second, and the reports.

The ring's thread sends them, never waits, and lets fall what does not fit into the queue.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from stagewire.observe.status_events import NEWS_SOCKET_ENV, DatagramSender
from stagewire.observe.timings import StageTimes, StepSummary
from stagewire.wire.messages import StageReport

__all__ = ["NewsSender", "RingNews", "StageNews", "decode_news", "resident_bytes"]

NEWS_INTERVAL_S = 1.0

# Of the longest reports that the wire allows: this many stay below MAX_DATAGRAM_BYTES.
STAGES_PER_DATAGRAM = 24


class RingNews(msgspec.Struct, frozen=True, tag=True):
    """The ring as a whole. ``phase`` is the ring's own (ring/rules/phases.py); ``waits_for`` is empty once it is open.

    ``head`` is the head's report, fresh also while nothing goes round.
    """

    phase: str
    epoch: int
    waits_for: str
    lost_stage: int | None
    linked: list[int]
    head: StageReport
    steps: StepSummary


class StageNews(msgspec.Struct, frozen=True, tag=True):
    """Some stages' reports, and what the last steps took there, if there were any."""

    stages: list[tuple[StageReport, StageTimes | None]]


_ENCODER = msgspec.msgpack.Encoder()

_DECODER = msgspec.msgpack.Decoder(RingNews | StageNews)


def decode_news(data: bytes) -> RingNews | StageNews:
    """One datagram. Raises msgspec.MsgspecError for anything else."""
    news: RingNews | StageNews = _DECODER.decode(data)
    return news


def resident_bytes(pids: Iterable[int] = ()) -> int:
    """Of this process and of ``pids``, as the kernel counts it; one that is gone has none."""
    num_pages = 0
    for name in ("self", *map(str, pids)):
        with contextlib.suppress(OSError):
            num_pages += int(Path(f"/proc/{name}/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


class NewsSender:
    """For the ring's thread: never waits, and what does not fit into the queue is lost."""

    def __init__(self, path: str) -> None:
        self._sender = DatagramSender([path])
        self._next_at = 0.0

    @classmethod
    def from_environment(cls) -> NewsSender | None:
        """None without an API server that listens: an `LLM` in somebody's Python."""
        path = os.environ.get(NEWS_SOCKET_ENV)
        return cls(path) if path else None

    def __repr__(self) -> str:
        return f"NewsSender({self._sender!r})"

    def is_due(self) -> bool:
        return time.monotonic() >= self._next_at

    def skip(self) -> None:
        """Nothing to tell: due again after the usual time."""
        self._next_at = time.monotonic() + NEWS_INTERVAL_S

    def tell(self, news: RingNews) -> None:
        self.skip()
        self._sender.send(_ENCODER.encode(news), is_droppable=True)

    def tell_stages(self, reports: Sequence[StageReport], times: Sequence[StageTimes]) -> None:
        """``times``: of every stage in order, or empty."""
        pairs = [(report, times[report.stage] if report.stage < len(times) else None) for report in reports]
        for begin in range(0, len(pairs), STAGES_PER_DATAGRAM):
            part = StageNews(pairs[begin : begin + STAGES_PER_DATAGRAM])
            self._sender.send(_ENCODER.encode(part), is_droppable=True)
