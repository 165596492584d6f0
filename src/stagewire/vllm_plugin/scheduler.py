"""vLLM's scheduler with micro-batches of equal size.

Stock vLLM schedules every request that can run, so with several steps in flight the first takes all of them and the
others run empty or lopsided (14 and 50 of 64 was seen). This subclass holds the surplus back for one step through
`Request.next_decode_eligible_step`, which vLLM's own loop honours: nothing is hidden from `running`, and admission,
preemption and prefix caching stay vLLM's.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

__all__ = ["RingScheduler"]


class _Everything(set[str]):
    """Contains whatever is asked for."""

    def __contains__(self, item: object) -> bool:
        return True


class RingScheduler(Scheduler):
    """See the module. One micro-batch in flight per stage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_stages = self.vllm_config.parallel_config.pipeline_parallel_size

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._hold_back_surplus()
        return super().schedule(throttle_prefills)

    def _hold_back_surplus(self) -> None:
        """Lets at most a fair share of the decoding requests into this step; the rest is eligible for the next.

        A request in flight has computed all its tokens, so vLLM skips it by itself: only those that are ready count.
        """
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        share = -(-len(decoding) // self._num_stages)
        ready = [request for request in decoding if request.num_tokens_with_spec > request.num_computed_tokens]
        next_step = self.current_step + 2  # `super().schedule()` counts up first
        for request in ready[share:]:
            request.next_decode_eligible_step = next_step

    def _make_cached_request_data(self, *args: Any, **kwargs: Any) -> CachedRequestData:
        """Without copies of whole histories: V1 workers read them only under async scheduling, which is off.

        vLLM copies the tokens of every request that the previous step did not hold; with micro-batches that is all of
        them, every step.
        """
        scheduler: Any = self
        previous = scheduler.prev_step_scheduled_req_ids
        scheduler.prev_step_scheduled_req_ids = _Everything()
        try:
            return super()._make_cached_request_data(*args, **kwargs)
        finally:
            scheduler.prev_step_scheduled_req_ids = previous
