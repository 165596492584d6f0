"""What the head's EngineCore and a worker stage share: their end of the ring, and how the process ends with it.

Owns the exit code of a stage whose ring failed. A refusal can come while the main thread loads weights, so the ring's
thread ends the process, after it has printed the reason and sent it to all listeners. Does not know how steps and calls
are run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.system_utils import set_ulimit

from stagewire import machine
from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError, InternalError, PeerError, RankError, StageLost, StagewireError
from stagewire.observe.processes import ORPHAN_EXIT_CODE, take_launcher, take_parent
from stagewire.observe.status_events import Phase, StatusSender
from stagewire.observe.timings import StepStatistics
from stagewire.ring.observer import Delivery, Observer, Whole
from stagewire.ring.ring import Ring
from stagewire.ring.transport import hosts
from stagewire.ring.transport.security import SecuredStage
from stagewire.ring.transport.zmq_transport import ZmqTransport
from stagewire.vllm_plugin.codec.calls import PREPARE
from stagewire.vllm_plugin.codec.values import encode_value
from stagewire.vllm_plugin.member.awake import AwakeCores
from stagewire.vllm_plugin.member.identity import make_identity
from stagewire.vllm_plugin.member.journal import Journal
from stagewire.vllm_plugin.member.news import NewsSender, RingNews, resident_bytes
from stagewire.vllm_plugin.member.probes import EarlyServer, StageCondition, StageHealth
from stagewire.vllm_plugin.ranks.stage_ranks import StageRanks, call_limit_s
from stagewire.wire.messages import Call, Reply, Result, StageIdentity, StageReport, StageState, Step

__all__ = ["Member", "as_stagewire_error", "max_frame_bytes", "report"]

MIN_FRAME_LIMIT_BYTES = 16 << 20
MAX_FRAME_LIMIT_BYTES = 4 << 30
# How many frames of the largest size one message may hold (a step has several tensors), and how many may wait to be run
# besides the steps in flight (calls, bitmasks).
MAX_LARGE_FRAMES = 4
# A predecessor can make a stage keep at most this share of the machine's memory, even if a model would need more.
SHARE_FOR_PEERS = 0.25
# A ring that breaks again within this time, before its stages got their requests back, has not recovered: the recovery
# deadline keeps running.
RELAPSE_S = 60.0
# When a drain runs out, the ring's thread has this long to count the requests that are left, and to report them.
LEAVING_S = 1.0

logger = logging.getLogger("vllm.stagewire")


def as_stagewire_error(error: BaseException) -> StagewireError:
    """``error`` itself, or an InternalError in its place if it is none of ours."""
    if isinstance(error, StagewireError):
        return error
    return InternalError(f"{type(error).__name__}: {error}")


def report(stage: int, error: StagewireError) -> str:
    """The one line of log that a person reads."""
    return f"Stage {stage}: {error}"


def max_frame_bytes(vllm_config: Any, *, is_head: bool) -> int:
    """The limit of a frame from the predecessor, in bytes: above the largest that can be right.

    =============  ==========================================================================================
    on             the largest of
    =============  ==========================================================================================
    other stages   activations of a full batch; a schedule full of long prompts, and their blocks; a bitmask
    the head       log-probabilities of whole prompts (8 bytes for id and value, and a rank), or the vectors
                   of all their tokens from a pooling model; they arrive with a prompt's last chunk
    =============  ==========================================================================================
    """
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    prompt_tokens = scheduler.max_num_seqs * model.max_model_len
    if not is_head:
        activations = scheduler.max_num_batched_tokens * model.get_hidden_size() * 8
        drafts = vllm_config.speculative_config
        rows = scheduler.max_num_seqs * (1 + (drafts.num_speculative_tokens if drafts else 0))
        bitmask = rows * (model.get_vocab_size() // 8 + 4)
        largest = max(activations, prompt_tokens * 8, bitmask)
    elif model.runner_type == "pooling":
        largest = prompt_tokens * max(model.get_hidden_size(), model.embedding_size) * 4
    else:
        num_logprobs = model.max_logprobs if model.max_logprobs >= 0 else model.get_vocab_size()
        largest = prompt_tokens * (num_logprobs + 2) * 8
    return int(min(largest + MIN_FRAME_LIMIT_BYTES, MAX_FRAME_LIMIT_BYTES))


class Member(Observer):
    """This process's end of the ring.

    Args:
        config: the stage's place.
        vllm_config: resolved.
        ranks: the stage's own. They are watched, and end with the ring.
        status: sends to those who listen to this stage.
        secured: how this stage's connections are protected.

    Raises:
        ConfigError: as `make_identity` does.
    """

    def __init__(
        self, config: StageConfig, vllm_config: Any, ranks: StageRanks, status: StatusSender, secured: SecuredStage
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._status = status
        self._exit_code: int | None = None
        self._leaving: tuple[str, float] | None = None  # why, and until when at the latest (monotonic)
        self.is_draining = False  # at the head: whether a stage is to leave and has requests
        self._started_at = time.monotonic()
        self._state: StageState = "loading"
        self._address = ""
        self._kv_blocks = 0
        self._count_requests: Callable[[], int] = lambda: 0
        # At the head: what a restarted stage has missed.
        self.journal = Journal()
        self._prepare: tuple[int, int] | None = None  # epoch and number of the call that carries the journal now
        self._prepare_until = 0.0
        self._broken: StageLost | None = None
        self._broken_at = 0.0
        self._whole_at, self._is_recovered = 0.0, True
        self.given_up: PeerError | None = None  # while the ring is broken past the recovery deadline
        self._last_steps: dict[int, int] = {}
        self._news = NewsSender.from_environment() if config.is_head else None
        self.last_step = -1
        self.steps = StepStatistics()
        self._awake = AwakeCores.for_stage(on_cpu=current_platform.is_cpu())
        self._launcher = take_launcher()
        # EngineCore is a child of the API server or of the user's Python. A worker stage has no such parent.
        self._parent = take_parent()
        self.is_child = self._parent is not None
        self._is_told_to_stop = False
        self._host = secured.host
        for warning in secured.warnings:
            self.on_log(f"Stage {config.stage}: {warning}", is_warning=True)
        set_ulimit()  # a connection that never speaks holds a descriptor until its handshake times out
        frame_bytes = max_frame_bytes(vllm_config, is_head=config.is_head)
        most_bytes = int(machine.memory_bytes() * SHARE_FOR_PEERS)
        message_bytes = min(MAX_LARGE_FRAMES * frame_bytes, most_bytes)
        transport = ZmqTransport(
            self._host, frame_bytes, secured.security, message_bytes, functools.partial(hosts.bind_host, config)
        )
        identity = make_identity(config, vllm_config)
        # At most one step for each stage is in flight. They seldom all wait at one stage.
        unread_bytes = min((config.num_stages + MAX_LARGE_FRAMES) * frame_bytes, most_bytes)
        self.ring = Ring(config, identity, transport, self, self._watch, unread_bytes)

    def __repr__(self) -> str:
        return f"Member({self.ring!r})"

    def start(self) -> None:
        self.ring.start()

    def stop(self, text: str) -> None:
        """Ends the ring in order, and returns when that is done."""
        self.ring.stop(text)

    def leave(self, text: str, timeout_s: float) -> float:
        """Ends the ring in order once this stage has no requests, or after ``timeout_s``. From any thread.

        The head admits no new requests once it has heard of this by a report. The ring's thread notices when the last
        request has ended.

        Returns:
            For how many seconds the process may go on; 0 if it does not drain, but is to stop now.
        """
        if not timeout_s or self._state != "serving":
            return 0.0
        self._leaving = (text, time.monotonic() + timeout_s)
        self._state = "draining"
        self.ring.wake()
        return timeout_s + LEAVING_S

    def stop_at_once(self) -> None:
        """Ends the ring in order, and the process with it. From any thread."""
        self._is_told_to_stop = True
        self.ring.request_stop(f"stage {self._config.stage} was told to stop")

    def end(self, exit_code: int = 0) -> None:
        """Ends this process and its ranks at once. From any thread."""
        self._ranks.kill()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)

    def end_at_once(self) -> None:
        """Ends a process that was told twice to stop, or whose ring takes too long to end. From any thread."""
        if self._exit_code is None and not self._config.is_head:  # the head's API server prints its own line
            stage = self._config.stage
            sys.stderr.write(f"Stage {stage}: stopped (stage {stage} was told to stop)\n")
        self.end(self._exit_code or 0)

    def mark_loaded(self, count_requests: Callable[[], int]) -> None:
        """All ranks have loaded. ``count_requests``: how many the model runner holds; the ring's thread calls it."""
        self._count_requests = count_requests
        self._state = "loaded"
        self._status.send(Phase.LOADED)

    def reach(self, state: StageState, num_kv_blocks: int | None = None) -> None:
        """A start-up call has brought this stage to ``kv_cache`` or ``serving``."""
        self._state = state
        if num_kv_blocks is not None:
            self._kv_blocks = num_kv_blocks
        if state == "serving":
            self._status.send(Phase.READY)
        else:
            self._status.send(Phase.KV_CACHE, f"{self._kv_blocks} blocks")

    def mark_recovered(self, num_requests: int) -> None:
        """At the head, from the thread that runs the model: all stages know the live requests again."""
        self._is_recovered = True
        logger.info("Stage 0: all stages know the live requests again: %d", num_requests)

    def end_epoch(self, epoch: int, step: int, error: BaseException) -> None:
        """A step failed in this stage's model, but the stage can go on: ends the epoch for all."""
        stage = self._config.stage
        logger.error("Stage %d failed step %d", stage, step, exc_info=error)
        text = str(error) if isinstance(error, StagewireError) else f"{type(error).__name__}: {error}"
        self.ring.end_epoch(epoch, StageLost(stage, f"stage {stage} failed step {step}: {text}", step))

    def accuse(self, epoch: int, step: int, text: str) -> None:
        """At the head: ``step``, or a call (-1), is overdue. Ends the epoch and blames a stage, which then ends.

        That is the first stage whose last report does not include the step, or else the last stage.
        """
        stages = range(1, self._config.num_stages)
        behind = [stage for stage in stages if self._last_steps.get(stage, -1) < step]
        stage = behind[0] if behind else self._config.num_stages - 1
        self.ring.end_epoch(epoch, StageLost(stage, f"stage {stage} hangs or is too slow: {text}", max(step, 0)))

    @property
    def has_api(self) -> bool:
        """Whether an API server listens to this head; none does in a user's Python."""
        return self._news is not None

    def describe_health(self) -> StageCondition:
        """This stage's condition, for `StageHealth`."""
        state = self.ring.state
        failure = None if self.ring.error is None else str(self.ring.error)
        is_prepared = self._state in ("serving", "draining")
        return StageCondition(is_prepared, "" if state.is_open else state.waits_for(), failure)

    def open_health_port(self) -> EarlyServer | None:
        """Answers health probes on the address where the stage listens for its successor, if it was given a port.

        Raises:
            ConfigError: the port cannot be bound.
        """
        port = self._config.health_port
        if port is None:
            return None
        host = self._host or hosts.likely_host()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            sock = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ConfigError(f"--pipeline-health-port {port}: {error.strerror}; choose another one") from error
        return EarlyServer(sock, StageHealth(self.describe_health))

    def why_broken(self) -> str:
        return str(self._broken) if self._broken else "the ring is not whole"

    def fail_from(self, error: BaseException) -> None:
        """The main thread hit ``error``. Tells the other stages and the listeners, and ends the process.

        Only an in-process `LLM` goes on after it.
        """
        if not isinstance(error, StagewireError):
            logger.error("Stage %d failed", self._config.stage, exc_info=error)
        self.ring.fail(as_stagewire_error(error))

    # ---- from the ring's thread ------------------------------------------------------------------------------------

    def _watch(self) -> str | None:
        self._awake.release_when_idle(time.monotonic())
        if self._news is not None and self._news.is_due():
            self._tell(self._news)
        if self._broken is not None and self._config.is_head:
            self._mind_deadline(self._broken)
        if self._leaving is not None:
            self._mind_leaving(*self._leaving)
        problem = self._ranks.problem()
        if problem is not None:
            self.ring.request_fail(problem)
        if self._parent is not None and self._parent.has_ended():
            # A failure and not a stop: nobody told the API server to end, so the other stages wait for the next head.
            self.ring.request_fail(PeerError("its API server is gone"))
        if self._prepare is not None and time.monotonic() >= self._prepare_until:
            epoch, _ = self._prepare
            self._prepare = None
            self.accuse(epoch, -1, "it has not caught up with the others")
        return self._reason_to_end()

    def _mind_leaving(self, text: str, until: float) -> None:
        num_left = self._count_requests()
        if num_left and self._broken is None and time.monotonic() < until:
            return  # in a broken ring no request can finish here: each is computed again in any case
        self._leaving = None
        left = f"; {num_left} requests wait for the next one" if num_left else ""
        self.ring.request_stop(f"{text}{left}")

    def _mind_deadline(self, broken: StageLost) -> None:
        waited_s = time.monotonic() - self._broken_at
        if waited_s >= self._config.recovery_timeout_s and self.given_up is None:
            text = f"{broken}; it did not come back within {self._config.recovery_timeout_s:g} s"
            self.given_up = PeerError(text)
            logger.error("Stage 0: %s: requests are refused until it does", text)
            self._status.send(Phase.GIVEN_UP, text)

    def _reason_to_end(self) -> str | None:
        if self._launcher is not None and self._launcher.has_ended():
            return "the launcher is gone"
        return None

    def _tell(self, news: NewsSender, error: StagewireError | None = None) -> None:
        try:
            news.tell(self._describe_ring(error))
        except Exception:  # status is for people, and the ring must not end because of it
            news.skip()
            logger.debug("Stage 0: no status this time", exc_info=True)

    def _describe_ring(self, error: StagewireError | None = None) -> RingNews:
        state = self.ring.state
        return RingNews(
            phase=state.phase.value,
            epoch=state.epoch,
            waits_for="" if state.is_open or state.is_over else state.waits_for(),
            lost_stage=broken.stage if isinstance(broken := error or self._broken, StageLost) else None,
            linked=list(state.linked_stages),
            head=self.report(),
            steps=self.steps.summary(time.monotonic()),
        )

    def report(self) -> StageReport:
        return StageReport(
            stage=self._config.stage,
            layer_start=self._config.layers.start,
            layer_end=self._config.layers.end,
            state=self._state,
            pid=os.getpid(),
            host=socket.gethostname()[:64],
            address=self._address,
            age_ms=int((time.monotonic() - self._started_at) * 1000),
            rss_bytes=resident_bytes(self._ranks.followers.pids),
            device_bytes=torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0,
            kv_blocks=self._kv_blocks,
            cached_requests=self._count_requests(),
            last_step=self.last_step,
        )

    def on_reports(self, reports: Sequence[StageReport]) -> None:
        self._last_steps = {report.stage: report.last_step for report in reports}
        self.is_draining = any(report.state == "draining" for report in reports)
        if self._news is not None:
            self._news.tell_stages(reports, self.steps.per_stage())

    def on_log(self, text: str, is_warning: bool) -> None:
        logger.log(logging.WARNING if is_warning else logging.INFO, text)
        self._status.note(text)

    def on_bound(self, address: Address) -> None:
        self._address = str(address)[:128]
        shared = self._config.bind_port
        how = "" if address.port == shared else f", reached through port {shared}, which another stage owns"
        logger.info("Stage %d: listening on %s%s", self._config.stage, address, how)

    def on_open(self, epoch: int, identities: tuple[StageIdentity, ...]) -> None:
        if self._config.is_head:
            ranges = ", ".join(f"{i.stage}: {i.layer_start}-{i.layer_end}" for i in identities)
            logger.info("Stage 0: the ring is whole (%s)", ranges)
        if self._news is not None:
            self._tell(self._news)  # before the reports, which follow at once
        if self._broken is None:
            self._status.send(Phase.LINKED)
        if self._config.is_head:
            self._begin(epoch)
        else:
            self._broken = None

    def _begin(self, epoch: int) -> None:
        """At the head: lets all stages catch up. Then the thread that runs the model goes on."""
        entries = self.journal.entries()
        if not entries:
            self._set_whole(epoch)
            return
        call_id = secrets.randbelow(1 << 50)
        self._prepare = (epoch, call_id)
        self._prepare_until = time.monotonic() + call_limit_s(self._config, PREPARE)
        self.ring.send(Call(epoch, call_id, PREPARE), [encode_value(entries)])

    def takes(self, delivery: Delivery) -> bool:
        message = delivery.message
        if isinstance(message, (Step, Result)):
            self._awake.hold(time.monotonic())
        if self._prepare is None or not isinstance(message, Reply) or message.call_id != self._prepare[1]:
            return False
        epoch, _ = self._prepare
        self._prepare = None
        self._set_whole(epoch)
        return True

    def _set_whole(self, epoch: int) -> None:
        self.is_draining = False  # not earlier: the model's thread may not know of the loss yet, and would admit
        self.ring.inbox.put(Whole(epoch))
        if self._broken is not None:
            logger.info("Stage 0: the ring is whole again after %.1f s", time.monotonic() - self._broken_at)
            self._broken = None
            self._whole_at, self._is_recovered = time.monotonic(), False
            self.given_up = None
            self._status.send(Phase.READY if self._state == "serving" else Phase.LINKED)

    def on_broken(self, epoch: int, error: StageLost) -> None:
        self._prepare = None
        if self._broken is None and not self._is_relapse():
            self._broken_at = time.monotonic()
        self._broken = error
        if not self._config.is_head:
            return
        if self._news is not None:
            self._tell(self._news)
        self._status.send(Phase.RECOVERING, str(error))

    def _is_relapse(self) -> bool:
        """Whether the ring was whole only briefly, and the stages did not get their requests back."""
        return not self._is_recovered and time.monotonic() - self._whole_at < RELAPSE_S

    def on_failed(self, error: StagewireError) -> None:
        logger.error(report(self._config.stage, error))
        if self._news is not None:
            self._tell(self._news, error)
        text = (
            f"stage {self._config.stage} failed: {error}"
            if isinstance(error, (InternalError, RankError))
            else str(error)
        )
        self._status.send(Phase.FAILED, text, error.exit_code)
        self._exit_code = error.exit_code

    def on_stopped(self, text: str) -> None:
        logger.info("Stage %d: stopped (%s)", self._config.stage, text)
        self._status.send(Phase.STOPPED, text)
        if self._reason_to_end() is not None:
            self._exit_code = ORPHAN_EXIT_CODE
        elif not self._config.is_head or self._is_told_to_stop:
            self._exit_code = 0  # else vLLM has asked this head to stop, and ends it

    def on_ended(self) -> None:
        """The sockets are closed: ends the ranks and the process, but not a user's own Python (an in-process `LLM`)."""
        self._ranks.kill()
        self._awake.release_when_idle(math.inf)
        if self._exit_code is not None and not (self._config.is_head and not self.is_child):
            self.end(self._exit_code)
