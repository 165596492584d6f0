"""Encodes messages to frames and back. Only this module knows the bytes.

A message is frame 0 (an 8-byte preamble and a msgpack body) and payload frames. Decoding is typed. It refuses unknown
kinds, versions, fields and frame counts, and never allocates more than the frames that have arrived.

    preamble: 'S' 'W'  version (u16, big-endian)  kind (u8)  0 0 0
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from stagewire.errors import ProtocolError, WireVersionError
from stagewire.wire.messages import KINDS, MAX_RANKS, MAX_STAGES, Call, Message, Reply, Result, Sample, Step

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_STAGES",
    "MAX_TENSORS",
    "WIRE_VERSION",
    "Frame",
    "decode",
    "encode",
]

WIRE_VERSION = 2
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 64

Frame = bytes | bytearray | memoryview

_PREAMBLE = struct.Struct(">2sHB3x")
_MAGIC = b"SW"
_NUMBERS = {cls: number for number, cls in KINDS.items()}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[int, msgspec.msgpack.Decoder[Any]] = {n: msgspec.msgpack.Decoder(cls) for n, cls in KINDS.items()}

# How many payload frames a message may have: (least, most). Kinds that are not listed have none.
_PAYLOADS: dict[type[Message], tuple[int, int]] = {
    Call: (1, 1),
    Reply: (0, MAX_STAGES * MAX_RANKS),
    Step: (1, 1 + MAX_TENSORS),
    Sample: (0, 1),
    Result: (1, 1),
}


def encode(message: Message, payloads: Sequence[Frame] = ()) -> list[Frame]:
    """The frames of a message. Payloads are not copied."""
    header = _PREAMBLE.pack(_MAGIC, WIRE_VERSION, _NUMBERS[type(message)]) + _ENCODER.encode(message)
    return [header, *payloads]


def decode(frames: Sequence[Frame]) -> tuple[Message, Sequence[Frame]]:
    """The message and its payload frames, which are not copied.

    Raises:
        WireVersionError: the message has another wire version.
        ProtocolError: the frames are no valid message; the text has the reason.
    """
    if not frames:
        raise ProtocolError("an empty message")
    header, payloads = frames[0], frames[1:]
    if not _PREAMBLE.size < len(header) <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(header)} bytes: expected {_PREAMBLE.size + 1} to {MAX_HEADER_BYTES}")
    magic, version, number = _PREAMBLE.unpack_from(header)
    if magic != _MAGIC:
        raise ProtocolError("not a Stagewire message")
    if version != WIRE_VERSION:
        raise WireVersionError(
            f"wire version {version}, this stage speaks {WIRE_VERSION}: install the same Stagewire on all stages"
        )
    if number not in _DECODERS:
        raise ProtocolError(f"unknown kind of message: {number}")
    try:
        message: Message = _DECODERS[number].decode(memoryview(header)[_PREAMBLE.size :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed {KINDS[number].__name__}: {error}") from error
    _check_payload_count(message, len(payloads))
    return message, payloads


def _check_payload_count(message: Message, count: int) -> None:
    least, most = _PAYLOADS.get(type(message), (0, 0))
    if isinstance(message, Step):
        least, most = 1 + len(message.tensors), min(most, 1 + len(message.tensors))
    elif isinstance(message, Reply):
        least, most = len(message.results), min(most, len(message.results))
    if not least <= count <= most:
        raise ProtocolError(f"{type(message).__name__} with {count} payload frames: expected {least} to {most}")
