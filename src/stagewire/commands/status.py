"""`stagewire status`: how each stage of a running pipeline is, from the head's /pipeline/status or the front's."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stagewire.errors import ConfigError, PeerError

__all__ = ["add_arguments", "run"]

TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", default="http://localhost:8000", help="of the head or the front (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as it came")


def run(args: argparse.Namespace) -> int:
    """Prints a table. Returns 0 when the whole ring answers, 3 when it does not.

    Raises:
        ConfigError: ``url`` is none.
        PeerError: nothing answers there, or something else.
    """
    found = fetch(args.url)
    text = json.dumps(found, indent=2) if args.json else describe(found)
    sys.stdout.write(text + "\n")
    return 0 if found.get("is_ready") else PeerError.exit_code


def fetch(url: str) -> dict[str, Any]:
    """What /pipeline/status answers.

    Raises:
        PeerError: nothing answers there, or something else than the head of a pipeline.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: expected http://HOST:PORT, for instance http://localhost:8000")
    target = f"{url.rstrip('/')}/pipeline/status"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(target, timeout=TIMEOUT_S) as response:
            found = json.load(response)
    except urllib.error.HTTPError as error:
        raise PeerError(
            f"{target} has status {error.code}: not the head of a pipeline; --url says where it is"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise PeerError(f"{target} does not answer ({reason}): is stage 0 running? --url says where it is") from error
    if not isinstance(found, dict) or not isinstance(found.get("stages"), list):
        raise PeerError(f"{target} answers something else than the head of a pipeline: --url says where that is")
    return found


def describe(found: dict[str, Any]) -> str:
    """A table for people: the pipeline, its steps, each stage, and what is wrong with it."""
    reason = f": {found['reason']}" if found.get("reason") else ""
    lines = [f"{found['state']}{reason}"]
    if found.get("steps"):
        lines.append(_describe_steps(found["steps"]))
    rows = [[cell(stage) for cell in _TABLE.values()] for stage in found["stages"]]
    lines += ["", *_align([list(_TABLE), *rows])]
    told = {found.get("reason")}
    for stage in found["stages"]:
        text = stage.get("reason")
        if text and text not in told:
            lines.append(f"stage {stage['stage']}: {text}")
            told.add(text)
    return "\n".join(lines)


def _describe_steps(steps: dict[str, Any]) -> str:
    text = f"{steps['num_answered']} steps, {steps['per_s']:.1f}/s in the last 10 s"
    if steps["num_decode"]:
        text += (
            f"; the last {steps['num_decode']} decode steps: {steps['num_requests']:g} requests, "
            f"{steps['round_ms']:.1f} ms once round (medians)"
        )
    return text


_Stage = Mapping[str, Any]


def _cell(name: str, form: str = "{}", scale: float = 1.0) -> Callable[[_Stage], str]:
    """Of one figure in the head's answer; a dash where it is not known."""

    def describe_figure(stage: _Stage) -> str:
        value = stage.get(name)
        if value is None:
            return "-"
        return form.format(value / scale if scale != 1.0 else value)

    return describe_figure


def _address(stage: _Stage) -> str:
    address, host = _cell("address")(stage), stage.get("host")
    return f"{address} ({host})" if host else address


def _memory(stage: _Stage) -> str:
    """Of the process, and what it has on its device."""
    device = f"+{stage['device_bytes'] / 2**30:.2f}" if stage.get("device_bytes") else ""
    return _cell("rss_bytes", "{:.2f}", 2**30)(stage) + device + (" GiB" if stage.get("rss_bytes") else "")


_TABLE = {
    "stage": _cell("stage"),
    "layers": _cell("layers"),
    "state": _cell("state"),
    "pid": _cell("pid"),
    "address": _address,
    "up": _cell("uptime_s", "{:.0f} s"),
    "memory": _memory,
    "KV": _cell("kv_blocks"),
    "cached": _cell("cached_requests"),
    "step": _cell("last_step"),
    "compute": _cell("compute_ms", "{:.2f} ms"),
    "hop": _cell("hop_us", "{:.0f} µs"),
    "age": _cell("age_s", "{:.1f} s"),
}


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
