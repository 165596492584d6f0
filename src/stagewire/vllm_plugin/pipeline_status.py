"""What /pipeline/status says: news of the ring, from EngineCore to the head's API server, and what becomes of them.

The ring's thread sends a datagram about the ring once a second, whatever its state, and one for every few stages when
their reports come round. The API server keeps the last of each and says how old it is. Nothing else depends on it but
/ready, which does not vouch for an EngineCore that has gone silent.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from stagewire.config import StageConfig
from stagewire.observe.status import NEWS_SOCKET_ENV, DatagramSender
from stagewire.observe.timings import StageTimes, StepSummary
from stagewire.wire.messages import StageReport

__all__ = ["Health", "NewsSender", "PipelineStatus", "RingNews", "StageNews", "resident_bytes"]

NEWS_INTERVAL_S = 1.0
# They come through another socket than a stage's words, and are read by another thread.
LATE_NEWS_S = 3.0
# Reports come once a second; a peer that stops answering ends the ring after 4 s.
LATE_REPORT_S = 3.0
# Above the heartbeats' patience, because a forward pass may hold the interpreter for a while.
SILENCE_S = 10.0
# Of the longest reports that the wire allows: this many stay below MAX_DATAGRAM_BYTES.
STAGES_PER_DATAGRAM = 24


class RingNews(msgspec.Struct, frozen=True, tag=True):
    """The ring as a whole. ``phase`` is the ring's own (ring/state.py); ``waits_for`` is empty once it is open.

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


@dataclass(frozen=True)
class Health:
    """What the API server itself knows: the head's phase in words, whether it accepts requests, why it failed, and
    which stage it waits for.
    """

    news: str
    is_serving: bool
    failure: str | None
    outage: str | None = None


@dataclass(frozen=True)
class _Heard:
    report: StageReport
    times: StageTimes | None
    at: float


class PipelineStatus:
    """The pipeline as the head's API server knows it. Written by the thread that listens, read by those that answer.

    Args:
        config: the head's place.
        clock: monotonic, in seconds.
    """

    def __init__(self, config: StageConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._ring: RingNews | None = None
        self._ring_at = 0.0
        self._stages: dict[int, _Heard] = {}
        self.task = ""  # what the model is for; empty until the API server knows

    def __repr__(self) -> str:
        phase = self._ring.phase if self._ring else None
        return f"PipelineStatus(ring={phase}, heard of {sorted(self._stages)})"

    def update(self, data: bytes) -> None:
        """One datagram; a malformed one is dropped."""
        with contextlib.suppress(msgspec.MsgspecError), self._lock:
            news, now = _DECODER.decode(data), self._clock()
            if isinstance(news, RingNews):
                self._ring, self._ring_at = news, now
                head = self._stages.get(0)
                self._stages[0] = _Heard(news.head, head.times if head else None, now)
                return
            for report, times in news.stages:
                if report.stage < self._config.num_stages:
                    self._stages[report.stage] = _Heard(report, times, now)

    def is_whole_after(self, moment: float) -> bool:
        """Whether the news say that the ring is whole, and have for longer than they come late behind a loss.

        Args:
            moment: of the last word of a loss, by `clock`.
        """
        with self._lock:
            ring = self._ring
            is_whole = ring is not None and ring.lost_stage is None and not ring.waits_for
            return is_whole and self._ring_at - moment > LATE_NEWS_S

    @property
    def silence_s(self) -> float:
        """How long EngineCore has been silent, beyond what is normal; 0 before its first word."""
        with self._lock:
            silent_s = self._clock() - self._ring_at
            return silent_s if self._ring is not None and silent_s > SILENCE_S else 0.0

    def describe(self, health: Health) -> dict[str, Any]:
        """What docs/reference/http.md documents, as JSON's types."""
        silence_s = self.silence_s
        with self._lock:
            ring, stages, now = self._ring, dict(self._stages), self._clock()
        state, reason = self._judge(ring, stages, health, silence_s, now)
        rows = [self._row(stage, ring, stages.get(stage), health, now) for stage in range(self._config.num_stages)]
        return {
            "state": state,
            "is_ready": state == "serving" and silence_s == 0.0,
            "reason": reason,
            "epoch": ring.epoch if ring else 0,
            "num_stages": self._config.num_stages,
            "api_server": {"pid": os.getpid(), "rss_bytes": resident_bytes(), "task": self.task},
            "steps": asdict(ring.steps) if ring else None,
            "stages": rows,
        }

    def _judge(
        self, ring: RingNews | None, stages: dict[int, _Heard], health: Health, silence_s: float, now: float
    ) -> tuple[str, str]:
        """State and reason of the pipeline as a whole."""
        if health.failure is not None:
            return "failed" if ring is None or ring.lost_stage is None else "lost", health.failure
        if health.outage is not None:
            return "recovering", health.outage
        if ring is None or ring.phase in ("linking", "opening"):
            return "linking", ring.waits_for if ring and ring.waits_for else health.news
        if not health.is_serving:
            slow = [
                f"stage {n} is at {heard.report.state}"
                for n, heard in stages.items()
                if heard.report.state != "serving"
            ]
            return "loading", "; ".join(sorted(slow)) or health.news
        if silence_s:
            return "serving", f"stage 0's EngineCore has said nothing for {silence_s:.0f} s"
        ages = [now - heard.at for stage, heard in stages.items() if stage]
        if ages and min(ages) > LATE_REPORT_S:
            return "serving", f"no reports of the other stages for {min(ages):.0f} s: one of them is held up"
        draining = [str(stage) for stage, heard in sorted(stages.items()) if heard.report.state == "draining"]
        if draining:
            return "serving", f"stage {', '.join(draining)} is to stop: new requests wait for the one after it"
        return "serving", ""

    def _row(
        self, stage: int, ring: RingNews | None, heard: _Heard | None, health: Health, now: float
    ) -> dict[str, Any]:
        state, reason = self._judge_stage(stage, ring, heard, health)
        layers = (heard.report.layer_start, heard.report.layer_end) if heard else self._own_layers(stage)
        row: dict[str, Any] = {
            "stage": stage,
            "layers": f"{layers[0]}-{layers[1]}" if layers else None,
            "num_layers": layers[1] - layers[0] if layers else None,
            "state": state,
            "reason": reason,
            "age_s": round(now - heard.at, 3) if heard else None,
        }
        known = msgspec.structs.asdict(heard.report) if heard else {}
        for name in (
            "pid",
            "host",
            "address",
            "rss_bytes",
            "device_bytes",
            "kv_blocks",
            "cached_requests",
            "last_step",
        ):
            row[name] = known.get(name)
        row["uptime_s"] = round(heard.report.age_ms / 1e3 + now - heard.at, 3) if heard else None
        times = heard.times if heard else None
        row["compute_ms"] = times.compute_ms if times else None
        row["hop_us"] = times.hop_us if times else None
        return row

    def _judge_stage(self, stage: int, ring: RingNews | None, heard: _Heard | None, health: Health) -> tuple[str, str]:
        if health.failure is not None:
            if ring is not None and stage == ring.lost_stage:
                return "lost", health.failure
            return ("failed", health.failure) if stage == 0 else ("unknown", "no word of it since the ring ended")
        if health.outage is not None and ring is not None and stage == ring.lost_stage:
            return "lost", health.outage
        if stage == 0 and heard is None:
            return "starting", health.news
        if stage == 0 or (ring is not None and stage in ring.linked):
            return (heard.report.state if heard else "linked"), ""
        return "not linked yet", "" if heard is None else "it was linked before"

    def _own_layers(self, stage: int) -> tuple[int, int] | None:
        layers = self._config.layers
        return (layers.start, layers.end) if stage == 0 else None
