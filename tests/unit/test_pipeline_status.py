"""What the head's API server says of the pipeline: honest while it starts, serves, is held up, and after its end."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stagewire.observe.status_events import MAX_DATAGRAM_BYTES, DatagramReceiver, Phase, StatusEvent
from stagewire.observe.timings import StageTimes, StepStatistics
from stagewire.vllm_plugin.head.api_app import RingMiddleware
from stagewire.vllm_plugin.head.health import HeadHealth
from stagewire.vllm_plugin.head.pipeline_status import Health, PipelineStatus
from stagewire.vllm_plugin.member.news import NewsSender, RingNews
from stagewire.vllm_plugin.member.probes import EarlyServer, StageCondition, StageHealth
from stagewire.wire.messages import MAX_STAGES, StageReport, StageTiming
from unit.ring_harness import make_config, make_report

LOADING = Health("stage 0 is at loading, layers 0-7", is_serving=False, failure=None)
SERVING = Health("stage 0 is at ready", is_serving=True, failure=None)
NO_STEPS = StepStatistics().summary(0.0)


@dataclass
class Channel:
    """From EngineCore to the API server, over a real socket, with a clock that moves when it is told to."""

    receiver: DatagramReceiver
    now: float = 50.0
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sender = NewsSender(self.receiver.path)
        self.status = PipelineStatus(make_config(0), lambda: self.now)

    def carry(self) -> None:
        for data in self.receiver.receive_all():
            self.sizes.append(len(data))
            self.status.update(data)

    def tell(self, **changes: Any) -> None:
        news = RingNews("linking", 0, "stage 3 to link", None, [], make_report(0, state="loading"), NO_STEPS)
        self.sender.tell(msgspec.structs.replace(news, **changes))
        self.carry()

    def tell_open(self, phase: str = "serving", **changes: Any) -> None:
        head = make_report(0)
        self.tell(**{"phase": phase, "epoch": 7, "waits_for": "", "linked": [0, 1, 2, 3], "head": head, **changes})

    def tell_stages(self, *reports: StageReport, times: list[StageTimes] | None = None) -> None:
        self.sender.tell_stages(reports, times or [])
        self.carry()

    def describe(self, health: Health) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(json.dumps(self.status.describe(health)))
        return described


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    receiver = DatagramReceiver(str(tmp_path / "news"))
    yield Channel(receiver)
    receiver.close()


def states(described: dict[str, Any]) -> list[str]:
    return [row["state"] for row in described["stages"]]


class TestStates:
    def test_before_the_first_word(self, channel: Channel) -> None:
        found = channel.describe(LOADING)
        assert (found["state"], found["is_ready"], found["reason"]) == ("linking", False, LOADING.news)
        assert states(found) == ["starting", "not linked yet", "not linked yet", "not linked yet"]
        assert [row["layers"] for row in found["stages"]] == ["0-8", None, None, None]

    def test_while_linking_it_says_for_whom_it_waits_and_who_is_there(self, channel: Channel) -> None:
        channel.tell(linked=[1])
        found = channel.describe(LOADING)
        assert (found["state"], found["reason"]) == ("linking", "stage 3 to link")
        assert states(found) == ["loading", "linked", "not linked yet", "not linked yet"]

    def test_linked_and_loading(self, channel: Channel) -> None:
        channel.tell_open("open")
        channel.tell_stages(*(make_report(n, state="loading" if n == 2 else "loaded") for n in range(4)))
        found = channel.describe(LOADING)
        assert (found["state"], found["is_ready"]) == ("loading", False)
        assert "stage 2 is at loading" in found["reason"]

    def test_serving(self, channel: Channel) -> None:
        channel.tell_open()
        channel.tell_stages(*map(make_report, range(4)), times=[StageTimes(1.5 + n, 40.0) for n in range(4)])
        channel.now += 0.5
        found = channel.describe(SERVING)
        assert (found["state"], found["is_ready"], found["reason"], found["epoch"]) == ("serving", True, "", 7)
        assert found["stages"][2] == {
            "stage": 2,
            "layers": "16-24",
            "num_layers": 8,
            "state": "serving",
            "reason": "",
            "age_s": 0.5,
            "pid": 102,
            "host": "here",
            "address": "127.0.0.1:1",
            "rss_bytes": 1 << 30,
            "device_bytes": 0,
            "kv_blocks": 10,
            "cached_requests": 0,
            "last_step": 7,
            "uptime_s": 0.505,
            "compute_ms": 3.5,
            "hop_us": 40.0,
        }

    def test_a_stage_that_is_to_stop_is_named(self, channel: Channel) -> None:
        channel.tell_open()
        channel.tell_stages(*(make_report(n, state="draining" if n == 2 else "serving") for n in range(4)))
        found = channel.describe(SERVING)
        assert (found["state"], found["is_ready"]) == ("serving", True)
        assert found["reason"] == "stage 2 is to stop: new requests wait for the one after it"
        assert states(found) == ["serving", "serving", "draining", "serving"]

    def test_one_stage_that_says_nothing_of_itself_is_linked_all_the_same(self, channel: Channel) -> None:
        channel.tell_open()
        channel.tell_stages(*(make_report(n) for n in (0, 1, 3)))
        assert states(channel.describe(SERVING)) == ["serving", "serving", "linked", "serving"]

    def test_reports_that_stay_away_are_told_with_their_age(self, channel: Channel) -> None:
        channel.tell_open()
        channel.tell_stages(*map(make_report, range(4)))
        channel.now += 6
        channel.tell_open()
        found = channel.describe(SERVING)
        assert found["is_ready"]
        assert "no reports of the other stages for 6 s" in found["reason"]
        assert [row["age_s"] for row in found["stages"]] == [0, 6, 6, 6]

    def test_a_silent_engine_is_not_ready(self, channel: Channel) -> None:
        channel.tell_open()
        channel.now += 9
        assert channel.describe(SERVING)["is_ready"]
        channel.now += 3
        found = channel.describe(SERVING)
        assert not found["is_ready"]
        assert "EngineCore has said nothing for 12 s" in found["reason"]

    def test_a_lost_stage_is_named_and_the_others_are_not_vouched_for(self, channel: Channel) -> None:
        channel.tell_open()
        channel.tell_stages(*map(make_report, range(4)))
        channel.tell_open("failed", lost_stage=2)
        channel.now += 4
        found = channel.describe(Health("", is_serving=True, failure="stage 2 is lost: gone"))
        assert (found["state"], found["is_ready"], found["reason"]) == ("lost", False, "stage 2 is lost: gone")
        assert states(found) == ["failed", "unknown", "lost", "unknown"]
        assert found["stages"][2]["pid"] == 102
        assert found["stages"][2]["age_s"] == 4

    def test_a_stage_that_went_before_serving_is_not_linked(self, channel: Channel) -> None:
        channel.tell_open("open")
        channel.tell_stages(*map(make_report, range(4)))
        channel.tell(linked=[1])
        found = channel.describe(LOADING)
        assert states(found)[3] == "not linked yet"
        assert found["stages"][3]["reason"] == "it was linked before"


class TestDatagrams:
    def test_the_largest_ring_fits(self, channel: Channel) -> None:
        """In datagrams of bounded size; a queue that is full costs the sender nothing but the news."""
        text = "\N{SNOWMAN}" * 128

        def wide(stage: int) -> StageReport:
            return msgspec.structs.replace(make_report(0), stage=stage, host=text, address=text, rss_bytes=1 << 62)

        reports = [wide(n) for n in range(MAX_STAGES)]
        channel.sender.tell_stages(reports, [])
        channel.carry()
        assert channel.sizes
        assert max(channel.sizes) < MAX_DATAGRAM_BYTES
        channel.tell_open(linked=list(range(MAX_STAGES)))
        assert max(channel.sizes) < MAX_DATAGRAM_BYTES

    def test_nobody_listens(self, tmp_path: Path) -> None:
        NewsSender(str(tmp_path / "nobody")).tell_stages([make_report(0)], [])

    @pytest.mark.parametrize("data", [b"", b"\x00", b"{}", msgspec.msgpack.encode({"type": "RingNews"})])
    def test_malformed_ones_are_dropped(self, channel: Channel, data: bytes) -> None:
        channel.status.update(data)
        assert channel.describe(LOADING)["state"] == "linking"

    def test_a_stage_that_this_ring_does_not_have(self, channel: Channel) -> None:
        channel.tell_open()
        channel.tell_stages(msgspec.structs.replace(make_report(3), stage=4))
        assert len(channel.describe(SERVING)["stages"]) == 4


def timings(start_ns: int, compute_ms: list[float], hop_us: list[int], round_ms: float) -> list[StageTiming]:
    """Each stage's clock has an origin of its own."""
    made = [
        StageTiming(n, start_ns + n * 10**15, n * 10**15, n * 10**15 + int(ms * 1e6), 0, hop * 1000)
        for n, (ms, hop) in enumerate(zip(compute_ms, hop_us, strict=True))
    ]
    back = StageTiming(0, start_ns + int(round_ms * 1e6), 0, 0, 0, 90_000)
    return [*made, back]


class TestStatistics:
    def test_nothing_yet(self) -> None:
        steps = StepStatistics()
        summary = steps.summary(100.0)
        assert (summary.num_answered, summary.per_s, summary.since_last_s, summary.round_ms) == (0, 0.0, None, None)
        assert steps.per_stage() == []

    def test_medians_of_decode_steps_only(self) -> None:
        steps = StepStatistics()
        for number, (compute, is_decode) in enumerate(
            [([1.0, 4.0], True), ([2.0, 5.0], True), ([30.0, 50.0], True), ([500.0, 600.0], False)]
        ):
            steps.add(4, is_decode, timings(number * 10**9, compute, [70, 40], 12.0))
        found = steps.summary(10.0)
        assert (found.num_answered, found.num_decode, found.num_requests, found.round_ms) == (4, 3, 4, 12.0)
        # The head's hop is the one that its result came by; what it measured before the step is older.
        assert steps.per_stage() == [StageTimes(2.0, 90.0), StageTimes(5.0, 40.0)]

    def test_a_hop_that_was_never_measured_is_unknown(self) -> None:
        steps = StepStatistics()
        steps.add(1, True, timings(0, [1.0, 1.0], [0, 0], 3.0))
        assert [each.hop_us for each in steps.per_stage()] == [90.0, None]

    @pytest.mark.parametrize(("num_steps", "after_s", "per_s"), [(20, 0.0, 2.0), (20, 5.0, 1.0), (20, 60.0, 0.0)])
    def test_the_rate_follows_the_load(self, num_steps: int, after_s: float, per_s: float) -> None:
        steps = StepStatistics()
        for number in range(num_steps + 1):
            steps.add(1, True, timings(int(number * 0.5e9), [1.0], [1], 0.0))
        assert steps.summary(num_steps * 0.5 + after_s).per_s == pytest.approx(per_s, abs=0.15)


class TestHttp:
    """Both servers of the head's port give the same answer, while it starts and later."""

    @pytest.fixture
    def health(self, channel: Channel) -> HeadHealth:
        health = HeadHealth(lambda: channel.now)
        health.pipeline = channel.status
        return health

    def test_while_it_loads(self, health: HeadHealth, channel: Channel) -> None:
        health.update(StatusEvent(0, Phase.LOADING, "layers 0-7"))
        channel.tell(linked=[1])
        with socket.create_server(("127.0.0.1", 0)) as sock:
            server = EarlyServer(sock, health)
            try:
                found = {path: self._get(sock.getsockname()[1], path) for path in ("/pipeline/status", "/ready")}
            finally:
                server.close()
        assert found["/ready"][0] == 503
        status, body = found["/pipeline/status"]
        assert status == 200
        assert states(body) == ["loading", "linked", "not linked yet", "not linked yet"]

    @staticmethod
    def _get(port: int, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    @pytest.mark.parametrize(("path", "status"), [("/pipeline/status", 200), ("/ready", 503), ("/v1/models", 503)])
    def test_after_a_loss(self, health: HeadHealth, channel: Channel, path: str, status: int) -> None:
        health.is_serving = True
        channel.tell_open("failed", lost_stage=3)
        health.update(StatusEvent(0, Phase.FAILED, "stage 3 is lost", 3))
        sent = self._ask(health, path)
        assert sent[0]["status"] == status
        assert "stage 3 is lost" in sent[1]["body"].decode()

    def test_while_a_lost_stage_may_come_back(self, health: HeadHealth, channel: Channel) -> None:
        health.is_serving = True
        channel.tell_open("linking", lost_stage=3)
        health.update(StatusEvent(0, Phase.READY))
        health.update(StatusEvent(0, Phase.RECOVERING, "stage 3 is lost"))
        assert health.answer("/health") is None
        assert health.answer("/v1/completions") is None
        assert health.answer("/ready") == (503, "recovering: stage 3 is lost")
        described = json.loads(self._ask(health, "/pipeline/status")[1]["body"])
        assert (described["state"], described["is_ready"], described["reason"]) == (
            "recovering",
            False,
            "stage 3 is lost",
        )
        assert states(described)[3] == "lost"
        health.update(StatusEvent(0, Phase.READY))
        channel.tell_open()
        assert health.answer("/ready") == (200, "the whole ring answers")

    def test_past_the_deadline_until_it_is_back(self, health: HeadHealth, channel: Channel) -> None:
        told: list[str | None] = []
        health.is_serving = True
        health.on_refusal(lambda: told.append(health.refusal))
        channel.tell_open()
        health.update(StatusEvent(0, Phase.RECOVERING, "stage 3 is lost"))
        assert told == []
        health.update(StatusEvent(0, Phase.GIVEN_UP, "stage 3 did not come back"))
        assert told == ["stage 3 did not come back"]
        for path in ("/health", "/ready", "/v1/models"):
            assert health.answer(path) == (503, "stage 3 did not come back")
        health.update(StatusEvent(0, Phase.READY))
        assert health.answer("/v1/models") is None

    def test_an_open_request_that_is_refused_ends_inside_as_if_its_client_had_hung_up(self, health: HeadHealth) -> None:
        """vLLM goes on computing a request whose handler is only cancelled."""
        health.is_serving = True
        seen: list[str] = []
        sent: list[MutableMapping[str, Any]] = []

        async def inside(scope: Any, receive: Any, send: Any) -> None:
            seen.append((await receive())["type"])
            health.update(StatusEvent(0, Phase.GIVEN_UP, "stage 3 did not come back"))
            seen.append((await receive())["type"])
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> MutableMapping[str, Any]:
            if not seen:
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.sleep(3600)  # the client waits
            raise AssertionError

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        asyncio.run(RingMiddleware(inside, health)({"type": "http", "path": "/v1/completions"}, receive, send))
        assert seen == ["http.request", "http.disconnect"]
        assert [message.get("status") for message in sent] == [503, None]
        assert b"stage 3 did not come back" in sent[1]["body"]

    def test_the_ring_is_whole_when_its_news_say_so_for_long_enough(self, health: HeadHealth, channel: Channel) -> None:
        """The word that it is was lost: this process was held up."""
        health.is_serving = True
        health.update(StatusEvent(0, Phase.RECOVERING, "stage 3 is lost"))
        health.update(StatusEvent(0, Phase.GIVEN_UP, "stage 3 did not come back"))
        channel.tell_open()  # late: from before the loss
        assert self._ask(health, "/v1/models")[0]["status"] == 503
        channel.now += 4
        channel.tell_open(lost_stage=3)
        assert self._ask(health, "/v1/models")[0]["status"] == 503
        channel.tell_open()
        assert health.refusal is None
        assert self._ask(health, "/ready")[0]["status"] == 200

    def test_an_ended_request_is_told_why_also_if_it_is_over_by_then(self, health: HeadHealth) -> None:
        health.is_serving = True
        sent: list[MutableMapping[str, Any]] = []

        async def inside(scope: Any, receive: Any, send: Any) -> None:
            health.update(StatusEvent(0, Phase.GIVEN_UP, "stage 3 did not come back"))
            health.update(StatusEvent(0, Phase.READY, ""))
            assert (await receive())["type"] == "http.disconnect"

        async def receive() -> MutableMapping[str, Any]:
            await asyncio.sleep(3600)
            raise AssertionError

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        asyncio.run(RingMiddleware(inside, health)({"type": "http", "path": "/v1/completions"}, receive, send))
        assert b"stage 3 did not come back" in sent[1]["body"]

    def test_ready_does_not_vouch_for_a_silent_engine(self, health: HeadHealth, channel: Channel) -> None:
        health.is_serving = True
        channel.tell_open()
        assert self._ask(health, "/ready")[0]["status"] == 200
        channel.now += 11
        assert self._ask(health, "/ready")[0]["status"] == 503

    @pytest.mark.parametrize(
        ("described", "health", "ready"),
        [
            ((False, "stage 1", None), 503, 503),
            ((True, "", None), 200, 200),
            ((True, "stage 3", None), 200, 503),
            ((True, "", "stage 1 failed"), 503, 503),
        ],
        ids=["joins", "serves", "waits", "failed"],
    )
    def test_a_stage_without_an_api(self, described: tuple[bool, str, str | None], health: int, ready: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            server = EarlyServer(sock, StageHealth(lambda: StageCondition(*described)))
            try:
                port = sock.getsockname()[1]
                paths = ("/live", "/health", "/ready", "/v1/models")
                assert [self._get(port, path)[0] for path in paths] == [200, health, ready, 404]
            finally:
                server.close()

    @staticmethod
    def _ask(health: HeadHealth, path: str) -> list[MutableMapping[str, Any]]:
        sent: list[MutableMapping[str, Any]] = []

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def inside(*_: Any) -> None:
            raise AssertionError("the application inside was asked")

        asyncio.run(RingMiddleware(inside, health)({"type": "http", "path": path}, receive, send))
        return sent
