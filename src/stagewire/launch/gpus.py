"""The memory of this machine's GPUs, as nvidia-smi tells it. No CUDA, no torch."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from stagewire.errors import ConfigError
from stagewire.launch.spec import visible_gpus

__all__ = ["gpu_memory_bytes"]

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
_TIMEOUT_S = 30
_MIB = 2**20
_INSTEAD = "give the figures instead: --memory 24GiB, or one for each stage: --memory 24GiB,12GiB"


def gpu_memory_bytes(environ: Mapping[str, str]) -> list[int]:
    """Of each GPU that CUDA_VISIBLE_DEVICES leaves visible, in its order: the order in which stages take them.

    Raises:
        ConfigError: nvidia-smi is missing or fails, there is no GPU, or CUDA_VISIBLE_DEVICES names one that it lacks.
    """
    try:
        listing = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"--memory without figures asks nvidia-smi, which did not answer ({error}); {_INSTEAD}"
        ) from error
    gpus = [tuple(part.strip() for part in line.split(",")) for line in listing.splitlines() if line.strip()]
    chosen = visible_gpus(environ) if "CUDA_VISIBLE_DEVICES" in environ else [gpu[0] for gpu in gpus]
    if not chosen:
        raise ConfigError(f"--memory alone found no GPU here; {_INSTEAD}")
    return [_find(name, gpus) for name in chosen]


def _find(name: str, gpus: list[tuple[str, ...]]) -> int:
    for gpu in gpus:
        is_this = name == gpu[0] or (name.startswith("GPU-") and gpu[1].startswith(name))
        if is_this and gpu[2].isdecimal():
            return int(gpu[2]) * _MIB
    found = ", ".join(f"{gpu[0]} ({gpu[1]}, {gpu[2]} MiB)" for gpu in gpus) or "none"
    raise ConfigError(f"CUDA_VISIBLE_DEVICES names {name}, nvidia-smi lists {found}; correct it, or {_INSTEAD}")
