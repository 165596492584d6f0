"""vLLM's scheduler with micro-batches of equal size, and drafts that arrive with a step's result.

Stock vLLM schedules every request that can run, so with several steps in flight the first takes all of them and the
others run empty or lopsided (14 and 50 of 64 was seen). This subclass holds the surplus back for one step through
`Request.next_decode_eligible_step`, which vLLM's own loop honours: nothing is hidden from `running`, and preemption and
prefix caching stay vLLM's. Prompts that wait together are shared out in the same way, by their tokens and uncut: the
later stages then begin with the first of them while the head runs the next.

While the ring is not whole it schedules nothing, and hardly waits: aborts, calls and a stop go on working. After a
loss it takes every request off its stages by vLLM's own forced preemption, lets the lost steps drain as stale, and once
the ring is whole again has all stages forget and get the live requests anew. What they compute then is ordinary
prefill.

With LoRA it also keeps each step's adapters to ``max_loras``. vLLM admits a request when the step at hand has room for
its adapter, and takes for granted that every step holds all running requests; with several steps in flight it does not,
and vLLM's own assertion ends the engine as soon as too many meet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from stagewire.vllm_plugin.codec.speculative import DraftingOutput
from stagewire.vllm_plugin.head.live_requests import RingAccess, live_requests
from stagewire.vllm_plugin.head.suspects import Suspicion
from stagewire.vllm_plugin.seams.versions import is_at_least
from stagewire.vllm_plugin.worker.speculation import only_of, with_accepted

__all__ = ["RingScheduler"]

logger = logging.getLogger("vllm.stagewire")

# With requests that cannot run EngineCore asks again after a millisecond, and so takes half a core from a stage of this
# host that is to come back.
_PAUSE_S = 0.02
# A step of fewer tokens takes hardly less time: it reads the same weights. Prompts are not shared out below that.
_LEAST_TOKENS_ON_CPU = 64
_LEAST_TOKENS_ELSEWHERE = 512
# What vLLM compares the number of running requests with before it admits one.
_ADMISSION_LIMIT = "max_num_active_reqs" if is_at_least(0, 31) else "max_num_running_reqs"


class RingScheduler(Scheduler):
    """See the module. One micro-batch in flight per stage."""

    waiting: RequestQueue
    finished_req_ids: set[str]

    def __init__(self, *args: Any, ring: RingAccess, **kwargs: Any) -> None:
        """``ring``: of the executor, which is made before the scheduler; the rest is vLLM's."""
        super().__init__(*args, **kwargs)
        self._num_stages = self.vllm_config.parallel_config.pipeline_parallel_size
        self._least_tokens = _LEAST_TOKENS_ON_CPU if current_platform.is_cpu() else _LEAST_TOKENS_ELSEWHERE
        self._last_steps: dict[str, int] = {}  # of each request, with LoRA
        self._ring = ring
        self._restored_epoch = ring.epoch
        self._suspicion = Suspicion()
        self._ended: list[Request] = []  # by a loss; their clients are to hear of it
        ring.take_losses()  # of the start: nothing was scheduled

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._ring.poll(_PAUSE_S)
        self._note_losses()
        if not self._is_restored():
            return SchedulerOutput.make_empty()
        suspect = self._suspicion.next_suspect(self.requests)
        if suspect is None:
            return self._schedule_all(throttle_prefills)
        with self._only(self.requests[suspect]):
            schedule = super().schedule(throttle_prefills)
        if not any(request.num_in_flight_tokens for request in self.requests.values()):
            self._make_room(self.requests[suspect])
        return schedule

    def _schedule_all(self, throttle_prefills: bool) -> SchedulerOutput:
        if self.lora_config is not None:
            self._hold_back_adapters(self.lora_config.max_loras)
        self._hold_back_surplus()
        limit = getattr(self, _ADMISSION_LIMIT)
        setattr(self, _ADMISSION_LIMIT, min(limit, self._active_with_share()))
        try:
            schedule = super().schedule(throttle_prefills)
        finally:
            setattr(self, _ADMISSION_LIMIT, limit)
        if self.lora_config is not None:
            self._last_steps.update(dict.fromkeys(schedule.num_scheduled_tokens, self.current_step))
        return schedule

    def _active_with_share(self) -> int:
        """Active requests after this step, if a fair share of the prompts' tokens is admitted, to the nearest prompt.

        Prompts in flight count, or each share would be smaller than the one before. What fills all stages' steps
        anyway is left to vLLM. While a stage drains only those are admitted that the stages know already: it waits for
        their end.
        """
        num_active: int = len(self.running) + self.num_waiting_for_streaming_input
        if self._ring.is_draining:
            return num_active + sum(_is_known(request) for request in self.waiting)
        sizes: list[int] = []
        total = sum(request.num_prompt_tokens for request in self.running if not request.num_output_tokens)
        enough = self._num_stages * self.max_num_scheduled_tokens
        for request in self.waiting:
            sizes.append(request.num_tokens - request.num_computed_tokens)
            total += sizes[-1]
            if total >= enough:
                break
        share = max(-(-total // self._num_stages), self._least_tokens)
        admitted, tokens = 0, 0
        while admitted < len(sizes) and (not admitted or tokens + sizes[admitted] / 2 <= share):
            tokens += sizes[admitted]
            admitted += 1
        return num_active + max(admitted, 1)

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> Any:
        """vLLM's own. When all are ended in a broken ring, its stages need not be told: they forget everything anyway.
        A head that is told to stop would wait for it.
        """
        finished = super().finish_requests(request_ids, finished_status)
        if request_ids is None and not self._ring.is_whole:
            self.finished_req_ids = set()
        return finished

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """vLLM's own, then the drafts for the next step of the same requests.

        Not those of a request that was preempted meanwhile: it computes from its beginning again.
        """
        followed = [
            req_id
            for req_id in scheduler_output.num_scheduled_tokens
            if (request := self.requests.get(req_id)) is not None and request.num_stale_output_tokens == 0
        ]
        self._note_losses()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if isinstance(model_runner_output, DraftingOutput) and model_runner_output.draft_token_ids is not None:
            self.update_draft_token_ids(only_of(model_runner_output.draft_token_ids, followed))
        for request in self._ended:
            group = outputs.setdefault(request.client_index, EngineCoreOutputs())
            group.outputs.append(
                EngineCoreOutput(request.request_id, new_token_ids=[], finish_reason=request.get_finished_reason())
            )
        self._ended.clear()
        return outputs

    # ---- after a loss ----------------------------------------------------------------------------------------------

    def _note_losses(self) -> None:
        """Nothing that was computed on the stages counts any more, nor does the prefix cache: their blocks are gone."""
        losses = self._ring.take_losses()
        if not losses:
            return
        for loss in losses:
            # vLLM fails these alone, with the next output, as it does when a grammar cannot be compiled.
            failed = self._suspicion.note(loss, self.requests)
            for req_id in failed:
                logger.error("Stage 0: request %s is given up, stages fail of it: %s", req_id, loss.error)
            # Since vLLM 0.33 a dict, with the error that the client is to see.
            self.grammar_compile_error_reqs.update(dict.fromkeys(failed) if is_at_least(0, 33) else failed)
        # Sessions between two inputs hold blocks, whether the next input has come or not.
        sessions = [
            r.request_id
            for r in self.requests.values()
            if r.status == RequestStatus.WAITING_FOR_STREAMING_REQ or _is_session_with_input(r)
        ]
        self._ended += self.finish_requests(sessions, RequestStatus.FINISHED_ERROR)
        for request in self.requests.values():
            if request.num_stale_output_tokens > 0:
                # Preempted before, with a step in flight whose output was still to be delivered: it will not come.
                request.drop_stale_output = True
        self.reset_prefix_cache(reset_running_requests=True)
        self.reset_encoder_cache()

    def _make_room(self, suspect: Request) -> None:
        """It did not fit beside those that are held back with their blocks, and vLLM preempts nobody for a prompt."""
        for request in reversed([each for each in self.running if each is not suspect]):
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())

    @contextmanager
    def _only(self, suspect: Request) -> Iterator[None]:
        """Nobody else is scheduled meanwhile. The others wait: since the loss none runs but who was a suspect too."""
        for request in self.running:
            if request is not suspect:
                request.next_decode_eligible_step = self._next_step
        everybody, self.waiting = self.waiting, create_request_queue(self.policy)
        if suspect in everybody:
            everybody.remove_request(suspect)
            self.waiting.add_request(suspect)
        try:
            yield
        finally:
            for request in reversed(list(self.waiting)):
                everybody.prepend_request(request)
            self.waiting = everybody

    def _is_restored(self) -> bool:
        """Whether the ring is whole and its stages know what this scheduler knows."""
        if self._ring.is_whole and self._ring.epoch != self._restored_epoch:
            epoch = self._ring.epoch
            groups = len(self.kv_cache_config.kv_cache_groups)
            if self._ring.restore(live_requests(self.requests, groups)):
                self._restored_epoch = epoch
            self._note_losses()
        return self._ring.is_whole and self._ring.epoch == self._restored_epoch

    def _hold_back_adapters(self, max_loras: int) -> None:
        """Lets the requests in that have waited longest and, of the others that are ready, those with their adapters.

        By request, not by adapter: one adapter may have requests in several micro-batches.
        """
        self._last_steps = {each: step for each, step in self._last_steps.items() if each in self.requests}
        ready = [request for request in self.running if self._is_ready(request) and _adapter(request)]
        ready.sort(key=lambda request: self._last_steps.get(request.request_id, 0))
        chosen = list(dict.fromkeys(map(_adapter, ready)))[:max_loras]
        for request in ready:
            if _adapter(request) not in chosen:
                request.next_decode_eligible_step = self._next_step

    def _hold_back_surplus(self) -> None:
        """Lets at most a fair share of the decoding requests into this step; the rest is eligible for the next.

        Only those that are ready count; vLLM skips the others by itself.
        """
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        share = -(-len(decoding) // self._num_stages)
        ready = [request for request in decoding if self._is_ready(request)]
        for request in ready[share:]:
            request.next_decode_eligible_step = self._next_step

    @property
    def _next_step(self) -> int:
        """The one after the step that is about to be scheduled: `super().schedule()` counts up first."""
        return int(self.current_step) + 2

    def _is_ready(self, request: Request) -> bool:
        """Not held back, and not in flight: then it has computed all its tokens."""
        has_work: bool = request.num_tokens_with_spec > request.num_computed_tokens
        return has_work and request.next_decode_eligible_step < self._next_step

    def _make_cached_request_data(self, *args: Any, **kwargs: Any) -> CachedRequestData:
        """Without copies of whole histories: V1 workers read them only under async scheduling, which is off. With
        speculation, also the tokens that the last step accepted.

        vLLM copies the tokens of every request that the previous step did not hold; with micro-batches that is all of
        them, every step.
        """
        scheduler: Any = self
        previous = scheduler.prev_step_scheduled_req_ids
        scheduler.prev_step_scheduled_req_ids = set(self.requests)
        try:
            cached = super()._make_cached_request_data(*args, **kwargs)
        finally:
            scheduler.prev_step_scheduled_req_ids = previous
        return with_accepted(cached, self.requests, self.num_spec_tokens) if self.num_spec_tokens else cached


def _is_session_with_input(request: Request) -> bool:
    """A session whose next input has come; its earlier ones are computed."""
    return bool(request.status == RequestStatus.WAITING and request.num_computed_tokens)


def _is_known(request: Request) -> bool:
    """Whether the stages know this request, which waits."""
    return request.status == RequestStatus.PREEMPTED or _is_session_with_input(request)


def _adapter(request: Request) -> int:
    """Its number; 0 stands for the base model."""
    return int(request.lora_request.lora_int_id) if request.lora_request else 0
