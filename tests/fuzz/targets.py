"""What is fuzzed: everything that turns a peer's bytes into something. Each target takes any bytes and never raises.

A target's bytes begin with what shapes the input (how many frames, which side), so that a fuzzer can reach all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from stagewire.errors import ProtocolError
from stagewire.ring.rules.actions import Action, Connect, ConnectOwner, Side
from stagewire.ring.rules.phases import Phase
from stagewire.ring.rules.state import RingState
from stagewire.wire.codec import WIRE_VERSION, Frame, decode, encode
from stagewire.wire.messages import (
    Call,
    CallResult,
    Fault,
    Hello,
    Message,
    Open,
    Register,
    Reply,
    Report,
    Result,
    Roll,
    Sample,
    Step,
    TensorSpec,
    Welcome,
)
from stagewire.wire.tensors import TensorPlan, check_tensors
from unit.ring_harness import make_config, make_identity, make_report

__all__ = ["TARGETS", "read_chunks", "seeds"]

GOLDEN = Path(__file__).parents[1] / "unit" / "golden_frames.json"
# Far above what a stage has to keep of its neighbours, far below what would hurt.
MAX_STATE_BYTES = 4 << 20
MAX_ACTIONS = 64
EPOCH = 123456789
NUM_PROGRESS = 5
PREDECESSOR, SUCCESSOR, STRANGER = b"", b"succ", b"strange"


def read_chunks(data: bytes) -> Iterator[bytes]:
    """Pieces with two bytes of length before each; the last one may be shorter than it says."""
    while data:
        size = int.from_bytes(data[:2], "big")
        yield data[2 : 2 + size]
        data = data[2 + size :]


def write_chunks(chunks: list[bytes]) -> bytes:
    return b"".join(len(chunk).to_bytes(2, "big") + chunk for chunk in chunks)


def fuzz_decode(data: bytes) -> None:
    """Frames to a message. What decodes means the same after another round."""
    message = _decode(list(read_chunks(data)))
    if message is not None:
        again, _ = decode([encode(message)[0], *[b""] * (len(list(read_chunks(data))) - 1)])
        assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(message)


def fuzz_tensors(data: bytes) -> None:
    """A Step's tensors against a plan."""
    frames = list(read_chunks(data))
    message = _decode(frames)
    if message is None or not hasattr(message, "tensors"):
        return
    plan = [TensorPlan("hidden_states", "float32", (8,)), TensorPlan("residual", "float32", (8,))]
    try:
        check_tensors(plan, message.num_tokens, message.tensors, frames[2:])
    except ProtocolError:
        return
    assert sum(map(len, frames[2:])) == 2 * message.num_tokens * 32


def fuzz_state(data: bytes) -> None:
    """A stage of a ring, before and while it serves, and what its neighbours and strangers say to it.

    The first byte chooses the stage and how far its ring has come, the first of each piece who says it.
    """
    first, now = data[:1] or b"\0", 100.0
    state = _make_state(first[0] % 4, first[0] // 4 % NUM_PROGRESS)
    peers = {0: (Side.PREDECESSOR, PREDECESSOR), 1: (Side.SUCCESSOR, SUCCESSOR), 2: (Side.SUCCESSOR, STRANGER)}
    for piece in read_chunks(data[1:]):
        now += (piece[:1] or b"\0")[0] / 32
        side, peer = peers.get((piece[:1] or b"\0")[0] % 4, (Side.OWNER, b""))
        _check(state, _say(state, side, peer, piece[1:], now))
        _check(state, state.tick(now))
    assert _size_of(state, set()) < MAX_STATE_BYTES


def _say(state: RingState, side: Side, peer: bytes, data: bytes, now: float) -> list[Action]:
    """One event: a connection that comes, goes or fails, or a message: as bytes, or as a kind and the fields' bytes."""
    match data[:1]:
        case b"\1":
            return state.connected(side, now) if side is not Side.SUCCESSOR else []
        case b"\2":
            return state.disconnected(side, "gone", now) if side is not Side.SUCCESSOR else []
        case b"\3":
            return state.bad_handshake(side, now)
    frames: list[Frame] = [data[1:]]
    if data[:1] == b"\4":
        frames = list(read_chunks(data[1:]))
    elif data[:1] == b"\5":
        frames = [b"SW" + WIRE_VERSION.to_bytes(2, "big") + data[1:2] + bytes(3) + data[2:]]
    try:
        message, payloads = decode(frames)
    except ProtocolError as error:
        return state.bad_message(side, peer, error, now)
    return state.received(side, peer, message, payloads, now)


def _make_state(stage: int, progress: int) -> RingState:
    """``progress``: 0 nothing yet, 1 greeting, 2 linked to both neighbours, 3 open, 4 serving."""
    config = make_config(stage)
    state = RingState(config, make_identity(config), 99.0, first_epoch=EPOCH)
    state.start(99.0)
    state.bound(True, config.bind_port, 99.0)
    before, after = (make_identity(make_config(index % 4), "it") for index in (stage - 1, stage + 1))
    if progress >= 1:
        state.connected(Side.PREDECESSOR, 99.0)
    if progress >= 2:
        state.received(Side.PREDECESSOR, PREDECESSOR, Welcome(before), (), 99.0)
        state.received(Side.SUCCESSOR, SUCCESSOR, Hello(after, stage), (), 99.0)
        roll = [make_identity(make_config(index), "it") for index in range(stage or 4)]
        if stage == 0:
            roll[0] = state.identity
        state.received(Side.PREDECESSOR, PREDECESSOR, Roll(EPOCH, roll), (), 99.0)
    if progress >= 3:
        state.received(Side.PREDECESSOR, PREDECESSOR, Open(EPOCH), (), 99.0)
        assert state.phase is Phase.OPEN
    if progress >= 4:
        state.began_serving()
    return state


def _check(state: RingState, actions: list[Action]) -> None:
    """What the state wants done can be done: it is bounded, and each message in it is one that a peer can read."""
    assert len(actions) <= MAX_ACTIONS
    for action in actions:
        message = getattr(action, "message", None)
        if message is not None:
            decode(encode(message, getattr(action, "payloads", ())))
        elif isinstance(action, (Connect, ConnectOwner)):
            assert not state.is_over


def _size_of(value: object, counted: set[int]) -> int:
    """Bytes of everything that a state keeps, by its fields. Its parts share some, which are counted once."""
    if id(value) in counted:
        return 0
    if isinstance(value, (RingState, msgspec.Struct)) or dataclasses.is_dataclass(value):
        counted.add(id(value))
        names = getattr(value, "__struct_fields__", None) or [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
        return sum(_size_of(getattr(value, name), counted) for name in names)
    if isinstance(value, dict):
        return sum(_size_of(key, counted) + _size_of(item, counted) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return sum(_size_of(item, counted) for item in value)
    return sys.getsizeof(value)


def _decode(frames: list[bytes]) -> Any:
    try:
        return decode(list[Frame](frames))[0]
    except ProtocolError:
        return None


def fuzz_schedule(data: bytes) -> None:
    from stagewire.vllm_plugin.codec.schedules import decode_schedule

    _refuses(decode_schedule, data)


def fuzz_output(data: bytes) -> None:
    from stagewire.vllm_plugin.codec.schedules import decode_output

    _refuses(decode_output, data)


def fuzz_grammar(data: bytes) -> None:
    from stagewire.vllm_plugin.codec.schedules import decode_grammar

    _refuses(decode_grammar, data)


def fuzz_call_value(data: bytes) -> None:
    from stagewire.vllm_plugin.codec.values import decode_value

    _refuses(decode_value, data)


def _refuses(function: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        function(data)


# The last four import vLLM.
TARGETS: dict[str, Callable[[bytes], None]] = {
    "decode": fuzz_decode,
    "tensors": fuzz_tensors,
    "state": fuzz_state,
    "schedule": fuzz_schedule,
    "output": fuzz_output,
    "grammar": fuzz_grammar,
    "call_value": fuzz_call_value,
}


def golden() -> list[tuple[Message, list[bytes]]]:
    """The recorded messages, each with its frames."""
    recorded_frames = [entry["frames"] for entry in json.loads(GOLDEN.read_text())]
    recorded = [[bytes.fromhex(frame) for frame in frames] for frames in recorded_frames]
    return [(decode(list[Frame](frames))[0], frames) for frames in recorded]


def seeds(name: str) -> list[bytes]:
    """Inputs to begin with: recorded messages, and for a state a ring that comes up, serves and hears them all."""
    if name in ("decode", "tensors"):
        return [write_chunks(frames) for _, frames in golden()]
    if name == "state":
        firsts = [stage + 4 * progress for stage in range(4) for progress in range(NUM_PROGRESS)]
        return [seed for first in firsts for seed in _scenes(first)]
    from fuzz.codec_seeds import codec_seeds

    return codec_seeds(name)


def _scenes(first: int) -> Iterator[bytes]:
    """One event or message each, from everybody in turn: the recorded ones, and those that fit this very ring."""
    stage, step = first % 4, Step(EPOCH, 1, 1, 7, False, [TensorSpec("hidden_states", "float32", [1, 8])], [])
    own: list[tuple[Message, list[bytes]]] = [
        (Welcome(make_identity(make_config((stage - 1) % 4), "other")), []),
        (Hello(make_identity(make_config((stage + 1) % 4), "other"), stage), []),
        (Register(make_identity(make_config((stage + 2) % 4), "other"), 5, False), []),
        (Roll(EPOCH + 1, [make_identity(make_config(index), "other") for index in range(stage or 4)]), []),
        (Fault(EPOCH, 2, 5, "stage 2 is lost"), []),
        (Open(EPOCH + 1), []),
        (Call(EPOCH, 1, "check_health"), [b"args"]),
        (Reply(EPOCH, 1, [CallResult(1, 0, "", "")]), [b"value"]),
        (step, [b"schedule", bytes(32)]),
        (Sample(EPOCH, 1), [b"bitmask"]),
        (Result(EPOCH, 1, []), [b"tokens"]),
        (Report(EPOCH, [make_report(index) for index in range(stage or 4)]), []),
    ]
    everybody = (1, 2, 3, 0)  # the predecessor last: its word can end a ring
    for event in (1, 2, 3):
        yield bytes([first]) + write_chunks([bytes([who, event]) for who in everybody])
    for frames in [[bytes(frame) for frame in encode(*each)] for each in own] + [frames for _, frames in golden()]:
        yield bytes([first]) + write_chunks([bytes([who, 4]) + write_chunks(frames) for who in everybody])
