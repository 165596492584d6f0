"""The ring as the head's API server knows it, and what that means for each path of its HTTP port.

Knows no socket and no ASGI. The table of answers is in head/api_app.py.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from stagewire.observe.status_events import Phase, StatusEvent
from stagewire.vllm_plugin.head.pipeline_status import Health, PipelineStatus
from stagewire.vllm_plugin.member.probes import body_of

__all__ = ["HEALTH", "HeadHealth"]


class HeadHealth:
    """The ring as the API server knows it. Thread-safe: a value changes in one assignment, and waiters have an event.

    ``failure``: why this head is ending, None while it is not. ``outage``: which stage it waits for, None while the
    ring is whole. ``refusal``: why requests are refused, None while they are not.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.phase = Phase.IMPORTING
        self.news = ""
        self.is_serving = False
        self.failure: str | None = None
        self.exit_code = 0
        self._outage: str | None = None
        self._outage_at = 0.0
        self._is_given_up = False
        self.pipeline: PipelineStatus | None = None
        self._failed = threading.Event()
        self._listeners: set[Callable[[], None]] = set()

    def __repr__(self) -> str:
        return f"HeadHealth({self.phase.value}, serving={self.is_serving}, failure={self.failure!r})"

    def update(self, event: StatusEvent) -> None:
        match event.phase:
            case Phase.FAILED if self.failure is None:
                self.failure, self.exit_code = event.text, event.exit_code
                self._failed.set()
                self._refuse()
            case Phase.GIVEN_UP | Phase.RECOVERING:
                self._outage, self._outage_at = event.text, self._clock()
                if event.phase is Phase.GIVEN_UP:
                    self._is_given_up = True
                    self._refuse()
                return
            case Phase.READY:
                self._outage, self._is_given_up = None, False
        self.phase = event.phase
        self.news = event.text

    def _refuse(self) -> None:
        for listener in list(self._listeners):
            listener()

    @property
    def outage(self) -> str | None:
        # If this process was held up, it may have missed the event that ends the outage. News come once a second.
        if self.pipeline is not None and self.pipeline.is_whole_after(self._outage_at):
            return None
        return self._outage

    @property
    def refusal(self) -> str | None:
        return self.failure or (self.outage if self._is_given_up else None)

    def fail(self, text: str, exit_code: int) -> None:
        """This process itself has seen that the head must end. Only the first reason counts."""
        self.update(StatusEvent(0, Phase.FAILED, text, exit_code))

    def wait_for_failure(self, timeout_s: float | None = None) -> str | None:
        self._failed.wait(timeout_s)
        return self.failure

    def on_refusal(self, listener: Callable[[], None]) -> None:
        self._listeners.add(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        self._listeners.discard(listener)

    def answer(self, path: str) -> tuple[int, str] | None:
        """HTTP status and text for this path; None: vLLM's own application answers."""
        if path == "/live":
            return 200, "alive"
        if self.refusal is not None:
            return 503, self.refusal
        if not self.is_serving:
            return 503, f"the pipeline is not ready: {self._where()}"
        if path == "/ready":
            if self.outage is not None:
                return 503, f"recovering: {self.outage}"
            silence_s = self.pipeline.silence_s if self.pipeline else 0.0
            if silence_s:
                return 503, f"stage 0's EngineCore has said nothing for {silence_s:.0f} s"
            return 200, "the whole ring answers"
        return None

    def respond(self, path: str) -> tuple[int, bytes] | None:
        """HTTP status and body for this path; None: vLLM's own application answers."""
        if path == "/pipeline/status" and self.pipeline is not None:
            known = Health(self._where(), self.is_serving, self.failure, self.outage)
            return 200, json.dumps(self.pipeline.describe(known)).encode()
        answer = self.answer(path)
        return None if answer is None else (answer[0], body_of(*answer))

    def _where(self) -> str:
        news = f", {self.news}" if self.news else ""
        return f"stage 0 is at {self.phase.value.replace('_', ' ')}{news}"


HEALTH = HeadHealth()
