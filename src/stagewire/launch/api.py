"""The head's HTTP API, seen as its first client: where it is, whether the ring is ready, whether it answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagewire.errors import PeerError
from stagewire.launch.examples import first_request
from stagewire.observe.status_events import HeadApi

__all__ = ["DEFAULT_PORT", "Api", "Served", "chat_template_exists"]

_POLL_TIMEOUT_S = 5.0
DEFAULT_PORT = 8000  # vLLM's own


@dataclass(frozen=True)
class Served:
    """What a first request has shown: the model's name, and what it is for (launch/examples.py; empty: unknown)."""

    model: str
    task: str = "generate"


@dataclass(frozen=True)
class Api:
    """Where the head answers. ``host`` is what it binds (``None``: every interface); ``uds``: a path in its place."""

    host: str | None
    port: int = DEFAULT_PORT
    api_key: str | None = field(default=None, repr=False)
    is_tls: bool = False
    uds: str | None = None
    needs_client_certificate: bool = False
    has_chat_template: bool = False  # one of the head's arguments; the model's folder may have another

    @classmethod
    def told(cls, api: HeadApi) -> Api:
        """As the head has resolved it."""
        return cls(
            api.host or None,
            api.port,
            api.api_key or None,
            api.is_tls,
            api.uds or None,
            api.needs_client_certificate,
            api.has_chat_template,
        )

    @property
    def client_host(self) -> str:
        """An address that reaches the head from this machine."""
        unspecified = {None: "127.0.0.1", "": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
        return unspecified.get(self.host) or str(self.host)

    @property
    def url(self) -> str:
        if self.uds:
            return "http://localhost"
        host = {"127.0.0.1": "localhost"}.get(self.client_host, self.client_host)
        return f"http{'s' if self.is_tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def place(self) -> str:
        """For people."""
        return f"the Unix socket {self.uds}" if self.uds else self.url

    def is_ready(self) -> bool:
        """Whether the whole ring answers. False also while nobody listens yet."""
        try:
            if self.needs_client_certificate:  # we have none; but the head listens only once the ring is ready
                self._plain(_POLL_TIMEOUT_S).close()
                return True
            return self._request("GET", "/ready", None, _POLL_TIMEOUT_S)[0] == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

    def first_request(self, timeout_s: float) -> Served:
        """Asks for what the model is for, as cheaply as can be.

        Raises:
            PeerError: no answer, or not the expected one.
        """
        if self.needs_client_certificate:
            return Served("the model", "")
        try:
            task = str(self._json("GET", "/pipeline/status", None, timeout_s)["api_server"]["task"])
            model = str(self._json("GET", "/v1/models", None, timeout_s)["data"][0]["id"])
            request = first_request(task)
            if request is not None:
                self._json("POST", request.route, {"model": model, **request.body}, timeout_s)
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise PeerError(f"stage 0 did not answer a first request at {self.place}: {error!r}") from error
        return Served(model, task)

    def _json(self, method: str, path: str, body: Mapping[str, object] | None, timeout_s: float) -> Any:
        status, data = self._request(method, path, body, timeout_s)
        if status != http.HTTPStatus.OK:
            raise PeerError(
                f"stage 0 answered {method} {path} with status {status}: {data[:500].decode(errors='replace')}"
            )
        return json.loads(data)

    def _request(
        self, method: str, path: str, body: Mapping[str, object] | None, timeout_s: float
    ) -> tuple[int, bytes]:
        with contextlib.closing(self._connect(timeout_s)) as connection:
            headers = {"Content-Type": "application/json"}
            if self.api_key:
                headers["Authorization"] = f"Bearer {self.api_key}"
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            return response.status, response.read()

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.client_host, self.port, timeout=timeout_s)
        connection.sock = self._plain(timeout_s)
        if self.is_tls:
            # Our own child on this machine, with a certificate for some other name.
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection.sock = context.wrap_socket(connection.sock, server_hostname=self.client_host)
        return connection

    def _plain(self, timeout_s: float) -> socket.socket:
        if not self.uds:
            return socket.create_connection((self.client_host, self.port), timeout_s)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        try:
            connection.connect(self.uds)
        except OSError:
            connection.close()
            raise
        return connection


def chat_template_exists(model_dir: Path) -> bool:
    if any((model_dir / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((model_dir / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
