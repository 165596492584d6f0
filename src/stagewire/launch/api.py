"""The head's HTTP API, seen as its first client: is the ring ready, does it answer, how is it called."""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagewire.errors import PeerError

__all__ = ["Api", "chat_template_exists", "option_value", "usage"]

_POLL_TIMEOUT_S = 5.0
_PROMPT = "San Francisco is a"


@dataclass(frozen=True)
class Api:
    """Where the head answers. ``host`` is what it binds (``None``: every interface)."""

    host: str | None
    port: int
    api_key: str | None = field(default=None, repr=False)
    is_tls: bool = False

    @property
    def client_host(self) -> str:
        """An address that reaches the head from this machine."""
        unspecified = {None: "127.0.0.1", "": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
        return unspecified.get(self.host) or str(self.host)

    @property
    def url(self) -> str:
        host = {"127.0.0.1": "localhost"}.get(self.client_host, self.client_host)
        return f"http{'s' if self.is_tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def is_ready(self) -> bool:
        """Whether the whole ring answers. False also while nobody listens yet."""
        try:
            return self._request("GET", "/ready", None, _POLL_TIMEOUT_S)[0] == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

    def first_request(self, timeout_s: float) -> str:
        """Asks for one token; returns the served model's name.

        Raises:
            PeerError: no answer, or not the expected one.
        """
        try:
            model = str(self._json("GET", "/v1/models", None, timeout_s)["data"][0]["id"])
            body = {"model": model, "prompt": _PROMPT, "max_tokens": 1, "temperature": 0}
            self._json("POST", "/v1/completions", body, timeout_s)
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise PeerError(f"stage 0 did not answer a first request at {self.url}: {error!r}") from error
        return model

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
        if not self.is_tls:
            return http.client.HTTPConnection(self.client_host, self.port, timeout=timeout_s)
        # Our own child on this machine, with a certificate for some other name.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection(self.client_host, self.port, timeout=timeout_s, context=context)


def option_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of ``--flag VALUE`` or ``--flag=VALUE``, the last one given."""
    value = None
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        elif argument == flag and i + 1 < len(arguments):
            value = arguments[i + 1]
    return value


def chat_template_exists(model_dir: Path) -> bool:
    if any((model_dir / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((model_dir / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def usage(api: Api, model: str, has_chat_template: bool) -> str:
    """The lines to copy: `curl`, and Python's `openai`."""
    body: dict[str, object] = {"model": model}
    if has_chat_template:
        path, call, answer = "chat/completions", "chat.completions", "choices[0].message.content"
        content = "What is a pipeline?"
        body["messages"] = [{"role": "user", "content": content}]
        argument = f'messages=[{{"role": "user", "content": "{content}"}}]'
    else:
        path, call, answer = "completions", "completions", "choices[0].text"
        body["prompt"] = _PROMPT
        argument = f'prompt="{_PROMPT}"'
    body |= {"max_tokens": 50, "temperature": 0}
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if api.api_key else ""
    python_key = 'os.environ["VLLM_API_KEY"]' if api.api_key else '"none"'
    return f"""Serving {model} at {api.url}

  curl {api.url}/v1/{path} -H "Content-Type: application/json"{key} -d {shlex.quote(json.dumps(body))}

  from openai import OpenAI
  client = OpenAI(base_url="{api.url}/v1", api_key={python_key})
  answer = client.{call}.create(model={json.dumps(model)}, {argument}, max_tokens=50, temperature=0)
  print(answer.{answer})
"""
