"""Every message that may travel the ring, as typed structs.

Owns the messages and their numbers (`KINDS`). Knows no socket, no torch, no vLLM: schedules, grammar bitmasks, call
arguments and tensors are payload frames, whose bytes are opaque here. docs/reference/wire.md describes the messages in
prose.
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
# Bounds a StageReport, so that a Report of MAX_STAGES stages fits a header.
ShortText = Annotated[str, msgspec.Meta(max_length=128)]

# The state of a stage's model; a stage passes them in this order. A draining stage was told to stop, and leaves when no
# request is left.
StageState = Literal["loading", "loaded", "kv_cache", "serving", "draining"]


class _Struct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Fields are positional on the wire. A message with a field more or less than ours is refused."""


class StageIdentity(_Struct, frozen=True):
    """Who a stage is, and the settings that it must share with the others.

    The layers are ``layer_start`` to ``layer_end - 1``. ``tensor_parallel`` is the number of ranks, which may differ
    between stages. ``incarnation`` is random per process, to tell two processes with one index apart. ``shared`` holds
    the resolved settings that must equal the head's, by name, as text.

    An identity that no stage can have (an index outside the total, no layers) is refused when it is decoded, so
    receivers need not check it again.
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
    """Successor to predecessor: I am ``identity`` and look for stage ``want``.

    Repeated four times a second until a Welcome, and with each ping after that.
    """

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
    """Answer to Hello or Register: not now, ask again.

    The stage that the caller looks for is not known on this port yet. Or the stage that answers cannot decide yet
    whether the caller belongs to its pipeline or may take another process's place. The caller reports ``stage`` as not
    registered yet.
    """

    stage: int


class Register(_Struct, frozen=True):
    """To the owner of a shared port: I am ``identity`` and listen on ``port`` of the same address.

    ``stands_by``: I replace the owner if it ends, and until then nobody may be redirected to me.
    """

    identity: StageIdentity
    port: Port
    stands_by: bool


class Registered(_Struct, frozen=True):
    """Answer to Register. ``owner`` is the owner's index."""

    owner: int


class Refused(_Struct, frozen=True):
    """Stage ``stage`` cannot take part. Sent to that stage, and by it towards the head, so that both say why."""

    stage: int
    field: str
    expected: str
    found: str
    text: str


class Roll(_Struct, frozen=True):
    """Forward: the identities of stage 0 up to the sender. When it returns to the head, it has the whole pipeline.

    ``epoch``: the epoch that the head will open with it. The head repeats the Roll once a second until the ring is
    open.
    """

    epoch: int
    identities: list[StageIdentity]


class Open(_Struct, frozen=True):
    """Forward, once round: the ring is complete and ``epoch`` begins."""

    epoch: int


class Ping(_Struct, frozen=True):
    """Successor to predecessor. ``sent_ns`` is the sender's monotonic clock; the Pong returns it unchanged."""

    sent_ns: int


class Pong(_Struct, frozen=True):
    sent_ns: int


class Fault(_Struct, frozen=True):
    """Forward, once round: ``epoch`` is over, because stage ``stage`` is lost, failed a step, or stops.

    ``step``: the step that failed, -1 if none did. A stage ignores a Fault of an epoch that is over already.
    """

    epoch: int
    stage: int
    step: int
    text: str


class Bye(_Struct, frozen=True):
    """Forward: the head stops, and every stage that receives this shuts down gracefully too."""

    text: str


class Call(_Struct, frozen=True):
    """Forward: run ``method`` on your workers. Payload 0: arguments."""

    epoch: int
    call_id: int
    method: str


class CallResult(_Struct, frozen=True):
    """The outcome of a call on rank ``rank`` of stage ``stage``.

    An error is its type and message; both are empty without one. The value is the payload at the same position.
    """

    stage: int
    rank: int
    error_type: str
    error_text: str


class Reply(_Struct, frozen=True):
    """Forward: the results of stages 1 up to the sender, one for each rank, in order. Each has one payload."""

    epoch: int
    call_id: int
    results: list[CallResult]


class TensorSpec(_Struct, frozen=True):
    """``dtype`` is torch's name without the prefix (``bfloat16``). ``shape`` begins with the number of rows."""

    name: str
    dtype: str
    shape: list[int]


class StageTiming(_Struct, frozen=True):
    """Four times of one stage's monotonic clock, in nanoseconds, and half of the last round trip to its predecessor.

    Only times of one stage may be subtracted, because hosts share no clock. ``hop_ns`` is the half round trip, 0 while
    unknown.
    """

    stage: int
    received_ns: int
    started_ns: int
    finished_ns: int
    sent_ns: int
    hop_ns: int


class Step(_Struct, frozen=True):
    """Forward: run one micro-batch.

    Payload 0 is the schedule; one payload per tensor follows. ``digest`` is of (request id, tokens) in row order, and
    every stage compares it with its own rows. ``waits_for_sample``: a Sample message follows (grammar bitmask).
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
    """What a stage reports of itself for the status. The ring decides nothing by it.

    ``host`` is the machine's name, ``address`` where the stage listens, ``age_ms`` how long its process has taken part.
    ``rss_bytes`` is of all its tensor parallel ranks, ``device_bytes`` of rank 0's device, 0 without one. ``kv_blocks``
    is 0 before the KV cache exists. ``last_step`` is the last step that it ran, -1 before the first.
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

    A stage without a report of its own passes it on as it is. A Report that is late or lost is not repeated.
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

# The number of each message on the wire. Never reuse one; a change of meaning is a new wire version (codec.py).
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
