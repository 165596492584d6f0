"""One public HTTP port before the head's: an ASGI application that passes everything through, and its server.

    /health           200: this process lives
    /ready            200 only when the head says that the whole ring answers and a token has gone round it
    /pipeline/status  the head's, with what is known here; also while there is no head
    others            the head's, streamed both ways; 503 with the reason and Retry-After while it cannot be reached

A request and its answer are carried piece by piece, and a piece is read only when the one before it has been taken: a
slow client slows the head, memory stays the same. A client that hangs up ends its connection to the head, which ends
the request there. An open answer has no deadline.

Over aiohttp, not httpx: measured here, 12 against 17 µs of processor per streamed event and 0.26 against 1.1 ms per
request. Knows HTTP and what it is told of local stages; starts nothing but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import uvicorn
from multidict import CIMultiDict
from yarl import URL

from stagewire.errors import ConfigError
from stagewire.launch.api import Api, Served
from stagewire.launch.examples import Example, first_request
from stagewire.launch.loop import run_loop, take_signals
from stagewire.launch.screen import open_screen
from stagewire.launch.supervisor import Progress
from stagewire.launch.up import Launch

__all__ = ["Front", "listen", "run_in_loop", "serve", "serve_head", "serve_launch"]

RETRY_AFTER_S = 5
CONNECT_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 5.0
FIRST_TOKEN_TIMEOUT_S = 300.0
# At the end open answers have this long to finish; the head has ended by then, or goes on without us.
GRACE_S = 1
# Below the head's (VLLM_HTTP_TIMEOUT_KEEP_ALIVE, 5 s): a request never meets a connection that is just being closed.
KEEP_ALIVE_S = 2.0
MAX_HEADER_BYTES = 65536

# RFC 9110, 7.6.1: of one connection, not of the message. `Expect` is answered by our own server.
_HOP_BY_HOP = frozenset(
    name.encode()
    for name in (
        *("connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization"),
        *("te", "trailer", "transfer-encoding", "upgrade", "expect"),
    )
)
# The client would add these by itself.
_AUTOMATIC = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]
_Receive = Callable[[], Awaitable[_Message]]
_Headers = list[tuple[bytes, bytes]]


class Front:
    """The application.

    Args:
        head: URL of the head's API, without a path.
        api_key: for the one request that the front may make itself; asked when it makes it.
        stages: what is known of local stages; empty for a ring that was started by others.
    """

    def __init__(
        self,
        head: str,
        api_key: Callable[[], str | None] = lambda: None,
        stages: Callable[[], Sequence[Progress]] = tuple,
    ) -> None:
        self.is_proven = False  # a token has gone round the ring, as somebody else saw
        self._proven_head: int | None = None  # whose ring that was: its process
        self._head = head
        self._api_key = api_key
        self._stages = stages
        self._session: aiohttp.ClientSession | None = None
        self._started_at = time.monotonic()
        self._num_open = 0
        self._first_token: asyncio.Task[None] | None = None
        self._first_token_error = ""

    def __repr__(self) -> str:
        return f"Front({self._head}, open={self._num_open}, proven={self.is_proven})"

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _live(self, receive: _Receive, send: _Send) -> None:
        await receive()
        self._session = self._open_session()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._first_token is not None:
            self._first_token.cancel()
        await self._session.close()
        await send({"type": "lifespan.shutdown.complete"})

    def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_AUTOMATIC,
            auto_decompress=False,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )

    async def _answer(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        headers: _Headers = scope["headers"]
        if scope["path"] == "/health":
            await _respond(send, 200, {"status": "alive"})
        elif scope["path"] == "/ready":
            is_ready, text = await self._judge()
            await _respond(send, 200, {"status": text}) if is_ready else await _refuse(send, 503, text)
        elif scope["path"] == "/pipeline/status":
            await _respond(send, 200, await self._describe())
        elif any(name == b"upgrade" and value.lower() == b"websocket" for name, value in headers):
            text = "WebSockets are not passed on: /v1/realtime is for speech, which is not served over stages"
            await _refuse(send, 501, text)
        elif not scope["raw_path"].startswith(b"/"):
            await _refuse(send, 400, f"{scope['path']!r} is not a path on this server")
        else:
            self._num_open += 1
            try:
                await self._carry(scope, receive, send)
            finally:
                self._num_open -= 1

    # ---- the head's routes -----------------------------------------------------------------------------------------

    async def _carry(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """One request there and back, or its end with the client's."""
        upload: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        listening = asyncio.ensure_future(_listen_to_client(receive, upload))
        exchange = asyncio.ensure_future(self._exchange(scope, upload, send))
        try:
            await asyncio.wait({listening, exchange}, return_when=asyncio.FIRST_COMPLETED)
            if exchange.done():
                exchange.result()
        finally:
            for task in (exchange, listening):
                task.cancel()
            await asyncio.wait({listening, exchange})

    async def _exchange(self, scope: _Scope, upload: asyncio.Queue[bytes | None], send: _Send) -> None:
        assert self._session is not None
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        try:
            url = URL(self._head + (scope["raw_path"] + query).decode("ascii"), encoded=True)
            headers = _request_headers(scope)
            body = _pieces(upload) if _has_body(scope["headers"]) else None
            response = await self._session.request(
                scope["method"], url, headers=headers, data=body, allow_redirects=False
            )
        except (aiohttp.ClientConnectionError, OSError) as error:
            await _refuse(send, 503, self._why_unreachable(error))
        except aiohttp.ClientError as error:
            await _refuse(send, 502, f"the head at {self._head} does not answer as an HTTP server: {error}")
        except ValueError as error:
            await _refuse(send, 400, f"this request cannot be passed on: {error}")
        else:
            try:
                await self._return(response, send)
            finally:
                response.close()  # an answer that was taken in whole has given its connection back already

    async def _return(self, response: aiohttp.ClientResponse, send: _Send) -> None:
        headers = _without_hop_by_hop([(name.lower(), value) for name, value in response.raw_headers])
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        try:
            async for piece in response.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (aiohttp.ClientError, OSError) as error:
            if response.content_type != "text/event-stream":
                return  # unfinished: the server ends the connection, and nobody takes half an answer for a whole one
            text = f"the head ended its answer in the middle: {error}"
            last = b"\n\ndata: " + json.dumps(_error(503, text)).encode() + b"\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _why_unreachable(self, error: BaseException) -> str:
        stages = self._stages()
        failures = [stage.failure for stage in stages if stage.failure]
        if failures:
            return failures[0]
        reason = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        why = "connection refused" if isinstance(reason, ConnectionRefusedError) else str(reason) or repr(reason)
        text = f"the head at {self._head} cannot be reached ({why})"
        where = ", ".join(f"stage {stage.spec.index} is at {_words(stage)}" for stage in stages)
        return f"{text}; {where}" if where else text

    # ---- our own ---------------------------------------------------------------------------------------------------

    async def _ask_head(self) -> dict[str, Any] | str:
        """What the head's /pipeline/status says, or why it does not."""
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
        try:
            async with self._session.get(f"{self._head}/pipeline/status", timeout=timeout) as response:
                if response.status != 200:
                    return f"{self._head}/pipeline/status has status {response.status}: not the head of a pipeline"
                found = json.loads(await response.read())
                is_ours = isinstance(found, dict) and isinstance(found.get("stages"), list)
                return found if is_ours else f"{self._head}/pipeline/status is not that of a pipeline"
        except TimeoutError:
            return f"the head at {self._head} did not answer within {ASK_TIMEOUT_S:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return self._why_unreachable(error)

    async def _judge(self) -> tuple[bool, str]:
        """Whether a token would go round now, and why not."""
        failures = [stage.failure for stage in self._stages() if stage.failure]
        if failures:
            return False, failures[0]
        found = await self._ask_head()
        if isinstance(found, str):
            return False, found
        if not found.get("is_ready"):
            return False, f"the pipeline is {found.get('state')}: {found.get('reason')}"
        head = (found.get("api_server") or {}).get("pid")
        if self._proven_head is None:
            self._proven_head = head
        is_proven = self.is_proven and head == self._proven_head
        request = first_request((found.get("api_server") or {}).get("task", "generate"))
        if request is None or is_proven or (found.get("steps") or {}).get("num_answered"):
            return True, "the whole ring answers"
        self._ask_first(request)
        return (
            False,
            f"no token has gone round the ring yet, a first one is asked for {self._first_token_error}".strip(),
        )

    def _ask_first(self, request: Example) -> None:
        """Once at a time, and never again for a ring that has answered a step: its head counts them."""
        if self._first_token is None or self._first_token.done():
            self._first_token = asyncio.create_task(self._first(request))

    async def _first(self, request: Example) -> None:
        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        if api_key := self._api_key():
            headers["Authorization"] = f"Bearer {api_key}"
        self._first_token_error = ""
        try:
            async with asyncio.timeout(FIRST_TOKEN_TIMEOUT_S):
                async with self._session.get(f"{self._head}/v1/models", headers=headers) as response:
                    response.raise_for_status()
                    model = json.loads(await response.read())["data"][0]["id"]
                body = json.dumps({"model": model, **request.body})
                async with self._session.post(f"{self._head}{request.route}", headers=headers, data=body) as response:
                    response.raise_for_status()
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as error:
            self._first_token_error = f"(the last one failed: {error or type(error).__name__})"

    async def _describe(self) -> dict[str, Any]:
        """The head's word, and ours where it has none."""
        found = await self._ask_head()
        local = {stage.spec.index: stage for stage in self._stages()}
        if isinstance(found, str):
            found = {
                "state": "head unreachable",
                "is_ready": False,
                "reason": found,
                "epoch": 0,
                "num_stages": len(local),
                "api_server": None,
                "steps": None,
                "stages": [{"stage": number, "state": "unknown", "reason": ""} for number in sorted(local)],
            }
        found["stages"] = [_with_local(row, local.get(row["stage"])) for row in found["stages"]]
        found["front"] = {
            "pid": os.getpid(),
            "head": self._head,
            "uptime_s": round(time.monotonic() - self._started_at, 3),
            "open_requests": self._num_open,
            "stages": [_as_row(stage) for stage in local.values()],
        }
        return found


def _words(stage: Progress) -> str:
    return f"{stage.phase.value.replace('_', ' ')} {stage.text}".rstrip()


def _as_row(stage: Progress) -> dict[str, Any]:
    layers = stage.spec.layers
    return {
        "stage": stage.spec.index,
        "layers": str(layers),
        "num_layers": layers.end - layers.start,
        "state": stage.phase.value,
        "reason": stage.text,
        "pid": stage.pid,
        "failure": stage.failure,
    }


def _with_local(row: dict[str, Any], local: Progress | None) -> dict[str, Any]:
    """Where the head knows nothing of a stage yet, or no longer, the launcher's knowledge counts."""
    if local is None:
        return row
    if local.failure:
        return {**row, "state": "failed", "reason": local.failure, "pid": row.get("pid") or local.pid}
    if row.get("pid") is not None:
        return row
    known = _as_row(local)
    del known["failure"]
    return {**row, **known, "reason": local.text or row["reason"]}


# ---- pieces of HTTP --------------------------------------------------------------------------------------------------


async def _listen_to_client(receive: _Receive, upload: asyncio.Queue[bytes | None]) -> None:
    """Puts the request's body into ``upload``, None at its end; returns when the client is gone."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if message.get("body"):
            await upload.put(message["body"])
        if not message.get("more_body"):
            await upload.put(None)


async def _pieces(upload: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while (piece := await upload.get()) is not None:
        yield piece


def _has_body(headers: _Headers) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0") for name, value in headers
    )


def _without_hop_by_hop(headers: _Headers) -> _Headers:
    named = {part.strip().lower() for name, value in headers if name == b"connection" for part in value.split(b",")}
    return [(name, value) for name, value in headers if name not in _HOP_BY_HOP and name not in named]


def _request_headers(scope: _Scope) -> CIMultiDict[str]:
    """As the client sent them, in order, also those that come twice; and whom they come from."""
    forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    client = scope.get("client")
    if client:
        forwarded.append(str(client[0]).encode())
    kept = [(name, value) for name, value in _without_hop_by_hop(scope["headers"]) if name != b"x-forwarded-for"]
    if forwarded:
        kept.append((b"x-forwarded-for", b", ".join(forwarded)))
    return CIMultiDict((name.decode("ascii"), value.decode()) for name, value in kept)


def _error(status: int, text: str) -> dict[str, Any]:
    return {"error": {"message": text, "type": "ServiceUnavailable", "param": None, "code": status}}


async def _refuse(send: _Send, status: int, text: str) -> None:
    retry = [(b"retry-after", str(RETRY_AFTER_S).encode())] if status == 503 else []
    await _respond(send, status, _error(status, text), retry)


async def _respond(send: _Send, status: int, body: dict[str, Any], more: _Headers | None = None) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *(more or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


# ---- the server ------------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to whoever runs the front."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str | None, port: int) -> socket.socket:
    """The public port, taken before anything is started.

    Raises:
        ConfigError: it is taken, or not an address of this machine.
    """
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    try:
        return socket.create_server((host or "", port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host or 'every interface'} port {port} ({error}): choose another --port or --host"
        ) from error


async def serve(front: Front, sock: socket.socket, work: Awaitable[int], hurry: asyncio.Event | None = None) -> int:
    """Serves until ``work`` is done, whose result it returns; what is open then has a moment, unless ``hurry``."""
    # Requests that a client breaks off or that ask for a WebSocket are no news for the terminal.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        front,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not working.done():  # the server ended by itself, or we are cancelled
            working.cancel()
            await asyncio.wait({working})
        # Answers that are cut now are cut by us: uvicorn would print a traceback for each.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.should_exit = True
        hurrying = asyncio.ensure_future((hurry or asyncio.Event()).wait())
        await asyncio.wait({serving, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        server.force_exit = not hurrying.cancel()
        await serving
    return working.result()


async def serve_launch(launch: Launch, public: Api, sock: socket.socket, private_dir: str) -> int:
    """Starts the stages and serves before them until they are stopped, as `stagewire up` does.

    Raises:
        StagewireError: as `Supervisor.run`.
    """

    def serving(api: Api, served: Served) -> str:
        front.is_proven = True
        return launch.usage(replace(public, api_key=api.api_key), served)

    supervisor = launch.supervisor(open_screen(launch.specs), private_dir, serving)
    url = f"http://{launch.api.client_host}:{launch.api.port}"
    front = Front(url, lambda: supervisor.api.api_key, supervisor.progress)
    return await serve(front, sock, supervisor.run())


async def serve_head(head: str, api_key: str | None, public: Api, sock: socket.socket) -> int:
    """Serves before a head that others look after, until Ctrl-C, SIGTERM or the end of the terminal. Returns 0."""
    asked, hurry = asyncio.Event(), asyncio.Event()

    def on_signal(signum: int) -> None:
        if asked.is_set() and signum != signal.SIGHUP:
            hurry.set()
        asked.set()

    take_signals(on_signal)
    print(f"{public.url} is the front of {head}. Ctrl-C stops it, and nothing else.", flush=True)  # noqa: T201

    async def until_asked() -> int:
        await asked.wait()
        print("stopping", flush=True)  # noqa: T201
        return 0

    return await serve(Front(head, lambda: api_key), sock, until_asked(), hurry)


def run_in_loop(work: Coroutine[Any, Any, int]) -> int:
    """On uvloop where it is installed, which vLLM does: two thirds of the processor time per streamed event."""
    try:
        import uvloop
    except ImportError:
        return run_loop(work)
    return run_loop(work, uvloop.new_event_loop)
