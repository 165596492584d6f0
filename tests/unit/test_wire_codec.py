"""The bytes of the ring: every message there and back, the recorded frames, and everything that is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewire.errors import ProtocolError, WireVersionError
from stagewire.wire.codec import MAX_HEADER_BYTES, MAX_TENSORS, WIRE_VERSION, Frame, decode, encode
from stagewire.wire.messages import (
    KINDS,
    MAX_STAGES,
    Bye,
    Call,
    CallResult,
    Fault,
    Hello,
    Message,
    NotHere,
    Open,
    Ping,
    Pong,
    Redirect,
    Refused,
    Register,
    Registered,
    Reply,
    Report,
    Result,
    Roll,
    Sample,
    StageIdentity,
    StageReport,
    StageTiming,
    Step,
    TensorSpec,
    Welcome,
)

GOLDEN = Path(__file__).with_name("golden_frames.json")

_IDENTITY = StageIdentity(1, 4, 8, 16, 2, "0f1e2d3c4b5a6978", "", {"--dtype": "float32", "model": "1a2b"})
_TIMING = StageTiming(1, 1_000, 2_000, 3_000, 4_000, 50_000)
_REPORT = StageReport(1, 8, 16, "serving", 4321, "machine-b", "192.168.1.11:15550", 61_000, 700 << 20, 0, 1831, 3, 1234)
_SPECS = [TensorSpec("hidden_states", "float32", [3, 8]), TensorSpec("residual", "float32", [3, 8])]

# One of each kind, with payloads. The golden frames are these, encoded.
EXAMPLES: list[tuple[Message, list[bytes]]] = [
    (Hello(_IDENTITY, 0), []),
    (Welcome(_IDENTITY), []),
    (Redirect(2, 50001), []),
    (NotHere(2), []),
    (Register(_IDENTITY, 50002, False), []),
    (Registered(0), []),
    (Refused(2, "--dtype", "float32", "bfloat16", "--dtype is bfloat16 on stage 2"), []),
    (Roll(7, [_IDENTITY, _IDENTITY]), []),
    (Open(123_456_789), []),
    (Ping(987_654_321), []),
    (Pong(987_654_321), []),
    (Fault(7, 2, -1, "stage 2 is lost"), []),
    (Bye("the API server ended"), []),
    (Call(5, 1, "get_kv_cache_spec"), [b"\x90"]),
    (Reply(5, 1, [CallResult(1, 0, "", ""), CallResult(1, 1, "ValueError", "no")]), [b"\xc0", b""]),
    (Step(5, 9, 3, 2**64 - 1, True, _SPECS, [_TIMING]), [b"schedule", b"\0" * 96, b"\1" * 96]),
    (Sample(5, 9), [b"mask"]),
    (Result(5, 9, [_TIMING]), [b"tokens"]),
    (Report(5, [_REPORT, _REPORT]), []),
]
IDS = [type(message).__name__ for message, _ in EXAMPLES]


def as_bytes(frames: list[Frame]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def header(body: Any, kind: int = 13, version: int = WIRE_VERSION, magic: bytes = b"SW") -> bytes:
    packed = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    return struct.pack(">2sHB3x", magic, version, kind) + packed


class TestRoundTrip:
    def test_there_is_an_example_of_every_kind(self) -> None:
        assert [type(message) for message, _ in EXAMPLES] == list(KINDS.values())

    @pytest.mark.parametrize(("message", "payloads"), EXAMPLES, ids=IDS)
    @pytest.mark.parametrize("kind_of_frame", [bytes, bytearray, memoryview])
    def test_there_and_back(self, message: Message, payloads: list[bytes], kind_of_frame: Any) -> None:
        frames = [kind_of_frame(bytes(frame)) for frame in encode(message, payloads)]
        decoded, rest = decode(frames)
        assert decoded == message
        assert as_bytes(list(rest)) == payloads

    def test_payloads_are_not_copied(self) -> None:
        payload = bytearray(1000)
        assert encode(Call(1, 1, "m"), [payload])[1] is payload
        assert decode(encode(Call(1, 1, "m"), [payload]))[1][0] is payload

    def test_a_sample_without_a_bitmask(self) -> None:
        assert decode(encode(Sample(1, 2)))[0] == Sample(1, 2)

    @pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=IDS)
    def test_golden(self, number: int) -> None:
        """A change here changes the format: a new WIRE_VERSION, docs/reference/wire.md, and new golden frames."""
        golden = json.loads(GOLDEN.read_text())[number]
        frames = [bytes.fromhex(text) for text in golden["frames"]]
        message, payloads = decode(frames)
        assert type(message).__name__ == golden["kind"]
        assert as_bytes(encode(message, payloads)) == frames
        assert message == EXAMPLES[number][0]

    def test_golden_has_all(self) -> None:
        assert [entry["kind"] for entry in json.loads(GOLDEN.read_text())] == IDS


class TestMalformed:
    @pytest.mark.parametrize(("message", "payloads"), EXAMPLES, ids=IDS)
    def test_truncated_anywhere(self, message: Message, payloads: list[bytes]) -> None:
        first, *rest = as_bytes(encode(message, payloads))
        for length in range(len(first)):
            with pytest.raises(ProtocolError):
                decode([first[:length], *rest])

    @pytest.mark.parametrize(("message", "payloads"), EXAMPLES, ids=IDS)
    def test_a_byte_too_many(self, message: Message, payloads: list[bytes]) -> None:
        first, *rest = as_bytes(encode(message, payloads))
        with pytest.raises(ProtocolError):
            decode([first + b"\0", *rest])

    @pytest.mark.parametrize(("message", "payloads"), EXAMPLES, ids=IDS)
    def test_a_field_more_or_less(self, message: Message, payloads: list[bytes]) -> None:
        first, *rest = as_bytes(encode(message, payloads))
        fields = msgspec.msgpack.decode(first[8:])
        for wrong in ([*fields, 1], fields[:-1], dict(enumerate(fields))):
            with pytest.raises(ProtocolError):
                decode([first[:8] + msgspec.msgpack.encode(wrong), *rest])

    @pytest.mark.parametrize(("message", "payloads"), EXAMPLES, ids=IDS)
    def test_a_field_of_another_type(self, message: Message, payloads: list[bytes]) -> None:
        first, *rest = as_bytes(encode(message, payloads))
        fields = msgspec.msgpack.decode(first[8:])
        for position in range(len(fields)):
            for wrong in (None, 1.5, {"a": 1}, b"x"):
                changed = [*fields[:position], wrong, *fields[position + 1 :]]
                with pytest.raises(ProtocolError):
                    decode([first[:8] + msgspec.msgpack.encode(changed), *rest])

    @pytest.mark.parametrize(("message", "payloads"), EXAMPLES, ids=IDS)
    def test_a_payload_too_many(self, message: Message, payloads: list[bytes]) -> None:
        with pytest.raises(ProtocolError, match="payload frames"):
            decode(encode(message, [*payloads, b"extra"]))

    @pytest.mark.parametrize(
        ("message", "payloads"),
        [
            (Call(1, 1, "m"), []),
            (Result(1, 1, []), []),
            (Step(1, 1, 1, 1, False, [], []), []),
            (Step(1, 1, 1, 1, False, _SPECS, []), [b"", b""]),
            (Reply(1, 1, [CallResult(1, 0, "", "")]), []),
        ],
    )
    def test_a_payload_too_few(self, message: Message, payloads: list[bytes]) -> None:
        with pytest.raises(ProtocolError, match="payload frames"):
            decode(encode(message, payloads))

    def test_too_many_tensors(self) -> None:
        specs = [TensorSpec(f"t{i}", "int8", [1]) for i in range(MAX_TENSORS + 1)]
        with pytest.raises(ProtocolError, match="payload frames"):
            decode(encode(Step(1, 1, 1, 1, False, specs, []), [b""] * (len(specs) + 1)))

    @pytest.mark.parametrize(
        ("frames", "says"),
        [
            ([], "empty"),
            ([b""], "header of 0 bytes"),
            ([b"SW\0\1\x0d\0\0\0"], "header of 8 bytes"),
            ([header([""], magic=b"XX")], "not a Stagewire message"),
            ([b"GET / HTTP/1.1\r\n\r\n"], "not a Stagewire message"),
            ([header([""], kind=0)], "unknown kind of message: 0"),
            ([header([""], kind=255)], "unknown kind of message: 255"),
            ([header(["x" * MAX_HEADER_BYTES])], f"{MAX_HEADER_BYTES}"),
            ([header(b"\x91" * 500_000 + b"\xa0")], "malformed Bye"),
            ([header(b"\xdd\xff\xff\xff\xff")], "malformed Bye"),
            ([header(b"\x91\xdb\xff\xff\xff\xff")], "malformed Bye"),
            ([header(b"\x91\xdd\xff\xff\xff\xff", kind=8)], "malformed Roll"),
            ([header(b"\x91\xa1\xff")], "malformed Bye"),  # not UTF-8
            ([header([0, 70000], kind=3)], "malformed Redirect"),
            ([header([0, 0], kind=3)], "malformed Redirect"),
            ([header([1.0], kind=9)], "malformed Open"),
        ],
    )
    def test_table(self, frames: list[bytes], says: str) -> None:
        with pytest.raises(ProtocolError, match=says):
            decode(frames)

    @pytest.mark.parametrize("version", [0, WIRE_VERSION + 1, 65535])
    def test_another_version_is_told_apart(self, version: int) -> None:
        with pytest.raises(WireVersionError, match=f"wire version {version}, this stage speaks {WIRE_VERSION}"):
            decode([header(b"whatever that version means", version=version)])

    @pytest.mark.parametrize(
        "change",
        [
            {"stage": -1},
            {"stage": 4},
            {"num_stages": 0},
            {"num_stages": 1 << 40},
            {"layer_start": -1},
            {"layer_start": 16},
            {"tensor_parallel": 0},
            {"tensor_parallel": 65},
            {"layer_end": 2},
        ],
    )
    def test_an_identity_that_no_stage_has(self, change: dict[str, int]) -> None:
        fields = {**msgspec.structs.asdict(_IDENTITY), **change}
        with pytest.raises(ProtocolError, match="malformed Welcome"):
            decode([header([list(fields.values())], kind=2)])

    @pytest.mark.parametrize(
        "change",
        [
            {"stage": -1},
            {"stage": MAX_STAGES},
            {"layer_start": -1},
            {"state": "dancing"},
            {"pid": -1},
            {"host": "x" * 129},
            {"address": "x" * 129},
            {"rss_bytes": -1},
            {"rss_bytes": 1.5},
            {"last_step": -2},
        ],
    )
    def test_a_report_that_no_stage_makes(self, change: dict[str, Any]) -> None:
        fields = {**msgspec.structs.asdict(_REPORT), **change}
        with pytest.raises(ProtocolError, match="malformed Report"):
            decode([header([5, [list(fields.values())]], kind=19)])

    def test_the_largest_report_fits_and_a_larger_one_is_refused(self) -> None:
        widest = {
            name: value
            for name, value in msgspec.structs.asdict(_REPORT).items()
            if name not in ("host", "address", "pid", "age_ms", "rss_bytes", "device_bytes", "cached_requests")
        }
        number, text = (1 << 63) - 1, "\N{SNOWMAN}" * 128
        widest |= dict.fromkeys(("pid", "age_ms", "rss_bytes", "device_bytes", "cached_requests"), number)
        report = StageReport(**widest, host=text, address=text)
        assert decode(encode(Report(number, [report] * MAX_STAGES)))[0] == Report(number, [report] * MAX_STAGES)
        with pytest.raises(ProtocolError, match="malformed Report"):
            decode(encode(Report(5, [_REPORT] * (MAX_STAGES + 1))))


class TestFuzz:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(st.binary(max_size=60), max_size=4))
    def test_any_frames(self, frames: list[bytes]) -> None:
        self._survives(frames)

    @settings(max_examples=600, deadline=None, derandomize=True)
    @given(st.integers(0, len(KINDS) + 2), st.binary(max_size=80), st.lists(st.binary(max_size=8), max_size=3))
    def test_any_body(self, kind: int, body: bytes, payloads: list[bytes]) -> None:
        self._survives([header(body, kind=kind), *payloads])

    @settings(max_examples=600, deadline=None, derandomize=True)
    @given(st.sampled_from(EXAMPLES), st.data())
    def test_any_changed_byte(self, example: tuple[Message, list[bytes]], data: st.DataObject) -> None:
        first, *rest = as_bytes(encode(*example))
        position = data.draw(st.integers(0, len(first) - 1))
        changed = bytearray(first)
        changed[position] = data.draw(st.integers(0, 255))
        self._survives([bytes(changed), *rest])

    def _survives(self, frames: list[bytes]) -> None:
        """A message, which can be sent on as it is, or a ProtocolError; nothing else."""
        try:
            message, payloads = decode(frames)
        except ProtocolError:
            return
        again, _ = decode(encode(message, payloads))
        assert again == message
