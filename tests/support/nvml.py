"""A stand-in for NVIDIA's library: what `launch/gpus.py` uses of pynvml, with GPUs that a test chooses."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

__all__ = ["FakeNvml"]

# Model, bytes (None: shared with the machine) and bytes of each slice.
Spec = tuple[str, int | None] | tuple[str, int | None, Sequence[int]]


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801 - the library's name
    pass


class NVMLError_NotFound(NVMLError):  # noqa: N801
    pass


class FakeNvml(types.ModuleType):
    """UUIDs are GPU-a, GPU-b, ... and of slices MIG-a0, MIG-a2, ...: every second place is free.

    Args:
        gpus: in the order of the PCI bus.
        failing: the name of a function that fails, as on a machine without a driver.
    """

    NVML_DEVICE_MIG_ENABLE = 1
    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    NVMLError_NotFound = NVMLError_NotFound

    def __init__(self, gpus: Sequence[Spec] = (), failing: str = "") -> None:
        super().__init__("pynvml")
        self.gpus = gpus
        self.failing = failing
        self.num_open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self._fail("nvmlInit")
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[int, int | None]:  # noqa: N802
        self._fail("nvmlDeviceGetHandleByIndex")
        return index, None

    def nvmlDeviceGetName(self, handle: tuple[int, int | None]) -> str:  # noqa: N802
        return self.gpus[handle[0]][0]

    def nvmlDeviceGetUUID(self, handle: tuple[int, int | None]) -> str:  # noqa: N802
        index, place = handle
        letter = "abcdefgh"[index]
        return f"GPU-{letter}" if place is None else f"MIG-{letter}{place}"

    def nvmlDeviceGetMigMode(self, handle: tuple[int, int | None]) -> list[int]:  # noqa: N802
        if "H100" not in self.gpus[handle[0]][0]:
            raise NVMLError_NotSupported
        return [int(len(self.gpus[handle[0]]) > 2), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: tuple[int, int | None]) -> int:  # noqa: N802
        return 14

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: tuple[int, int | None], place: int) -> Any:  # noqa: N802
        if place % 2 or place // 2 >= len(self._slices(handle)):
            raise NVMLError_NotFound
        return handle[0], place

    def nvmlDeviceGetMemoryInfo(self, handle: tuple[int, int | None]) -> Any:  # noqa: N802
        total = self.gpus[handle[0]][1] if handle[1] is None else self._slices(handle)[handle[1] // 2]
        if total is None:
            raise NVMLError_NotSupported
        return types.SimpleNamespace(total=total)

    def _slices(self, handle: tuple[int, int | None]) -> Sequence[int]:
        own = self.gpus[handle[0]]
        return own[2] if len(own) > 2 else ()

    def _fail(self, name: str) -> None:
        if name == self.failing:
            raise NVMLError("Driver Not Loaded")
