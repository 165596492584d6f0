"""Lets the head answer on the API server's socket between binding and serving."""

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
    """Installs the patches in a head's process. To be called before its API server starts.

    Args:
        setup, serve: each takes one of vLLM's functions and returns its replacement, in the order of `PATCHES`.
    """
    from vllm.entrypoints.launchers.api_server import entry

    wrap(entry, "setup_server", setup)
    wrap(entry, "build_and_serve", serve)
