"""What a running ring holds, by its own word; needs vLLM's development mode on the head (VLLM_SERVER_DEV_MODE=1)."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from support.stages import Ring


def states(ring: Ring) -> list[dict[str, Any]]:
    response = httpx.post(f"{ring.url}/collective_rpc", json={"method": "get_stage_state"}, trust_env=False)
    response.raise_for_status()
    results: list[dict[str, Any]] = response.json()["results"]
    return [json.loads(each.replace("'", '"')) if isinstance(each, str) else each for each in results]


def kv_usage(ring: Ring) -> float:
    text = httpx.get(f"{ring.url}/metrics", trust_env=False).text
    (line,) = [each for each in text.splitlines() if each.startswith("vllm:kv_cache_usage_perc{")]
    return float(line.split()[-1])


def until_idle(ring: Ring, deadline_s: float = 20.0) -> list[dict[str, Any]]:
    """The stages' states once the head holds nothing any more; asking is what makes the time pass."""
    ends_at = time.monotonic() + deadline_s
    while True:
        found = states(ring)
        if kv_usage(ring) == 0 and not any(state["cached_requests"] for state in found):
            return found
        assert time.monotonic() < ends_at, f"requests left behind: {found}, KV usage {kv_usage(ring)}"
