"""Which vLLM versions work, and every patch of vLLM: each with its reason and what would remove it.

A patch raises when its target has moved; nothing is patched by import. tests/vllm/test_seams.py has one test per seam.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import InvalidStateError
from dataclasses import dataclass
from typing import Any
from unittest import mock

from stagewire.errors import ConfigError
from stagewire.observe.processes import watch_spawned

__all__ = [
    "PATCHES",
    "SUPPORTED",
    "add",
    "bytes_per_kv_block",
    "check_version",
    "end_waits_for_dead_engine",
    "frontend_args",
    "install_flag_patches",
    "interrupt_engine_start",
    "is_at_least",
    "keep_generators_of_discarded_rows",
    "keep_logprobs_of_neighbours",
    "let_engine_say_goodbye",
    "mapped_name",
    "mend_lora",
    "on_engine_shutdown",
    "plan_kv_cache",
    "returns_routed_experts",
    "watch_engine",
    "wrap",
]

SUPPORTED = ((0, 30), (0, 33))  # from, below
_MARK = "__stagewire_patch__"


@dataclass(frozen=True)
class Patch:
    target: str  # module:qualified.name
    reason: str
    until: str


# The second module imports the operators of the first by name.
_TORCH_LORA_MODULES = ("ops.torch_ops.lora_ops", "punica_wrapper.punica_cpu")
_TORCH_LORA_OPERATORS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")

PATCHES = (
    Patch(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "adds the flags; vLLM loads plugins right before it looks this method up",
        "vLLM lets a plugin add arguments",
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "it drops what is not a field of the dataclass, so flags are translated here for every entry point",
        "vLLM lets a plugin see the parsed arguments",
    ),
    Patch(
        "vllm.entrypoints.cli.serve:ServeSubcommand.cmd",
        "a worker stage serves the ring instead of HTTP; the head checks its settings before anything starts",
        "vLLM has a hook for serve",
    ),
    Patch(
        "vllm.entrypoints.launchers.api_server.entry:setup_server",
        "answers 503 with a reason on the bound socket until the engine is up; only in a head's process",
        "vLLM listens before its engine is up",
    ),
    Patch(
        "vllm.entrypoints.launchers.api_server.entry:build_and_serve",
        "hands that socket over to the API server; only in a head's process",
        "vLLM listens before its engine is up",
    ),
    Patch(
        "vllm.v1.engine.utils:get_engine_process_shutdown_timeout",
        "without a drain vLLM kills EngineCore right after SIGTERM, before the ring could say goodbye; only in a "
        "head's process, where it gets the grace that ROCm gets",
        "the grace is not for ROCm alone",
    ),
    Patch(
        "vllm.v1.engine.utils:CoreEngineProcManager.__init__",
        "EngineCore imports for seconds before it can notice that its parent was killed, and a killed EngineCore is "
        "noticed by vLLM but told to nobody; only in a process that starts EngineCore",
        "vLLM's EngineCore ends with its parent from the start, and its API server with EngineCore",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.shutdown",
        "the first thing that vLLM's API server does when it is told to stop while it serves: from here on there is a "
        "deadline, and EngineCore's end is no error any more, which vLLM prints a traceback for now and then; only in "
        "a head's process",
        "vLLM ends within a time and without a traceback",
    ),
    Patch(
        "vllm.v1.engine.core_client:MPClient.shutdown",
        "vLLM's monitor calls it when EngineCore has been killed: it ends the thread that takes answers in, and "
        "`LLM.generate` and every other call wait for ever; only in a head's process without an API",
        "vLLM raises EngineDeadError where an `LLM` waits for a killed EngineCore",
    ),
    Patch(
        "vllm.v1.engine.utils:zmq_socket_ctx",
        "it swallows Ctrl-C while EngineCore starts, and an `LLM` then waits ten minutes for an engine that may itself "
        "wait for other stages; only in a head's process without an API",
        "vLLM passes KeyboardInterrupt on",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
        "a seeded request whose prompt is computed in chunks ends stock vLLM on CPU: it draws a token for every chunk, "
        "throws it away and rewinds the generator, which CPU generators cannot do; only where a stage's layers run",
        "vLLM does not draw for rows that it discards, or can rewind a CPU generator",
    ),
    Patch(
        "vllm.v1.sample.sampler:Sampler.forward",
        "notes how many log-probabilities the batch asks for, for the next patch; only where a stage's layers run",
        "the next one is gone",
    ),
    Patch(
        "vllm.v1.sample.sampler:Sampler.gather_specific_token_logprobs",
        "beside one request with logprob_token_ids every other request of the step loses its likeliest tokens, and a "
        "beam search its beams; rows without such a list get what they asked for; only where a stage's layers run",
        "vLLM gathers both kinds row by row",
    ),
    Patch(
        "vllm.v1.worker.cpu_worker:get_memory_node_info",
        "of a container's memory vLLM counts the page cache as taken, which is full of the checkpoint after loading, "
        "and refuses a KV cache for which there is room; it does not see limits of outer groups, or mounted elsewhere; "
        "only where a stage's layers run on a CPU",
        "vLLM leaves the page cache out and looks at every group above its own",
    ),
    Patch(
        "vllm.model_executor.models.gemma4:Gemma4Model.forward",
        "stages after the first do not look at the per-layer inputs that came in, and so compute without them; only in "
        "a process that runs a Gemma 4",
        "vLLM takes them from the intermediate tensors whenever they are there",
    ),
    Patch(
        "vllm.model_executor.models.utils:PPMissingLayer.forward",
        "some models loop over the layers of all stages; called with hidden states and residual by name, a missing "
        "layer must return both and returns whatever was named first; only in a stage's process",
        "models loop over their own layers",
    ),
    Patch(
        "vllm.model_executor.models.utils:PPMissingLayer.tie_weights",
        "some models tie the output head to the embedding on every stage, also where there is no head; only in a "
        "stage's process",
        "models tie on the last stage alone, or a missing layer can be tied",
    ),
    Patch(
        "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead.tie_weights",
        "some models have the embedding on the first stage alone and tie the last stage's head to it all the same: the "
        "head keeps a tensor of its own there, which is read from the embedding's; only in a stage's process",
        "models build the embedding on the last stage too when it is tied",
    ),
    Patch(
        "vllm.model_executor.models.transformers.base:Base.pipeline_parallel",
        "the Transformers backend runs what comes between embedding and first layer (positions, a norm) again on later "
        "stages; only in a process that runs a model through that backend",
        "later stages leave it out",
    ),
    Patch(
        "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters",
        "a step's adapters come as a set of names, which each process iterates in an order of its own, so stages would "
        "evict different ones; only in a stage's process",
        "vLLM touches a step's adapters in an order that is the same everywhere",
    ),
    *(
        Patch(
            f"vllm.lora.{module}:{name}",
            "-1 stands for the base model and is used as an index, so requests to the base model get the last slot's "
            "adapter when their batch has adapters; only in a stage's process, without effect off the CPU",
            "vLLM 0.33 is the oldest that is supported: its torch operators leave out rows of index -1",
        )
        for module in _TORCH_LORA_MODULES
        for name in _TORCH_LORA_OPERATORS
    ),
)

# Saying goodbye takes milliseconds. What follows, vLLM's own teardown, spends seconds in the garbage collector, and
# stock vLLM never waits for it.
ENGINE_STOP_GRACE_S = 2.0


def is_at_least(major: int, minor: int) -> bool:
    """Whether the installed vLLM is this version or a later one; for what its versions name or take differently."""
    from vllm.version import __version_tuple__

    return tuple(__version_tuple__[:2]) >= (major, minor)


def bytes_per_kv_block(vllm_config: Any, groups: Any) -> int:
    """Bytes of one block of a worker's KV cache, all its layers together."""
    module = "kv_cache_planning" if is_at_least(0, 33) else "kv_cache_utils"
    count: Callable[..., int] = importlib.import_module(f"vllm.v1.core.{module}")._pool_bytes_per_block
    return count(vllm_config, groups) if is_at_least(0, 32) else count(groups)


def plan_kv_cache(vllm_config: Any, groups: Any, num_blocks: int) -> Any:
    """vLLM's own KV cache configuration of these groups of layers. It may have another number of blocks, by a flag."""
    if is_at_least(0, 33):
        builder = importlib.import_module("vllm.v1.core.kv_cache_config_builder")
        return builder.get_kv_cache_config_builder(vllm_config).get_kv_cache_config_from_groups(
            vllm_config, groups, num_blocks
        )
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    num_bytes = num_blocks * bytes_per_kv_block(vllm_config, groups)
    return utils.get_kv_cache_config_from_groups(vllm_config, groups, num_bytes)


def frontend_args() -> Any:
    """The dataclass of the API server's own arguments."""
    package = "common" if is_at_least(0, 33) else "launchers"
    return importlib.import_module(f"vllm.entrypoints.{package}.cli_args").FrontendArgs


def main_task(supported_tasks: Sequence[str], model_config: Any) -> str:
    """What a model is for, as vLLM's API server picks its routes; ``score`` if that is to compare two texts."""
    if "generate" in supported_tasks:
        return "generate"
    task: str | None = model_config.get_pooling_task(tuple(supported_tasks))
    if task is None:
        return supported_tasks[0] if supported_tasks else ""
    is_cross_encoder = task == "classify" and getattr(model_config.hf_config, "num_labels", 0) == 1
    return "score" if is_cross_encoder else task


def mapped_name(mapper: Any, name: str) -> str | None:
    """A tensor's name in vLLM's model, by the model's ``WeightsMapper`` if it has one; None: it is dropped."""
    if mapper is None:
        return name
    mapped: str | None = mapper.map_name(name) if is_at_least(0, 31) else mapper._map_name(name)
    return mapped


def returns_routed_experts(vllm_config: Any) -> bool:
    """Whether answers are to name the experts that each token went to."""
    holder = vllm_config.aux_output_config if is_at_least(0, 31) else vllm_config.model_config
    return bool(holder.enable_return_routed_experts)


def check_version() -> None:
    """Raises ConfigError naming the installed and the supported versions."""
    from vllm.version import __version__

    if not is_at_least(*SUPPORTED[0]) or is_at_least(*SUPPORTED[1]):
        low, high = (".".join(str(part) for part in bound) for bound in SUPPORTED)
        raise ConfigError(
            f"vLLM {__version__} is installed, this Stagewire supports vllm>={low},<{high}: install a supported vLLM, "
            "or a Stagewire release for this one"
        )


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Replaces ``owner.name`` by ``make(original)``, once.

    Raises:
        ConfigError: there is no such attribute; this vLLM is not the one that the patch was written for.
    """
    original = vars(owner).get(name)
    if original is None:
        raise ConfigError(f"{getattr(owner, '__name__', owner)}.{name} is gone in this vLLM: {_expected()}")
    function = original.__func__ if isinstance(original, (staticmethod, classmethod)) else original
    if hasattr(function, _MARK):
        return
    replacement = functools.wraps(function)(make(function))
    setattr(replacement, _MARK, True)
    if isinstance(original, (staticmethod, classmethod)):
        setattr(owner, name, type(original)(replacement))
    else:
        setattr(owner, name, replacement)


def add(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Gives ``owner`` a method that it lacks, once.

    Raises:
        ConfigError: there is one already; this vLLM is not the one that the patch was written for.
    """
    existing = vars(owner).get(name)
    if existing is not None and not hasattr(existing, _MARK):
        raise ConfigError(f"{getattr(owner, '__name__', owner)}.{name} exists in this vLLM: {_expected()}")
    if existing is None:
        setattr(function, _MARK, True)
        setattr(owner, name, function)


def let_engine_say_goodbye() -> None:
    """In the process that started EngineCore: time to tell the ring that the head stops."""
    from vllm.v1.engine import utils

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_engine_process_shutdown_timeout(request_timeout: Any, process_timeout: Any) -> Any:
            timeout = original(request_timeout, process_timeout)
            return ENGINE_STOP_GRACE_S if request_timeout == 0 and timeout == 0 else timeout

        return get_engine_process_shutdown_timeout

    wrap(utils, "get_engine_process_shutdown_timeout", make)


def watch_engine(act: Callable[[Any], None] | None = None) -> None:
    """In the process that starts EngineCore: that one ends with this one, whatever it does.

    Args:
        act: called with EngineCore's process of multiprocessing once it is started.
    """
    from vllm.v1.engine.utils import CoreEngineProcManager

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            with watch_spawned("EngineCore"):
                original(self, *args, **kwargs)
            if act is not None:
                for process in self.processes:
                    act(process)

        return init

    wrap(CoreEngineProcManager, "__init__", make)


def on_engine_shutdown(act: Callable[[float], None]) -> None:
    """In an API server: ``act`` is called when it begins to stop, with the seconds that open requests may take.

    From then on EngineCore's end is no error. vLLM reports one now and then: `AsyncLLM` takes the end of its connection
    for a death unless its task has been cancelled before.
    """
    from vllm.v1.engine import async_llm
    from vllm.v1.engine.exceptions import EngineDeadError

    def is_news(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], EngineDeadError))

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def shutdown(self: Any, timeout: float | None = None) -> None:
            act(timeout or 0.0)
            async_llm.logger.addFilter(is_news)
            original(self, timeout)

        return shutdown

    wrap(async_llm.AsyncLLM, "shutdown", make)


def end_waits_for_dead_engine(tell: Callable[[Any], None]) -> None:
    """In a head's process without an API: whoever waits for EngineCore when it dies gets vLLM's EngineDeadError.

    Args:
        tell: called before that, with EngineCore's process of multiprocessing.
    """
    from vllm.v1.engine.core_client import MPClient, SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def shutdown(self: Any, timeout: float | None = None) -> None:
            is_dead, manager = self.resources.engine_dead, self.resources.engine_manager
            try:
                original(self, timeout)
            finally:
                # A client that is still being made has no queue. Whoever asks it later is refused by vLLM itself.
                if is_dead and isinstance(self, SyncMPClient) and hasattr(self, "outputs_queue"):
                    for process in manager.processes if manager is not None else ():
                        tell(process)
                    self.outputs_queue.put_nowait(EngineDeadError())
                    for future in list(self.utility_results.values()):
                        with contextlib.suppress(InvalidStateError):  # its answer came at the last moment
                            future.set_exception(EngineDeadError())

        return shutdown

    wrap(MPClient, "shutdown", make)


def interrupt_engine_start() -> None:
    """In a head's process without an API: Ctrl-C while EngineCore starts is KeyboardInterrupt in the user's Python."""
    from vllm.v1.engine import utils

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def zmq_socket_ctx(*args: Any, **kwargs: Any) -> Iterator[Any]:
            interrupt = None
            with original(*args, **kwargs) as socket:
                try:
                    yield socket
                except KeyboardInterrupt as error:
                    interrupt = error
                    raise
            if interrupt is not None:
                raise interrupt

        return zmq_socket_ctx

    wrap(utils, "zmq_socket_ctx", make)


def keep_generators_of_discarded_rows() -> None:
    """In a process that runs layers: a row whose token is thrown away leaves its request's generator as it was.

    `GPUModelRunner._bookkeeping_sync` calls ``set_offset(get_offset() - 4)`` for such rows; without a generator in the
    batch nothing is drawn from it and nothing is rewound. Others than CPU generators can be, and stay.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def sample_tokens(self: Any, grammar_output: Any) -> Any:
            batch = self.input_batch
            is_discarded = self.discard_request_mask.np
            aside = {
                row: generator
                for row, generator in batch.generators.items()
                if row < batch.num_reqs and is_discarded[row] and generator.device.type == "cpu"
            }
            for row in aside:
                del batch.generators[row]  # the very dict that the sampler reads
            try:
                return original(self, grammar_output)
            finally:
                batch.generators.update(aside)

        return sample_tokens

    wrap(GPUModelRunner, "sample_tokens", make)


def keep_logprobs_of_neighbours() -> None:
    """In a process that runs layers: rows without ``logprob_token_ids`` keep their top log-probabilities.

    `Sampler.forward` prefers the chosen tokens' table to the likeliest tokens' for the whole batch. The table made here
    has a row's own kind in each row, as wide as the wider kind; vLLM's API server cuts a row to what it asked for.
    """
    import torch
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.sampler import Sampler

    def make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            self.stagewire_num_logprobs = sampling_metadata.max_num_logprobs
            return original(self, logits, sampling_metadata, *args, **kwargs)

        return forward

    def make_gather(original: Callable[..., Any]) -> Callable[..., Any]:
        def gather_specific_token_logprobs(self: Any, logprobs: Any, logprob_token_ids: Any, sampled: Any) -> Any:
            chosen = original(self, logprobs, logprob_token_ids, sampled)
            count = self.stagewire_num_logprobs
            if chosen is None or count is None or count < 0:  # nobody asks for the likeliest, or for all tokens
                return chosen
            top = self.gather_logprobs(logprobs, count, token_ids=sampled)
            num_rows, width = len(sampled), max(chosen.logprobs.shape[1], top.logprobs.shape[1])
            ids = chosen.logprob_token_ids.new_zeros(num_rows, width)
            values = chosen.logprobs.new_full((num_rows, width), float("-inf"))
            rows = torch.tensor([row not in logprob_token_ids for row in range(num_rows)], device=ids.device)
            for table, of in ((chosen, ~rows), (top, rows)):
                ids[of, : table.logprobs.shape[1]] = table.logprob_token_ids[of]
                values[of, : table.logprobs.shape[1]] = table.logprobs[of]
            return LogprobsTensors(ids, values, chosen.selected_token_ranks)

        return gather_specific_token_logprobs

    wrap(Sampler, "forward", make_forward)
    wrap(Sampler, "gather_specific_token_logprobs", make_gather)


def mend_lora() -> None:
    """In a stage's process, before the first step: both patches of LoRA."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _apply_adapters(self: Any, lora_requests: Any) -> None:
            original(self, sorted(lora_requests, key=lambda request: request.lora_int_id))

        return _apply_adapters

    wrap(LRUCacheWorkerLoRAManager, "_apply_adapters", make)
    if is_at_least(0, 33):
        return  # it leaves those rows out
    for module in _TORCH_LORA_MODULES:
        owner = importlib.import_module(f"vllm.lora.{module}")
        for name in _TORCH_LORA_OPERATORS:
            wrap(owner, name, _without_base_rows)


def _without_base_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def operator(inputs: Any, weights: Any, output: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
        # inputs: [num_rows, ...]; a row of zeros adds nothing, whichever adapter is applied to it.
        rows = inputs.masked_fill((indices < 0).unsqueeze(-1), 0)
        return original(rows, weights, output, indices, *args, **kwargs)

    return operator


def release_kv_cache(runner: Any) -> None:
    """Takes back `initialize_kv_cache`, so that another configuration may follow.

    vLLM's runner has this for the cache that it profiles with. Its calls of the accelerator mean nothing on a CPU, and
    fail there.
    """
    import torch

    if torch.accelerator.is_available():
        runner._cleanup_profiling_kv_cache()
        return
    with (
        mock.patch.object(torch.accelerator, "synchronize"),
        mock.patch.object(torch.accelerator, "empty_cache"),
    ):
        runner._cleanup_profiling_kv_cache()


def _expected() -> str:
    return f"Stagewire supports vllm>={SUPPORTED[0][0]}.{SUPPORTED[0][1]},<{SUPPORTED[1][0]}.{SUPPORTED[1][1]}"


def install_flag_patches() -> None:
    """The patches of every vLLM process with a command line; modules that are not loaded need none.

    Never raises: a plugin that raises breaks every vLLM process of its environment, flags or not.
    """
    from stagewire.vllm_plugin import flags

    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    serve = sys.modules.get("vllm.entrypoints.cli.serve")
    try:
        if arg_utils is not None:
            wrap(arg_utils.EngineArgs, "add_cli_args", flags.with_flags)
            wrap(arg_utils.EngineArgs, "from_cli_args", flags.with_translation)
        if serve is not None:
            wrap(serve.ServeSubcommand, "cmd", flags.with_stages)
    except (ConfigError, AttributeError) as error:
        sys.stderr.write(f"Stagewire is installed but cannot work with this vLLM: {error}\n")
