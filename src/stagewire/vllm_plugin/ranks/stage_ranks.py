"""All ranks of one stage as one: this process's own worker (rank 0, the leader) and its followers' processes.

Every rank runs every schedule and every call. Activations are complete at a stage's boundary. So a stage receives once,
tells its followers what came in, and sends rank 0's tensors on. Followers have no ring and no HTTP. A stage of one rank
has no followers and runs the same code. Knows no socket, no epoch and no other stage.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from stagewire.config import StageConfig
from stagewire.errors import ConfigError, InternalError, RankError
from stagewire.folders import private_folder
from stagewire.observe.deadlines import StepDeadlines
from stagewire.observe.processes import watch_spawned
from stagewire.vllm_plugin.codec.calls import CALLS
from stagewire.vllm_plugin.codec.schedules import decode_grammar, encode_schedule, token_digest
from stagewire.vllm_plugin.codec.values import encode_value
from stagewire.vllm_plugin.ranks.follower import run_follower
from stagewire.vllm_plugin.ranks.local_link import Block, CallDone, Follower, Followers, RunCall, RunSample, RunStep
from stagewire.vllm_plugin.worker.pipeline_group import RankPlace
from stagewire.vllm_plugin.worker.stage_worker import Activations, CallOutcome, StageWorker, run_call
from stagewire.wire.codec import Frame
from stagewire.wire.messages import CallResult, TensorSpec

__all__ = ["StageRanks", "call_limit_s", "is_step_failure"]

# A stage whose ranks hang reports that before the head's deadline for the step. The head could only guess the stage.
SHARE_OF_TIMEOUT = 0.9
# The head watches a stage of one rank. This limit is for a stage that hangs in a step which the head has lost with the
# ring.
TIMES_TIMEOUT_ALONE = 2


def call_limit_s(config: StageConfig, method: str) -> float:
    """How many seconds a call may take: the step timeout, or for a slow call an hour or the longer start timeout.

    Compiling may take many minutes on a first start.
    """
    is_slow = method in CALLS and CALLS[method].is_slow
    return max(config.start_timeout_s, 3600.0) if is_slow else config.step_timeout_s


def is_step_failure(ranks: StageRanks, error: Exception) -> bool:
    """Whether only a step failed, and the stage can go on.

    It cannot with several ranks, which may be stuck in a collective, or with a device in an unknown state.
    """
    if isinstance(error, (ConfigError, InternalError, RankError)) or ranks.num_ranks > 1:
        return False
    return not isinstance(error, torch.AcceleratorError) and _device_answers()


def _device_answers() -> bool:
    """Whether the device still works: one in an unknown state fails at the next synchronization."""
    if not torch.accelerator.is_available():
        return True
    try:
        torch.accelerator.synchronize()
    except RuntimeError:
        return False
    return True


class StageRanks:
    """Spawns the followers when it is made, so that they inherit no socket of the ring. `load` loads the model.

    Args:
        config: this stage's place.
        vllm_config: resolved; ``tensor_parallel_size`` is the number of ranks.
    """

    own: StageWorker  # rank 0, once it is loaded

    def __init__(self, config: StageConfig, vllm_config: VllmConfig) -> None:
        self.config = config
        self.vllm_config = vllm_config
        self.num_ranks = vllm_config.parallel_config.tensor_parallel_size
        self._folder = contextlib.ExitStack()
        self._store = Path(self._folder.enter_context(private_folder())) / "store"
        self._is_pooling = vllm_config.model_config.runner_type == "pooling"
        self._unsettled: list[int] = []
        # Like the head's deadlines, but a share of them: this stage reports first, and with the pids of its ranks.
        self._deadlines = StepDeadlines(config.step_timeout_s)
        self._last = 0, 0.0  # tokens of the last step, and how long it took
        block = Block()
        self.followers = Followers([self._spawn(rank, block) for rank in range(1, self.num_ranks)], block)
        share = SHARE_OF_TIMEOUT if self.followers else TIMES_TIMEOUT_ALONE
        self._limit_s = config.step_timeout_s * share  # for the last step
        if self.followers:
            # At exit multiprocessing waits for its children without a limit, so the followers must have ended by then.
            Finalize(self, self.followers.kill, exitpriority=100)

    def __repr__(self) -> str:
        return f"StageRanks(stage={self.config.stage}, {self.followers!r})"

    def _spawn(self, rank: int, block: Block) -> Follower:
        maybe_register_config_serialize_by_value()
        context = multiprocessing.get_context("spawn")
        connection, their_end = context.Pipe()
        failures, their_failures = context.Pipe(duplex=False)
        place = RankPlace(rank, self.num_ranks, self._store)
        arguments = (self.config, self.vllm_config, place, their_end, their_failures, block)
        name = f"Stage{self.config.stage}_TP{rank}"
        process = context.Process(target=run_follower, args=arguments, name=name, daemon=True)
        with watch_spawned(f"Stage {self.config.stage}, tensor parallel rank {rank}"):
            process.start()
        their_end.close()
        their_failures.close()
        return Follower(rank, process, connection, failures)

    def load(self) -> None:
        """Loads this rank's part, and returns when all ranks have loaded theirs.

        Raises:
            RankError: a follower has failed.
        """
        with self.followers.work("loading", None):
            self.own = StageWorker(self.config, self.vllm_config, RankPlace(0, self.num_ranks, self._store))
            self.followers.settle(0)
        self._folder.close()

    # ---- steps -----------------------------------------------------------------------------------------------------

    def execute(
        self,
        schedule: SchedulerOutput,
        schedule_bytes: Frame,
        digest: int,
        specs: Sequence[TensorSpec],
        frames: Sequence[Frame],
    ) -> Activations | None:
        """`StageWorker.execute` on all ranks; ``schedule_bytes`` is the schedule as it travels.

        Raises:
            RankError: a rank has ended, or its rows differ from rank 0's. Others as `StageWorker.execute`.
        """
        num_tokens = schedule.total_num_scheduled_tokens
        # The head runs the encoder of images in the same step. The number of tokens does not say how long that takes.
        has_images = bool(schedule.scheduled_encoder_inputs)
        limit_s = self.config.step_timeout_s if has_images else self._deadlines.limit_s(num_tokens)
        if self.followers:
            self._limit_s = limit_s * SHARE_OF_TIMEOUT
        began = time.monotonic()
        with self.followers.work("a step", self._limit_s, counts_alone=not self.config.is_head):
            self.followers.send(RunStep(digest, list(specs)), [schedule_bytes, *frames])
            activations = self.own.execute(schedule, digest, specs, frames)
            if self.followers:
                self._unsettled.append(self.own.digest(schedule))
            if self._is_pooling or not self.config.is_tail or not num_tokens:
                self._settle()
        self._last = num_tokens, time.monotonic() - began
        if not has_images:
            self._deadlines.add(*self._last)
        return activations

    def answer(self, grammar: Frame | None) -> ModelRunnerOutput:
        """On the tail, after `execute`: all ranks sample the same tokens, as in stock vLLM. Returns rank 0's.

        With a pooling model every rank has pooled in `execute` already. Returns rank 0's vectors.

        Raises:
            RankError: a rank has ended, or has sampled other tokens than rank 0.
        """
        if self._is_pooling:
            return self.own.answer(None)
        began = time.monotonic()
        with self.followers.work("sampling", self._limit_s, counts_alone=not self.config.is_head):
            self.followers.send(RunSample(), [] if grammar is None else [grammar])
            output = self.own.answer(None if grammar is None else decode_grammar(grammar))
            if self.followers:
                self._unsettled.append(token_digest(output))
            self._settle()
        num_tokens, spent_s = self._last
        self._deadlines.add(num_tokens, spent_s + time.monotonic() - began)
        return output

    def _settle(self) -> None:
        self.followers.settle(*self._unsettled)
        self._unsettled.clear()

    # ---- calls -----------------------------------------------------------------------------------------------------

    def call(
        self, method: str, args_bytes: Frame, first_rank: int, own_args: tuple[Any, ...] | None = None
    ) -> tuple[list[CallResult], list[Frame]]:
        """Runs one call of the closed list on all ranks. Returns a result and an encoded value for each, in order.

        Args:
            method: its name.
            args_bytes: the arguments by `codec.values.encode_value`.
            first_rank: how many workers the earlier stages have.
            own_args: rank 0's arguments, if they hold more than what travels.

        Raises:
            RankError: a rank has ended. A call that fails is a result.
        """
        if self._unsettled:  # the last step was lost before it was sampled
            self._settle()
        limit_s = call_limit_s(self.config, method) * SHARE_OF_TIMEOUT
        with self.followers.work(f"the call {method}", limit_s, counts_alone=True):
            self.followers.send(RunCall(method, first_rank), [args_bytes])
            own = run_call(self.own, method, args_bytes, first_rank, own_args)
            outcomes: list[CallOutcome | CallDone] = [own, *self.followers.answers()]
        results = [
            CallResult(self.config.stage, rank, each.error_type, each.error_text) for rank, each in enumerate(outcomes)
        ]
        return results, [each.value for each in outcomes]

    def forget(self) -> None:
        """Makes every rank forget its requests and its adapters. Raises InternalError if one cannot."""
        results, _ = self.call(
            "restore_requests", encode_value((encode_schedule(SchedulerOutput.make_empty()), [], True)), 0
        )
        for lora_id in list(self.own.adapters.known):
            more, _ = self.call("remove_lora", encode_value((lora_id,)), 0)
            results += more
            del self.own.adapters.known[lora_id]
        failed = next((result for result in results if result.error_type), None)
        if failed is not None:
            raise InternalError(f"cannot forget its requests: {failed.error_type}: {failed.error_text}")

    # ---- end -------------------------------------------------------------------------------------------------------

    def problem(self) -> RankError | None:
        """`Followers.problem`, for the ring's thread."""
        return self.followers.problem()

    def kill(self) -> None:
        """Ends the followers at once and removes their folder. From any thread."""
        self.followers.kill()
        self._folder.close()

    def shutdown(self) -> None:
        self.followers.close()
        self.own.shutdown()
