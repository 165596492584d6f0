"""Loads one stage's weights in this process and prints what that cost, as one JSON line. Started by benches/loading.py.

python -m benches.load_stage MODEL STAGE NUM_STAGES RANGE stagewire|stock
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from stagewire.config import Address, StageConfig
from stagewire.plan.ranges import LayerRange


def io_counter(name: str) -> int:
    """Of this process: ``read_bytes`` came from a disk, ``rchar`` from read calls, page cache included."""
    found = re.search(rf"^{name}: (\d+)", Path("/proc/self/io").read_text(), re.M)
    assert found is not None
    return int(found[1])


def memory(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def measured(load_weights: Any, found: dict[str, float]) -> Any:
    """``load_weights`` alone: the model is built, imports are done."""

    def wrapper(self: Any, model: Any, model_config: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, read, began_at = memory("VmRSS"), io_counter("read_bytes"), time.perf_counter()
        load_weights(self, model, model_config)
        found["seconds"] = time.perf_counter() - began_at
        found["disk_bytes"] = io_counter("read_bytes") - read
        found["peak_bytes"] = memory("VmHWM") - before
        found["weight_bytes"] = sum(value.nbytes for value in model.state_dict().values())

    return wrapper


def main() -> None:
    model, stage, num_stages, layers, loader = sys.argv[1:]
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.usage.usage_lib import UsageContext

    from stagewire.vllm_plugin.entry import external_mode
    from stagewire.vllm_plugin.loading import load_formats
    from stagewire.vllm_plugin.loading.range_loader import RangeLoader
    from stagewire.vllm_plugin.ranks.stage_ranks import StageRanks
    from vllm import AsyncEngineArgs

    found: dict[str, float] = {}
    chosen = RangeLoader if loader == "stagewire" else DefaultModelLoader
    chosen.load_weights = measured(chosen.load_weights, found)  # type: ignore[method-assign]
    if loader == "stock":
        load_formats.REPLACED_LOAD_FORMATS = ()  # type: ignore[assignment]
    config = StageConfig(int(stage), int(num_stages), LayerRange.parse(layers), 15550, Address("127.0.0.1", 15549))
    arguments = AsyncEngineArgs(
        model=model, dtype="auto", enforce_eager=True, max_model_len=512, max_num_batched_tokens=512
    )
    external_mode.apply_external_mode(arguments, config)
    vllm_config = arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    StageRanks(config, vllm_config).load()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
