"""The front's ASGI application: which request is answered here, and which is the head's.

    /health           200: this process lives
    /ready            200 only when the head says that the whole ring answers and a token has gone round it
    /pipeline/status  the head's, with what is known here; also while there is no head
    others            the head's, streamed both ways; 503 with the reason and Retry-After while it cannot be reached

What follows from the head's status is decided by the functions at the end, which are pure.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from stagewire.front.proxy import Proxy, Receive, Scope, Send, open_session, refuse, respond
from stagewire.launch.examples import Example, first_request
from stagewire.launch.local_stage import Progress

__all__ = ["Front"]

ASK_TIMEOUT_S = 5.0
FIRST_TOKEN_TIMEOUT_S = 300.0

_Status = dict[str, Any]


@dataclass(frozen=True)
class _Readiness:
    """Whether a token would go round now, and why not. ``first``: a request that would show it, where none has yet."""

    is_ready: bool
    text: str
    first: Example | None = None


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
        self._proxy: Proxy | None = None
        self._started_at = time.monotonic()
        self._num_open = 0
        self._first_token: asyncio.Task[None] | None = None
        self._first_token_error = ""

    def __repr__(self) -> str:
        return f"Front({self._head}, open={self._num_open}, proven={self.is_proven})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._session = open_session()
        self._proxy = Proxy(self._head, self._session, self._why_unreachable)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._first_token is not None:
            self._first_token.cancel()
        await self._session.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        if scope["path"] == "/health":
            await respond(send, 200, {"status": "alive"})
        elif scope["path"] == "/ready":
            found = await self._judge()
            await respond(send, 200, {"status": found.text}) if found.is_ready else await refuse(send, 503, found.text)
        elif scope["path"] == "/pipeline/status":
            await respond(send, 200, await self._describe())
        elif any(name == b"upgrade" and value.lower() == b"websocket" for name, value in headers):
            text = "WebSockets are not passed on: /v1/realtime is for speech, which is not served over stages"
            await refuse(send, 501, text)
        elif not scope["raw_path"].startswith(b"/"):
            await refuse(send, 400, f"{scope['path']!r} is not a path on this server")
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._proxy is not None
        self._num_open += 1
        try:
            await self._proxy.carry(scope, receive, send)
        finally:
            self._num_open -= 1

    def _why_unreachable(self, error: BaseException) -> str:
        return _describe_unreachable(self._head, error, self._stages())

    # ---- our own ---------------------------------------------------------------------------------------------------

    async def _ask_head(self) -> _Status | str:
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

    async def _judge(self) -> _Readiness:
        """Asks for a first token where that is what is missing."""
        if failure := _first_failure(self._stages()):
            return _Readiness(False, failure)
        found = await self._ask_head()
        if isinstance(found, str):
            return _Readiness(False, found)
        head = _api_server(found).get("pid")
        if found.get("is_ready") and self._proven_head is None:
            self._proven_head = head
        is_proven = self.is_proven and head == self._proven_head
        readiness = _judge_status(found, is_proven, self._first_token_error)
        if readiness.first is not None:
            self._ask_first(readiness.first)
        return readiness

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

    async def _describe(self) -> _Status:
        """The head's word, and ours where it has none."""
        found = await self._ask_head()
        local = {stage.spec.index: stage for stage in self._stages()}
        status = _without_head(found, local) if isinstance(found, str) else found
        status["stages"] = [_with_local(row, local.get(row["stage"])) for row in status["stages"]]
        status["front"] = {
            "pid": os.getpid(),
            "head": self._head,
            "uptime_s": round(time.monotonic() - self._started_at, 3),
            "open_requests": self._num_open,
            "stages": [_as_row(stage) for stage in local.values()],
        }
        return status


# ---- what follows from what is known ---------------------------------------------------------------------------------


def _judge_status(found: _Status, is_proven: bool, last_error: str) -> _Readiness:
    """``found``: of the head. ``is_proven``: a token has gone round its ring, as somebody else saw."""
    if not found.get("is_ready"):
        return _Readiness(False, f"the pipeline is {found.get('state')}: {found.get('reason')}")
    request = first_request(_api_server(found).get("task", "generate"))
    if request is None or is_proven or (found.get("steps") or {}).get("num_answered"):
        return _Readiness(True, "the whole ring answers")
    text = f"no token has gone round the ring yet, a first one is asked for {last_error}".strip()
    return _Readiness(False, text, request)


def _api_server(found: _Status) -> Mapping[str, Any]:
    return found.get("api_server") or {}


def _first_failure(stages: Sequence[Progress]) -> str:
    return next((stage.failure for stage in stages if stage.failure), "")


def _describe_unreachable(head: str, error: BaseException, stages: Sequence[Progress]) -> str:
    """A local stage's failure, where there is one: the head is away because of that."""
    if failure := _first_failure(stages):
        return failure
    reason = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    why = "connection refused" if isinstance(reason, ConnectionRefusedError) else str(reason) or repr(reason)
    where = ", ".join(f"stage {stage.spec.index} is at {_words(stage)}" for stage in stages)
    text = f"the head at {head} cannot be reached ({why})"
    return f"{text}; {where}" if where else text


def _words(stage: Progress) -> str:
    return f"{stage.phase.value.replace('_', ' ')} {stage.text}".rstrip()


def _without_head(reason: str, local: Mapping[int, Progress]) -> _Status:
    """A status as the head's, which gives none."""
    return {
        "state": "head unreachable",
        "is_ready": False,
        "reason": reason,
        "epoch": 0,
        "num_stages": len(local),
        "api_server": None,
        "steps": None,
        "stages": [{"stage": number, "state": "unknown", "reason": ""} for number in sorted(local)],
    }


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
