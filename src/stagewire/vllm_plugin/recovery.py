"""What brings a ring back to where it was: the head's journal of calls, its live requests, and who is suspected.

A stage that comes back has its weights and nothing else. The head first replays the calls that made the others what
they are (`Journal`; a stage skips those that it has run, so they go to all alike), from the ring's own thread, because
they may take minutes. Then, from the scheduler, every stage forgets its requests and gets the live ones anew
(`restore_requests`): stages that were not lost are as stale, since they have run steps that never came back.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from stagewire.errors import StageLost
from stagewire.vllm_plugin.call_codec import CALLS

__all__ = [
    "PREPARE",
    "Entry",
    "Journal",
    "Loss",
    "Restored",
    "RingAccess",
    "Suspicion",
    "forget_requests",
    "live_requests",
    "restore_requests",
]

# The call that carries the journal. Stages know it from the others by its name (stage_host.py).
PREPARE = "prepare"

# (number of the call, method, arguments as bytes)
Entry = tuple[int, str, bytes]


class Journal:
    """The calls that a stage must have run to be like the others, oldest first. Used by two threads."""

    def __init__(self) -> None:
        self._entries: list[tuple[Entry, tuple[Any, ...]]] = []
        self._woken: set[str] = set()  # parts, since the last sleep
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Journal({[method for _, method, _ in self.entries()]})"

    def entries(self) -> list[Entry]:
        with self._lock:
            return [entry for entry, _ in self._entries]

    def add(self, call_id: int, method: str, args: tuple[Any, ...], args_bytes: bytes) -> None:
        """After it has succeeded on all stages. What undoes an earlier call takes it out."""
        with self._lock:
            match method:
                case "remove_lora":
                    self._drop_adapter(args[0])
                case "wake_up":
                    self._woken |= {"weights", "kv_cache"} if args[0] is None else set(args[0])
                    if self._woken >= {"weights", "kv_cache"}:
                        self._drop(("sleep", "discard", "wake_up"))
                        return
                case "sleep" | "discard":
                    self._woken.clear()
                case "pin_lora":  # in use it may have outlived adapters that were added later, but not in a replay
                    added = [each for each in self._entries if _adapter_of(each[0][1], each[1]) == args[0]]
                    self._entries = [each for each in self._entries if each not in added] + added
            if not CALLS[method].is_kept:
                return
            if CALLS[method].is_once:
                self._drop((method,))
            self._entries.append(((call_id, method, args_bytes), args))

    def _drop(self, methods: tuple[str, ...]) -> None:
        self._entries = [each for each in self._entries if each[0][1] not in methods]

    def _drop_adapter(self, lora_id: int) -> None:
        self._entries = [each for each in self._entries if _adapter_of(each[0][1], each[1]) != lora_id]

    def renumber_adapter(self, lora_id: int, first_id: int) -> int:
        """A call about this adapter was lost half-way: every stage runs its entries again. The next free number."""
        with self._lock:
            for index, ((_, method, data), args) in enumerate(self._entries):
                if _adapter_of(method, args) == lora_id:
                    self._entries[index] = ((first_id, method, data), args)
                    first_id += 1
        return first_id


def _adapter_of(method: str, args: tuple[Any, ...]) -> int | None:
    if method == "add_lora":
        return int(args[0].lora_int_id)
    return int(args[0]) if method == "pin_lora" else None


@dataclass(frozen=True)
class Loss:
    """What the scheduler learns of a broken ring: the requests of the step that failed, and of all that were lost."""

    error: StageLost
    failed: Sequence[str]
    in_flight: Sequence[str]


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


# ---- who is to blame -----------------------------------------------------------------------------------------------

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


# ---- on every stage ------------------------------------------------------------------------------------------------


def forget_requests(worker: Any) -> None:
    """Everything that vLLM's worker knows of requests goes, through its own code where it has any.

    Args:
        worker: vLLM's wrapper around it.
    """
    runner = worker.worker.model_runner
    runner.execute_model_state = None
    runner.kv_connector_output = None
    for name in ("_draft_token_ids", "_draft_probs", "_draft_prob_req_ids", "_draft_token_req_ids"):
        if hasattr(runner, name):
            setattr(runner, name, None)
    runner.mamba_state_idx.clear()
    worker.worker._pp_send_work = []
    batch = getattr(runner, "input_batch", None)  # there is none before the KV cache is
    if batch is None:
        return
    batch.prev_sampled_token_ids = None
    batch.prev_req_id_to_index = None
    runner.encoder_cache.clear()
    schedule = SchedulerOutput.make_empty()
    schedule.finished_req_ids = set(runner.requests)
    worker.execute_model(schedule)


def restore_requests(worker: Any, schedule: SchedulerOutput, outputs: Sequence[Sequence[int]]) -> None:
    """Builds the state of ``schedule.scheduled_new_reqs``, which were running once, by vLLM's own code.

    Args:
        worker: vLLM's wrapper around it; has forgotten these requests.
        schedule: without tokens; at most ``max_num_seqs`` requests.
        outputs: the tokens that each has got so far, in the same order.
    """
    if not schedule.scheduled_new_reqs:
        return
    runner = worker.worker.model_runner
    worker.execute_model(schedule)
    worker.execute_model(SchedulerOutput.make_empty())  # out of the batch again: none of them runs yet
    for request, accepted in zip(schedule.scheduled_new_reqs, outputs, strict=True):
        state = runner.requests[request.req_id]
        state.output_token_ids[:] = accepted
        if accepted:  # its prompt's log-probabilities were delivered with the first of them
            runner.num_prompt_logprobs.pop(request.req_id, None)
        if state.generator is not None:
            _fast_forward(state.generator, len(accepted), runner)


def _fast_forward(generator: torch.Generator, num_tokens: int, runner: Any) -> None:
    """As many draws as the sampler made for ``num_tokens`` tokens (v1/sample/ops/topk_topp_sampler.py)."""
    if generator.device.type != "cpu":
        # vLLM itself takes one token's draw back by this many. Not run on a GPU.
        generator.set_offset(generator.get_offset() + 4 * num_tokens)
        return
    vocab_size, wants_fp64 = runner.input_batch.vocab_size, runner.model_config.use_fp64_gumbel
    for _ in range(num_tokens):
        if wants_fp64:
            torch.empty(vocab_size, dtype=torch.float64).exponential_(generator=generator)
        else:
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
