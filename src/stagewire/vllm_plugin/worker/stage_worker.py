"""One rank of a stage's model: vLLM's own worker, its layers, and the input and output of a step.

The head (in EngineCore), the other stages (host/stage_host.py) and the followers of a tensor parallel stage
(ranks/follower.py) use the same class. It knows torch and vLLM's worker, and no socket.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerWrapperBase

from stagewire.config import StageConfig
from stagewire.errors import ConfigError, InternalError, PeerError
from stagewire.plan.ranges import PARTITION_ENV, partition_counts
from stagewire.vllm_plugin.codec.calls import CALLS, Runs, check_call
from stagewire.vllm_plugin.codec.schedules import decode_schedule, row_digest
from stagewire.vllm_plugin.codec.values import decode_value, encode_value
from stagewire.vllm_plugin.loading import model_cuts, range_loader
from stagewire.vllm_plugin.loading.model_cuts import drop_towers
from stagewire.vllm_plugin.seams import (
    container_memory,
    discarded_rows,
    interfaces,
    kv_cache_release,
    lora,
    neighbours_logprobs,
    tied_heads,
)
from stagewire.vllm_plugin.worker import cpu, pipeline_group, restore
from stagewire.vllm_plugin.worker.adapters import Adapters
from stagewire.vllm_plugin.worker.own_kv_cache import own_kv_cache_config
from stagewire.vllm_plugin.worker.pipeline_group import RankPlace
from stagewire.vllm_plugin.worker.speculation import prepare_runner, take_accepted
from stagewire.wire.codec import Frame
from stagewire.wire.messages import TensorSpec
from stagewire.wire.tensors import TensorPlan, check_tensors

__all__ = ["Activations", "CallOutcome", "StageWorker", "compile_ranks", "run_call"]

logger = logging.getLogger("vllm.stagewire")


class CallOutcome(NamedTuple):
    """The result of a call on one rank: type and text of its error (empty without one), and its value as bytes."""

    error_type: str
    error_text: str
    value: bytes


@dataclass(frozen=True)
class Activations:
    """What one forward pass hands to the next stage: specs and bytes in the same order, and the digest of the rows."""

    specs: list[TensorSpec]
    frames: list[Frame]
    digest: int


class StageWorker:
    """Builds vLLM's worker and loads the stage's layers.

    Args:
        config: this stage's place.
        vllm_config: resolved, in external mode (entry/external_mode.py).
        place: which of the stage's tensor parallel ranks this is.

    Raises:
        ConfigError: the model, its files or a setting do not allow this stage.
    """

    def __init__(self, config: StageConfig, vllm_config: VllmConfig, place: RankPlace) -> None:
        if not config.is_head:
            drop_towers(vllm_config)
        if vllm_config.use_v2_model_runner:
            raise ConfigError("external mode needs the V1 model runner: unset VLLM_USE_V2_MODEL_RUNNER")
        self.config = config
        self.vllm_config = vllm_config
        self.place = place
        self._is_pooling = vllm_config.model_config.runner_type == "pooling"
        self._pooled: Any = None
        if self._is_pooling:
            # If the last stage cached a query and were lost, the query's documents would fail.
            vllm_config.model_config.pooler_config.enable_flash_late_interaction = False
        lora.mend_lora()
        num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        counts = partition_counts(config.stage, config.num_stages, config.layers, num_layers)
        # Read by vllm.distributed.utils.get_pp_indices when the model is built, in this process.
        os.environ[PARTITION_ENV] = ",".join(str(count) for count in counts)
        discarded_rows.keep_generators_of_discarded_rows()
        neighbours_logprobs.keep_logprobs_of_neighbours()
        if current_platform.is_cpu():
            container_memory.count_page_cache_as_free()
        self._wrapper = WorkerWrapperBase(rpc_rank=0)
        self._init_device()
        range_loader.register()
        model_cuts.install(vllm_config.model_config)
        self._wrapper.load_model()
        tied_heads.check_heads(self.runner.get_model())
        if current_platform.is_cpu():
            cpu.release_second_copies(self.runner.get_model(), vllm_config, is_tail=config.is_tail)
        prepare_runner(self.runner, is_tail=config.is_tail)
        current_platform.update_block_size_for_backend(vllm_config)
        self.plan = self._plan_tensors()
        self.adapters = Adapters(config, self._wrapper)
        if config.stands_by:
            self._work_ahead()

    def __repr__(self) -> str:
        rank = f", rank={self.place.rank}/{self.place.size}" if self.place.size > 1 else ""
        return f"StageWorker(stage={self.config.stage}{rank}, layers={self.config.layers})"

    def _init_device(self) -> None:
        """Makes a torch.distributed world of the stage's ranks with our pipeline group, then initialises the worker."""
        arguments = {
            "vllm_config": self.vllm_config,
            "local_rank": self.place.rank,
            # vLLM divides this by the number of ranks to find the stage's layers, as if all stages had as many.
            "rank": self.config.stage * self.place.size + self.place.rank,
            "distributed_init_method": f"file://{self.place.store}",
            "is_driver_worker": self.config.is_tail and self.place.rank == 0,
        }
        self._wrapper.init_worker(all_kwargs=[arguments])
        with set_current_vllm_config(self.vllm_config):
            self.group = pipeline_group.install(self.config, self.place)
        self._wrapper.init_device()

    @property
    def runner(self) -> Any:
        return self._wrapper.worker.model_runner

    # ---- steps -----------------------------------------------------------------------------------------------------

    def execute(
        self, schedule: SchedulerOutput, digest: int, specs: Sequence[TensorSpec], frames: Sequence[Frame]
    ) -> Activations | None:
        """Runs the stage's layers on one schedule.

        Args:
            schedule: the head's decision.
            digest: of the head's rows; 0 on the head itself.
            specs, frames: the incoming tensors; empty on the head and for a schedule without tokens.

        Returns:
            What goes to the next stage. None on the tail (call `answer`), for a schedule without tokens, and on ranks
            other than 0: every rank has the whole activations, and one copy travels.

        Raises:
            PeerError: the tensors do not fit the plan, accepted drafts are missing, or this stage's rows differ from
                the head's.
        """
        num_tokens = schedule.total_num_scheduled_tokens
        if not self.config.is_tail:
            take_accepted(self.runner, schedule)
        if num_tokens and not self.config.is_head:
            check_tensors(self.plan, num_tokens, specs, frames)
            tensors = self._receive(num_tokens, specs, frames)
            self.group.put_incoming(tensors, lambda: self._check_rows(schedule, digest))
        output = self._wrapper.execute_model(schedule)
        if self._is_pooling:
            self._pooled = output
        if not num_tokens or self.config.is_tail:
            return None
        outgoing = self.group.take_outgoing()
        if self.place.rank:
            return None
        specs_out, frames_out = self._send(num_tokens, outgoing)
        return Activations(specs_out, frames_out, self.digest(schedule) if self.config.is_head else digest)

    def answer(self, grammar: GrammarOutput | None) -> ModelRunnerOutput:
        """On the tail, after `execute`: the sampled tokens and what else the requests asked for, or the pooled vectors.

        Raises InternalError when the worker returns something else.
        """
        output = self._pooled if self._is_pooling else self._wrapper.sample_tokens(grammar)
        if self._is_pooling and isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()  # waits for the copy from the device
        if not isinstance(output, ModelRunnerOutput):
            raise InternalError(f"the worker returned {type(output).__name__}: async scheduling must be off")
        return output

    def take_drafts(self) -> DraftTokenIds | None:
        """On the tail with speculation, after `answer` and before the next step: the drafts for that step."""
        drafts: DraftTokenIds | None = self._wrapper.take_draft_token_ids()
        return drafts

    def digest(self, schedule: SchedulerOutput) -> int:
        """The digest of this rank's rows, after `execute`; 0 for a schedule without tokens."""
        if not schedule.total_num_scheduled_tokens:
            return 0
        return row_digest(self.runner.input_batch.req_ids, schedule.num_scheduled_tokens)

    def _check_rows(self, schedule: SchedulerOutput, digest: int) -> None:
        if self.digest(schedule) != digest:
            raise PeerError(
                f"stage {self.config.stage} orders {len(schedule.num_scheduled_tokens)} rows otherwise than stage 0: "
                "its answer would be wrong, so the step is failed"
            )

    def _receive(self, num_rows: int, specs: Sequence[TensorSpec], frames: Sequence[Frame]) -> dict[str, torch.Tensor]:
        """Copies the frames into the runner's own buffers, which have room for any padding."""
        buffers = self.runner.intermediate_tensors.tensors
        for spec, frame in zip(specs, frames, strict=True):
            dtype = getattr(torch, spec.dtype)
            incoming = torch.frombuffer(frame, dtype=dtype).view(spec.shape)  # [num_rows, ...]
            buffers[spec.name][:num_rows].copy_(incoming)
        return dict(buffers)

    def _send(self, num_rows: int, tensors: dict[str, torch.Tensor | None]) -> tuple[list[TensorSpec], list[Frame]]:
        """Unpadded rows as bytes. A tensor in the runner's own buffers is copied, because the next step overwrites it.

        A model may declare a tensor and hand on None (MiniCPM's residual). Zeros travel for it, so that every step has
        the same tensors.
        """
        declared = {each.name: each for each in self.plan}
        persistent = {tensor.untyped_storage().data_ptr() for tensor in self._buffers()}
        specs: list[TensorSpec] = []
        frames: list[Frame] = []
        for name, handed_on in tensors.items():
            tensor = _zeros(declared[name], num_rows) if handed_on is None else handed_on
            rows = tensor[:num_rows].contiguous().cpu()  # [num_rows, ...]
            if rows.untyped_storage().data_ptr() in persistent:
                rows = rows.clone()
            specs.append(TensorSpec(name, str(rows.dtype).removeprefix("torch."), list(rows.shape)))
            frames.append(memoryview(rows.view(-1).view(torch.uint8).numpy()))
        if not self.config.is_tail:
            check_tensors(self.plan, num_rows, specs, frames)
        return specs, frames

    def _buffers(self) -> list[torch.Tensor]:
        held = self.runner.intermediate_tensors
        return [] if held is None else list(held.tensors.values())

    def _plan_tensors(self) -> list[TensorPlan]:
        """Names, dtypes and trailing shapes of the tensors between stages, as the model declares them.

        Also allocates the runner's receive buffers. vLLM allocates them while it warms up, so never in eager mode on
        CPU.
        """
        model = self.runner.get_model()
        dtype = self.vllm_config.model_config.dtype
        declared = model.make_empty_intermediate_tensors(
            batch_size=self.runner.max_num_tokens, dtype=dtype, device=self.runner.device
        )
        if not self.config.is_head and self.runner.intermediate_tensors is None:
            self.runner.intermediate_tensors = declared
        return [
            TensorPlan(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]))
            for name, tensor in declared.tensors.items()
        ]

    # ---- calls -----------------------------------------------------------------------------------------------------

    def call(self, method: str, args: tuple[Any, ...], first_rank: int = 0) -> Any:
        """Runs one call of the closed list on this worker.

        Args:
            method, args: of codec.calls.CALLS.
            first_rank: how many workers the earlier stages have. vLLM picks this worker's KV cache config by it.

        Raises:
            ConfigError: the method is not on the list or not for a rank, or an argument has another type.
        """
        check_call(method, args)
        self._wrapper.global_rank = first_rank + self.place.rank
        spec = CALLS[method]
        if spec.runs is Runs.HOST:
            raise ConfigError(f"{method} is for a whole stage, not for one of its ranks")
        runs_it = self if spec.runs is Runs.RANK else self._wrapper
        names = list(spec.args)
        first = len(names) - spec.by_keyword
        return getattr(runs_it, method)(*args[:first], **dict(zip(names[first:], args[first:], strict=True)))

    def supported_tasks(self) -> tuple[Any, ...]:
        """What the model can do, as vLLM names it. It is the same on every stage, so the head asks its own rank."""
        return tuple(self._wrapper.get_supported_tasks())

    def check_lora(self, request: LoRARequest) -> str:
        return self.adapters.check(request)

    def add_lora(self, request: LoRARequest) -> bool:
        return self.adapters.add(request)

    def determine_available_memory(self) -> int:
        """vLLM's own, after our check: where memory is short, vLLM's check ends with a traceback."""
        if current_platform.is_cpu():
            kv_bytes = self.vllm_config.cache_config.kv_cache_memory_bytes
            cpu.check_kv_room(self.config, kv_bytes, self.place.size)
        return int(self._wrapper.determine_available_memory())

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        """vLLM's own, with this stage's sizes. Replaces the KV cache that an earlier head's configuration made."""
        worker = self._wrapper.global_rank
        specs = self._wrapper.get_kv_cache_spec()
        config = own_kv_cache_config(kv_cache_configs, worker, specs, self.vllm_config)
        if current_platform.is_cpu() and config.kv_cache_groups:
            per_block = interfaces.bytes_per_kv_block(self.vllm_config, config.kv_cache_groups)
            cpu.check_kv_memory(config.num_blocks, per_block * self.place.size)
        if self.runner.attn_groups:
            kv_cache_release.release_kv_cache(self.runner)
        self._wrapper.initialize_from_config([*[None] * worker, config])  # the wrapper picks by its global rank

    def restore_requests(self, schedule: bytes | SchedulerOutput, outputs: list[list[int]], is_first: bool) -> None:
        """Builds the live requests anew; ``is_first``: after forgetting all requests.

        ``schedule``: as it travels; on the head the schedule itself, with the images, which do not travel.
        ``outputs``: the tokens that each request has got so far.
        """
        if isinstance(schedule, bytes):
            schedule = decode_schedule(schedule, self.adapters.known)
        if is_first:
            self.forget_requests()
        restore.restore_requests(self._wrapper, schedule, outputs)

    def forget_requests(self) -> None:
        """Drops all state of requests and of the last step."""
        self._pooled = None
        self.group.forget()
        restore.forget_requests(self._wrapper)

    def get_reorder_batch_threshold(self) -> int | None:
        return getattr(self.runner, "reorder_batch_threshold", None)

    def set_reorder_batch_threshold(self, threshold: int | None) -> None:
        self.runner.reorder_batch_threshold = threshold

    def get_stage_state(self) -> dict[str, Any]:
        batch = getattr(self.runner, "input_batch", None)
        return {
            "stage": self.config.stage,
            "rank": self.place.rank,
            "cached_requests": len(self.runner.requests),
            "rows": 0 if batch is None else batch.num_reqs,
            "num_kv_blocks": self.vllm_config.cache_config.num_gpu_blocks or 0,
            "cpu_s": time.process_time(),
            "activations": [f"{each.name}: {each.dtype} {list(each.trailing)}" for each in self.plan],
        }

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's own. Then excludes all objects that exist from garbage collection, as only vLLM's GPU worker does.

        They live as long as the stage, and a full collection of them would stop the whole ring.
        """
        result = self._wrapper.compile_or_warm_up_model()
        freeze_gc_heap()
        return result

    def _work_ahead(self) -> None:
        """On a standby: does now what clients would otherwise wait for after it has taken over."""
        if self.config.is_tail and not self._is_pooling:
            compile_ranks(self.runner.sampler, self.vllm_config.model_config.get_vocab_size(), self.runner.device)
        freeze_gc_heap()

    def shutdown(self) -> None:
        self._wrapper.shutdown()


def compile_ranks(sampler: Any, vocab_size: int, device: torch.device) -> None:
    """Compiles what vLLM would compile in the first step that asks for log-probabilities.

    It takes seconds, also when torch has it in its cache. If it cannot be compiled, only a warning is logged, because
    requests without log-probabilities do not need it.
    """
    logits = torch.zeros((1, vocab_size), device=device)
    sampled = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        with torch.inference_mode():
            sampler.gather_logprobs(logits, 1, token_ids=sampled)
    except TorchDynamoException as error:
        logger.warning("Requests for log-probabilities will fail on this stage: %s", str(error).strip().splitlines()[0])


def _zeros(plan: TensorPlan, num_rows: int) -> torch.Tensor:
    """# [num_rows, *plan.trailing]"""
    return torch.zeros((num_rows, *plan.trailing), dtype=getattr(torch, plan.dtype))


def run_call(
    worker: StageWorker, method: str, args_bytes: Frame, first_rank: int, args: tuple[Any, ...] | None = None
) -> CallOutcome:
    """Runs one call on one rank. Never raises: an error is part of the outcome.

    Args:
        worker, method, first_rank: as `StageWorker.call` takes them.
        args_bytes: the arguments as they travel.
        args: the arguments themselves, where they hold more than what travels.
    """
    try:
        given = decode_value(args_bytes) if args is None else args
        return CallOutcome("", "", encode_value(worker.call(method, given, first_rank)))
    except Exception as error:  # the head must hear of any error
        logger.exception("%r: the call %s failed", worker, method)
        return CallOutcome(type(error).__name__, str(error), encode_value(None))
