"""News of the ring, from EngineCore's ring thread to the head's API server, as datagrams.

The ring's thread sends one about the ring each second, whatever the ring's state. When reports have come round, it
sends one for every few stages. It never waits: news that do not fit into the queue are lost. Owns the format and the
sender; head/pipeline_status.py keeps what arrives.
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

# So many of the longest reports that the wire allows stay below MAX_DATAGRAM_BYTES.
STAGES_PER_DATAGRAM = 24


class RingNews(msgspec.Struct, frozen=True, tag=True):
    """The ring as a whole.

    Args:
        phase: of the ring's state machine.
        waits_for: what the ring waits for, for people; empty while it is open or over.
        lost_stage: the stage whose loss broke or ended the ring; None while it is whole.
        linked: the stages that are linked.
        head: the head's own report, which is new also while no reports go round.
        steps: what the last steps took.
    """

    phase: str
    epoch: int
    waits_for: str
    lost_stage: int | None
    linked: list[int]
    head: StageReport
    steps: StepSummary


class StageNews(msgspec.Struct, frozen=True, tag=True):
    """Some stages' reports, each with what the last steps took there; None before the first decode step."""

    stages: list[tuple[StageReport, StageTimes | None]]


_ENCODER = msgspec.msgpack.Encoder()

_DECODER = msgspec.msgpack.Decoder(RingNews | StageNews)


def decode_news(data: bytes) -> RingNews | StageNews:
    """The news in one datagram. Raises msgspec.MsgspecError for anything else."""
    news: RingNews | StageNews = _DECODER.decode(data)
    return news


def resident_bytes(pids: Iterable[int] = ()) -> int:
    """Resident memory of this process and of ``pids``, as the kernel counts it. A process that has ended counts 0."""
    num_pages = 0
    for name in ("self", *map(str, pids)):
        with contextlib.suppress(OSError):
            num_pages += int(Path(f"/proc/{name}/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


class NewsSender:
    """For the ring's thread. Never waits: news that do not fit into the queue are lost.

    Args:
        path: the Unix socket of the API server's `DatagramReceiver`.
    """

    def __init__(self, path: str) -> None:
        self._sender = DatagramSender([path])
        self._next_at = 0.0

    @classmethod
    def from_environment(cls) -> NewsSender | None:
        """None if no API server listens, as in a user's Python."""
        path = os.environ.get(NEWS_SOCKET_ENV)
        return cls(path) if path else None

    def __repr__(self) -> str:
        return f"NewsSender({self._sender!r})"

    def is_due(self) -> bool:
        return time.monotonic() >= self._next_at

    def skip(self) -> None:
        """Sends nothing. The next news are due after `NEWS_INTERVAL_S`."""
        self._next_at = time.monotonic() + NEWS_INTERVAL_S

    def tell(self, news: RingNews) -> None:
        self.skip()
        self._sender.send(_ENCODER.encode(news), is_droppable=True)

    def tell_stages(self, reports: Sequence[StageReport], times: Sequence[StageTimes]) -> None:
        """``times``: of every stage in order; empty before the first decode step."""
        pairs = [(report, times[report.stage] if report.stage < len(times) else None) for report in reports]
        for begin in range(0, len(pairs), STAGES_PER_DATAGRAM):
            part = StageNews(pairs[begin : begin + STAGES_PER_DATAGRAM])
            self._sender.send(_ENCODER.encode(part), is_droppable=True)
