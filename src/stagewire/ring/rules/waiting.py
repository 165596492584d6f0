"""A ring that is not whole: whom this stage waits for, for how long, and what it says meanwhile.

Knows the links by what they say of themselves, and the deadlines of the configuration. Which phase the ring is in, and
how an epoch ends, is decided in ring/rules/epochs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagewire.config import StageConfig
from stagewire.errors import PeerError, StageLost
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import Action, Log
from stagewire.ring.rules.notices import Notices
from stagewire.ring.rules.predecessor import PredecessorLink
from stagewire.ring.rules.rendezvous import Rendezvous
from stagewire.ring.rules.successor import SuccessorLink

__all__ = ["Waiting"]


@dataclass
class Waiting:
    """See the module.

    Args:
        since: when the deadline begins, in seconds of the ring's clock.
        has_served: whether this stage has been part of a ring that ran a call or a step.
        lost: why the last epoch ended, until the head is heard again.
        listens_at: where this stage listens, for people.
        other_addresses: where this machine could listen besides, as "address (interface)".
        place_note: what is wrong with the place where it listens, for people.
    """

    config: StageConfig
    predecessor: PredecessorLink
    successor: SuccessorLink
    rendezvous: Rendezvous
    notices: Notices
    since: float
    has_served: bool = False
    lost: StageLost | None = None
    listens_at: str = ""
    other_addresses: Sequence[str] = ()
    place_note: str = ""
    _next_line_at: float = 0.0

    def start(self, now: float) -> None:
        self._next_line_at = now + timeouts.WAIT_LINE_INTERVAL_S

    def begin_again(self, lost: StageLost, now: float) -> None:
        """An open ring has fallen apart."""
        self.lost = lost
        self.since = now
        self._next_line_at = now + timeouts.WAIT_LINE_INTERVAL_S

    def describe(self) -> str:
        """Whom this stage waits for, for people."""
        return f"{self._describe_peer()}; {self.place_note}" if self.place_note else self._describe_peer()

    def _describe_peer(self) -> str:
        config = self.config
        if self.rendezvous.stands_by:
            return f"the end of the stage {config.stage} that has port {config.bind_port}: it stands by"
        if not self.predecessor.is_linked:
            return f"{self.predecessor} ({self.predecessor.why})"
        if self.successor.peer is None:
            place = self.listens_at or f"port {config.bind_port}"
            return f"stage {config.successor_stage} to connect to {place}"
        if config.is_head:
            return f"the stages between 1 and {config.num_stages - 1} to link to each other"
        return "the head to open the ring: some other stage is not linked yet"

    def _limit_s(self, now: float) -> float | None:
        """How long this stage waits for a whole ring, in seconds; None: as long as the process lives.

        A ring that has served waits for a stage without limit. The head refuses requests meanwhile (its own deadline)
        and serves again when the stage is back. If the head is gone, there is nothing to wait for.
        """
        if self.rendezvous.stands_by:
            return None
        if not self.has_served:
            return self.config.start_timeout_s
        # A failed step on the head does not mean that the head is gone.
        is_headless = self.lost is not None and self.lost.stage == 0 and self.lost.step < 0
        # The head greets and pings the tail, the tail its predecessor, and so on: no word from the successor for this
        # long means that no head is left behind it.
        is_quiet = self.successor.silent_s(now) >= self.config.recovery_timeout_s
        # Counted from the end of its link. The ring may have been broken long before, by the loss of another stage.
        is_gone = self.predecessor.unlinked_s(now) >= self.config.recovery_timeout_s
        is_headless |= is_quiet and (self.config.is_tail or is_gone)
        is_headless |= is_gone and self.config.predecessor_stage == 0
        return self.config.recovery_timeout_s if is_headless and not self.config.is_head else None

    def check_deadline(self, now: float) -> PeerError | None:
        """Why this stage cannot wait any longer."""
        limit_s = self._limit_s(now)
        if limit_s is None or now - self.since < limit_s:
            return None
        return PeerError(f"stage {self.config.stage} waited {limit_s:.0f} s for {self.describe()}")

    def say_line(self, now: float) -> list[Action]:
        """Every few seconds, whom this stage waits for."""
        if now < self._next_line_at:
            return []
        self._next_line_at = now + timeouts.WAIT_LINE_INTERVAL_S
        waited_s, limit_s = now - self.since, self._limit_s(now)
        how_long = f"{waited_s:.0f} s" if limit_s is None else f"{waited_s:.0f} of {limit_s:.0f} s"
        line = Log(f"Stage {self.config.stage}: waiting for {self.describe()}, {how_long}")
        return [line, *self._mention_addresses()]

    def _mention_addresses(self) -> list[Action]:
        """The successor may call an address that this stage does not listen on, and nothing of that arrives here."""
        if self.has_served or self.successor.peer is not None or not self.other_addresses:
            return []
        text = (
            f"Stage {self.config.stage}: listens on {self.listens_at} only. This machine also has "
            f"{', '.join(self.other_addresses)}: if stage {self.config.successor_stage} calls that, give this stage "
            "--pipeline-local-bind-host with it"
        )
        return self.notices.warn_once("addresses", text)
