"""What the head's HTTP port says about the ring: /live, /health, /ready, /pipeline/status, and 503 with the reason.

    path              starting  serving  recovering  past the recovery deadline  after this head failed
    /live             200       200      200         200                         200
    /health           503       200      200         503                         503
    /ready            503       200      503         503                         503
    /pipeline/status  200       200      200         200                         200
    others            503       vLLM's   they wait   503                         503

Each 503 has Retry-After. /ready is 503 also while EngineCore is silent. Past the recovery deadline requests are refused
until the ring is whole again. A worker stage may answer the first three on a port of its own (`StageHealth` in
member/probes.py).

Before vLLM's own server listens, `EarlyServer` (member/probes.py) answers on the same socket. From then on
`RingMiddleware` answers, and ends the requests that are open when the recovery deadline passes or this head fails.
`HeadHealth` decides on the answers; this module knows ASGI and no ring.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from stagewire.vllm_plugin.head.health import HEALTH, HeadHealth
from stagewire.vllm_plugin.member.probes import RETRY_AFTER_S, body_of

__all__ = ["RingMiddleware"]

# How long vLLM may take to end a request that this middleware has answered.
ABORT_S = 5.0

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]
_Receive = Callable[[], Awaitable[_Message]]


class RingMiddleware:
    """Pure ASGI, added through vLLM's own --middleware.

    Args:
        app: the application inside.
        health: by default this process's; another one for tests.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], health: HeadHealth | None = None) -> None:
        self._app = app
        self._health = health or HEALTH

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
    """One request. It ends at once when requests are refused, with the reason as its error."""

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
            self._refusal = self._health.refusal or self._refusal  # kept: it may be over when `_end` asks
            with contextlib.suppress(RuntimeError):  # the loop is closed, and no client is left
                loop.call_soon_threadsafe(refused.set)

        async def watched_send(message: _Message) -> None:
            if not self._finished and (refused.is_set() or self._health.refusal is not None):
                return  # `_end` sends the error instead
            self._note(message)
            await send(message)

        async def watched_receive() -> _Message:
            """Tells vLLM of a refusal as of a client that has disconnected: it then ends the request everywhere."""
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
            await asyncio.wait({request}, timeout=ABORT_S)
            if request.done() and not request.cancelled():
                request.exception()  # or asyncio would log it; the client has its answer
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
            await _respond(send, 503, body_of(503, text))
            return
        tail = b"data: " + body_of(503, text) + b"\n\ndata: [DONE]\n\n" if self._is_stream else b""
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
