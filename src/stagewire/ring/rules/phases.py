"""The tables of the ring: which phase follows which, and which message counts when.

`TRANSITIONS` has what moves a stage to another phase; `next_phase` looks it up. `RULES` has every message that may
come, from whom, and in which phase it counts; `receive` looks it up. Whatever is in neither table changes nothing.

docs/reference/wire.md shows both tables; tests/unit/test_ring_phases.py compares them with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from stagewire.ring.rules.actions import Side
from stagewire.wire.messages import (
    Bye,
    Call,
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
    Step,
    Welcome,
)

__all__ = ["RULES", "TRANSITIONS", "Change", "Phase", "Reception", "Role", "Rule", "next_phase", "receive"]


class Role(Enum):
    HEAD = "head"
    WORKER = "worker"


class Phase(Enum):
    """How far the ring has come, as one stage sees it. OPENING is the head's alone."""

    LINKING = "linking"
    OPENING = "opening"
    OPEN = "open"
    SERVING = "serving"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_open(self) -> bool:
        """Whether the ring is whole."""
        return self in (Phase.OPEN, Phase.SERVING)

    @property
    def is_over(self) -> bool:
        """Whether this stage has left the ring for good."""
        return self in (Phase.FAILED, Phase.STOPPED)


class Change(Enum):
    """What moves a stage to another phase."""

    ROLL_CAME_ROUND = "the head's own Roll came round, with all stages"
    OPEN_CAME = "Open came (at the head: its own came round)"
    OPEN_LOST = "Open did not come round in time, or the successor is gone"
    DATA = "the first call or step was sent, or came"
    LOSS = "a neighbour was lost or connected anew, a Fault of this epoch or a Roll of another one came"
    FAILURE = "a refusal, a deadline, or an error of this stage"
    STOP = "this stage was told to stop, or the head said Bye"


TRANSITIONS: Mapping[Role, Mapping[Phase, Mapping[Change, Phase]]] = {
    Role.HEAD: {
        Phase.LINKING: {
            Change.ROLL_CAME_ROUND: Phase.OPENING,
            Change.FAILURE: Phase.FAILED,
            Change.STOP: Phase.STOPPED,
        },
        Phase.OPENING: {
            Change.OPEN_CAME: Phase.OPEN,
            Change.OPEN_LOST: Phase.LINKING,
            Change.LOSS: Phase.LINKING,
            Change.FAILURE: Phase.FAILED,
            Change.STOP: Phase.STOPPED,
        },
        Phase.OPEN: {
            Change.DATA: Phase.SERVING,
            Change.LOSS: Phase.LINKING,
            Change.FAILURE: Phase.FAILED,
            Change.STOP: Phase.STOPPED,
        },
        Phase.SERVING: {
            Change.DATA: Phase.SERVING,
            Change.LOSS: Phase.LINKING,
            Change.FAILURE: Phase.FAILED,
            Change.STOP: Phase.STOPPED,
        },
        Phase.FAILED: {},
        Phase.STOPPED: {},
    },
    Role.WORKER: {
        Phase.LINKING: {
            Change.OPEN_CAME: Phase.OPEN,
            Change.FAILURE: Phase.FAILED,
            Change.STOP: Phase.STOPPED,
        },
        Phase.OPEN: {
            Change.DATA: Phase.SERVING,
            Change.LOSS: Phase.LINKING,
            Change.FAILURE: Phase.FAILED,
            Change.STOP: Phase.STOPPED,
        },
        Phase.SERVING: {
            Change.DATA: Phase.SERVING,
            Change.LOSS: Phase.LINKING,
            Change.FAILURE: Phase.FAILED,
            Change.STOP: Phase.STOPPED,
        },
        Phase.FAILED: {},
        Phase.STOPPED: {},
    },
}


def next_phase(role: Role, phase: Phase, change: Change) -> Phase | None:
    """The phase that follows; None: the change means nothing in this phase."""
    return TRANSITIONS[role][phase].get(change)


class Reception(Enum):
    """What becomes of a message."""

    TAKEN = "taken"
    IGNORED = "ignored"
    STALE = "stale"  # dropped and counted; it came too late or too early, which is nobody's fault
    BAD = "bad"  # dropped and counted; its sender should not have sent it


_ALIVE = (Phase.LINKING, Phase.OPENING, Phase.OPEN, Phase.SERVING)
_NOT_SERVING = (Phase.LINKING, Phase.OPENING, Phase.OPEN)
_WHOLE = (Phase.OPEN, Phase.SERVING)
_BOTH = (Role.HEAD, Role.WORKER)


@dataclass(frozen=True)
class Rule:
    """When a message of one side counts.

    Args:
        side: whose connection it comes by.
        message: its type.
        follows: what is done about it, for people.
        heard_by: the roles for which it is meant; for another it is bad.
        phases: in which it is taken.
        is_of_epoch: whether only one of the present epoch is taken.
        before_welcome: what becomes of it while the predecessor has not said Welcome on this connection.
        otherwise: what becomes of it in another phase or of another epoch.
    """

    side: Side
    message: type[Message]
    follows: str
    heard_by: tuple[Role, ...] = _BOTH
    phases: tuple[Phase, ...] = _ALIVE
    is_of_epoch: bool = False
    before_welcome: Reception = Reception.TAKEN
    otherwise: Reception = Reception.BAD


def _linked(message: type[Message], follows: str, *heard_by: Role) -> Rule:
    """A message of the predecessor that counts once it has said Welcome."""
    return Rule(Side.PREDECESSOR, message, follows, heard_by or _BOTH, before_welcome=Reception.IGNORED)


def _data(message: type[Message], follows: str, *heard_by: Role) -> Rule:
    """A message of the predecessor that counts in the epoch that is open."""
    stale = Reception.STALE
    return Rule(Side.PREDECESSOR, message, follows, heard_by or _BOTH, _WHOLE, True, stale, stale)


RULES: tuple[Rule, ...] = (
    Rule(Side.PREDECESSOR, Welcome, "the link is up, or this stage refuses itself because its layers do not fit"),
    Rule(Side.PREDECESSOR, Redirect, "connect to the port that it names"),
    Rule(Side.PREDECESSOR, NotHere, "ask again, or try another way to the address"),
    Rule(Side.PREDECESSOR, Refused, "FAILED; from a stage of another ring: try another way", phases=_NOT_SERVING),
    _linked(Pong, "the time of a hop is known"),
    _linked(
        Roll, "worker: add itself and pass it on, or refuse itself; head: OPENING and send Open, if all stages fit"
    ),
    _linked(Open, "OPEN; worker: pass it on"),
    _linked(Fault, "of this epoch: LINKING, and send a Fault; of another: pass it on to the head as news"),
    _linked(Bye, "STOPPED, pass it on", Role.WORKER),
    Rule(
        Side.PREDECESSOR,
        Report,
        "worker: add its own and pass it on; head: show it",
        phases=_WHOLE,
        is_of_epoch=True,
        before_welcome=Reception.IGNORED,
        otherwise=Reception.STALE,
    ),
    _data(Call, "SERVING, pass it on, run it", Role.WORKER),
    _data(Reply, "SERVING; worker: add its own results, pass it on; head: the call is done"),
    _data(Step, "SERVING, run it", Role.WORKER),
    _data(Sample, "SERVING, the tail samples the step", Role.WORKER),
    _data(Result, "SERVING, the step is done", Role.HEAD),
    Rule(Side.SUCCESSOR, Hello, "Welcome, Redirect, NotHere or Refused"),
    Rule(Side.SUCCESSOR, Register, "Registered, NotHere or Refused"),
    Rule(Side.SUCCESSOR, Ping, "Pong"),
    Rule(Side.SUCCESSOR, Refused, "pass it on towards the head; from a stranger: bad"),
    Rule(Side.OWNER, Registered, "others find this stage by the shared port"),
    Rule(Side.OWNER, NotHere, "register again"),
    Rule(Side.OWNER, Refused, "FAILED", phases=_NOT_SERVING),
)
_BY_MESSAGE = {(rule.side, rule.message): rule for rule in RULES}


def receive(side: Side, message: Message, role: Role, phase: Phase, *, epoch: int, is_linked: bool) -> Reception:
    """What becomes of a message.

    Args:
        epoch: the present one.
        is_linked: whether the predecessor has said Welcome on this connection.
    """
    if phase.is_over:
        return Reception.IGNORED
    is_early = side is Side.PREDECESSOR and not is_linked
    rule = _BY_MESSAGE.get((side, type(message)))
    if rule is None:
        return Reception.IGNORED if is_early else Reception.BAD
    if is_early and rule.before_welcome is not Reception.TAKEN:
        return rule.before_welcome
    if phase not in rule.phases or (rule.is_of_epoch and getattr(message, "epoch", None) != epoch):
        return rule.otherwise
    return Reception.TAKEN if role in rule.heard_by else Reception.BAD
