"""What may cross a stage boundary: exactly the plan."""

from __future__ import annotations

import pytest

from stagewire.errors import ProtocolError
from stagewire.wire.messages import TensorSpec
from stagewire.wire.tensors import ITEM_BYTES, TensorPlan, check_tensors

PLAN = (TensorPlan("hidden_states", "bfloat16", (8,)), TensorPlan("residual", "float32", (8,)))
ROWS = 3
HIDDEN = TensorSpec("hidden_states", "bfloat16", [3, 8])
RESIDUAL = TensorSpec("residual", "float32", [3, 8])
HIDDEN_FRAME, RESIDUAL_FRAME = bytes(3 * 8 * 2), bytes(3 * 8 * 4)
FRAMES = [HIDDEN_FRAME, RESIDUAL_FRAME]


@pytest.mark.parametrize("frame_type", [bytes, bytearray, memoryview])
def test_the_plan_itself_in_any_order(frame_type: type) -> None:
    check_tensors(PLAN, ROWS, [HIDDEN, RESIDUAL], [frame_type(frame) for frame in FRAMES])
    check_tensors(PLAN, ROWS, [RESIDUAL, HIDDEN], [frame_type(frame) for frame in reversed(FRAMES)])


def test_no_tensors_where_none_are_planned() -> None:
    check_tensors((), 0, (), ())


def test_a_plan_gives_specs_and_sizes() -> None:
    assert PLAN[0].spec(ROWS) == HIDDEN
    assert PLAN[0].num_bytes(ROWS) == len(HIDDEN_FRAME)
    assert TensorPlan("scalar per row", "int64", ()).num_bytes(5) == 40
    assert {dtype: TensorPlan("t", dtype, (2,)).num_bytes(1) for dtype in ITEM_BYTES} == {
        dtype: 2 * size for dtype, size in ITEM_BYTES.items()
    }


@pytest.mark.parametrize(
    ("specs", "frames", "says"),
    [
        ([HIDDEN], [HIDDEN_FRAME], r"\['hidden_states'\]: expected \['hidden_states', 'residual'\]"),
        ([], [], "expected"),
        ([HIDDEN, RESIDUAL, TensorSpec("extra", "int8", [3])], [*FRAMES, bytes(3)], "extra"),
        ([HIDDEN, TensorSpec("residuals", "float32", [3, 8])], FRAMES, "residuals"),
        ([HIDDEN, HIDDEN], [HIDDEN_FRAME] * 2, "hidden_states"),
        ([HIDDEN, RESIDUAL, RESIDUAL], [*FRAMES, RESIDUAL_FRAME], "residual"),
        ([HIDDEN, TensorSpec("residual", "bfloat16", [3, 8])], FRAMES, r"is bfloat16 .*expected float32"),
        ([HIDDEN, TensorSpec("residual", "no such", [3, 8])], FRAMES, "is no such"),
        ([HIDDEN, TensorSpec("residual", "float32", [3, 9])], FRAMES, r"\[3, 9\]: expected float32 \[3, 8\]"),
        ([HIDDEN, TensorSpec("residual", "float32", [4, 8])], FRAMES, r"\[4, 8\]"),
        ([HIDDEN, TensorSpec("residual", "float32", [24])], FRAMES, r"\[24\]"),
        ([HIDDEN, TensorSpec("residual", "float32", [-3, -8])], FRAMES, r"\[-3, -8\]"),
        ([HIDDEN, RESIDUAL], [HIDDEN_FRAME, RESIDUAL_FRAME[1:]], "has 95 bytes: expected 96"),
        ([HIDDEN, RESIDUAL], [HIDDEN_FRAME, b""], "has 0 bytes"),
        ([HIDDEN, RESIDUAL], [HIDDEN_FRAME + b"\0", RESIDUAL_FRAME], "has 49 bytes"),
        ([HIDDEN, RESIDUAL], [HIDDEN_FRAME], "2 tensors in 1 frames"),
    ],
)
def test_anything_else_is_refused(specs: list[TensorSpec], frames: list[bytes], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        check_tensors(PLAN, ROWS, specs, frames)
