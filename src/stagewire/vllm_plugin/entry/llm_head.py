"""A head without an API server: `LLM(...)` in a user's Python, or a `vllm` command other than serve."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from stagewire.config import parse_stage
from stagewire.folders import fits_sockets, short_base
from stagewire.vllm_plugin.head.stopping import describe_engine_end
from stagewire.vllm_plugin.seams import dead_engine, engine_stop_grace, engine_watch, interrupted_start, versions

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

__all__ = ["head_arguments", "prepare_engine"]

_OPTIONS = {
    "bind_host": "pipeline_local_bind_host",
    "pipeline_id": "pipeline_id",
    "start_timeout": "pipeline_start_timeout",
    "step_timeout": "pipeline_step_timeout",
    "recovery_timeout": "pipeline_recovery_timeout",
    "key_file": "pipeline_key_file",
    "allow_insecure": "pipeline_allow_insecure",
}


def head_arguments(
    total_stages: int, layer_range: str, bind_port: int, prev_stage_addr: str, options: dict[str, Any]
) -> dict[str, Any]:
    """See `stagewire.head`. Takes its own options out of ``options``."""
    from vllm.engine.arg_utils import EngineArgs

    from stagewire.vllm_plugin.entry.external_mode import apply_external_mode

    versions.check_version()
    prepare_engine()
    flags: dict[str, Any] = {
        "pipeline_stage_mode": "external",
        "pipeline_stage_idx": 0,
        "pipeline_total_stages": total_stages,
        "pipeline_layer_range": layer_range,
        "pipeline_local_bind_port": bind_port,
        "pipeline_prev_stage_addr": prev_stage_addr,
    }
    flags |= {flag: options.pop(name) for name, flag in _OPTIONS.items() if name in options}
    # Any model will do here. vLLM would look up a name that is not a path on the hub.
    given = EngineArgs(model=os.curdir, **options)
    before = dict(vars(given))
    apply_external_mode(given, parse_stage(flags))
    changed = {name: value for name, value in vars(given).items() if value is not before[name]}
    return {**options, **changed}


def prepare_engine() -> None:
    """Installs what a head without an API server needs. Must be called before this process starts EngineCore."""
    engine_stop_grace.give_engine_time_to_stop()
    if not fits_sockets(os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()):
        os.environ["VLLM_RPC_BASE_PATH"] = short_base()
    engine_watch.watch_engine()
    dead_engine.end_waits_for_dead_engine(_tell_of_dead_engine)
    interrupted_start.interrupt_engine_start()


def _tell_of_dead_engine(process: BaseProcess) -> None:
    text = describe_engine_end(process)
    if process.exitcode:  # not when this process has told it to end
        sys.stderr.write(f"Stage 0: {text}\n")
        sys.stderr.flush()
