"""vLLM's API server between binding its socket and serving: somebody else may answer there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCHES", "answer_early"]

PATCHES = (
    Patch(
        "vllm.entrypoints.launchers.api_server.entry:setup_server",
        "answers 503 with a reason on the bound socket until the engine is up; only in a head's process",
        "vLLM listens before its engine is up",
    ),
    Patch(
        "vllm.entrypoints.launchers.api_server.entry:build_and_serve",
        "hands that socket over to the API server; only in a head's process",
        "vLLM listens before its engine is up",
    ),
)

Make = Callable[[Callable[..., Any]], Any]


def answer_early(setup: Make, serve: Make) -> None:
    """In a head's process, before its API server starts.

    Args:
        setup, serve: each makes the replacement of one of these functions out of vLLM's own, in the order of `PATCHES`.
    """
    from vllm.entrypoints.launchers.api_server import entry

    wrap(entry, "setup_server", setup)
    wrap(entry, "build_and_serve", serve)
