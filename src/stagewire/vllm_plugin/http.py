"""What the head's HTTP port says about the ring: /live, /health, /ready, /pipeline/status, and 503 with the reason.

    /live             200 once the process is up
    /health           503 until the ring has answered once, 200 while it serves or a lost stage may come back, 503 past
                      the recovery deadline and after this head failed
    /ready            200 only while the whole ring answers
    /pipeline/status  200 with all that is known of every stage, at any time
    others            503 with Retry-After before the ring has answered, past the recovery deadline until the ring is
                      whole again, and after this head failed; meanwhile they wait

A stage without an API answers the first three on a port of its own, if it is given one: `StageHealth`.

Before vLLM's own server listens, `EarlyServer` answers on the same socket; from then on `RingMiddleware` does, which
also ends the requests that are open when the deadline passes or this head fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from stagewire.observe.status_events import Phase, StatusEvent
from stagewire.vllm_plugin.pipeline_status import Health, PipelineStatus

__all__ = ["EarlyServer", "HeadHealth", "RingMiddleware", "StageHealth"]

RETRY_AFTER_S = 5
# For vLLM to end a request whose client has had its answer from us.
GOODBYE_S = 5.0

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]
_Receive = Callable[[], Awaitable[_Message]]


class HeadHealth:
    """The ring as the API server knows it. Thread-safe: single assignments, and events for who waits.

    ``failure``: why this head is ending. ``outage``: which stage it waits for, None while the ring is whole;
    ``refusal``: why requests are refused, None while they are not.
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
        # Word that it is over is lost if this process was held up; news of the ring come all the time.
        if self.pipeline is not None and self.pipeline.is_whole_after(self._outage_at):
            return None
        return self._outage

    @property
    def refusal(self) -> str | None:
        return self.failure or (self.outage if self._is_given_up else None)

    def fail(self, text: str, exit_code: int) -> None:
        """This head is ending, as this process has seen by itself. Only the first reason counts."""
        self.update(StatusEvent(0, Phase.FAILED, text, exit_code))

    def wait_for_failure(self, timeout_s: float | None = None) -> str | None:
        self._failed.wait(timeout_s)
        return self.failure

    def on_refusal(self, listener: Callable[[], None]) -> None:
        self._listeners.add(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        self._listeners.discard(listener)

    def answer(self, path: str) -> tuple[int, str] | None:
        """Status and text for this path; None: vLLM's own application answers."""
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
        """Status and body for this path; None: vLLM's own application answers."""
        if path == "/pipeline/status" and self.pipeline is not None:
            known = Health(self._where(), self.is_serving, self.failure, self.outage)
            return 200, json.dumps(self.pipeline.describe(known)).encode()
        answer = self.answer(path)
        return None if answer is None else (answer[0], _body(*answer))

    def _where(self) -> str:
        news = f", {self.news}" if self.news else ""
        return f"stage 0 is at {self.phase.value.replace('_', ' ')}{news}"


class StageHealth:
    """What a stage without an API says. Asked from the server's threads.

    Args:
        describe: whether its model can serve; what it waits for, empty in a whole ring; why it failed, or None.
    """

    def __init__(self, describe: Callable[[], tuple[bool, str, str | None]]) -> None:
        self._describe = describe

    def respond(self, path: str) -> tuple[int, bytes]:
        """Status and body for this path."""
        is_prepared, waits_for, failure = self._describe()
        if path == "/live":
            found = 200, "alive"
        elif path not in ("/health", "/ready"):
            return 404, _body(404, "this stage has no API: /live, /health and /ready")
        elif failure is not None:
            found = 503, failure
        elif not is_prepared:
            found = 503, "the stage has not joined a ring that serves yet"
        elif path == "/ready" and waits_for:
            found = 503, f"waiting for {waits_for}"
        else:
            found = 200, "healthy" if path == "/health" else "the ring is whole"
        return found[0], _body(*found)


def _body(status: int, text: str) -> bytes:
    if status == 200:
        return json.dumps({"status": text}).encode()
    error = {"message": text, "type": "ServiceUnavailable", "param": None, "code": status}
    return json.dumps({"error": error}).encode()


# ---- before vLLM listens -------------------------------------------------------------------------------------------


class EarlyServer:
    """Answers on a socket until `close`: the API's, whose connections wait in its backlog after that, or a stage's."""

    def __init__(self, sock: socket.socket, health: HeadHealth | StageHealth) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 5

            def answer(self) -> None:
                starting = 503, _body(503, "the pipeline is starting")
                status, body = health.respond(self.path.partition("?")[0]) or starting
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                if status == 503:
                    self.send_header("Retry-After", str(RETRY_AFTER_S))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = do_OPTIONS = answer  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None: ...

        sock.listen(128)
        self._server = http.server.ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = sock.dup()
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


# ---- while vLLM serves ---------------------------------------------------------------------------------------------


class RingMiddleware:
    """Pure ASGI, added through vLLM's own --middleware.

    Args:
        app: the application inside.
        health: for tests; by default this process's.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], health: HeadHealth | None = None) -> None:
        if health is None:
            from stagewire.vllm_plugin.head import HEALTH

            health = HEALTH
        self._app = app
        self._health = health

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            self._health.is_serving = True
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response = self._health.respond(scope["path"])
        if response is not None:
            await _respond(send, *response)
            return
        await _Guarded(self._app, self._health).run(scope, receive, send)


class _Guarded:
    """One request; when the ring fails for good it ends at once, with an error that names the stage."""

    def __init__(self, app: Callable[..., Awaitable[None]], health: HeadHealth) -> None:
        self._app = app
        self._health = health
        self._started = False
        self._is_stream = False
        self._finished = False
        self._refusal = "the pipeline failed"

    async def run(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        refused = asyncio.Event()
        loop = asyncio.get_running_loop()

        def listener() -> None:
            self._refusal = self._health.refusal or self._refusal  # it may be over before we are asked
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(refused.set)

        async def watched_send(message: _Message) -> None:
            if not self._finished and (refused.is_set() or self._health.refusal is not None):
                return  # the error goes out instead
            self._note(message)
            await send(message)

        async def watched_receive() -> _Message:
            """As if the client had hung up, once it is refused: vLLM then ends its request, wherever that is."""
            return await _first(receive(), refused) or {"type": "http.disconnect"}

        self._health.on_refusal(listener)
        request = asyncio.ensure_future(self._app(scope, watched_receive, watched_send))
        refusal = asyncio.ensure_future(refused.wait())
        try:
            await asyncio.wait({request, refusal}, return_when=asyncio.FIRST_COMPLETED)
            if request.done() and (self._finished or not (refused.is_set() or self._health.refusal)):
                request.result()
                return
            await self._end(send)
            await asyncio.wait({request}, timeout=GOODBYE_S)
            if request.done() and not request.cancelled():
                request.exception()  # seen: the client has had its answer
        finally:
            self._health.forget(listener)
            refusal.cancel()
            request.cancel()

    def _note(self, message: _Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = dict(message.get("headers", []))
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self._finished = True

    async def _end(self, send: _Send) -> None:
        text = self._health.refusal or self._refusal
        if self._finished:
            return
        if not self._started:
            await _respond(send, 503, _body(503, text))
            return
        tail = b"data: " + _body(503, text) + b"\n\ndata: [DONE]\n\n" if self._is_stream else b""
        await send({"type": "http.response.body", "body": tail, "more_body": False})


async def _first(message: Awaitable[_Message], event: asyncio.Event) -> _Message | None:
    """The message, or None when the event comes before it."""
    coming, waiting = asyncio.ensure_future(message), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({coming, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        coming.cancel()
        waiting.cancel()


async def _respond(send: _Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
