"""One request to a server through the real `openai` client, and two whole answers compared.

An answer is the client's own object as plain data, without what differs between any two runs (ids, times). Streams are
put together first: where a server cuts its text into events is a matter of timing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai

from support.workload import LOGPROB_TOLERANCE

__all__ = ["Api", "differences", "strict_client"]

# Different on every run, on the same server too.
VOLATILE = frozenset({"id", "created", "created_at", "completed_at", "request_id", "system_fingerprint", "item_id"})
IMPOSSIBLE = -9999.0  # vLLM's word for a log-probability of minus infinity


def strict_client(url: str, api_key: str = "none") -> openai.OpenAI:
    """Tries nothing twice, and opens a connection for each request.

    A server closes one that nobody has used for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), perhaps in the moment in which a
    client uses it again. Clients that may try again do.
    """
    return openai.OpenAI(
        base_url=f"{url}/v1",
        api_key=api_key,
        timeout=300,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
        default_headers={"Connection": "close"},
    )


class Api:
    """A server: ``url`` without ``/v1``, and the model by the name that it serves."""

    def __init__(self, url: str, model: Path) -> None:
        self.url = url
        self.model = str(model)
        self.client = strict_client(url)

    def completion(self, **body: Any) -> Any:
        return self._plain(self.client.completions.create, body)

    def chat(self, **body: Any) -> Any:
        return self._plain(self.client.chat.completions.create, body)

    def response(self, **body: Any) -> Any:
        return self._plain(self.client.responses.create, body)

    def completion_stream(self, **body: Any) -> Any:
        return self._joined(self.client.completions.create, body)

    def chat_stream(self, **body: Any) -> Any:
        return self._joined(self.client.chat.completions.create, body)

    def post(self, path: str, **body: Any) -> Any:
        """A route that the client has no method for."""
        return _without_volatile(self._http("POST", path, json={"model": self.model, **body}).json())

    @staticmethod
    def plain(answer: Any) -> Any:
        """An answer that came by another way, as this class gives them."""
        return _without_volatile(answer)

    def get(self, path: str) -> str:
        return self._http("GET", path).text

    def metric(self, name: str) -> float:
        """A counter or gauge without its labels, all series added up."""
        values = [line.rsplit(" ", 1)[1] for line in self.get("/metrics").splitlines() if line.startswith(f"{name}{{")]
        assert values, f"{self.url}/metrics has no {name}"
        return sum(map(float, values))

    def _http(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = httpx.request(method, self.url + path, timeout=300, trust_env=False, **options)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response

    def _call(self, create: Callable[..., Any], body: Mapping[str, Any]) -> Any:
        """With the client's own arguments where it has them, and vLLM's beside them."""
        known = set(inspect.signature(create).parameters)
        own = {name: value for name, value in body.items() if name in known}
        return create(model=self.model, **own, extra_body={k: v for k, v in body.items() if k not in known})

    def _plain(self, create: Callable[..., Any], body: Mapping[str, Any]) -> Any:
        return _without_volatile(self._call(create, body).model_dump(mode="json"))

    def _joined(self, create: Callable[..., Any], body: Mapping[str, Any]) -> Any:
        options = {"include_usage": True}
        with self._call(create, {**body, "stream": True, "stream_options": options}) as events:
            return _join([event.model_dump(mode="json") for event in events])


def _without_volatile(value: Any) -> Any:
    """Also without tokens that cannot come: which of them are named beside the few that can is arbitrary."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if key not in VOLATILE and each != IMPOSSIBLE}
        return {key: _without_volatile(each) for key, each in kept.items()}
    if isinstance(value, list):
        return [_without_volatile(each) for each in value if not _is_impossible(each)]
    return value


def _is_impossible(value: Any) -> bool:
    return isinstance(value, dict) and value.get("logprob") == IMPOSSIBLE


def _join(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One answer out of a stream's events: what is text or a list in a choice is added up, the rest is the last one."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            _add(choices.setdefault(choice["index"], {}), choice)
    joined = {"choices": [choices[index] for index in sorted(choices)], "usage": usage}
    found: dict[str, Any] = _without_volatile(joined)
    return found


def _add(into: dict[str, Any], piece: Mapping[str, Any]) -> None:
    for key, value in piece.items():
        if value is None:
            into.setdefault(key, None)
        elif isinstance(value, dict):
            held = into.get(key)
            into[key] = {} if held is None else held
            _add(into[key], value)
        elif key == "tool_calls":
            calls = into.get(key) or []
            for call in value:
                while len(calls) <= call["index"]:
                    calls.append({})
                _add(calls[call["index"]], call)
            into[key] = calls
        elif isinstance(value, list) or (isinstance(value, str) and key in ("text", "content", "arguments")):
            into[key] = value if into.get(key) is None else into[key] + value
        else:
            into[key] = value


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where two answers differ; numbers that are log-probabilities may by `LOGPROB_TOLERANCE`."""
    if isinstance(found, dict) and isinstance(expected, dict):
        if found.keys() != expected.keys():
            return [f"{where}: {_short(found)}, expected {_short(expected)}"]
        return [line for key in expected for line in differences(found[key], expected[key], f"{where}.{key}")]
    if isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            return [f"{where}: {_short(found)}, expected {_short(expected)}"]
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{where}[{index}]")]
    is_equal = found == expected
    if isinstance(found, float) and isinstance(expected, float):
        is_equal = abs(found - expected) <= LOGPROB_TOLERANCE
    return [] if is_equal else [f"{where}: {_short(found)}, expected {_short(expected)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}..."
