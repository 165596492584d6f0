"""Which requests may be what stages fail of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm.v1.request import Request

from stagewire.errors import StageLost

__all__ = ["Loss", "Suspicion"]


@dataclass(frozen=True)
class Loss:
    """What the scheduler learns of a broken ring: the requests of the step that failed, and of all that were lost."""

    error: StageLost
    failed: Sequence[str]
    in_flight: Sequence[str]


# Of a request alone in the step that failed, or in flight when a stage died: a stage does not say what it died of, and
# may have been killed by somebody else, who kills one and then another. The last death that counts here must come
# before the one at which a launcher gives up (launch/supervisor.py): MAX_DEATHS_ALONE + SUSPICIOUS_DEATHS at most.
MAX_FAILED_STEPS = 2

MAX_DEATHS = 5

MAX_DEATHS_ALONE = 4

# A stage may die for any reason; that a request was in flight twice, without a token in between, is suspicious.
SUSPICIOUS_DEATHS = 2


@dataclass
class _Record:
    num_tokens: int  # that it had at the last loss
    failed: int = 0
    deaths: int = 0
    deaths_alone: int = 0  # the last ones of those, of the same stage, with no other request in flight
    stage: int = 0


@dataclass
class Suspicion:
    """Which requests may be what stages fail of. They run one by one, so that only the one that is to blame is failed.

    A suspect is cleared by its next token. Forgotten with the request.
    """

    _records: dict[str, _Record] = field(default_factory=dict)
    _suspects: dict[str, None] = field(default_factory=dict)  # in order

    def __repr__(self) -> str:
        return f"Suspicion({list(self._suspects)})"

    def note(self, loss: Loss, requests: Mapping[str, Request]) -> list[str]:
        """The requests that must not run again because of this loss."""
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
        """The one that runs alone now; None: there is none, and all may run."""
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
