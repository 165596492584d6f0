"""Which requests may be the cause of stages' failures. Knows neither the ring nor the scheduler's queues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm.v1.request import Request

from stagewire.errors import StageLost

__all__ = ["Loss", "Suspicion"]


@dataclass(frozen=True)
class Loss:
    """What the scheduler learns of a broken ring.

    Args:
        error: which stage was lost, or failed a step, and why.
        failed: ids of the requests in the step that failed or is overdue; empty if none is.
        in_flight: ids of the requests in all steps that were lost.
    """

    error: StageLost
    failed: Sequence[str]
    in_flight: Sequence[str]


# A request is failed when this many steps with it have failed, and it was alone in the last of them.
MAX_FAILED_STEPS = 2

# A request is failed when it was in flight at MAX_DEATHS deaths of stages, and alone at MAX_DEATHS_ALONE of one stage.
# A dead stage does not say why it died: somebody may have killed it, and then another. A launcher must not give up
# before that: MAX_DEATHS_ALONE + SUSPICIOUS_DEATHS is at most its DEFAULT_MAX_RESTARTS (launch/restarts.py).
MAX_DEATHS = 5

MAX_DEATHS_ALONE = 4

# A stage may die once for any reason. A request in flight at two deaths, without a token in between, is suspicious.
SUSPICIOUS_DEATHS = 2


@dataclass
class _Record:
    num_tokens: int  # output tokens that it had at the last loss
    failed: int = 0
    deaths: int = 0
    deaths_alone: int = 0  # of those, with no other request in flight; begins again when another stage dies
    stage: int = 0  # that died then


@dataclass
class Suspicion:
    """Which requests may be the cause of failures. They run one by one, so that only the cause itself is failed.

    The next token of a suspect clears it. A request that has ended is forgotten.
    """

    _records: dict[str, _Record] = field(default_factory=dict)
    _suspects: dict[str, None] = field(default_factory=dict)  # in order

    def __repr__(self) -> str:
        return f"Suspicion({list(self._suspects)})"

    def note(self, loss: Loss, requests: Mapping[str, Request]) -> list[str]:
        """Records a loss. Returns the ids of the requests that must not run again because of it.

        ``requests``: all of the scheduler, by id.
        """
        self._forget(requests)
        present = [req_id for req_id in loss.failed or loss.in_flight if req_id in requests]
        condemned = []
        for req_id in dict.fromkeys(present):
            num_tokens = requests[req_id].num_output_tokens
            record = self._records.setdefault(req_id, _Record(num_tokens))
            if record.num_tokens != num_tokens:
                self._records[req_id] = record = _Record(num_tokens)
            if loss.failed:
                record.failed += 1
            else:
                record.deaths += 1
                if len(present) == 1:
                    record.deaths_alone = record.deaths_alone + 1 if record.stage == loss.error.stage else 1
                    record.stage = loss.error.stage
            if record.failed or record.deaths >= SUSPICIOUS_DEATHS:
                self._suspects[req_id] = None
            has_killed = record.deaths >= MAX_DEATHS and record.deaths_alone >= MAX_DEATHS_ALONE
            if len(present) == 1 and (record.failed >= MAX_FAILED_STEPS or has_killed):
                condemned.append(req_id)
        return condemned

    def next_suspect(self, requests: Mapping[str, Request]) -> str | None:
        """The id of the suspect that runs alone now. None: there is none, and all requests may run."""
        self._forget(requests)
        for req_id in list(self._suspects):
            if requests[req_id].num_output_tokens == self._records[req_id].num_tokens:
                return req_id
            del self._suspects[req_id]
        return None

    def _forget(self, requests: Mapping[str, Request]) -> None:
        for known in (self._records, self._suspects):
            for req_id in [req_id for req_id in known if req_id not in requests]:
                del known[req_id]
