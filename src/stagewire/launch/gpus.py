"""This machine's GPUs: which ones a pipeline may use, and their memory. No CUDA, no torch.

NVIDIA's own library (`pynvml` of nvidia-ml-py) lists them in the order of the PCI bus, slices of a GPU (MIG) included.
It does not know CUDA_VISIBLE_DEVICES, so this module reads the variable as CUDA does:

- An entry is a number, or the beginning of a UUID.
- An entry that CUDA does not know, such as -1, hides itself and all entries after it.
- A GPU that is named twice hides all.

About other vendors' GPUs it says what the kernel tells. Without NVIDIA's library this is standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagewire.errors import ConfigError

__all__ = [
    "Gpu",
    "Visible",
    "amd_cards",
    "ask_nvidia",
    "gpu_memory_bytes",
    "list_gpus",
    "visible_gpus",
]

CUDA_VARIABLE = "CUDA_VISIBLE_DEVICES"
# Of other vendors, as vLLM reads them too.
_VARIABLES = (CUDA_VARIABLE, "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_ORDER, _BY_BUS = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
_DRM = Path("/sys/class/drm")
_AMD = "0x1002"
_INSTEAD = "give the figures instead: --memory 24GiB, or one for each stage: --memory 24GiB,12GiB"


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a slice of one (``is_slice``); ``index`` and ``gpu_uuid`` are of the whole GPU.

    ``memory_bytes``: ``None`` where it has none of its own, as it shares the machine's.
    """

    index: int
    gpu_uuid: str
    uuid: str
    model: str
    memory_bytes: int | None
    is_slice: bool = False

    def __str__(self) -> str:
        memory = "no memory of its own" if self.memory_bytes is None else f"{self.memory_bytes / 1e9:.1f} GB"
        return f"{self.uuid if self.is_slice else self.index} ({self.model}, {memory})"

    @property
    def name(self) -> str:
        """For CUDA_VISIBLE_DEVICES, in the order of the PCI bus."""
        return self.uuid if self.is_slice else str(self.index)

    def is_meant_by(self, entry: str) -> bool:
        if entry.isdecimal():
            return int(entry) == self.index
        return entry.startswith(("GPU-", "MIG-")) and (self.gpu_uuid.startswith(entry) or self.uuid.startswith(entry))


@dataclass(frozen=True)
class Visible:
    """The GPUs that stages may be given.

    Args:
        variable: of the environment, that takes ``names``.
        text: where that is known from, for people.
        environ: what else a stage's environment needs, so that the names mean these GPUs.
    """

    variable: str
    names: tuple[str, ...]
    text: str
    environ: Mapping[str, str]


def list_gpus(nvml: Any) -> list[Gpu]:
    """In the order of the PCI bus. A GPU that is cut into slices is listed as these.

    Args:
        nvml: pynvml, initialised.

    Raises:
        nvml.NVMLError: a GPU cannot be asked.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [gpu for index, handle in enumerate(handles) for gpu in _cut(nvml, index, handle)]


def _cut(nvml: Any, index: int, handle: Any) -> Iterator[Gpu]:
    uuid, model = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
    slices = list(_slices(nvml, handle))
    for each in slices or [handle]:
        own = nvml.nvmlDeviceGetUUID(each)
        yield Gpu(index, uuid, own, model, _memory_bytes(nvml, each), is_slice=bool(slices))


def _slices(nvml: Any, handle: Any) -> Iterator[Any]:
    try:
        is_cut = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError_NotSupported:
        return
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if is_cut else 0):
        with contextlib.suppress(nvml.NVMLError_NotFound):  # that place is free
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)


def _memory_bytes(nvml: Any, handle: Any) -> int | None:
    try:
        total: int = nvml.nvmlDeviceGetMemoryInfo(handle).total
    except nvml.NVMLError_NotSupported:  # GB10, Jetson: it is the machine's
        return None
    return total


def ask_nvidia() -> tuple[list[Gpu], str]:
    """The GPUs, or none and why NVIDIA's library did not say."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return [], "NVIDIA's library for it is not installed (pip install nvidia-ml-py)"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [], f"NVIDIA's library says: {error}"
    try:
        gpus = list_gpus(nvml)
    except nvml.NVMLError as error:
        return [], f"NVIDIA's library says of a GPU: {error}"
    finally:
        nvml.nvmlShutdown()
    return gpus, "" if gpus else "NVIDIA's library lists none"


def visible_gpus(environ: Mapping[str, str], ask: Callable[[], tuple[list[Gpu], str]] = ask_nvidia) -> Visible:
    """What the variables that hide GPUs leave visible, in their order; without one, every GPU of NVIDIA's.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names a GPU that is not there, or one twice.
    """
    variable = next((each for each in _VARIABLES if each in environ), None)
    gpus, problem = ask() if variable in (None, CUDA_VARIABLE) else ([], "")
    if variable is None:
        order = {} if _ORDER in environ else {_ORDER: _BY_BUS}
        text = (
            f"this machine has {len(gpus)} ({', '.join(map(str, gpus))})"
            if gpus
            else f"none was found: {_describe_none(problem)}"
        )
        return Visible(CUDA_VARIABLE, tuple(gpu.name for gpu in gpus), text, order)
    names = _entries(variable, environ[variable])
    if gpus:
        _resolve(variable, names, gpus)
    shown = f"{variable}={environ[variable]} shows {len(names)}"
    return Visible(variable, tuple(names), shown, {})


def gpu_memory_bytes(environ: Mapping[str, str], ask: Callable[[], tuple[list[Gpu], str]] = ask_nvidia) -> list[int]:
    """Of each visible GPU, in the order in which stages take them.

    Raises:
        ConfigError: a figure cannot be told; the message says which, why, and what to give by hand.
    """
    gpus, problem = ask()
    if not gpus:
        raise ConfigError(f"--memory without figures found no GPU here: {_describe_none(problem)}; {_INSTEAD}")
    chosen = gpus
    if CUDA_VARIABLE in environ:
        names = _entries(CUDA_VARIABLE, environ[CUDA_VARIABLE])
        if not names:
            raise ConfigError(f"{CUDA_VARIABLE}={environ[CUDA_VARIABLE]} shows no GPU; correct it, or {_INSTEAD}")
        chosen = _resolve(CUDA_VARIABLE, names, gpus)
        _check_order(names, gpus, environ)
    return [_figure(gpu) for gpu in chosen]


def _describe_none(problem: str) -> str:
    """Why there is no GPU, and what else is known. ``problem``: of `ask_nvidia`."""
    others = amd_cards()
    if not others:
        return problem
    return (
        f"{problem}; the kernel lists AMD's {', '.join(others)}, which Stagewire does not count by itself: set "
        "HIP_VISIBLE_DEVICES to their numbers"
    )


def amd_cards(folder: Path = _DRM) -> list[str]:
    """``card0 (17.2 GB)`` for each of AMD's GPUs with memory of its own, as the kernel's driver tells."""
    cards = []
    for memory in sorted(folder.glob("card*/device/mem_info_vram_total")):
        with contextlib.suppress(OSError, ValueError):
            if (memory.parent / "vendor").read_text().strip() == _AMD:
                cards.append(f"{memory.parent.parent.name} ({int(memory.read_text()) / 1e9:.1f} GB)")
    return cards


# ---- CUDA_VISIBLE_DEVICES ------------------------------------------------------------------------------------------


def _entries(variable: str, value: str) -> list[str]:
    """Up to the first that hides the rest. Raises ``ConfigError`` for one that is there twice."""
    entries: list[str] = []
    for entry in (each.strip() for each in value.split(",")):
        if not entry or entry.startswith("-"):
            break
        if entry in entries:
            raise ConfigError(f"{variable}={value} names {entry} twice, and shows no GPU for that: name each once")
        entries.append(entry)
    return entries


def _resolve(variable: str, names: Sequence[str], gpus: Sequence[Gpu]) -> list[Gpu]:
    found = [_find(variable, name, gpus) for name in names]
    for i, gpu in enumerate(found):
        if gpu in found[:i]:
            other = names[found.index(gpu)]
            raise ConfigError(f"{variable} names one GPU twice, as {other} and as {names[i]}: {gpu}; name each once")
    return found


def _find(variable: str, name: str, gpus: Sequence[Gpu]) -> Gpu:
    meant = [gpu for gpu in gpus if gpu.is_meant_by(name)]
    listed = ", ".join(f"{gpu} {gpu.gpu_uuid}" for gpu in gpus)
    if not meant:
        raise ConfigError(f"{variable} names {name}, this machine has {listed}; correct it, or unset it")
    exact = [gpu for gpu in meant if gpu.uuid == name]
    if not exact and len({gpu.index for gpu in meant}) > 1:
        raise ConfigError(f"{variable}: {name} is the beginning of several UUIDs ({listed}): give more of it")
    return (exact or meant)[0]  # CUDA gives the first slice to who names the whole GPU


def _check_order(names: Sequence[str], gpus: Sequence[Gpu], environ: Mapping[str, str]) -> None:
    is_by_number = any(name.isdecimal() for name in names)
    if is_by_number and environ.get(_ORDER) != _BY_BUS and len({gpu.model for gpu in gpus}) > 1:
        raise ConfigError(
            f"{CUDA_VARIABLE} counts GPUs of several kinds ({', '.join(map(str, gpus))}), CUDA the fastest first and "
            f"NVIDIA's library by PCI bus: set {_ORDER}={_BY_BUS} here and for the stages, name them by UUID, or "
            f"{_INSTEAD}"
        )


def _figure(gpu: Gpu) -> int:
    if gpu.memory_bytes is None:
        raise ConfigError(
            f"--memory without figures: GPU {gpu.name} ({gpu.model}) has no memory of its own, it shares the "
            f"machine's, and NVIDIA's library has no figure for it; {_INSTEAD}"
        )
    return gpu.memory_bytes
