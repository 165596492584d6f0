"""Which tensors may cross a stage boundary, and their sizes, without torch.

The plan (names, dtypes and trailing shapes) is fixed when the model is loaded. Every step's tensors must equal it
exactly on both ends, because vLLM silently uses the last step's buffer for a name that is missing
(docs/design/vllm-seams.md, "Activations").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stagewire.errors import ProtocolError
from stagewire.wire.codec import Frame
from stagewire.wire.messages import TensorSpec

__all__ = ["ITEM_BYTES", "TensorPlan", "check_tensors"]

# The torch dtypes that activations may have, and their bytes per element.
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor between stages: ``trailing`` is its shape without the rows ([num_tokens, *trailing])."""

    name: str
    dtype: str
    trailing: tuple[int, ...]

    def spec(self, num_rows: int) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, [num_rows, *self.trailing])

    def num_bytes(self, num_rows: int) -> int:
        return num_rows * math.prod(self.trailing) * ITEM_BYTES[self.dtype]


def check_tensors(
    plan: Sequence[TensorPlan], num_rows: int, specs: Sequence[TensorSpec], frames: Sequence[Frame]
) -> None:
    """Checks that the tensors of a step have exactly the names, dtypes, shapes and byte counts of the plan.

    Raises:
        ProtocolError: the first difference, with both values.
    """
    expected = {tensor.name: tensor for tensor in plan}
    found = {spec.name: spec for spec in specs}
    if found.keys() != expected.keys() or len(found) != len(specs):
        raise ProtocolError(f"tensors {[spec.name for spec in specs]}: expected {sorted(expected)}")
    if len(frames) != len(specs):
        raise ProtocolError(f"{len(specs)} tensors in {len(frames)} frames: expected one each")
    for spec, frame in zip(specs, frames, strict=True):
        tensor = expected[spec.name]
        if spec != tensor.spec(num_rows):
            wanted = tensor.spec(num_rows)
            raise ProtocolError(
                f"tensor {spec.name!r} is {spec.dtype} {spec.shape}: expected {wanted.dtype} {wanted.shape}"
            )
        num_bytes = memoryview(frame).nbytes
        if num_bytes != tensor.num_bytes(num_rows):
            raise ProtocolError(f"tensor {spec.name!r} has {num_bytes} bytes: expected {tensor.num_bytes(num_rows)}")
