"""The live requests as every stage gets them after a loss, and the ring as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import Request, RequestStatus

from stagewire.vllm_plugin.head.suspects import Loss

__all__ = ["Restored", "RingAccess", "live_requests"]


@dataclass(frozen=True)
class Restored:
    """One live request as every stage needs it: as if new, and the tokens that it has got so far."""

    request: NewRequestData
    output_token_ids: list[int]


class RingAccess(Protocol):
    """The ring as the scheduler sees it; the executor's model thread is the scheduler's."""

    epoch: int
    is_whole: bool

    @property
    def is_draining(self) -> bool:
        """Whether a stage is to leave when those that it knows have ended: no more are let in."""

    def poll(self, pause_s: float = 0.0) -> None:
        """Takes in what has happened since; in a broken ring it waits ``pause_s`` for something to happen."""

    def take_losses(self) -> list[Loss]:
        """Those that were not taken yet."""

    def restore(self, requests: Sequence[Restored]) -> bool:
        """All stages forget their requests and get these. False: the ring broke again meanwhile."""


def live_requests(requests: dict[str, Request], num_groups: int) -> list[Restored]:
    """Those that stages must know: all that have been scheduled, which the reset has preempted."""
    return [
        Restored(
            NewRequestData.from_request(request, tuple([] for _ in range(num_groups))), list(request.output_token_ids)
        )
        for request in requests.values()
        if request.status == RequestStatus.PREEMPTED
    ]
