"""vLLM's scheduler with micro-batches of equal size, and drafts that arrive with a step's result.

Stock vLLM schedules every request that can run. With several steps in flight the first step takes all of them, and the
others run empty or lopsided (14 and 50 of 64 requests were measured). This subclass holds the surplus back for one step
through `Request.next_decode_eligible_step`, which vLLM's own loop honours. Nothing is hidden from `running`, and
preemption and prefix caching stay vLLM's. Prompts that wait together are shared out in the same way, by their tokens
and uncut, so that the later stages begin with the first prompts while the head runs the next.

While the ring is not whole it schedules nothing and hardly waits, so that aborts, calls and a stop go on working. After
a loss it preempts every request by vLLM's own forced preemption, and lets the lost steps drain as stale. Once the ring
is whole again, all stages forget their requests and get the live ones anew. What they compute then is ordinary prefill.

With LoRA it also limits each step to ``max_loras`` adapters. vLLM admits a request when the current step has room for
its adapter, and assumes that every step holds all running requests. With several steps in flight that is not so, and an
assertion of vLLM ends the engine when a later step gets too many adapters.

It knows the ring through `RingAccess` only.
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

# While no request can run, EngineCore asks again after a millisecond. That takes half a core from a stage that restarts
# on this host.
_PAUSE_S = 0.02
# A step of fewer tokens takes hardly less time, because it reads the same weights. Smaller shares would gain nothing.
_LEAST_TOKENS_ON_CPU = 64
_LEAST_TOKENS_ELSEWHERE = 512
# The attribute with which vLLM compares the number of running requests before it admits one.
_ADMISSION_LIMIT = "max_num_active_reqs" if is_at_least(0, 31) else "max_num_running_reqs"


class RingScheduler(Scheduler):
    """See the module. One micro-batch for each stage is in flight."""

    waiting: RequestQueue
    finished_req_ids: set[str]

    def __init__(self, *args: Any, ring: RingAccess, **kwargs: Any) -> None:
        """``ring``: the executor, which exists before the scheduler. The other arguments are vLLM's."""
        super().__init__(*args, **kwargs)
        self._num_stages = self.vllm_config.parallel_config.pipeline_parallel_size
        self._least_tokens = _LEAST_TOKENS_ON_CPU if current_platform.is_cpu() else _LEAST_TOKENS_ELSEWHERE
        self._last_steps: dict[str, int] = {}  # request id to the last step with it; with LoRA only
        self._ring = ring
        self._restored_epoch = ring.epoch
        self._suspicion = Suspicion()
        self._ended: list[Request] = []  # ended by a loss; their clients are still to be told
        ring.take_losses()  # those before the first request do not count

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
        """How many requests are active after this step, if a fair share of the prompts' tokens is admitted.

        The share is rounded to whole prompts. Prompts in flight count, or each share would be smaller than the one
        before. Prompts that fill the steps of all stages anyway need no sharing. While a stage drains, only requests
        that the stages know already are admitted, because the stage waits for their end.
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
        """vLLM's own. The stages are not told if all requests are ended while the ring is broken.

        They forget all requests anyway, and a head that is told to stop would wait for a whole ring to tell them.
        """
        finished = super().finish_requests(request_ids, finished_status)
        if request_ids is None and not self._ring.is_whole:
            self.finished_req_ids = set()
        return finished

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """vLLM's own, then takes the drafts for the next step of the same requests.

        Drops the drafts of a request that was preempted meanwhile: it computes from its beginning again.
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
        """Preempts all requests and resets the caches: the stages' KV blocks no longer count."""
        losses = self._ring.take_losses()
        if not losses:
            return
        for loss in losses:
            # vLLM fails the requests of this set with the next output, as when a grammar cannot be compiled.
            failed = self._suspicion.note(loss, self.requests)
            for req_id in failed:
                logger.error("Stage 0: request %s is given up, stages fail of it: %s", req_id, loss.error)
            # Since vLLM 0.33 it is a dict, with the error for the client.
            self.grammar_compile_error_reqs.update(dict.fromkeys(failed) if is_at_least(0, 33) else failed)
        # Sessions between two inputs hold blocks, whether or not the next input has come. The reset does not preempt
        # them.
        sessions = [
            r.request_id
            for r in self.requests.values()
            if r.status == RequestStatus.WAITING_FOR_STREAMING_REQ or _is_session_with_input(r)
        ]
        self._ended += self.finish_requests(sessions, RequestStatus.FINISHED_ERROR)
        for request in self.requests.values():
            if request.num_stale_output_tokens > 0:
                # It was preempted earlier with a step in flight, whose output will not come any more.
                request.drop_stale_output = True
        self.reset_prefix_cache(reset_running_requests=True)
        self.reset_encoder_cache()

    def _make_room(self, suspect: Request) -> None:
        """Preempts the other running requests, which are held back but keep their KV blocks.

        vLLM itself preempts no request to admit a prompt.
        """
        for request in reversed([each for each in self.running if each is not suspect]):
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())

    @contextmanager
    def _only(self, suspect: Request) -> Iterator[None]:
        """Inside this context vLLM can schedule ``suspect`` alone.

        The loss has preempted all requests, so those in `running` are earlier suspects. The others are in `waiting`.
        """
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
        """Whether the ring is whole and its stages know the live requests. Restores them once in each epoch."""
        if self._ring.is_whole and self._ring.epoch != self._restored_epoch:
            epoch = self._ring.epoch
            groups = len(self.kv_cache_config.kv_cache_groups)
            if self._ring.restore(live_requests(self.requests, groups)):
                self._restored_epoch = epoch
            self._note_losses()
        return self._ring.is_whole and self._ring.epoch == self._restored_epoch

    def _hold_back_adapters(self, max_loras: int) -> None:
        """Chooses the ``max_loras`` adapters of the requests that have waited longest, and holds back all others.

        It goes by requests and not by adapters, because one adapter may have requests in several micro-batches.
        """
        self._last_steps = {each: step for each, step in self._last_steps.items() if each in self.requests}
        ready = [request for request in self.running if self._is_ready(request) and _adapter(request)]
        ready.sort(key=lambda request: self._last_steps.get(request.request_id, 0))
        chosen = list(dict.fromkeys(map(_adapter, ready)))[:max_loras]
        for request in ready:
            if _adapter(request) not in chosen:
                request.next_decode_eligible_step = self._next_step

    def _hold_back_surplus(self) -> None:
        """Lets at most a fair share of the decoding requests into this step. The others are eligible for the next.

        vLLM skips requests that are not ready by itself.
        """
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        share = -(-len(decoding) // self._num_stages)
        ready = [request for request in decoding if self._is_ready(request)]
        for request in ready[share:]:
            request.next_decode_eligible_step = self._next_step

    @property
    def _next_step(self) -> int:
        """The number of the step after the one to be scheduled now; `super().schedule()` counts up first."""
        return int(self.current_step) + 2

    def _is_ready(self, request: Request) -> bool:
        """Whether it is neither held back nor in flight. A request in flight has no token left to compute."""
        has_work: bool = request.num_tokens_with_spec > request.num_computed_tokens
        return has_work and request.next_decode_eligible_step < self._next_step

    def _make_cached_request_data(self, *args: Any, **kwargs: Any) -> CachedRequestData:
        """vLLM's own without copies of whole histories, and with speculation the tokens that the last step accepted.

        vLLM copies the tokens of every request that the previous step did not hold. With micro-batches these are all
        requests in every step. V1 workers read the copies only under async scheduling, which is off.
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
    """Whether it is a session whose next input has come, and whose earlier inputs are computed."""
    return bool(request.status == RequestStatus.WAITING and request.num_computed_tokens)


def _is_known(request: Request) -> bool:
    """Whether the stages know this waiting request."""
    return request.status == RequestStatus.PREEMPTED or _is_session_with_input(request)


def _adapter(request: Request) -> int:
    """The number of its LoRA adapter; 0 for the base model."""
    return int(request.lora_request.lora_int_id) if request.lora_request else 0
