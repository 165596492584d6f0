"""A worker stage: `vllm serve ... --external-pp-worker`. Without API and scheduler, it runs what the head decides.

The main thread runs the model, because OpenMP's threads belong to it. The ring's thread owns the sockets.

A stage remembers which calls it has run, because the head does not keep track of it. The head replays its journal
(member/journal.py) to all stages alike, and a stage skips the calls that it has run. A new head begins as if its stages
were new, and a stage answers its start-up calls as it answered those of the old head.
"""

from __future__ import annotations

import logging
import queue
import signal
import time
from typing import Any

from stagewire.config import StageConfig
from stagewire.errors import ConfigError, InternalError, PeerError
from stagewire.observe.signals import SignalWatch
from stagewire.observe.status_events import StatusSender
from stagewire.ring.observer import Broken, Delivery, Whole
from stagewire.ring.transport.security import SecuredStage
from stagewire.vllm_plugin.codec.calls import CALLS, PREPARE, CallSpec
from stagewire.vllm_plugin.codec.schedules import decode_schedule, encode_output
from stagewire.vllm_plugin.codec.values import decode_value, encode_value
from stagewire.vllm_plugin.member.journal import Entry
from stagewire.vllm_plugin.member.member import Member
from stagewire.vllm_plugin.ranks.stage_ranks import StageRanks, is_step_failure
from stagewire.wire.codec import Frame
from stagewire.wire.messages import Call, CallResult, Reply, Result, Sample, StageTiming, Step

__all__ = ["serve_stage"]

logger = logging.getLogger("vllm.stagewire")

# Stands in for a method that is not on the list. Each rank refuses it, and the refusal is the answer.
_UNKNOWN = CallSpec({}, lambda _: False)


def serve_stage(
    config: StageConfig, vllm_config: Any, secured: SecuredStage, status: StatusSender, signals: SignalWatch
) -> None:
    """Loads the stage and serves the ring until it is stopped. Ends the process itself when the ring fails.

    Args:
        config: the stage's place.
        vllm_config: resolved.
        secured: how this stage's connections are protected.
        status: who listens to this stage.
        signals: directed to this stage's own ways to end.
    """
    ranks = StageRanks(config, vllm_config)
    process = Member(config, vllm_config, ranks, status, secured)
    drain_s = vllm_config.shutdown_timeout

    def ask(number: int) -> float:
        return process.leave(f"stage {config.stage} was told to stop", drain_s if number == signal.SIGTERM else 0.0)

    signals.direct(ask, process.stop_at_once, process.end_at_once)
    process.start()
    try:
        process.open_health_port()
        ranks.load()
        process.mark_loaded(lambda: len(ranks.own.runner.requests))
        _StageHost(process, ranks).run()
    except Exception as error:
        process.fail_from(error)
        raise


class _StageHost:
    def __init__(self, process: Member, ranks: StageRanks) -> None:
        self._process = process
        self._ring = process.ring
        self._ranks = ranks
        self._config = ranks.config
        self._call_results: dict[int, tuple[list[CallResult], list[Frame]]] = {}
        self._unsampled: tuple[Step, StageTiming] | None = None
        self._failed_epoch = -1
        self._head = ""
        self._ran: set[int] = set()  # calls of this head that are kept in its journal
        # Of calls that no stage runs twice (`CallSpec.is_once`), by method: arguments, results and values.
        self._answered: dict[str, tuple[bytes, list[CallResult], list[Frame]]] = {}

    def run(self) -> None:
        while True:
            try:
                item = self._ring.receive(60.0)
            except queue.Empty:
                continue  # idle; the ring's thread notices a dead predecessor
            match item:
                case None:
                    self._ranks.shutdown()
                    return
                case Broken() | Whole():
                    self._call_results.clear()
                    self._unsampled = None
                case Delivery() if self._is_current(item.message.epoch):
                    self._handle(item)

    def _is_current(self, epoch: int) -> bool:
        """Whether the epoch is the ring's current one, and no step of it has failed here."""
        return epoch == self._ring.state.epoch != self._failed_epoch

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
        try:
            activations = self._ranks.execute(schedule, schedule_bytes, step.digest, step.tensors, frames)
        except Exception as error:  # noqa: BLE001  whatever it is, the others must hear of it
            self._fail_step(step, error)
            return
        self._process.last_step = step.step
        timing = StageTiming(
            self._config.stage, delivery.received_ns, started_ns, time.monotonic_ns(), 0, self._ring.hop_ns
        )
        if not self._config.is_tail:
            timings = [*step.timings, _sent(timing)]
            specs, out = (activations.specs, activations.frames) if activations else ([], [])
            message = Step(step.epoch, step.step, step.num_tokens, step.digest, step.waits_for_sample, specs, timings)
            self._ring.send(message, [schedule_bytes, *out])
        elif step.num_tokens and not step.waits_for_sample:
            self._answer(step, timing, None)
        elif step.num_tokens:
            self._unsampled = (step, timing)

    def _sample(self, sample: Sample, payloads: Any) -> None:
        if not self._config.is_tail:
            self._ring.send(sample, payloads)
            return
        if self._unsampled is None:
            return  # its step has failed here
        if self._unsampled[0].step != sample.step:
            raise PeerError(f"a Sample for step {sample.step}, which this stage has not just run")
        step, timing = self._unsampled
        self._unsampled = None
        self._answer(step, timing, payloads[0] if payloads else None)

    def _answer(self, step: Step, timing: StageTiming, grammar: Frame | None) -> None:
        try:
            output = self._ranks.answer(grammar)
        except Exception as error:  # noqa: BLE001  whatever it is, the others must hear of it
            self._fail_step(step, error)
            return
        finished = StageTiming(
            timing.stage, timing.received_ns, timing.started_ns, time.monotonic_ns(), 0, timing.hop_ns
        )
        payload = encode_output(output, self._ranks.own.take_drafts())
        self._ring.send(Result(step.epoch, step.step, [*step.timings, _sent(finished)]), [payload])

    def _fail_step(self, step: Step, error: Exception) -> None:
        """Ends the epoch and tells the other stages why. Raises ``error`` if this stage cannot go on."""
        if not is_step_failure(self._ranks, error):
            raise error
        self._failed_epoch = step.epoch
        self._process.end_epoch(step.epoch, step.step, error)

    # ---- calls -----------------------------------------------------------------------------------------------------

    def _run_call(self, call: Call, args_bytes: Frame) -> None:
        """Runs a call that the ring's thread has passed on already. A failure is a result.

        Raises:
            InternalError: a vital call failed, which ends the stage.
            ConfigError: a call of the journal failed, which does so too.
        """
        self._meet_head()
        if call.method == PREPARE:
            self._prepare(_read_journal(args_bytes))
            results, payloads = self._nothing()
        else:
            results, payloads = self._call(call.call_id, call.method, bytes(args_bytes))
        if results[0].error_type and CALLS.get(call.method, _UNKNOWN).is_vital:
            # A restart may help.
            raise InternalError(f"cannot take up its requests: {results[0].error_type}: {results[0].error_text}")
        if self._config.stage == 1:
            self._ring.send(Reply(call.epoch, call.call_id, results), payloads)
        else:
            self._call_results[call.call_id] = (results, payloads)

    def _call(self, call_id: int, method: str, args_bytes: bytes) -> tuple[list[CallResult], list[Frame]]:
        spec = CALLS.get(method, _UNKNOWN)
        if spec.is_once and method in self._answered:
            before, results, payloads = self._answered[method]
            if before == args_bytes:
                self._ran.add(call_id)
                return results, payloads
            del self._answered[method]  # also if the new call fails: it may have undone what the old one did
            for voided in spec.voids:
                self._answered.pop(voided, None)
        first_rank = sum(earlier.tensor_parallel for earlier in self._ring.identities)
        results, payloads = self._ranks.call(method, args_bytes, first_rank)
        if any(result.error_type for result in results):
            return results, payloads
        if spec.is_kept:
            self._ran.add(call_id)
        if spec.is_once:
            self._answered[method] = (args_bytes, results, payloads)
        if spec.reaches is not None:
            self._process.reach(spec.reaches, self._ranks.vllm_config.cache_config.num_gpu_blocks or 0)
        return results, payloads

    def _nothing(self) -> tuple[list[CallResult], list[Frame]]:
        results = [CallResult(self._config.stage, rank, "", "") for rank in range(self._ranks.num_ranks)]
        return results, [encode_value(None) for _ in results]

    def _prepare(self, journal: list[Entry]) -> None:
        """Runs the calls of the journal that this stage has not run.

        Raises ConfigError or InternalError when one fails: the stage is then of no use to the others, and ends.
        """
        for call_id, method, args_bytes in journal:
            if call_id in self._ran:
                continue
            logger.info("Stage %d: catching up: %s", self._config.stage, method)
            results, _ = self._call(call_id, method, args_bytes)
            failed = next((result for result in results if result.error_type), None)
            if failed is not None:
                kind = ConfigError if failed.error_type == ConfigError.__name__ else InternalError
                raise kind(f"cannot catch up with the others: {method}: {failed.error_text}")

    def _meet_head(self) -> None:
        """Forgets the old head's requests if the head is a new process, which does not know them."""
        head = self._ring.identities[0].incarnation
        if self._head and head != self._head:
            logger.info("Stage %d: stage 0 is a new process; the old one's requests are forgotten", self._config.stage)
            self._ran.clear()
            self._process.last_step = -1
            self._ranks.forget()
        self._head = head

    def _pass_reply(self, reply: Reply, payloads: list[Frame]) -> None:
        own = self._call_results.pop(reply.call_id, None)
        if own is None:
            raise PeerError(f"a reply to call {reply.call_id}, which this stage has not run")
        own_results, own_payloads = own
        self._ring.send(Reply(reply.epoch, reply.call_id, [*reply.results, *own_results]), [*payloads, *own_payloads])


def _read_journal(args_bytes: Frame) -> list[Entry]:
    """Raises PeerError for anything but a journal."""
    entries = decode_value(args_bytes)
    if not CALLS[PREPARE].args["journal"](entries):
        raise PeerError("stage 0 sent a journal that is none")
    return [Entry(*entry) for entry in entries]


def _sent(timing: StageTiming) -> StageTiming:
    return StageTiming(
        timing.stage, timing.received_ns, timing.started_ns, timing.finished_ns, time.monotonic_ns(), timing.hop_ns
    )
