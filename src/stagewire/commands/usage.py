"""What a person can copy once a ring serves: a request by `curl`, and by Python's package `openai`. Pure."""

from __future__ import annotations

import json
import shlex

from stagewire.launch.api import Api, Served
from stagewire.launch.examples import Example, example_for

__all__ = ["usage"]


def usage(api: Api, served: Served, has_chat_template: bool) -> str:
    """The lines to copy: `curl`, and Python's `openai` where that has a word for it."""
    lines = [f"Serving {served.model} at {api.place}", ""]
    example = example_for(served.task, has_chat_template)
    if api.needs_client_certificate:
        lines += ["  Clients need a certificate that it accepts (--ssl-cert-reqs).", ""]
    if example is not None:
        lines += [f"  {_curl(api, served.model, example)}", ""]
        # Without an indent, which Python would refuse.
        lines += [*_python(api, served.model, example), ""] if example.call else []
    return "\n".join(lines)


def _curl(api: Api, model: str, example: Example) -> str:
    uds = f"--unix-socket {shlex.quote(api.uds)} " if api.uds else ""
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if api.api_key else ""
    body = shlex.quote(json.dumps({"model": model, **example.body}))
    return f'curl {uds}{api.url}{example.route} -H "Content-Type: application/json"{key} -d {body}'


def _python(api: Api, model: str, example: Example) -> list[str]:
    key = 'os.environ["VLLM_API_KEY"]' if api.api_key else '"none"'
    client = ""
    if api.uds:
        client = f", http_client=openai.DefaultHttpxClient(transport=httpx.HTTPTransport(uds={json.dumps(api.uds)}))"
    imports = ["import httpx, openai"] if api.uds else []
    arguments = ", ".join(f"{name}={json.dumps(value)}" for name, value in {"model": model, **example.body}.items())
    return [
        *imports,
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{api.url}/v1", api_key={key}{client})',
        f"answer = client.{example.call}.create({arguments})",
        f"print(answer.{example.answer})",
    ]
