"""The live requests as every stage gets them after a loss, and the ring as the scheduler sees it.

The scheduler uses the ring through `RingAccess` only, and does not import the executor.
"""

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
    """One live request as every stage needs it: as a new one, and with the tokens that it has got so far."""

    request: NewRequestData
    output_token_ids: list[int]


class RingAccess(Protocol):
    """The ring as the scheduler sees it. Only the thread that runs the head's model and its scheduler calls it.

    ``epoch`` is the ring's last whole one. ``is_whole``: whether steps can be sent.
    """

    epoch: int
    is_whole: bool

    @property
    def is_draining(self) -> bool:
        """Whether a stage drains: it leaves once the requests that it knows have ended, so no more are admitted."""

    def poll(self, pause_s: float = 0.0) -> None:
        """Takes in what has happened since the last call. In a broken ring it waits up to ``pause_s`` for news."""

    def take_losses(self) -> list[Loss]:
        """The losses since the last call, oldest first."""

    def restore(self, requests: Sequence[Restored]) -> bool:
        """Makes all stages forget their requests and take these. False: the ring broke again meanwhile."""


def live_requests(requests: dict[str, Request], num_groups: int) -> list[Restored]:
    """The requests that stages must know: those that were scheduled before the loss, which has preempted them.

    Args:
        requests: all of the scheduler, by id.
        num_groups: how many KV cache groups there are; a restored request has no block in any.
    """
    return [
        Restored(
            NewRequestData.from_request(request, tuple([] for _ in range(num_groups))), list(request.output_token_ids)
        )
        for request in requests.values()
        if request.status == RequestStatus.PREEMPTED
    ]
