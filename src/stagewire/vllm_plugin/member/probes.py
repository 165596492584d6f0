"""Answers to health probes: of a stage without an API, and on the API's socket before vLLM's own server listens.

Owns the small HTTP server and the form of an answer. Knows no ring and no vLLM.
"""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["EarlyServer", "StageCondition", "StageHealth", "body_of"]

RETRY_AFTER_S = 5


@dataclass(frozen=True)
class StageCondition:
    """What a stage knows of itself.

    Args:
        is_prepared: whether its model can serve.
        waits_for: what its ring waits for; empty while the ring is whole.
        failure: why the stage failed, None if it has not.
    """

    is_prepared: bool
    waits_for: str
    failure: str | None


class StageHealth:
    """What a stage without an API answers. The server's threads call it.

    Args:
        describe: the stage's condition now.
    """

    def __init__(self, describe: Callable[[], StageCondition]) -> None:
        self._describe = describe

    def respond(self, path: str) -> tuple[int, bytes]:
        """HTTP status and body for this path: 404 for all but /live, /health and /ready."""
        now = self._describe()
        if path == "/live":
            found = 200, "alive"
        elif path not in ("/health", "/ready"):
            return 404, body_of(404, "this stage has no API: /live, /health and /ready")
        elif now.failure is not None:
            found = 503, now.failure
        elif not now.is_prepared:
            found = 503, "the stage has not joined a ring that serves yet"
        elif path == "/ready" and now.waits_for:
            found = 503, f"waiting for {now.waits_for}"
        else:
            found = 200, "healthy" if path == "/health" else "the ring is whole"
        return found[0], body_of(*found)


def body_of(status: int, text: str) -> bytes:
    """JSON; for any status but 200 in the form of vLLM's own errors."""
    if status == 200:
        return json.dumps({"status": text}).encode()
    error = {"message": text, "type": "ServiceUnavailable", "param": None, "code": status}
    return json.dumps({"error": error}).encode()


class Health(Protocol):
    """Knows the answers to probes."""

    def respond(self, path: str) -> tuple[int, bytes] | None:
        """HTTP status and body for this path; None: not known yet."""


class EarlyServer:
    """Answers on a socket until `close`. Connections that come after that wait in the socket's backlog.

    Args:
        sock: bound; the API server's, or a stage's own health port.
        health: gives the answers, in the server's threads. While it knows none, the answer is 503.
    """

    def __init__(self, sock: socket.socket, health: Health) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 5

            def answer(self) -> None:
                starting = 503, body_of(503, "the pipeline is starting")
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
