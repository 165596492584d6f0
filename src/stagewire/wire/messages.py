"""Every message that may travel the ring, as typed structs.

Owns the vocabulary and its numbers (`KINDS`). Knows no socket, no torch, no vLLM: a schedule, a grammar bitmask, call
arguments and tensors are payload frames whose bytes are opaque here. docs/reference/wire.md has them in prose.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = [
    "KINDS",
    "MAX_RANKS",
    "MAX_STAGES",
    "Bye",
    "Call",
    "CallResult",
    "Fault",
    "Hello",
    "Message",
    "NotHere",
    "Open",
    "Ping",
    "Pong",
    "Redirect",
    "Refused",
    "Register",
    "Registered",
    "Reply",
    "Report",
    "Result",
    "Roll",
    "Sample",
    "StageIdentity",
    "StageReport",
    "StageState",
    "StageTiming",
    "Step",
    "TensorSpec",
    "Welcome",
]


MAX_STAGES = 1024
# Tensor parallel ranks of one stage.
MAX_RANKS = 64

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0)]
# A report has one of these per stage: with the largest number of stages it still fits a header.
ShortText = Annotated[str, msgspec.Meta(max_length=128)]

# What a stage's model is doing, in the order in which it passes them. One that is draining was told to stop, and leaves
# when it has no requests any more.
StageState = Literal["loading", "loaded", "kv_cache", "serving", "draining"]


class _Struct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Positional on the wire; a field more or less than ours is an error, not a guess."""


class StageIdentity(_Struct, frozen=True):
    """Who a stage is and what it must agree on with the others.

    ``shared`` holds the resolved settings that must equal the head's, by name, as text; ``tensor_parallel``, its number
    of ranks, need not. ``incarnation`` is random per process: two processes with one index are told apart by it. One
    that no stage can have (an index outside its total, no layers) does not decode, so nobody who receives an identity
    need doubt it.
    """

    stage: int
    num_stages: int
    layer_start: int
    layer_end: int
    tensor_parallel: int
    incarnation: ShortText
    pipeline_id: str
    shared: dict[str, str]

    def __post_init__(self) -> None:
        if not 0 <= self.stage < self.num_stages <= MAX_STAGES:
            raise ValueError(f"stage {self.stage} of {self.num_stages}")
        if not 0 <= self.layer_start < self.layer_end:
            raise ValueError(f"layers from {self.layer_start} to {self.layer_end}")
        if not 1 <= self.tensor_parallel <= MAX_RANKS:
            raise ValueError(f"{self.tensor_parallel} tensor parallel ranks")


class Hello(_Struct, frozen=True):
    """Successor to predecessor, first on a connection: I am ``identity`` and look for stage ``want``."""

    identity: StageIdentity
    want: int


class Welcome(_Struct, frozen=True):
    """Answer to Hello: I am the one you look for."""

    identity: StageIdentity


class Redirect(_Struct, frozen=True):
    """Answer to Hello: stage ``stage`` listens on ``port`` of the address that you asked."""

    stage: int
    port: Port


class NotHere(_Struct, frozen=True):
    """Answer to Hello or Register: not now, ask again. Stage ``stage``, the one looked for, is not known on this port
    so far, or cannot say yet whether the caller belongs to its pipeline or may take another one's place.
    """

    stage: int


class Register(_Struct, frozen=True):
    """To the owner of a shared port: I am ``identity`` and listen on ``port`` of the same address.

    ``stands_by``: for the owner itself, should it end; not to be found by others before that.
    """

    identity: StageIdentity
    port: Port
    stands_by: bool


class Registered(_Struct, frozen=True):
    """Answer to Register. ``owner`` is the owner's index."""

    owner: int


class Refused(_Struct, frozen=True):
    """Stage ``stage`` cannot take part. Sent to it, or by it towards the head so that both ends say why."""

    stage: int
    field: str
    expected: str
    found: str
    text: str


class Roll(_Struct, frozen=True):
    """Forward: the identities of stage 0 up to the sender. At the head it is the whole pipeline.

    ``epoch``: that the head will open with it. The head repeats it once a second until the ring is open.
    """

    epoch: int
    identities: list[StageIdentity]


class Open(_Struct, frozen=True):
    """Forward, once round: the ring is complete and ``epoch`` begins."""

    epoch: int


class Ping(_Struct, frozen=True):
    """Successor to predecessor; ``sent_ns`` is the sender's monotonic clock and comes back unchanged."""

    sent_ns: int


class Pong(_Struct, frozen=True):
    sent_ns: int


class Fault(_Struct, frozen=True):
    """Forward, once round: ``epoch`` is over, because stage ``stage`` is lost, failed a step, or stops.

    ``step``: the one that failed, -1 where no step did. A Fault of an epoch that is over already ends nothing.
    """

    epoch: int
    stage: int
    step: int
    text: str


class Bye(_Struct, frozen=True):
    """Forward: the head is stopping; stop too, in order."""

    text: str


class Call(_Struct, frozen=True):
    """Forward: run ``method`` on your workers. Payload 0: arguments."""

    epoch: int
    call_id: int
    method: str


class CallResult(_Struct, frozen=True):
    """One worker's outcome: rank ``rank`` of stage ``stage``. An error is its type and message, a value is the payload
    of the same position.
    """

    stage: int
    rank: int
    error_type: str
    error_text: str


class Reply(_Struct, frozen=True):
    """Forward: results of stages 1 up to the sender, one for each of their ranks, in order; one payload each."""

    epoch: int
    call_id: int
    results: list[CallResult]


class TensorSpec(_Struct, frozen=True):
    """``dtype`` is torch's name without the prefix (``bfloat16``); ``shape`` counts rows first."""

    name: str
    dtype: str
    shape: list[int]


class StageTiming(_Struct, frozen=True):
    """Four instants of one stage's monotonic clock, in nanoseconds, and half its link's last ping.

    Only instants of one stage may be subtracted: hosts share no clock. ``hop_ns`` is the one-way time from the
    predecessor, 0 while unknown.
    """

    stage: int
    received_ns: int
    started_ns: int
    finished_ns: int
    sent_ns: int
    hop_ns: int


class Step(_Struct, frozen=True):
    """Forward: run one micro-batch.

    Payload 0 is the schedule, then one payload per tensor. ``digest`` is of (request id, tokens) in row order; every
    stage compares it with its own rows. ``waits_for_sample``: a Sample message follows (grammar bitmask).
    """

    epoch: int
    step: int
    num_tokens: int
    digest: int
    waits_for_sample: bool
    tensors: list[TensorSpec]
    timings: list[StageTiming]


class Sample(_Struct, frozen=True):
    """Forward to the tail: sample step ``step``. Payload 0, if any: the grammar bitmask."""

    epoch: int
    step: int


class Result(_Struct, frozen=True):
    """Tail to head. Payload 0: sampled token ids and what else the requests asked for."""

    epoch: int
    step: int
    timings: list[StageTiming]


class StageReport(_Struct, frozen=True):
    """What a stage says of itself, for people and planners; nothing is decided by it.

    ``host`` is the machine's name, ``address`` where the stage listens. ``rss_bytes`` is of all its tensor parallel
    ranks, ``device_bytes`` of rank 0's device, 0 without one. ``kv_blocks`` is 0 before the KV cache exists.
    ``last_step`` is the last one that it has run, -1 before the first. ``age_ms``: how long its process has taken part.
    """

    stage: Annotated[int, msgspec.Meta(ge=0, lt=MAX_STAGES)]
    layer_start: Count
    layer_end: Count
    state: StageState
    pid: Count
    host: ShortText
    address: ShortText
    age_ms: Count
    rss_bytes: Count
    device_bytes: Count
    kv_blocks: Count
    cached_requests: Count
    last_step: Annotated[int, msgspec.Meta(ge=-1)]


class Report(_Struct, frozen=True):
    """Forward, once round, about once a second: the reports of stage 0 up to the sender.

    A stage that has nothing to say passes it on as it is. One that is late or lost is not repeated.
    """

    epoch: int
    stages: Annotated[list[StageReport], msgspec.Meta(max_length=MAX_STAGES)]


Message = (
    Hello
    | Welcome
    | Redirect
    | NotHere
    | Register
    | Registered
    | Refused
    | Roll
    | Open
    | Ping
    | Pong
    | Fault
    | Bye
    | Call
    | Reply
    | Step
    | Sample
    | Result
    | Report
)

# The number of a message on the wire. Never reuse one; a change of meaning is a new wire version (codec.py).
KINDS: dict[int, type[Message]] = {
    1: Hello,
    2: Welcome,
    3: Redirect,
    4: NotHere,
    5: Register,
    6: Registered,
    7: Refused,
    8: Roll,
    9: Open,
    10: Ping,
    11: Pong,
    12: Fault,
    13: Bye,
    14: Call,
    15: Reply,
    16: Step,
    17: Sample,
    18: Result,
    19: Report,
}
