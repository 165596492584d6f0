"""The end of a head's API server: what counts as a second signal."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial

import pytest

from stagewire.vllm_plugin.head import stopping
from stagewire.vllm_plugin.head.health import HeadHealth
from stagewire.vllm_plugin.head.stopping import HeadEnd

SOON_S = 0.2


class Told(HeadEnd):
    """Remembers that it would have ended the process."""

    def __init__(self) -> None:
        super().__init__(HeadHealth(), lambda: None)
        self.num_ends = 0

    def end_now(self, engine_s: float = 0.0) -> None:
        self.num_ends += 1


def test_a_second_signal_ends_it_and_the_news_that_the_ring_has_ended_is_none() -> None:
    """EngineCore says so before its last words have left: ended at once, it would leave stages that wait for it."""
    told: list[str] = []

    async def stop() -> list[int]:
        end, loop = Told(), asyncio.get_running_loop()
        end.serve_in(loop)
        loop.add_signal_handler(signal.SIGTERM, told.append, "vLLM")
        ends = []
        tell = partial(os.kill, os.getpid(), signal.SIGTERM)
        acts: list[Callable[[], None]] = [tell, partial(end.begin_stop, 600.0), end.ring_stopped, tell]
        for act in acts:
            act()
            await asyncio.sleep(SOON_S)
            ends.append(end.num_ends)
        return ends

    assert asyncio.run(stop()) == [0, 0, 0, 1]
    assert told == ["vLLM"]


def test_a_second_signal_counts_also_before_vllm_has_obeyed_the_first() -> None:
    async def stop() -> int:
        end, loop = Told(), asyncio.get_running_loop()
        end.serve_in(loop)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        await asyncio.sleep(SOON_S)
        return end.num_ends

    assert asyncio.run(stop()) == 1


def test_a_stop_has_a_deadline_without_a_signal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "STOP_S", SOON_S / 2)

    async def stop() -> int:
        end = Told()
        end.serve_in(asyncio.get_running_loop())
        for _ in range(2):
            end.begin_stop(0.0)
        await asyncio.sleep(2 * SOON_S)
        return end.num_ends

    assert asyncio.run(stop()) == 1


def test_a_ring_that_somebody_else_has_ended_ends_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    end = Told()
    end.ring_stopped()
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert end.is_engine_to_end, "its end is no failure"
