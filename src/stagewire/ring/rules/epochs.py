"""Epochs: how a ring becomes whole, and how that ends.

The head calls the roll: its Roll goes round, and every stage adds itself. When the Roll is back and right, the head
picks the next epoch and sends Open round. From Open's return on, calls and steps travel.

An epoch ends once, for everybody. Whoever sees that the ring cannot go on leaves the epoch and sends a Fault forward.
Whoever hears a Fault of its own epoch does the same, and where the epoch is over already the Fault ends. The head then
calls the roll for the next epoch, once a second until it comes round; a stage that missed the Fault learns from the
Roll. So any loss mends itself as soon as every stage is linked again.

Owns the phase, the number of the epoch and the roll. Speaks through the link to the successor. Which connections there
are, and who may be a neighbour, is not known here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from stagewire.config import StageConfig
from stagewire.errors import ConfigError, PeerError, StageLost
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import Action, Fail, Log, Send, SetBroken, SetOpen, Side, clip
from stagewire.ring.rules.admission import folder_refusal, range_refusal, settings_refusal
from stagewire.ring.rules.notices import Notices
from stagewire.ring.rules.phases import Change, Phase, Reception, Role, next_phase
from stagewire.ring.rules.successor import SuccessorLink
from stagewire.ring.rules.waiting import Waiting
from stagewire.wire.messages import Fault, Open, Refused, Roll, StageIdentity

__all__ = ["Epochs"]


@dataclass
class Epochs:
    """See the module.

    Args:
        identity: this stage's own.
        first_epoch: the head counts from here.
        number: of the epoch that is open, was last, or that the head opens now.
        roll: the stages before this one, in order; at the head, when the ring is whole, all stages.
    """

    config: StageConfig
    identity: StageIdentity
    successor: SuccessorLink
    waiting: Waiting
    notices: Notices
    first_epoch: int

    phase: Phase = Phase.LINKING
    number: int = 0
    roll: tuple[StageIdentity, ...] | None = None

    _roll_number: int = 0
    _last_fault: Fault | None = None
    _unsent: Fault | None = None  # a Fault for which there was no way to the head
    _opening_since: float = 0.0
    _next_roll_at: float = 0.0

    @property
    def role(self) -> Role:
        return Role.HEAD if self.config.is_head else Role.WORKER

    @property
    def head(self) -> StageIdentity | None:
        """The head's identity, once it is known here."""
        if self.config.is_head:
            return self.identity
        return self.roll[0] if self.roll else None

    def may(self, change: Change) -> bool:
        """Whether the change means anything in this phase."""
        return next_phase(self.role, self.phase, change) is not None

    def move(self, change: Change) -> bool:
        """Moves to the phase that follows. False: the change means nothing in this phase."""
        after = next_phase(self.role, self.phase, change)
        self.phase = after or self.phase
        return after is not None

    def data_moved(self) -> None:
        """A call or a step was sent or has come."""
        self.move(Change.DATA)
        self.waiting.has_served = True

    # ---- becoming whole --------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Repeats what may have been lost while the ring is not whole."""
        if self.phase is Phase.OPENING and now - self._opening_since >= timeouts.OPENING_TIMEOUT_S:
            self.move(Change.OPEN_LOST)
        if not self.config.is_head or self.phase is not Phase.LINKING or now < self._next_roll_at:
            return []
        self._next_roll_at = now + timeouts.ROLL_INTERVAL_S
        return self.pass_roll()

    def pass_roll(self) -> list[Action]:
        """Sends the Roll on: the head's own, or the one that has come, with this stage added."""
        if self.config.is_head:
            return self.successor.send(Roll(self._next_number, [self.identity]))
        if self.roll is None:
            return []
        return self.successor.send(Roll(self._roll_number, [*self.roll, self.identity]))

    @property
    def _next_number(self) -> int:
        """At the head: the epoch for which it calls the roll."""
        return max(self.number + 1, self.first_epoch)

    def rolled(self, message: Roll, now: float) -> list[Action] | Reception:
        epoch, roll = message.epoch, tuple(message.identities)
        if self.phase.is_open and epoch == self.number:
            return []  # a repetition that was on its way when the ring opened
        if not roll or roll[0].stage != 0:
            return Reception.BAD
        if self.config.is_head and (
            roll[0].incarnation != self.identity.incarnation
            or epoch != self._next_number
            or not self.may(Change.ROLL_CAME_ROUND)
        ):
            return []  # from before this head's restart, or of another epoch
        refusal = settings_refusal(roll[0], self.identity) or folder_refusal(roll, self.identity)
        if refusal:
            return self.refuse_myself(refusal)
        expected = range(self.config.num_stages if self.config.is_head else self.config.stage)
        if [identity.stage for identity in roll] != list(expected):
            return Reception.BAD
        self.roll, self._roll_number = roll, epoch
        if self.config.is_head:
            return self._check_and_open(roll, now)
        actions = [*self.lose(StageLost(0, "the head calls the roll anew"), now), *self.pass_roll()]
        self.waiting.lost = None  # the head is there, whatever ended the epoch
        return actions

    def _check_and_open(self, roll: tuple[StageIdentity, ...], now: float) -> list[Action]:
        """At the head: the whole pipeline is known. Every stage has checked itself; this is the last check."""
        for earlier, later in itertools.pairwise(roll):
            refusal = range_refusal(earlier, later)
            if refusal:
                text = f"Stage 0: the ring is linked but not right, waiting: {refusal.text}"
                return self.notices.warn_once(("range", refusal.text), text)
        if any(settings_refusal(roll[0], each) or folder_refusal(roll, each) for each in roll):
            return []  # it has refused itself and is leaving
        self.number = self._next_number
        self.move(Change.ROLL_CAME_ROUND)
        self._opening_since = now
        return self.successor.send(Open(self.number))

    def opened(self, message: Open) -> list[Action]:
        epoch = message.epoch
        if self.roll is None or self._roll_number != epoch or self.successor.peer is None:
            return []  # a neighbour went away meanwhile; the head calls the roll again
        if self.config.is_head and epoch != self.number:
            return []
        if not self.move(Change.OPEN_CAME):
            return []
        self.number = epoch
        self.waiting.lost = None
        onward = [] if self.config.is_head else self.successor.send(Open(epoch))
        return [*onward, SetOpen(epoch, self.roll)]

    # ---- the end of an epoch ---------------------------------------------------------------------------------------

    def lose(self, lost: StageLost, now: float) -> list[Action]:
        """Ends the epoch, unless it is over already: everybody hears of it, and the head calls the next roll."""
        was_open = self.phase.is_open
        self.move(Change.LOSS)
        if not was_open:
            return []
        self.waiting.begin_again(lost, now)
        fault = self._last_fault = self.fault_of(lost)
        line = Log(f"Stage {self.config.stage}: {clip(str(lost))}", is_warning=True)
        actions = [line, SetBroken(self.number, lost), *self.successor.send(fault)]
        if self.config.is_head:
            self._next_roll_at = now + timeouts.ROLL_INTERVAL_S
            actions += self.pass_roll()
        return actions

    def lose_unsent(self, lost: StageLost, now: float) -> list[Action]:
        """As `lose`, when the successor itself is lost: the Fault waits for the next one."""
        actions = self.lose(lost, now)
        self._unsent = self._last_fault
        return actions

    def succeeded(self) -> list[Action]:
        """Sends what a new successor has to hear."""
        unsent = self.successor.send(self._unsent) if self._unsent is not None else []
        self._unsent = None
        return [*unsent, *self.pass_roll()]

    def fault_of(self, lost: StageLost) -> Fault:
        return Fault(self.number, lost.stage, lost.step, clip(str(lost)))

    def faulted(self, fault: Fault, now: float) -> list[Action]:
        """A Fault of this epoch ends it. One of no epoch or an earlier one is news on its way to the head."""
        if fault.epoch == self.number and self.may(Change.LOSS):
            actions = self.lose(StageLost(fault.stage, fault.text, fault.step), now)
            if fault.step >= 0 and fault.stage == self.config.stage and not self.config.is_head:
                # This stage would know of a step that failed here: the head has waited for it too long.
                self.move(Change.FAILURE)
                actions.append(Fail(PeerError(f"stage 0 has ended this stage: {fault.text}")))
            return actions
        if self.phase.is_open or fault == self._last_fault:
            return []
        self._last_fault = fault
        line = Log(f"Stage {self.config.stage}: {clip(fault.text)}", is_warning=True)
        return [line] if self.config.is_head else [line, *self.successor.send(fault)]

    def refuse_myself(self, refusal: Refused) -> list[Action]:
        """This stage does not fit: it says so towards the head, and ends."""
        self.move(Change.FAILURE)
        return [Send(Side.PREDECESSOR, refusal), Fail(ConfigError(refusal.text))]
