"""The HTTP front before a head that does as it is told: real sockets and servers, one event loop, no sleeps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import uvicorn

from stagewire.front.app import Front
from stagewire.front.server import listen, serve
from stagewire.launch.local_stage import Progress
from stagewire.launch.spec import place_stages
from stagewire.observe.status_events import Phase
from stagewire.plan.ranges import split_evenly

LIMIT_S = 20.0
# What the sockets between three programs may hold; the kernel alone takes some MB on each connection.
MAX_HELD_BYTES = 32 << 20
WHOLE_BYTES = 160 << 20

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


@dataclass
class Head:
    """A head; ``answer`` is what it does with a request that is not for its status."""

    answer: Callable[[Message, Receive, Send], Awaitable[None]]
    status: dict[str, Any] = field(default_factory=lambda: {"is_ready": True, "state": "serving", "stages": []})
    requests: list[tuple[str, str]] = field(default_factory=list)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["path"] == "/pipeline/status":
            await respond(send, 200, json.dumps(self.status).encode())
            return
        self.requests.append((scope["method"], scope["raw_path"].decode()))
        await self.answer(scope, receive, send)


async def respond(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


async def begin(send: Send, content_type: bytes = b"text/event-stream") -> None:
    headers = [(b"content-type", content_type)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def piece(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def body_of(receive: Receive) -> bytes:
    whole = b""
    while True:
        message = await receive()
        whole += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return whole


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass
class World:
    """A head, a front before it, and a client."""

    front: Front
    url: str
    client: aiohttp.ClientSession
    stop_head: Callable[[], Awaitable[None]]


class HeadServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def abort(self) -> None:
        """The process is gone: its connections end in the middle of whatever they carry."""
        self.force_exit = self.should_exit = True
        for connection in list(self.server_state.connections):
            transport = connection.transport
            assert isinstance(transport, asyncio.Transport)
            transport.abort()


@contextlib.asynccontextmanager
async def running(head: Head, url: str = "", **options: Any) -> AsyncIterator[World]:
    head_sock, front_sock = listen("127.0.0.1", 0), listen("127.0.0.1", 0)
    config = uvicorn.Config(head, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    server = HeadServer(config)
    serving = asyncio.ensure_future(server.serve(sockets=[head_sock]))

    async def stop_head() -> None:
        server.abort()
        await serving

    front = Front(url or f"http://127.0.0.1:{head_sock.getsockname()[1]}", **options)
    ended = asyncio.Event()

    async def until_ended() -> int:
        await ended.wait()
        return 0

    fronting = asyncio.ensure_future(serve(front, front_sock, until_ended()))
    public = f"http://127.0.0.1:{front_sock.getsockname()[1]}"
    try:
        async with aiohttp.ClientSession(auto_decompress=False) as client:
            yield World(front, public, client, stop_head)
    finally:
        ended.set()
        await fronting
        await stop_head()


def run(test: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(LIMIT_S):
            await test

    asyncio.run(within())


async def until_still(count: Callable[[], int]) -> int:
    """The count once it has stayed the same for a thousand turns of the loop, each of which moves what can move."""
    seen, turns = -1, 0
    while turns < 1000:
        await asyncio.sleep(0)
        seen, turns = (count(), 0) if count() != seen else (seen, turns + 1)
    return seen


class TestPassedThrough:
    def test_status_body_and_headers(self) -> None:
        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            headers = ((b"x-thing", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"retry-after", b"7"))
            await respond(send, int(scope["path"][1:]), b"\x00the body\xff", *headers, (b"content-encoding", b"gzip"))

        async def check(world: World, status: int) -> None:
            async with world.client.get(f"{world.url}/{status}") as response:
                assert response.status == status
                assert await response.read() == b"\x00the body\xff"
                assert response.headers.getall("set-cookie") == ["a=1", "b=2"]
                found = [response.headers[name] for name in ("x-thing", "retry-after", "content-encoding")]
                assert found == ["1", "7", "gzip"]

        async def test() -> None:
            async with running(Head(answer)) as world:
                for status in (200, 201, 400, 401, 404, 422, 429, 500, 503):
                    await check(world, status)

        run(test())

    def test_what_the_head_gets(self) -> None:
        got: list[Message] = []

        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            got.append({"scope": scope, "body": await body_of(receive)})
            await respond(send, 200, b"")

        async def test() -> None:
            async with running(Head(answer)) as world:
                port = urllib.parse.urlsplit(world.url).port
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(
                    b"POST /v1/a%2Fb?q=%20x&q=y HTTP/1.1\r\nHost: models.example\r\nAuthorization: Bearer key\r\n"
                    b"X-Twice: 1\r\nX-Twice: 2\r\nX-Forwarded-For: 10.9.8.7\r\n"
                    b"Connection: close, X-Drop\r\nX-Drop: me\r\nTE: trailers\r\n"
                    b"Proxy-Authorization: no\r\nContent-Length: 5\r\n\r\nhello"
                )
                assert b"200 OK" in await reader.read()
                writer.close()

        run(test())
        ((scope, body),) = [(each["scope"], each["body"]) for each in got]
        headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
        assert (scope["method"], scope["raw_path"], scope["query_string"]) == ("POST", b"/v1/a%2Fb", b"q=%20x&q=y")
        assert body == b"hello"
        assert sorted(headers) == [
            ("authorization", "Bearer key"),
            ("content-length", "5"),
            ("host", "models.example"),
            ("x-forwarded-for", "10.9.8.7, 127.0.0.1"),
            ("x-twice", "1"),
            ("x-twice", "2"),
        ]

    def test_every_method_and_redirects_are_the_clients_business(self) -> None:
        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            await respond(send, 307, b"", (b"location", b"/elsewhere"), (b"content-length", b"0"))

        async def test() -> None:
            head = Head(answer)
            methods = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
            async with running(head) as world:
                for method in methods:
                    asked = world.client.request(method, f"{world.url}/v1", allow_redirects=False)
                    async with asked as response:
                        assert (response.status, response.headers["location"]) == (307, "/elsewhere")
            assert head.requests == [(method, "/v1") for method in methods]

        run(test())

    def test_events_come_one_by_one(self) -> None:
        """Each is sent only when the client has had the one before it: nothing waits for more to come."""
        taken = asyncio.Semaphore(0)

        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            await begin(send)
            for number in range(50):
                await piece(send, b"data: %d\n\n" % number)
                await taken.acquire()
            await piece(send, b"", more=False)

        async def test() -> None:
            async with running(Head(answer)) as world, world.client.get(f"{world.url}/v1") as response:
                assert response.content_type == "text/event-stream"
                for number in range(50):
                    assert await response.content.readuntil(b"\n\n") == b"data: %d\n\n" % number
                    taken.release()
                assert await response.read() == b""

        run(test())

    def test_a_websocket_is_refused_in_words(self) -> None:
        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            raise AssertionError("passed on")

        async def test() -> None:
            headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
            async with (
                running(Head(answer)) as world,
                world.client.get(f"{world.url}/v1/realtime", headers=headers) as response,
            ):
                assert response.status == 501
                assert "WebSockets are not passed on" in await response.text()

        run(test())


class TestBackPressure:
    """A client that does not read stops the head; a head that does not read stops the client. Nothing piles up."""

    def test_down(self) -> None:
        sent = 0

        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            nonlocal sent
            await begin(send, b"application/octet-stream")
            for _ in range(WHOLE_BYTES >> 16):
                await piece(send, bytes(1 << 16))
                sent += 1 << 16
            await piece(send, b"", more=False)

        async def test() -> None:
            async with running(Head(answer)) as world, world.client.get(f"{world.url}/v1") as response:
                assert 0 < await until_still(lambda: sent) < MAX_HELD_BYTES
                got = 0
                async for data in response.content.iter_any():
                    got += len(data)
                    assert sent - got < MAX_HELD_BYTES
                assert got == WHOLE_BYTES

        run(test())

    def test_up(self) -> None:
        go_on = asyncio.Event()
        sent = 0

        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            await go_on.wait()
            got = 0
            while True:
                message = await receive()
                got += len(message.get("body", b""))
                if not message.get("more_body"):
                    break
            await respond(send, 200, str(got).encode())

        async def upload() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(WHOLE_BYTES >> 16):
                yield bytes(1 << 16)
                sent += 1 << 16

        async def test() -> None:
            async with running(Head(answer)) as world:
                request = asyncio.ensure_future(world.client.post(f"{world.url}/v1", data=upload()))
                assert 0 < await until_still(lambda: sent) < MAX_HELD_BYTES
                go_on.set()
                async with await request as response:
                    assert int(await response.read()) == WHOLE_BYTES

        run(test())


class TestEnds:
    @pytest.mark.parametrize("when", ["before the answer", "in the stream", "in the upload"])
    def test_a_client_that_hangs_up_ends_its_request_at_the_head(self, when: str) -> None:
        began, gone = asyncio.Event(), asyncio.Event()

        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            if when == "in the stream":
                await begin(send)
                await piece(send, b"data: 1\n\n")
            began.set()
            await until_gone(receive)
            gone.set()

        async def endless() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        async def test() -> None:
            async with running(Head(answer)) as world:
                data = endless() if when == "in the upload" else b"{}"
                request = asyncio.ensure_future(world.client.post(f"{world.url}/v1", data=data))
                await began.wait()
                if when == "in the stream":
                    (await request).close()
                else:
                    request.cancel()
                await gone.wait()
                while (await described(world))["front"]["open_requests"]:
                    pass

        run(test())

    def test_a_head_that_ends_in_the_middle_of_a_stream(self) -> None:
        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            await begin(send)
            await piece(send, b'data: {"cut": ')
            await until_gone(receive)

        async def test() -> None:
            async with running(Head(answer)) as world, world.client.get(f"{world.url}/v1") as response:
                await response.content.readany()
                await world.stop_head()
                events = (await response.text()).split("\n\n")
                assert (
                    "ended its answer in the middle" in json.loads(events[1].removeprefix("data: "))["error"]["message"]
                )
                assert events[2:] == ["data: [DONE]", ""]

        run(test())

    def test_half_of_any_other_answer_is_not_taken_for_a_whole_one(self) -> None:
        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            await begin(send, b"application/json")
            await piece(send, b'{"half": ')
            await until_gone(receive)

        async def test() -> None:
            async with running(Head(answer)) as world, world.client.get(f"{world.url}/v1") as response:
                await response.content.readany()
                await world.stop_head()
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()

        run(test())

    def test_a_head_that_is_down(self) -> None:
        async def test() -> None:
            async with running(Head(_never)) as world:
                await world.stop_head()
                for path in ("/v1/models", "/ready"):
                    async with world.client.get(world.url + path) as response:
                        assert (response.status, response.headers["retry-after"]) == (503, "5")
                        assert (
                            "cannot be reached (connection refused)"
                            in json.loads(await response.read())["error"]["message"]
                        )
                async with world.client.get(f"{world.url}/health") as response:
                    assert response.status == 200

        run(test())

    def test_what_listens_there_is_no_http_server(self) -> None:
        async def test() -> None:
            async def gibberish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"220 mail.example ESMTP\r\n\r\n")
                await writer.drain()
                writer.close()

            mail = await asyncio.start_server(gibberish, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{mail.sockets[0].getsockname()[1]}"
            async with (
                mail,
                running(Head(_never), url) as world,
                world.client.get(f"{world.url}/v1") as response,
            ):
                assert response.status == 502

        run(test())


async def _never(scope: Message, receive: Receive, send: Send) -> None:
    raise AssertionError(f"asked for {scope['path']}")


async def described(world: World) -> dict[str, Any]:
    async with world.client.get(f"{world.url}/pipeline/status") as response:
        assert response.status == 200
        found: dict[str, Any] = json.loads(await response.read())
        return found


async def ready(world: World) -> tuple[int, str]:
    async with world.client.get(f"{world.url}/ready") as response:
        found = json.loads(await response.read())
        return response.status, found.get("status") or found["error"]["message"]


SPECS = place_stages(split_evenly(30, 2), 15550)


class TestReady:
    def test_a_ring_that_answered_before_is_ready_without_being_asked(self) -> None:
        async def test() -> None:
            head = Head(_never)
            head.status["steps"] = {"num_answered": 3}
            async with running(head) as world:
                assert await ready(world) == (200, "the whole ring answers")
                head.status |= {"is_ready": False, "state": "lost", "reason": "stage 1 is lost"}
                assert await ready(world) == (503, "the pipeline is lost: stage 1 is lost")

        run(test())

    def test_a_ring_that_nobody_asked_is_asked_once(self) -> None:
        answered = asyncio.Event()

        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            if scope["path"] == "/v1/models":
                assert (b"authorization", b"Bearer secret") in scope["headers"]
                await respond(send, 200, b'{"data": [{"id": "m"}]}')
                return
            assert json.loads(await body_of(receive))["max_tokens"] == 1
            await answered.wait()
            head.status["steps"] = {"num_answered": 1}
            await respond(send, 200, b"{}")

        head = Head(answer)
        head.status["steps"] = {"num_answered": 0}

        async def test() -> None:
            async with running(head, api_key=lambda: "secret") as world:
                for _ in range(5):
                    status, text = await ready(world)
                    assert (status, text) == (503, "no token has gone round the ring yet, a first one is asked for")
                answered.set()
                while (await ready(world))[0] != 200:
                    pass
                assert head.requests == [("GET", "/v1/models"), ("POST", "/v1/completions")]

        run(test())

    @pytest.mark.parametrize(
        ("task", "requests"),
        [
            ("embed", [("GET", "/v1/models"), ("POST", "/v1/embeddings")]),
            ("score", [("GET", "/v1/models"), ("POST", "/score")]),
            ("plugin", []),
        ],
    )
    def test_a_ring_is_asked_for_what_its_model_is_for(self, task: str, requests: list[tuple[str, str]]) -> None:
        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            if scope["method"] == "POST":
                await body_of(receive)
                head.status["steps"] = {"num_answered": 1}
            await respond(send, 200, b'{"data": [{"id": "m"}]}')

        head = Head(answer)
        head.status["api_server"] = {"pid": 7, "task": task}

        async def test() -> None:
            async with running(head) as world:
                while (await ready(world))[0] != 200:
                    pass
                assert head.requests == requests

        run(test())

    def test_a_first_token_that_fails_is_told_and_asked_for_again(self) -> None:
        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            await respond(send, 401, b"{}")

        async def test() -> None:
            head = Head(answer)
            async with running(head) as world:
                while "401" not in (await ready(world))[1]:
                    pass
                while len(head.requests) < 3:
                    assert (await ready(world))[0] == 503

        run(test())

    def test_the_launchers_first_answer_is_a_proof_and_its_failed_stage_is_the_end(self) -> None:
        async def test() -> None:
            stages = [Progress(spec, Phase.READY, "", 100 + spec.index, "") for spec in SPECS]
            async with running(Head(_never), stages=lambda: stages) as world:
                world.front.is_proven = True
                assert (await ready(world))[0] == 200
                stages[1] = Progress(SPECS[1], Phase.READY, "", 101, "stage 1 was killed by SIGKILL")
                assert await ready(world) == (503, "stage 1 was killed by SIGKILL")

        run(test())

    def test_it_is_no_proof_for_the_next_head(self) -> None:
        async def test() -> None:
            head = Head(_never)
            head.status["api_server"] = {"pid": 7}
            async with running(head) as world:
                world.front.is_proven = True
                assert (await ready(world))[0] == 200
                head.status["api_server"] = {"pid": 8}
                assert (await ready(world))[0] == 503
                head.status["steps"] = {"num_answered": 1}
                assert (await ready(world))[0] == 200

        run(test())


class TestStatus:
    def test_the_heads_word_counts(self) -> None:
        async def test() -> None:
            head = Head(_never)
            head.status["stages"] = [{"stage": 0, "state": "serving", "reason": "", "pid": 7, "layers": "0-15"}]
            stages = [Progress(SPECS[0], Phase.READY, "", 100, "")]
            async with running(head, stages=lambda: stages) as world:
                found = await described(world)
                assert found["stages"] == head.status["stages"]
                assert found["front"]["stages"][0]["pid"] == 100

        run(test())

    def test_where_the_head_knows_nothing_the_launcher_does(self) -> None:
        async def test() -> None:
            head = Head(_never)
            head.status["stages"] = [
                {"stage": 0, "state": "loading", "reason": "", "pid": 7, "layers": "0-15"},
                {"stage": 1, "state": "not linked yet", "reason": "", "pid": None, "layers": None},
            ]
            stages = [Progress(spec, Phase.LOADING, "layers (0.2 GB)", 100 + spec.index, "") for spec in SPECS]
            async with running(head, stages=lambda: stages) as world:
                rows = (await described(world))["stages"]
                assert [(row["state"], row["pid"]) for row in rows] == [("loading", 7), ("loading", 101)]
                assert (rows[1]["layers"], rows[1]["num_layers"], rows[1]["reason"]) == ("15-30", 15, "layers (0.2 GB)")

        run(test())

    def test_while_the_head_is_down(self) -> None:
        async def test() -> None:
            stages = [Progress(spec, Phase.IMPORTING, "", 100 + spec.index, "") for spec in SPECS]
            async with running(Head(_never), stages=lambda: stages) as world:
                await world.stop_head()
                found = await described(world)
                assert (found["state"], found["is_ready"]) == ("head unreachable", False)
                assert "stage 1 is at importing" in found["reason"]
                assert [(row["state"], row["pid"]) for row in found["stages"]] == [
                    ("importing", 100),
                    ("importing", 101),
                ]

        run(test())

    @pytest.mark.parametrize("status", [[], {"stages": None}, "text"])
    def test_a_head_that_is_none(self, status: Any) -> None:
        async def test() -> None:
            async with running(Head(_never, status=status)) as world:
                assert (await described(world))["state"] == "head unreachable"
                assert (await ready(world))[0] == 503

        run(test())


def test_a_public_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Exception, match=f"cannot listen on 127.0.0.1 port {port} .*--port"):
            listen("127.0.0.1", port)
