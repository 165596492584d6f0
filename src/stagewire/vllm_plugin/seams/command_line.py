"""The three functions of vLLM's command line through which the --pipeline flags work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from stagewire.errors import ConfigError
from stagewire.vllm_plugin.seams.patching import Patch, wrap

__all__ = ["PATCHES", "install"]

PATCHES = (
    Patch(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "adds the flags; vLLM loads plugins right before it looks this method up",
        "vLLM lets a plugin add arguments",
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "it drops what is not a field of the dataclass, so flags are translated here for every entry point",
        "vLLM lets a plugin see the parsed arguments",
    ),
    Patch(
        "vllm.entrypoints.cli.serve:ServeSubcommand.cmd",
        "a worker stage serves the ring instead of HTTP; the head checks its settings before anything starts",
        "vLLM has a hook for serve",
    ),
)

Make = Callable[[Callable[..., Any]], Any]


def install(add_flags: Make, translate: Make, serve: Make) -> None:
    """Installs the patches in a vLLM process with a command line. Modules that are not loaded are left alone.

    Never raises, because a plugin that raises breaks every vLLM process of its environment, with our flags or without.

    Args:
        add_flags, translate, serve: each takes one of vLLM's functions and returns its replacement, in the order of
            `PATCHES`.
    """
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    cli = sys.modules.get("vllm.entrypoints.cli.serve")
    try:
        if arg_utils is not None:
            wrap(arg_utils.EngineArgs, "add_cli_args", add_flags)
            wrap(arg_utils.EngineArgs, "from_cli_args", translate)
        if cli is not None:
            wrap(cli.ServeSubcommand, "cmd", serve)
    except (ConfigError, AttributeError) as error:
        sys.stderr.write(f"Stagewire is installed but cannot work with this vLLM: {error}\n")
