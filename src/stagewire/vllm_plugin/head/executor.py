"""The head's executor. EngineCore sees one executor with the workers of all stages, one for each of their ranks.

It runs the head's own layers in the EngineCore process and the other layers over the ring. EngineCore's main thread
alone touches the model. While that thread waits for the future of a step, it takes results from the ring's inbox in the
order in which they arrive.

When the ring breaks, the steps in flight come back empty. The scheduler then asks this executor, as its `RingAccess`,
whether the ring is whole again, and does not wait for it. Only start-up calls wait: EngineCore would not repeat them.
It knows no socket and no bytes: those are the ring's and the codec's.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput

from stagewire.errors import ConfigError, InternalError, PeerError, ProtocolError, StageLost, StagewireError
from stagewire.observe.deadlines import StepDeadlines
from stagewire.observe.signals import SignalWatch
from stagewire.observe.status_events import StatusSender
from stagewire.observe.streams import keep_writing
from stagewire.observe.timings import StepLog
from stagewire.ring.observer import Broken, Delivery, Whole
from stagewire.ring.transport.security import secure_stage
from stagewire.vllm_plugin.codec.calls import CALLS, Runs, bind_call
from stagewire.vllm_plugin.codec.schedules import decode_output, encode_grammar, encode_schedule, is_nothing
from stagewire.vllm_plugin.codec.values import decode_value, encode_value
from stagewire.vllm_plugin.head.live_requests import Restored
from stagewire.vllm_plugin.head.scheduler import RingScheduler
from stagewire.vllm_plugin.head.suspects import Loss
from stagewire.vllm_plugin.member.journal import adapter_of
from stagewire.vllm_plugin.member.member import Member, as_stagewire_error
from stagewire.vllm_plugin.ranks.stage_ranks import StageRanks, call_limit_s, is_step_failure
from stagewire.vllm_plugin.seams.settings import RingSettings
from stagewire.vllm_plugin.worker.checks import check_model
from stagewire.wire.messages import Call, CallResult, Reply, Result, Sample, StageTiming, Step

__all__ = ["RingExecutor"]


# How long vLLM may take to abort open requests and leave its loop. It does not notice a stop while it waits for a step.
STOP_GRACE_S = 1.0
# A wait for a step is counted in pieces of this length at most. A pause of this process counts as one piece, however
# long it was, so that no stage is blamed for it.
PATIENCE_PIECE_S = 1.0


class _RingBroken(RuntimeError):
    """A call was lost with the ring. vLLM reports it as the error of that call, and goes on."""


class _StepFuture(Future[ModelRunnerOutput]):
    """A step in flight. Whoever waits for it handles the messages in the ring's inbox meanwhile."""

    def __init__(self, pump: Callable[[Future[Any]], None]) -> None:
        super().__init__()
        self._pump = pump

    def result(self, timeout: float | None = None) -> ModelRunnerOutput:
        if timeout is not None:
            raise InternalError("a step has the ring's deadline, not the caller's")
        self._pump(self)
        return super().result()


@dataclass
class _InFlight:
    step: int
    future: _StepFuture
    sent_at: float
    req_ids: list[str]
    num_tokens: int
    waits_for_sample: bool
    waited_s: float = 0.0  # for this step, since those before it came back

    @property
    def is_decode(self) -> bool:
        """Whether each request has one token, sampled at once. The times of such steps can be compared."""
        return self.num_tokens == len(self.req_ids) and not self.waits_for_sample


class RingExecutor(Executor):
    """See the module. External mode chooses it; vLLM constructs it."""

    supports_pp = True

    def _init_executor(self) -> None:
        self._stage = RingSettings.read(self.vllm_config)
        self._status = StatusSender(self._stage.stage)
        self._steps: dict[int, _InFlight] = {}
        self._replies: dict[int, Reply | None] = {}
        self._reply_payloads: dict[int, list[Any]] = {}
        self._next_step = 0
        # Not from 0: stages remember the numbers of calls that they have run for an earlier head.
        self._next_call = secrets.randbelow(1 << 50)
        self.epoch = 0
        self.is_whole = False
        self._losses: list[Loss] = []
        self._is_started = False
        self._current: tuple[int, SchedulerOutput] | None = None  # the step whose sample_tokens is due
        self._is_pooling = self.vllm_config.model_config.runner_type == "pooling"
        self._adapters: dict[int, LoRARequest] = {}  # by number, those that every stage knows
        self._step_log = StepLog.from_environment()
        self._deadlines = StepDeadlines(self._stage.step_timeout_s)
        self._last_result_at = 0.0
        self._ranks = StageRanks(self._stage, self.vllm_config)
        self._process = Member(self._stage, self.vllm_config, self._ranks, self._status, secure_stage(self._stage))
        if self._process.is_child:  # output and signals of an in-process `LLM` stay the user's
            keep_writing()
            # SIGTERM only: a terminal's Ctrl-C reaches this process too, but its parent decides what it means.
            end = self._process.stop_at_once, self._process.end_at_once
            SignalWatch(self._go_on_for, *end, installs=False, numbers=[signal.SIGTERM])
        self._process.start()
        try:
            check_model(self._stage, self.vllm_config)  # `vllm serve` has checked it already, an `LLM` has not
            self._ranks.load()
        except Exception as error:
            self._process.fail_from(error)
            raise
        self._process.mark_loaded(lambda: len(self._ranks.own.runner.requests))
        self._process.ring.wait_open(self._stage.start_timeout_s)
        self._await_whole(self._stage.start_timeout_s)
        # EngineCore constructs the scheduler next, from this class, and does not hand it the executor.
        self.vllm_config.scheduler_config.scheduler_cls = functools.partial(RingScheduler, ring=self)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput | None] | None:
        """Runs the head's layers and sends the step to stage 1.

        As in stock vLLM, `sample_tokens` returns the result. For a pooling model this call returns it.
        """
        if is_nothing(scheduler_output):
            self._current = None
            return _resolved(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        try:
            self._introduce_adapters(scheduler_output)
        except _RingBroken:  # the scheduler takes the loss before it takes this step's output
            self._current = None
            return _resolved(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        step = self._next_step
        self._next_step += 1
        received_ns = time.monotonic_ns()
        schedule_bytes = encode_schedule(scheduler_output)
        started_ns = time.monotonic_ns()
        try:
            activations = self._ranks.execute(scheduler_output, schedule_bytes, 0, (), ())
        except Exception as error:
            if not is_step_failure(self._ranks, error):
                self._process.fail_from(error)
                raise
            self._process.end_epoch(self.epoch, step, error)
            if not scheduler_output.total_num_scheduled_tokens:  # vLLM takes this result and asks for no sample
                self._current = None
                return _resolved(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
            return self._await_result(step, scheduler_output, waits_for_sample=False, non_block=non_block)
        finished_ns = time.monotonic_ns()
        self._process.last_step = step
        has_tokens = activations is not None
        timing = StageTiming(0, received_ns, started_ns, finished_ns, time.monotonic_ns(), self._process.ring.hop_ns)
        message = Step(
            epoch=self.epoch,
            step=step,
            num_tokens=scheduler_output.total_num_scheduled_tokens,
            digest=activations.digest if activations else 0,
            waits_for_sample=has_tokens and scheduler_output.has_structured_output_requests,
            tensors=activations.specs if activations else [],
            timings=[timing],
        )
        self._process.ring.send(message, [schedule_bytes, *(activations.frames if activations else ())])
        if not has_tokens:
            self._current = None
            return _resolved(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        return self._await_result(
            step, scheduler_output, waits_for_sample=message.waits_for_sample, non_block=non_block
        )

    def _await_result(self, step: int, schedule: SchedulerOutput, *, waits_for_sample: bool, non_block: bool) -> Any:
        future = _StepFuture(self._pump)
        self._steps[step] = _InFlight(
            step,
            future,
            time.monotonic(),
            list(schedule.num_scheduled_tokens),
            schedule.total_num_scheduled_tokens,
            waits_for_sample,
        )
        if self._is_pooling:
            return future if non_block else future.result()
        self._current = (step, schedule)
        return _resolved(None) if non_block else None

    def sample_tokens(
        self, grammar_output: GrammarOutput | None, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        """The result of the step that `execute_model` has just sent. Sends the grammar bitmask after it, for the tail.

        Raises:
            InternalError: a bitmask for a step that waits for none.
        """
        if self._current is None:
            return _resolved(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        step, schedule = self._current
        self._current = None
        if schedule.has_structured_output_requests:
            payloads = [] if grammar_output is None else [encode_grammar(grammar_output)]
            self._process.ring.send(Sample(self.epoch, step), payloads)
        elif grammar_output is not None:
            raise InternalError("a grammar bitmask for a step without structured output")
        future = self._steps[step].future
        return future if non_block else future.result()

    def _pump(self, awaited: Future[Any]) -> None:
        """Takes messages from the ring until ``awaited`` is done. A step past its deadline ends the epoch."""
        while not awaited.done():
            oldest = next(iter(self._steps.values()), None)
            if oldest is None:
                raise InternalError("a future that no step belongs to")
            limit_s = self._deadlines.limit_s(oldest.num_tokens)
            piece_s = min(limit_s - oldest.waited_s, PATIENCE_PIECE_S)
            if piece_s <= 0:
                what = f"step {oldest.step} ({len(oldest.req_ids)} requests, {oldest.num_tokens} tokens)"
                self._process.accuse(self.epoch, oldest.step, f"{what} did not come back within {limit_s:.3g} s")
                self._receive(None)  # the end of the epoch
                continue
            began = time.monotonic()
            with contextlib.suppress(queue.Empty):
                self._receive(piece_s)
            oldest.waited_s += min(time.monotonic() - began, piece_s)

    def _receive(self, timeout_s: float | None) -> None:
        """Takes in one message, or news of the ring. Raises queue.Empty after ``timeout_s``; None waits for ever."""
        item = self._process.ring.receive(None if timeout_s is None else max(timeout_s, 0.0))
        match item:
            case None:
                raise PeerError("the ring was stopped")
            case Broken(epoch, error):
                self._lose(epoch, error)
            case Whole(epoch):
                self.epoch, self.is_whole = epoch, True
            case Delivery():
                self._take(item)

    def _take(self, delivery: Delivery) -> None:
        message = delivery.message
        if isinstance(message, Result):
            if message.step not in self._steps:
                raise PeerError(f"a result for step {message.step}, which is not in flight")
            timed = [timing.stage for timing in message.timings]
            if timed != list(range(self._stage.num_stages)):
                raise PeerError(f"step {message.step} came back with the timings of stages {timed}")
            try:
                output = decode_output(delivery.payloads[0])
            except ProtocolError as error:
                self._process.end_epoch(self.epoch, message.step, error)
                return
            in_flight = self._steps.pop(message.step)
            timings = [*message.timings, StageTiming(0, delivery.received_ns, 0, 0, 0, self._process.ring.hop_ns)]
            self._step_log.write(message.step, len(in_flight.req_ids), in_flight.num_tokens, timings)
            self._process.steps.add(len(in_flight.req_ids), in_flight.is_decode, timings)
            received_at = delivery.received_ns / 1e9
            self._deadlines.add(in_flight.num_tokens, received_at - max(in_flight.sent_at, self._last_result_at))
            self._last_result_at = received_at
            in_flight.future.set_result(output)
        elif isinstance(message, Reply) and message.call_id in self._replies:
            self._replies[message.call_id] = message
            self._reply_payloads[message.call_id] = list(delivery.payloads)

    # ---- a broken ring ---------------------------------------------------------------------------------------------

    def _lose(self, epoch: int, error: StageLost) -> None:
        """Returns every step in flight empty, in order. The scheduler learns from the `Loss` which they were."""
        self.is_whole = False
        lost = list(self._steps.values())
        self._steps.clear()
        self._deadlines.forget()
        failed = next((each.req_ids for each in lost if each.step == error.step), [])
        self._losses.append(Loss(error, failed, [req_id for each in lost for req_id in each.req_ids]))
        for each in lost:
            each.future.set_result(EMPTY_MODEL_RUNNER_OUTPUT)

    def poll(self, pause_s: float = 0.0) -> None:
        """`RingAccess`."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._receive(0 if self.is_whole else pause_s)
        if self._process.given_up is not None and not self._process.has_api:
            raise self._process.given_up  # without an API server nobody refuses requests

    @property
    def is_draining(self) -> bool:
        """`RingAccess`."""
        return self._process.is_draining

    def take_losses(self) -> list[Loss]:
        """`RingAccess`."""
        losses, self._losses = self._losses, []
        return losses

    def restore(self, requests: Sequence[Restored]) -> bool:
        """`RingAccess`. Sends at most ``max_num_seqs`` requests in one call: vLLM's batch has no more rows."""
        size = self.vllm_config.scheduler_config.max_num_seqs
        try:
            for begin in range(0, max(len(requests), 1), size):
                part = requests[begin : begin + size]
                schedule = SchedulerOutput.make_empty()
                schedule.scheduled_new_reqs = [each.request for each in part]
                self._introduce_adapters(schedule)  # a live request may use one that was removed meanwhile
                rest = [each.output_token_ids for each in part], begin == 0
                args = encode_schedule(schedule), *rest
                self._call("restore_requests", args, self._stage.step_timeout_s, own_args=(schedule, *rest))
        except _RingBroken:
            return False
        self._process.mark_recovered(len(requests))
        return True

    def _await_whole(self, timeout_s: float) -> None:
        ends_at = time.monotonic() + timeout_s
        while not self.is_whole:
            try:
                self._receive(ends_at - time.monotonic())
            except queue.Empty:
                raise PeerError(f"the ring was not whole within {timeout_s:g} s") from None

    def supports_draft_weight_updates(self) -> bool:
        """False: no weights are updated while a ring runs. vLLM 0.30 asks at every start, and from another thread."""
        return False

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """None: drafts come with a step's result (`DraftingOutput`). Those asked for here would be of another step."""
        return None

    # ---- calls -----------------------------------------------------------------------------------------------------

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """Sends one call round the ring, after the steps before it. Returns a result for each rank of each stage.

        Args:
            method: its name on the closed list.
            timeout: in seconds; by default the call's own limit.
            args, kwargs: by vLLM's names for them.
            non_block: returns a future with the results.

        Raises:
            NotImplementedError: the call is not on the closed list. A callable never travels.
            ConfigError: the arguments do not fit the list.
            RuntimeError: it failed on a stage (the message names stage, type and text), or was lost with the ring.
        """
        if not isinstance(method, str) or method not in CALLS or CALLS[method].runs is Runs.HOST:
            raise NotImplementedError(
                f"{method if isinstance(method, str) else 'a callable'} cannot run on all stages: "
                "the ring carries a closed list of calls (docs/design/vllm-seams.md, C1)"
            )
        bound = bind_call(method, args, kwargs or {})
        while True:
            try:
                results = self._call(method, bound, timeout)
            except _RingBroken:
                if not CALLS[method].is_slow or self._is_started:
                    raise
                self._await_whole(self._stage.start_timeout_s)  # all stages have caught up then
            else:
                return _resolved(results) if non_block else results

    def _call(
        self, method: str, args: tuple[Any, ...], timeout: float | None, own_args: tuple[Any, ...] | None = None
    ) -> list[Any]:
        """Sends the call once; raises _RingBroken if it is lost. ``own_args``: as `StageRanks.call` takes them."""
        self._finish_steps()
        self.poll()
        if not self.is_whole:
            raise _RingBroken(f"{method}: {self._process.why_broken()}")
        call_id = self._next_call
        self._next_call += 1
        self._replies[call_id] = None
        args_bytes = encode_value(args)
        self._process.ring.send(Call(self.epoch, call_id, method), [args_bytes])
        try:
            results, payloads = self._ranks.call(method, args_bytes, 0, own_args)
        except StagewireError as error:
            self._process.fail_from(error)
            raise
        limit_s = timeout or call_limit_s(self._stage, method)
        ends_at = time.monotonic() + limit_s
        try:
            while self._replies[call_id] is None:
                self._receive_reply(ends_at - time.monotonic(), method, limit_s)
            reply = self._replies[call_id]
        except _RingBroken:
            adapter = adapter_of(method, args)
            if adapter is not None:
                self._next_call = self._process.journal.renumber_adapter(adapter, self._next_call)
            raise
        finally:
            del self._replies[call_id]
            late = self._reply_payloads.pop(call_id, [])
        assert reply is not None
        values = self._values(method, [*results, *reply.results], [*payloads, *late])
        self._process.journal.add(call_id, method, args, args_bytes)
        return values

    def _receive_reply(self, timeout_s: float, method: str, limit_s: float) -> None:
        try:
            self._receive(timeout_s)
        except queue.Empty:
            self._process.accuse(self.epoch, -1, f"the call {method} did not come back within {limit_s:g} s")
            self._receive(None)
        if not self.is_whole:
            raise _RingBroken(f"{method}: {self._process.why_broken()}")

    def _finish_steps(self) -> None:
        """Waits for the steps in flight, because a call would overtake a step that a stage still computes.

        Stages would then use adapters in different orders, and evict different ones. The step whose `sample_tokens` is
        due cannot end before that call, and is not waited for.
        """
        due = None if self._current is None else self._current[0]
        while any(step != due for step in self._steps):
            self._pump(next(iter(self._steps.values())).future)

    def _values(self, method: str, results: list[CallResult], payloads: list[Any]) -> list[Any]:
        """The decoded results, one for each worker, in the order of stages and their ranks."""
        workers = [
            (stage.stage, rank) for stage in self._process.ring.identities for rank in range(stage.tensor_parallel)
        ]
        found = [(result.stage, result.rank) for result in results]
        if found != workers:
            raise PeerError(f"{method}: results of (stage, rank) {found}, expected {workers}")
        values = []
        for result, payload in zip(results, payloads, strict=True):
            where = f"stage {result.stage}" + (f", tensor parallel rank {result.rank}" if result.rank else "")
            if result.error_type:
                raise RuntimeError(f"{method} failed on {where}: {result.error_type}: {result.error_text}")
            value = decode_value(payload)
            if not CALLS[method].result(value):
                raise PeerError(f"{method}: {where} returned a {type(value).__name__}")
            values.append(value)
        return values

    # ---- adapters and profiling: all stages or none ----------------------------------------------------------------

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Adds the adapter on all stages. Each first loads it and drops it again: one that a stage cannot read changes
        nothing.

        Raises:
            RuntimeError: a stage cannot load it, or has other files of it; the message names the stage.
        """
        lora_id, loaded = lora_request.lora_int_id, self.list_loras()
        if lora_id not in loaded or lora_request.load_inplace:
            _compare_digests(lora_request, self.collective_rpc("check_lora", args=(lora_request,)))
        try:
            is_added = super().add_lora(lora_request)
        except RuntimeError:
            if lora_id not in loaded:
                with contextlib.suppress(RuntimeError):  # the first error is reported
                    self.remove_lora(lora_id)
            raise
        self._adapters[lora_id] = lora_request
        return bool(is_added)

    def list_loras(self) -> set[int]:
        """The adapters that every stage has in memory. vLLM's own raises if stages differ, as after a restart."""
        return set.intersection(*self.collective_rpc("list_loras"))

    def remove_lora(self, lora_id: int) -> bool:
        self._adapters.pop(lora_id, None)  # the journal forgets it too, so the next request for it must add it
        return bool(super().remove_lora(lora_id))

    def pin_lora(self, lora_id: int) -> bool:
        if lora_id not in self.list_loras():
            raise ValueError(
                f"Pinning failed. LoRA {lora_id} is not registered."
            )  # vLLM's text; checked before any stage pins
        return bool(super().pin_lora(lora_id))

    def _introduce_adapters(self, schedule: SchedulerOutput) -> None:
        """Adds adapters that only new requests name, as with `LLM.generate`. Stock vLLM loads them in that step."""
        for request in schedule.scheduled_new_reqs:
            adapter = request.lora_request
            if adapter is None:
                continue
            known = self._adapters.get(adapter.lora_int_id)
            if known is None or known.lora_path != adapter.lora_path:
                try:
                    self.add_lora(adapter)
                except _RingBroken:
                    raise
                except Exception as error:
                    self._process.fail_from(error)
                    raise

    def profile(self, is_start: bool = True, profile_prefix: str | None = None, **limits: Any) -> None:
        """vLLM's own. If one stage cannot start (it has no --profiler-config), the others stop again.

        ``limits``: numbers of iterations, since vLLM 0.32.
        """
        try:
            super().profile(is_start, profile_prefix, **limits)
        except RuntimeError:
            if is_start:
                with contextlib.suppress(RuntimeError):
                    self.collective_rpc("profile", args=(False,))
            raise

    # ---- start-up --------------------------------------------------------------------------------------------------

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """For every worker the layouts that all stages support. Raises ConfigError if there is none."""
        each = super().get_supported_kv_cache_layouts()
        common = [layout for layout in each[0] if all(layout in layouts for layouts in each)]
        if not common:
            raise ConfigError(f"stages share no KV cache layout: {each}; choose one --attention-backend for all")
        return [common for _ in each]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        """vLLM's own. Then sets one reorder threshold for all stages: each derives it from its own layers' backends."""
        super().initialize_from_config(kv_cache_configs)
        given = [value for value in self.collective_rpc("get_reorder_batch_threshold") if value is not None]
        self.collective_rpc("set_reorder_batch_threshold", args=(min(given) if given else None,))
        self._process.reach("kv_cache", kv_cache_configs[0].num_blocks)

    def compile_or_warm_up_model(self) -> None:
        super().compile_or_warm_up_model()
        self._is_started = True
        self._process.reach("serving")

    @property
    def supported_tasks(self) -> tuple[Any, ...]:
        return self._ranks.own.supported_tasks()

    # ---- end -------------------------------------------------------------------------------------------------------

    def check_health(self) -> None:
        if self._process.ring.error is not None:
            raise self._process.ring.error

    def shutdown(self) -> None:
        """Stops the ring. EngineCore also calls this when an error ends it: the ring then fails with that error, the
        stages wait for the next head, and the clients are told why.
        """
        error = sys.exc_info()[1]
        exit_code = 0
        if self._process.is_child and isinstance(error, Exception):
            exit_code = as_stagewire_error(error).exit_code
            self._process.fail_from(error)
        else:
            self._process.stop("stage 0 is stopping")
        self._ranks.shutdown()
        if self._process.is_child:  # vLLM's own teardown takes seconds and is of no use
            self._process.end(exit_code)

    def _go_on_for(self, number: int) -> float:
        """How many seconds this process goes on after a first signal. Once it serves, vLLM's own handler stops it."""
        return self.vllm_config.shutdown_timeout + STOP_GRACE_S if self._is_started else 0.0

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return False


def _compare_digests(adapter: LoRARequest, digests: list[str]) -> None:
    other = next((stage for stage, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise RuntimeError(
            f"adapter {adapter.lora_name!r} differs between stages: stage 0 has {digests[0]}, stage {other} has "
            f"{digests[other]} (sha256 of its files); copy the same adapter to every stage"
        )


def _resolved(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
