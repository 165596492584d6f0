"""What /pipeline/status says: the head's API server keeps the last news of the ring, and says how old they are.

EngineCore's ring thread sends the news (member/news.py). Two decisions of `HeadHealth` also depend on them: /ready does
not vouch for an EngineCore that has gone silent, and news of a whole ring end an outage.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from stagewire.config import StageConfig
from stagewire.observe.timings import StageTimes
from stagewire.vllm_plugin.member.news import RingNews, decode_news, resident_bytes
from stagewire.wire.messages import StageReport

__all__ = ["Health", "PipelineStatus"]

# News and status events come through two sockets, to two threads. News this long after a loss were sent after it.
LATE_NEWS_S = 3.0
# Reports come once a second. A stage whose ring thread is held up passes none on, while its heartbeats go on.
LATE_REPORT_S = 3.0
# Longer than the heartbeat timeout: a forward pass may hold the interpreter, and with it the ring's thread.
SILENCE_S = 10.0


@dataclass(frozen=True)
class Health:
    """What the API server itself knows.

    Args:
        news: the head's phase, in words.
        is_serving: whether the API server has started to serve.
        failure: why this head is ending, None while it is not.
        outage: which stage the head waits for, None while the ring is whole.
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
        self.task = ""  # what the model is for, as `interfaces.main_task` names it; empty until the API serves

    def __repr__(self) -> str:
        phase = self._ring.phase if self._ring else None
        return f"PipelineStatus(ring={phase}, heard of {sorted(self._stages)})"

    def update(self, data: bytes) -> None:
        """One datagram; a malformed one is dropped."""
        with contextlib.suppress(msgspec.MsgspecError), self._lock:
            news, now = decode_news(data), self._clock()
            if isinstance(news, RingNews):
                self._ring, self._ring_at = news, now
                head = self._stages.get(0)
                self._stages[0] = _Heard(news.head, head.times if head else None, now)
                return
            for report, times in news.stages:
                if report.stage < self._config.num_stages:
                    self._stages[report.stage] = _Heard(report, times, now)

    def is_whole_after(self, moment: float) -> bool:
        """Whether news say that the ring is whole, and came so long after ``moment`` that they were sent after it.

        Args:
            moment: when the last event of a loss came, in seconds of `clock`.
        """
        with self._lock:
            ring = self._ring
            is_whole = ring is not None and ring.lost_stage is None and not ring.waits_for
            return is_whole and self._ring_at - moment > LATE_NEWS_S

    @property
    def silence_s(self) -> float:
        """For how many seconds EngineCore has sent no news; 0 up to `SILENCE_S`, and before the first."""
        with self._lock:
            silent_s = self._clock() - self._ring_at
            return silent_s if self._ring is not None and silent_s > SILENCE_S else 0.0

    def describe(self, health: Health) -> dict[str, Any]:
        """The answer of /pipeline/status, as JSON's types. docs/reference/http.md describes the fields."""
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
