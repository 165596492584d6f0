"""A worker stage: `vllm serve ... --external-pp-worker`. No HTTP, no scheduler; it runs what the head decides.

The main thread runs the model (OpenMP's threads belong to it); the ring's thread owns the sockets.
"""

from __future__ import annotations

import queue
import signal
import time
from typing import Any

from stagewire.config import StageConfig
from stagewire.errors import PeerError
from stagewire.observe.status import StatusSender
from stagewire.ring.node import Delivery
from stagewire.vllm_plugin.process import RingProcess
from stagewire.vllm_plugin.stage_ranks import StageRanks
from stagewire.vllm_plugin.step_codec import decode_schedule, encode_output
from stagewire.wire.codec import Frame
from stagewire.wire.messages import Call, CallResult, Reply, Result, Sample, StageTiming, Step

__all__ = ["serve_stage"]


def serve_stage(config: StageConfig, vllm_config: Any, status: StatusSender) -> None:
    """Loads the stage and serves the ring until the head stops it. Ends the process itself when the ring fails."""
    ranks = StageRanks(config, vllm_config)
    process = RingProcess(config, vllm_config, ranks, status)
    signal.signal(signal.SIGTERM, lambda *_: process.ring.node.request_stop(f"stage {config.stage} was told to stop"))
    signal.signal(signal.SIGINT, lambda *_: process.ring.node.request_stop(f"stage {config.stage} was interrupted"))
    process.start()
    try:
        ranks.load()
        process.mark_loaded(lambda: len(ranks.own.runner.requests))
        _StageHost(process, ranks).run()
    except Exception as error:
        process.fail_from(error)
        raise


class _StageHost:
    def __init__(self, process: RingProcess, ranks: StageRanks) -> None:
        self._process = process
        self._ring = process.ring
        self._ranks = ranks
        self._config = ranks.config
        self._call_results: dict[int, tuple[list[CallResult], list[Frame]]] = {}
        self._unsampled: tuple[Step, StageTiming] | None = None

    def run(self) -> None:
        while True:
            try:
                delivery = self._ring.receive(60.0)
            except queue.Empty:
                continue  # idle; a dead predecessor is the ring's business
            if delivery is None:
                self._ranks.shutdown()
                return
            self._handle(delivery)

    def _handle(self, delivery: Delivery) -> None:
        match delivery.message:
            case Step() as step:
                self._run_step(step, delivery)
            case Sample() as sample:
                self._sample(sample, delivery.payloads)
            case Call() as call:
                self._run_call(call, delivery.payloads[0])
            case Reply() as reply:
                self._pass_reply(reply, list(delivery.payloads))
            case other:
                raise PeerError(f"stage {self._config.stage} received a {type(other).__name__}, which is for the head")

    # ---- steps -----------------------------------------------------------------------------------------------------

    def _run_step(self, step: Step, delivery: Delivery) -> None:
        schedule_bytes, *frames = delivery.payloads
        schedule = decode_schedule(schedule_bytes, self._ranks.own.adapters.known)
        if schedule.total_num_scheduled_tokens != step.num_tokens:
            raise PeerError(f"step {step.step}: {step.num_tokens} tokens in the header, another number in the schedule")
        started_ns = time.monotonic_ns()
        activations = self._ranks.execute(schedule, schedule_bytes, step.digest, step.tensors, frames)
        self._process.last_step = step.step
        timing = StageTiming(
            self._config.stage, delivery.received_ns, started_ns, time.monotonic_ns(), 0, self._ring.hop_ns
        )
        if not self._config.is_tail:
            timings = [*step.timings, _sent(timing)]
            specs, out = (activations.specs, activations.frames) if activations else ([], [])
            message = Step(0, step.step, step.num_tokens, step.digest, step.waits_for_sample, specs, timings)
            self._ring.send(message, [schedule_bytes, *out])
        elif step.num_tokens and not step.waits_for_sample:
            self._answer(step, timing, None)
        elif step.num_tokens:
            self._unsampled = (step, timing)

    def _sample(self, sample: Sample, payloads: Any) -> None:
        if not self._config.is_tail:
            self._ring.send(Sample(0, sample.step), payloads)
            return
        if self._unsampled is None or self._unsampled[0].step != sample.step:
            raise PeerError(f"a Sample for step {sample.step}, which this stage has not just run")
        step, timing = self._unsampled
        self._unsampled = None
        self._answer(step, timing, payloads[0] if payloads else None)

    def _answer(self, step: Step, timing: StageTiming, grammar: Frame | None) -> None:
        output = self._ranks.answer(grammar)
        finished = StageTiming(
            timing.stage, timing.received_ns, timing.started_ns, time.monotonic_ns(), 0, timing.hop_ns
        )
        payload = encode_output(output, self._ranks.own.take_drafts())
        self._ring.send(Result(0, step.step, [*step.timings, _sent(finished)]), [payload])

    # ---- calls -----------------------------------------------------------------------------------------------------

    def _run_call(self, call: Call, args_bytes: Frame) -> None:
        """The ring's thread has passed the call on already; a failure is a result, not the end of the stage."""
        first_rank = sum(earlier.tensor_parallel for earlier in self._ring.identities)
        results, payloads = self._ranks.call(call.method, args_bytes, first_rank)
        has_failed = any(result.error_type for result in results)
        if call.method == "initialize_from_config" and not has_failed:
            self._process.report_kv_cache(self._ranks.vllm_config.cache_config.num_gpu_blocks or 0)
        if call.method == "compile_or_warm_up_model" and not has_failed:
            self._process.mark_ready()
        if self._config.stage == 1:
            self._ring.send(Reply(0, call.call_id, results), payloads)
        else:
            self._call_results[call.call_id] = (results, payloads)

    def _pass_reply(self, reply: Reply, payloads: list[Frame]) -> None:
        own = self._call_results.pop(reply.call_id, None)
        if own is None:
            raise PeerError(f"a reply to call {reply.call_id}, which this stage has not run")
        own_results, own_payloads = own
        self._ring.send(Reply(0, reply.call_id, [*reply.results, *own_results]), [*payloads, *own_payloads])


def _sent(timing: StageTiming) -> StageTiming:
    return StageTiming(
        timing.stage, timing.received_ns, timing.started_ns, timing.finished_ns, time.monotonic_ns(), timing.hop_ns
    )
