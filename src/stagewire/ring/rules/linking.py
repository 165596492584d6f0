"""Who becomes a neighbour of this stage, and who is refused.

Takes the greetings of both sides: the predecessor's Welcome, and the Hello or Register of whoever calls. Who is wrong
when two stages differ, and in which words, is in ring/rules/admission.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagewire.config import StageConfig
from stagewire.errors import StageLost
from stagewire.ring.rules.actions import Action, Log, Send, Side, clip
from stagewire.ring.rules.admission import pipeline_refusal, range_refusal, settings_refusal
from stagewire.ring.rules.epochs import Epochs
from stagewire.ring.rules.notices import Notices
from stagewire.ring.rules.phases import Reception
from stagewire.ring.rules.predecessor import PredecessorLink
from stagewire.ring.rules.rendezvous import Rendezvous
from stagewire.ring.rules.successor import SuccessorLink
from stagewire.wire.messages import Hello, Message, NotHere, Refused, Register, StageIdentity

__all__ = ["Linking"]


@dataclass
class Linking:
    """See the module. ``identity`` is this stage's own."""

    config: StageConfig
    identity: StageIdentity
    predecessor: PredecessorLink
    successor: SuccessorLink
    rendezvous: Rendezvous
    epochs: Epochs
    notices: Notices

    def welcomed(self, predecessor: StageIdentity) -> list[Action] | Reception:
        """The predecessor says that it is the stage that this one looks for."""
        link = self.predecessor
        if not link.is_greeting:
            return []
        if predecessor.stage != self.config.predecessor_stage:
            return Reception.BAD
        # The tail's end and the head's start are each checked against the model, by their own stage.
        refusal = None if self.config.is_head else range_refusal(predecessor, self.identity)
        if link.is_doubtful:
            other = settings_refusal(predecessor, self.identity) or refusal
            if other is not None:
                return link.is_another_ring(other.text)
        reports = link.welcomed()
        return [*reports, *self.epochs.refuse_myself(refusal)] if refusal else reports

    def greeted(self, peer: bytes, hello: Hello, now: float) -> list[Action]:
        """Somebody says Hello and looks for this stage, or for one that shares its port."""
        caller, head = hello.identity, self.epochs.head
        if hello.want != self.config.stage:
            return self._answer(peer, caller, self.rendezvous.direct(hello.want, now))
        if head is not None and caller.stage != 0:
            refusal = pipeline_refusal(head, caller)
            if refusal:
                return self._answer(peer, caller, refusal)
        if caller.stage != self.config.successor_stage or caller.pipeline_id != self.identity.pipeline_id:
            return self._answer(peer, caller, NotHere(self.config.stage))
        return self._succeeded(peer, caller, now)

    def _succeeded(self, peer: bytes, caller: StageIdentity, now: float) -> list[Action]:
        before = self.successor.peer
        actions = self.successor.claimed(peer, caller, now)
        if isinstance(actions, Refused):
            return self._answer(peer, caller, actions)
        if self.successor.peer == before:
            return actions
        lost = StageLost(caller.stage, f"stage {caller.stage} has connected anew to stage {self.config.stage}")
        if before is not None and self.epochs.phase.is_open:
            # The earlier process may still serve the epoch, and the stages after it too: they hear of the end first.
            actions.insert(0, Send(Side.SUCCESSOR, self.epochs.fault_of(lost), before))
        return [*actions, *self.epochs.lose(lost, now), *self.epochs.succeeded()]

    def registered(self, peer: bytes, register: Register, now: float) -> list[Action]:
        """A stage that shares this one's port wants to be found by it."""
        return self._answer(peer, register.identity, self.rendezvous.register(register, now))

    def _answer(self, peer: bytes, caller: StageIdentity, answer: Message) -> list[Action]:
        """Sends the answer. The stages from here to the head hear of a refusal, too, once per process."""
        sent: list[Action] = [Send(Side.SUCCESSOR, answer, peer)]
        if isinstance(answer, Refused) and self.notices.is_news(caller.incarnation):
            return [*sent, *self.report(answer)]
        return sent

    def report(self, refusal: Refused) -> list[Action]:
        """Passes a refusal on towards the head, so that both ends say why."""
        text = f"Stage {self.config.stage}: stage {refusal.stage} was refused: {clip(refusal.text)}"
        line = Log(text, is_warning=True)
        return [line] if self.config.is_head else [line, *self.predecessor.report(refusal)]
