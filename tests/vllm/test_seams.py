"""Everything that this package assumes about vLLM 0.32, seam by seam: docs/design/vllm-seams.md names these tests.

A test that fails here says that vLLM has moved: read the page's entry, then the new code, then decide. Imports vLLM,
starts no process, takes seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import importlib
import inspect
import json
import os
import pickle
import queue
import re
import select
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from fractions import Fraction
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import MagicMock, Mock

import msgspec
import numpy as np
import pytest
import torch
import uvloop
import zmq

from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError, InternalError, ProtocolError, StageLost
from stagewire.observe.deadlines import StepDeadlines
from stagewire.plan.ranges import LayerRange, partition_counts, split_evenly
from stagewire.vllm_plugin.codec.calls import CALLS, bind_call
from stagewire.vllm_plugin.codec.schedules import (
    decode_grammar,
    decode_output,
    decode_schedule,
    encode_grammar,
    encode_output,
    encode_schedule,
    is_nothing,
    row_digest,
    token_digest,
)
from stagewire.vllm_plugin.codec.values import decode_value, encode_value
from stagewire.vllm_plugin.entry import install, serve
from stagewire.vllm_plugin.entry.external_mode import REFUSED, apply_external_mode
from stagewire.vllm_plugin.head.executor import RingExecutor
from stagewire.vllm_plugin.head.health import HeadHealth
from stagewire.vllm_plugin.head.live_requests import Restored
from stagewire.vllm_plugin.head.scheduler import RingScheduler
from stagewire.vllm_plugin.head.stopping import HeadEnd
from stagewire.vllm_plugin.head.suspects import Loss
from stagewire.vllm_plugin.loading import model_cuts
from stagewire.vllm_plugin.member.member import max_frame_bytes
from stagewire.vllm_plugin.seams import (
    catalogue,
    dead_engine,
    discarded_rows,
    engine_stop_grace,
    interfaces,
    interrupted_start,
    lora,
    neighbours_logprobs,
    patching,
    stop_deadline,
    tied_heads,
    versions,
)
from stagewire.vllm_plugin.seams.settings import KEY, RingSettings
from stagewire.vllm_plugin.seams.versions import is_at_least
from stagewire.vllm_plugin.worker.pipeline_group import PipelineGroup, RankPlace
from stagewire.vllm_plugin.worker.stage_worker import compile_ranks
from stagewire.wire.messages import KINDS
from stagewire.wire.tensors import ITEM_BYTES

pytestmark = pytest.mark.vllm

DOCS = Path(__file__).parents[2] / "docs"
NUM_STAGES = 4


def stage_config(stage: int = 0, port: int = 15550, **overrides: Any) -> StageConfig:
    layers = split_evenly(32, NUM_STAGES)[stage]
    return StageConfig(stage, NUM_STAGES, layers, port, Address("127.0.0.1", 15554), **overrides)


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What external mode and vLLM's CPU platform set for their own process must not reach other tests.

    The version gate is open: seams are compared with more versions than can be run.
    """
    monkeypatch.setattr(versions, "SUPPORTED", ((0, 30), (0, 34)))
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_WORKER_MULTIPROC_METHOD", "OMP_NUM_THREADS", "LD_PRELOAD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def since(major: int, minor: int, *names: str) -> tuple[str, ...]:
    """What vLLM has from this version on."""
    return names if is_at_least(major, minor) else ()


def before(major: int, minor: int, *names: str) -> tuple[str, ...]:
    """What vLLM had until this version."""
    return () if is_at_least(major, minor) else names


def find(target: str) -> tuple[Any, str]:
    """``module:Class.name`` -> its owner and its name."""
    module, _, qualified = target.partition(":")
    *owners, name = qualified.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def parameters(function: Any) -> list[str]:
    """Names, keyword-only ones with a star; of vLLM's own function, below any wrapper of ours."""
    shown: dict[Any, str] = {inspect.Parameter.KEYWORD_ONLY: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [shown.get(p.kind, "") + p.name for p in inspect.signature(inspect.unwrap(function)).parameters.values()]


# ---- patches -------------------------------------------------------------------------------------------------------

SIGNATURES = {
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": ["parser"],
    "vllm.engine.arg_utils:EngineArgs.from_cli_args": ["cls", "args"],
    "vllm.entrypoints.cli.serve:ServeSubcommand.cmd": ["args"],
    "vllm.entrypoints.launchers.api_server.entry:setup_server": ["args", "*reuse_port"],
    "vllm.entrypoints.launchers.api_server.entry:build_and_serve": [
        "engine_client",
        "listen_address",
        "sock",
        "args",
        *since(0, 32, "peer_loads"),
        "**uvicorn_kwargs",
    ],
    "vllm.v1.engine.utils:get_engine_process_shutdown_timeout": ["request_timeout", "process_timeout"],
    "vllm.v1.engine.utils:CoreEngineProcManager.__init__": [
        "self",
        "local_engine_count",
        "start_index",
        "local_start_index",
        "vllm_config",
        "local_client",
        "handshake_address",
        "executor_class",
        "log_stats",
        "client_handshake_address",
        "tensor_queue",
    ],
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": ["self", "timeout"],
    "vllm.v1.engine.core_client:MPClient.shutdown": ["self", "timeout"],
    "vllm.v1.engine.utils:zmq_socket_ctx": ["path", "socket_type", "bind", "linger", "identity", "router_handover"],
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": ["self", "grammar_output"],
    "vllm.v1.worker.cpu_worker:get_memory_node_info": ["node_id"],
    "vllm.v1.sample.sampler:Sampler.forward": [
        "self",
        "logits",
        "sampling_metadata",
        "predict_bonus_token",
        "logprobs_mode_override",
    ],
    "vllm.v1.sample.sampler:Sampler.gather_specific_token_logprobs": [
        "self",
        "logprobs",
        "logprob_token_ids",
        "sampled",
    ],
    "vllm.model_executor.models.utils:PPMissingLayer.forward": ["self", "args", "**kwargs"],
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead.tie_weights": ["self", "embed_tokens"],
    "vllm.model_executor.models.transformers.base:Base.pipeline_parallel": ["self"],
    "vllm.model_executor.models.gemma4:Gemma4Model.forward": [
        "self",
        "input_ids",
        "positions",
        "intermediate_tensors",
        "inputs_embeds",
        "per_layer_inputs",
        "**kwargs",
    ],
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters": ["self", "lora_requests"],
    **{
        f"vllm.lora.{module}:{name}": [*first, "output_tensor", "lora_indices_tensor", *rest]
        for module in ("ops.torch_ops.lora_ops", "punica_wrapper.punica_cpu")
        for name, first, rest in (
            ("bgmv_shrink", ["inputs", "lora_b_weights"], ["scaling"]),
            ("bgmv_expand", ["inputs", "lora_b_weights"], ["add_inputs"]),
            ("bgmv_expand_slice", ["inputs", "lora_b_weights"], ["slice_offset", "slice_size", "add_inputs"]),
        )
    },
}


# Methods that vLLM's class lacks.
ADDED = {"vllm.model_executor.models.utils:PPMissingLayer.tie_weights"}


def test_every_patch_is_described_here() -> None:
    assert {patch.target for patch in catalogue.PATCHES} == {*SIGNATURES, *ADDED}
    assert all(patch.reason and patch.until for patch in catalogue.PATCHES)


@pytest.mark.parametrize("target", SIGNATURES)
def test_patch_target_exists_with_the_signature_that_is_wrapped(target: str) -> None:
    owner, name = find(target)
    assert name in vars(owner), f"{target} is gone: `patching.wrap` would refuse"
    # Wrapped already, when a test before this one has used the flags; and without binding the class.
    found = vars(owner)[name]
    assert parameters(inspect.unwrap(getattr(found, "__func__", found))) == SIGNATURES[target]


@pytest.mark.parametrize("target", sorted(ADDED))
def test_an_added_method_is_not_in_vllm(target: str) -> None:
    owner, name = find(target)
    existing = vars(owner).get(name)
    assert existing is None or existing.__module__.startswith("stagewire."), f"{target} exists: `add` would refuse"


def test_add_refuses_what_is_there_and_happens_once() -> None:
    owner = SimpleNamespace(taken=len)
    with pytest.raises(ConfigError, match="taken exists in this vLLM"):
        patching.add(owner, "taken", lambda: None)
    first, second = (lambda: 1), (lambda: 2)
    patching.add(owner, "free", first)
    patching.add(owner, "free", second)
    assert owner.free is first


def test_installed_version_is_supported_unless_only_its_files_are_tested() -> None:
    """Nothing of vLLM 0.33 can be run without a GPU so far: its seams are compared, and the gate is shut."""
    if is_at_least(0, 33):
        with pytest.raises(ConfigError):
            versions.check_version()
    else:
        versions.check_version()


def test_unsupported_version_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.version

    for installed in ((0, 29, 1), (0, 33, 0), (1, 31, 0)):
        text = ".".join(map(str, installed))
        monkeypatch.setattr(vllm.version, "__version_tuple__", installed)
        monkeypatch.setattr(vllm.version, "__version__", text)
        with pytest.raises(ConfigError, match=rf"{re.escape(text)} is installed.*>=0\.30,<0\.33"):
            versions.check_version()


def test_wrap_refuses_a_target_that_has_moved() -> None:
    with pytest.raises(ConfigError, match=r"gone_function is gone in this vLLM"):
        patching.wrap(SimpleNamespace(__name__="module"), "gone_function", lambda original: original)


def test_wrap_happens_once_and_keeps_the_kind_of_method() -> None:
    class Owner:
        @staticmethod
        def static(value: int) -> list[Any]:
            return [value]

        @classmethod
        def of_class(cls, value: int) -> list[Any]:
            return [cls, value]

    def add_one(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: [*original(*args), "wrapped"]

    for _ in range(2):
        patching.wrap(Owner, "static", add_one)
        patching.wrap(Owner, "of_class", add_one)
    assert Owner.static(5) == [5, "wrapped"]
    assert Owner.of_class(5) == [Owner, 5, "wrapped"]


def test_vllm_finds_the_plugin() -> None:
    found = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "stagewire"]
    assert found == ["stagewire.vllm_plugin:register"]


def test_plugins_are_loaded_before_the_flags_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin replaces `EngineArgs.add_cli_args` while it is loaded, and what it has put there is asked."""
    from vllm.engine import arg_utils
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    asked: list[Any] = []

    def add_cli_args(parser: Any) -> Any:
        asked.append(parser)
        return parser

    def load_general_plugins() -> None:
        monkeypatch.setattr(arg_utils.EngineArgs, "add_cli_args", staticmethod(add_cli_args))

    monkeypatch.setattr(arg_utils, "load_general_plugins", load_general_plugins)
    parser = FlexibleArgumentParser()
    arg_utils.AsyncEngineArgs.add_cli_args(parser)
    assert asked == [parser]


def test_serve_is_looked_up_after_the_parser_was_built(
    monkeypatch: pytest.MonkeyPatch, plain_environment: None
) -> None:
    """`with_stages` replaces `cmd` from within subparser_init; a lookup before that would keep vLLM's own."""
    import vllm.entrypoints.cli.serve
    from vllm.entrypoints.cli import main

    called: list[str] = []

    def subparser_init(subparsers: Any) -> Any:
        command.cmd = lambda args: called.append("ours")
        return subparsers.add_parser("serve")

    command = SimpleNamespace(name="serve", subparser_init=subparser_init, validate=lambda args: None)
    command.cmd = lambda args: called.append("vLLM's own")
    monkeypatch.setattr(vllm.entrypoints.cli.serve, "cmd_init", lambda: [command])
    monkeypatch.setattr("sys.argv", ["vllm", "serve"])
    main.main()
    assert called == ["ours"]


def test_api_server_looks_up_what_is_patched_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.launchers.api_server import entry

    called: list[str] = []

    def setup_server(args: Any, **_: Any) -> tuple[str, Any]:
        called.append("setup_server")
        return "address", Mock()

    async def build_and_serve(*_: Any, **__: Any) -> Any:
        called.append("build_and_serve")
        return asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def build_async_engine_client(*_: Any, **__: Any) -> AsyncIterator[None]:
        yield

    for function in (setup_server, build_and_serve, build_async_engine_client):
        monkeypatch.setattr(entry, function.__name__, function)
    monkeypatch.setattr(entry, "decorate_logs", Mock())
    monkeypatch.setattr("signal.signal", Mock())
    asyncio.run(entry.run_server(argparse.Namespace(tool_parser_plugin="", reasoning_parser_plugin="")))
    assert called == ["setup_server", "build_and_serve"]


def test_the_api_server_begins_its_stop_with_the_engines() -> None:
    """Before it stops to answer: from then on `HeadEnd` counts a second signal."""
    from fastapi import FastAPI
    from vllm.entrypoints.launchers.launcher import serve_http

    told: list[str] = []
    app = FastAPI(
        on_startup=[lambda: os.kill(os.getpid(), signal.SIGTERM)], on_shutdown=[lambda: told.append("server")]
    )
    config = SimpleNamespace(shutdown_timeout=7)
    app.state.engine_client = SimpleNamespace(
        vllm_config=config, errored=False, shutdown=lambda timeout: told.append(f"engine {timeout}")
    )

    async def serve() -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            await (await serve_http(app, sock=sock, host="127.0.0.1", port=sock.getsockname()[1]))

    asyncio.run(serve())
    assert told == ["engine 7", "server"]


def test_the_api_server_s_own_loop_takes_its_signals() -> None:
    """Where `HeadEnd` finds a second one, which vLLM passes over."""
    from fastapi import FastAPI
    from vllm.entrypoints.launchers.launcher import serve_http

    told: list[str] = []

    class Told(HeadEnd):
        def end_now(self, engine_s: float = 0.0) -> None:
            told.append("at once")

    def signal_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    app = FastAPI(on_startup=[signal_twice])
    app.state.engine_client = SimpleNamespace(
        vllm_config=SimpleNamespace(shutdown_timeout=7), errored=False, shutdown=lambda timeout: told.append("engine")
    )

    async def serve() -> None:
        Told(HeadHealth(), lambda: None).serve_in(asyncio.get_running_loop())
        with socket.create_server(("127.0.0.1", 0)) as sock:
            await (await serve_http(app, sock=sock, host="127.0.0.1", port=sock.getsockname()[1]))

    for run in (asyncio.run, uvloop.run):
        told.clear()
        run(serve())
        assert sorted(told) == ["at once", "engine"]


def test_an_engine_that_ends_when_it_is_told_to_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`AsyncLLM`'s own task, whose connection ends before it is cancelled."""
    from vllm.v1.engine import async_llm
    from vllm.v1.engine.exceptions import EngineDeadError

    monkeypatch.setattr(async_llm.AsyncLLM, "shutdown", lambda self, timeout: None)
    monkeypatch.setattr(async_llm.logger, "filters", [])
    monkeypatch.setattr(async_llm.logger, "handlers", [caplog.handler])
    told: list[float] = []
    stop_deadline.on_engine_shutdown(told.append)

    async def lose(error: Exception) -> None:
        async def get_output_async() -> None:
            raise error

        llm = async_llm.AsyncLLM.__new__(async_llm.AsyncLLM)
        for name in ("output_processor", "logger_manager", "renderer"):
            setattr(llm, name, Mock())
        llm.output_handler, llm.log_stats = None, False
        llm.engine_core = Mock(get_output_async=get_output_async)
        llm._run_output_handler()
        await llm.output_handler

    asyncio.run(lose(EngineDeadError()))
    assert "output_handler failed" in caplog.text, "it was not told to end"
    async_llm.AsyncLLM.shutdown(Mock(), 7.0)
    caplog.clear()
    asyncio.run(lose(EngineDeadError()))
    assert 7.0 in told
    assert not caplog.text
    asyncio.run(lose(ValueError("another one")))
    assert "another one" in caplog.text


def test_ctrl_c_while_an_llm_starts_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM alone swallows it, and goes on to wait for its engine."""
    from vllm.utils import network_utils
    from vllm.v1.engine import utils

    monkeypatch.setattr(utils, "zmq_socket_ctx", network_utils.zmq_socket_ctx)

    def wait(error: BaseException) -> None:
        with utils.zmq_socket_ctx("inproc://engine", zmq.ROUTER, bind=True):
            raise error

    wait(KeyboardInterrupt())  # this vLLM still does
    interrupted_start.interrupt_engine_start()
    with pytest.raises(KeyboardInterrupt):
        wait(KeyboardInterrupt())
    with pytest.raises(TimeoutError):
        wait(TimeoutError())
    with utils.zmq_socket_ctx("inproc://engine", zmq.ROUTER, bind=True) as bound:
        assert bound.getsockopt(zmq.TYPE) == zmq.ROUTER


def test_whoever_waits_for_an_engine_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits of vLLM's client for an `LLM`, and its monitor, as they are."""
    from vllm.v1.engine import core_client
    from vllm.v1.engine.exceptions import EngineDeadError

    monkeypatch.setattr(core_client.MPClient, "shutdown", inspect.unwrap(core_client.MPClient.shutdown))
    told: list[Any] = []
    dead_engine.end_waits_for_dead_engine(told.append)
    end = threading.Event()
    engine = Mock(name="its process")

    def client() -> Any:
        client = core_client.SyncMPClient.__new__(core_client.SyncMPClient)
        manager = Mock(processes=[engine], monitor_engine_liveness=end.wait)
        client.resources = core_client.BackgroundResources(ctx=Mock())
        client.resources.engine_manager = manager
        client._finalizer = weakref.finalize(client, client.resources)
        client.outputs_queue, client.utility_results = queue.Queue(), {}
        client.core_engine, client.encoder, client.input_socket = b"0", Mock(encode=lambda _: [b""]), Mock()
        return client

    stopped = client()
    stopped.shutdown()
    assert stopped.outputs_queue.empty()
    assert not told, "it was told to end, and nobody waits"

    waiting = client()
    waiting.start_engine_core_monitor()
    errors: queue.Queue[str] = queue.Queue()

    def call(method: str, *args: str) -> None:
        try:
            getattr(waiting, method)(*args)
        except EngineDeadError:
            errors.put(method)

    for each in (("get_output",), ("call_utility", "get_supported_tasks")):
        threading.Thread(target=call, args=each, daemon=True).start()
    while not waiting.utility_results:
        select.select([], [], [], 0.01)
    end.set()
    assert {errors.get(timeout=10) for _ in range(2)} == {"get_output", "call_utility"}
    assert told == [engine]
    with pytest.raises(EngineDeadError):
        waiting.call_utility("get_supported_tasks")


def test_engine_core_gets_the_grace_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine import utils

    given: list[float] = []
    monkeypatch.setattr(utils, "get_engine_process_shutdown_timeout", lambda request, process: 7.0)
    monkeypatch.setattr(utils, "shutdown", lambda processes, timeout: given.append(timeout))
    utils.CoreEngineProcManager.shutdown(Mock())
    assert given == [7.0]


def test_grace_is_only_for_an_end_without_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine import utils

    monkeypatch.setattr(utils, "get_engine_process_shutdown_timeout", lambda request, process: process)
    engine_stop_grace.give_engine_time_to_stop()
    timeout = utils.get_engine_process_shutdown_timeout
    assert timeout(0, 0) == engine_stop_grace.ENGINE_STOP_GRACE_S
    assert [timeout(30, 0), timeout(0, 7), timeout(0, None)] == [0, 7, None]


def test_engine_core_shuts_its_executor_down_while_its_error_is_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """`RingExecutor.shutdown` tells an error from an end in order by the exception that is being handled."""
    from vllm.v1.engine import core

    seen: list[BaseException | None] = []
    engine = Mock()
    engine.run_busy_loop.side_effect = AssertionError("why")
    engine.shutdown.side_effect = lambda: seen.append(sys.exc_info()[1])
    run_engine_core = core.EngineCoreProc.run_engine_core
    for name in ("set_process_title", "decorate_logs", "maybe_init_worker_tracer"):
        monkeypatch.setattr(core, name, Mock())
    monkeypatch.setattr(core, "EngineCoreProc", Mock(return_value=engine))
    monkeypatch.setattr("signal.signal", Mock())
    config = Mock(kv_transfer_config=None, logging_config=None)
    config.parallel_config = Mock(data_parallel_size=1, numa_bind=False)
    with pytest.raises(AssertionError, match="why") as raised:
        run_engine_core(vllm_config=config)
    assert seen == [raised.value]


def test_an_engine_core_that_is_told_to_stop_ends_all_requests_at_once() -> None:
    """`RingScheduler.finish_requests` tells that from the end of some requests by the ids, which are None."""
    from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

    engine = Mock(shutdown_state=EngineShutdownState.REQUESTED)
    engine.vllm_config.shutdown_timeout = 0
    engine.scheduler.get_num_unfinished_requests.return_value = 3
    EngineCoreProc._handle_shutdown(engine)
    assert engine.scheduler.finish_requests.call_args.args[0] is None


def test_vllm_still_rewinds_generators_that_cannot_be() -> None:
    """When this fails, upstream has changed what `keep_generators_of_discarded_rows` goes round: it may go."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    generator = torch.Generator("cpu")
    with pytest.raises(RuntimeError) as cannot:
        generator.get_offset()
    runner = Mock(
        use_async_scheduling=False,
        input_batch=SimpleNamespace(num_reqs=1, generators={0: generator}),
        discard_request_mask=SimpleNamespace(np=np.array([True])),
    )
    with pytest.raises(RuntimeError) as raised:
        GPUModelRunner._bookkeeping_sync(runner, Mock(), Mock(), None, torch.zeros(1, 1), 1)
    assert str(raised.value) == str(cannot.value)


def test_discarded_row_leaves_its_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three seeded rows the middle one is in prefill; below the batch lies a stale mark that means nothing."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def sample_tokens(self: Any, grammar_output: Any) -> str:  # what vLLM's does with generators on CPU
        for row, generator in self.input_batch.generators.items():
            torch.randint(0, 2**31, (1,), generator=generator)
            if row < 3 and self.discard_request_mask.np[row]:
                generator.get_offset()
        return f"sampled after {grammar_output}"

    monkeypatch.setattr(GPUModelRunner, "sample_tokens", sample_tokens)
    discarded_rows.keep_generators_of_discarded_rows()
    generators = {row: torch.Generator("cpu").manual_seed(row) for row in (0, 1, 2)}
    before = {row: generator.get_state() for row, generator in generators.items()}
    batch = SimpleNamespace(num_reqs=3, generators=dict(generators))
    runner: Any = SimpleNamespace(
        input_batch=batch, discard_request_mask=SimpleNamespace(np=np.array([False, True, False, True]))
    )

    assert GPUModelRunner.sample_tokens(runner, "a grammar") == "sampled after a grammar"
    assert batch.generators == generators
    drawn = {row for row, generator in generators.items() if not torch.equal(generator.get_state(), before[row])}
    assert drawn == {0, 2}


def test_vllm_still_gives_neighbours_of_chosen_logprobs_none() -> None:
    """When this fails, upstream has changed what `keep_logprobs_of_neighbours` mends: it may go."""
    from vllm.v1.sample.sampler import Sampler

    sampler = Mock(logprobs_mode="raw_logprobs")
    sampler.sample.return_value = torch.zeros(1), None
    sampler.gather_specific_token_logprobs.return_value = "chosen"
    sampler.gather_logprobs.return_value = "likeliest"
    sampling = SimpleNamespace(max_num_logprobs=2, logprob_token_ids={1: [7]})
    output = inspect.unwrap(Sampler.forward)(sampler, torch.zeros(1, 8), sampling)
    assert output.logprobs_tensors == "chosen"


@pytest.mark.parametrize(("count", "width"), [(3, 4), (1, 3), (None, 3)])
def test_neighbours_of_chosen_logprobs_keep_theirs(
    count: int | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1 asks for two tokens by id, rows 0 and 2 for their ``count`` likeliest."""
    from vllm.v1.sample.sampler import Sampler

    for name in ("forward", "gather_specific_token_logprobs"):
        monkeypatch.setattr(Sampler, name, inspect.unwrap(getattr(Sampler, name)))
    neighbours_logprobs.keep_logprobs_of_neighbours()
    monkeypatch.setattr("vllm.v1.sample.sampler.PIN_MEMORY", False)
    sampler: Any = Sampler()
    sampler.stagewire_num_logprobs = count
    logprobs = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    sampled = torch.tensor([4, 5, 6])
    found = sampler.gather_specific_token_logprobs(logprobs, {1: [7, 8]}, sampled)
    assert found.logprobs.shape == (3, width)
    assert found.logprob_token_ids[1, :3].tolist() == [5, 7, 8]
    assert torch.equal(found.logprobs[1, :3], logprobs[1, [5, 7, 8]])
    if count is not None:
        top = sampler.gather_logprobs(logprobs, count, token_ids=sampled)
        for row in (0, 2):
            assert torch.equal(found.logprob_token_ids[row, : count + 1], top.logprob_token_ids[row])
            assert torch.equal(found.logprobs[row, : count + 1], top.logprobs[row])


def test_a_standby_compiles_what_log_probabilities_need() -> None:
    """Any number of rows: nothing is left to be compiled in the steps after a take-over."""
    from vllm.v1.sample.sampler import Sampler

    sampler, vocab_size = Sampler(), 173
    sampled = torch.tensor([4, 5, 6])
    logprobs = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def gather(num_rows: int) -> torch.Tensor:
        with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
            ranks: torch.Tensor = sampler.gather_logprobs(logprobs[:num_rows], 2, sampled[:num_rows])[2]
            return ranks

    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        gather(3)
    compile_ranks(sampler, vocab_size, torch.device("cpu"))
    for num_rows in (1, 2, 3):
        expected = [int((row >= row[token]).sum()) for row, token in zip(logprobs[:num_rows], sampled, strict=False)]
        assert gather(num_rows).tolist() == expected


def test_a_standby_without_a_compiler_only_warns(caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    def gather_logprobs(*_: Any, **__: Any) -> None:
        raise InductorError(InvalidCxxCompiler(), None)

    with caplog.at_level("WARNING", "vllm.stagewire"):
        compile_ranks(SimpleNamespace(gather_logprobs=gather_logprobs), 8, torch.device("cpu"))
    assert "log-probabilities will fail" in caplog.text


def a_model(architecture: str, transformers_backend: bool = False) -> Any:
    return SimpleNamespace(architecture=architecture, using_transformers_backend=lambda: transformers_backend)


def test_a_missing_layer_passes_hidden_states_and_residual() -> None:
    """Granite's hybrids call all layers, by these names. The first half fails when a missing layer can be called so."""
    from vllm.model_executor.models.utils import PPMissingLayer

    layer, named = PPMissingLayer(), {"positions": 0, "hidden_states": 1, "residual": 2}
    assert inspect.unwrap(PPMissingLayer.forward)(layer, **named) == 0
    model_cuts.install(a_model("LlamaForCausalLM"))
    assert layer(**named) == (1, 2)
    assert layer(5, 6) == 5
    assert layer.tie_weights(torch.nn.Embedding(2, 2)) is layer


def test_a_tied_head_without_an_embedding_is_loaded_by_us() -> None:
    """Ernie's MoE: the embedding is on the first stage alone, the tied head on the last."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.utils import PPMissingLayer

    model_cuts.install(a_model("LlamaForCausalLM"))
    head = torch.nn.Linear(2, 3)
    head.weight.weight_loader = lambda parameter, loaded: parameter.data.copy_(loaded)
    model = torch.nn.ModuleDict({"head": head})
    assert ParallelLMHead.tie_weights(head, PPMissingLayer()) is head
    with pytest.raises(ConfigError, match="--load-format"):
        tied_heads.check_heads(model)
    (found,) = tied_heads.heads_without_embedding(model)
    tied_heads.load_head(found, torch.full((3, 2), 7.0))
    assert torch.equal(head.weight, torch.full((3, 2), 7.0))
    tied_heads.check_heads(model)


def test_transformers_backend_adds_no_positions_on_later_stages() -> None:
    """A GPT-like model on the last of two stages, with a tied embedding: stock adds its positions again."""
    from vllm.model_executor.models.transformers import base

    def last_stage() -> Any:
        model = torch.nn.Module()
        model.wte, model.wpe = torch.nn.Embedding(4, 2), torch.nn.Embedding(8, 2)
        model.h = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        model.supports_pp_plan, model._pp_plan = True, {"wte": (), "wpe": (), "h": ()}
        model.get_input_embeddings = lambda: model.wte
        return SimpleNamespace(
            model=model,
            pp_group=SimpleNamespace(is_first_rank=False, is_last_rank=True, rank_in_group=1, world_size=2),
            text_config=SimpleNamespace(num_hidden_layers=2),
            model_config=SimpleNamespace(dtype=torch.bfloat16),
            _get_tie_word_embeddings=lambda: True,
            _pp_indices=lambda: (1, 2),  # vLLM 0.33 asks for its layers in this way
        )

    stock, ours = last_stage(), last_stage()
    inspect.unwrap(base.Base.pipeline_parallel)(stock)
    assert isinstance(stock.model.wpe, torch.nn.Embedding), "the patch can go"

    model_cuts.install(a_model("GPTBigCodeForCausalLM", transformers_backend=True))
    base.Base.pipeline_parallel(ours)
    assert isinstance(ours.model.wte, torch.nn.Embedding)
    added = ours.model.wpe(torch.arange(3)[None])
    assert torch.equal(added, torch.zeros(1, 3, 1, dtype=torch.bfloat16))
    assert added.dtype is torch.bfloat16
    hidden_states = torch.randn(1, 3, 2)
    assert ours.model.wpe(hidden_states) is hidden_states


def test_gemma4_reads_what_the_stage_before_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half fails when vLLM reads it by itself: then the patch can go."""
    from vllm.model_executor.models import gemma4
    from vllm.sequence import IntermediateTensors

    seen: list[Any] = []

    def layer(positions: Any, hidden_states: Any, residual: Any, per_layer_input: Any) -> tuple[Any, Any]:
        seen.append(per_layer_input)
        return hidden_states, residual

    middle = SimpleNamespace(is_first_rank=False, is_last_rank=False)
    monkeypatch.setattr(gemma4, "get_pp_group", lambda: middle)
    stage = SimpleNamespace(fast_prefill_enabled=False, start_layer=1, end_layer=2, layers=[None, layer, None])
    stage._maybe_add_hidden_state = lambda *_: []
    inputs = torch.arange(24.0).view(2, 3, 4)  # [num_tokens, num_layers, size]
    came = IntermediateTensors({"hidden_states": torch.ones(2, 8), "per_layer_inputs": inputs})
    stock = inspect.unwrap(gemma4.Gemma4Model.forward)
    assert set(stock(stage, None, None, came).tensors) == {"hidden_states"}
    assert seen == [None]

    monkeypatch.setattr(gemma4.Gemma4Model, "forward", stock)
    model_cuts.install(a_model("Gemma4ForCausalLM"))
    assert gemma4.Gemma4Model.forward(stage, None, None, came).tensors["per_layer_inputs"] is inputs
    assert torch.equal(seen[1], inputs[:, 1])


def test_adapters_are_touched_in_the_order_of_their_ids() -> None:
    """vLLM's own loop, over adapters that are only names here; a set of them has another order in every process."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    lora.mend_lora()
    touched: list[int] = []
    manager = SimpleNamespace(
        _adapter_manager=SimpleNamespace(lora_slots=9),
        add_adapter=lambda request: touched.append(request.lora_int_id),
    )
    requests = {LoRARequest(f"name {i}", i, "/path") for i in (5, 3, 8, 1)}
    LRUCacheWorkerLoRAManager._apply_adapters(manager, requests)
    assert touched == [1, 3, 5, 8]


def test_rows_of_the_base_model_get_no_adapter() -> None:
    """In vLLM before 0.33 the last slot's adapter is added to them."""
    from vllm.lora.ops.torch_ops import lora_ops

    inputs, weights = torch.ones(2, 3), torch.ones(4, 5, 3)  # [rows, in], [slots, out, in]
    indices = torch.tensor([-1, 1])
    plain, mended = torch.zeros(2, 5), torch.zeros(2, 5)
    inspect.unwrap(lora_ops.bgmv_expand)(inputs, weights, plain, indices)
    assert plain.tolist() == [[0.0 if is_at_least(0, 33) else 3.0] * 5, [3.0] * 5], "the base model's row too"
    lora.mend_lora()
    lora_ops.bgmv_expand(inputs, weights, mended, indices)
    assert mended.tolist() == [[0.0] * 5, [3.0] * 5]
    lengths = torch.tensor([1, 1])
    mended.fill_(7.0)
    lora_ops.sgmv_shrink(inputs, weights, mended, torch.tensor([0, 1]), lengths, indices, 2, 1, 2, 1.0)
    assert mended.tolist() == [[0.0] * 5, [3.0] * 5]


def test_an_adapter_is_loaded_by_a_method_that_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`check_lora` calls it; taking the adapter in is `add_adapter`'s part."""
    from vllm.lora import worker_manager
    from vllm.lora.request import LoRARequest

    monkeypatch.setattr(worker_manager, "PEFTHelper", Mock())
    manager = Mock()
    manager._adapter_manager.supported_lora_modules = []
    loaded = worker_manager.LRUCacheWorkerLoRAManager._load_adapter(manager, LoRARequest("name", 3, "/path"))
    assert loaded is manager._lora_model_cls.from_local_checkpoint.return_value
    kept = {name for name, _, _ in manager.mock_calls if "add_adapter" in name or "activate" in name}
    assert not kept


def test_the_runner_has_its_adapters_where_they_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    made = Mock()
    monkeypatch.setattr(mixin, "supports_lora", lambda model: True)
    monkeypatch.setattr(mixin, "LRUCacheWorkerLoRAManager", Mock(return_value=made))
    runner: Any = mixin.LoRAModelRunnerMixin()
    with pytest.raises(RuntimeError):
        runner._ensure_lora_enabled()
    runner.load_lora_model(Mock(), Mock(), torch.device("cpu"))
    assert runner.lora_manager is made
    runner._ensure_lora_enabled()


def test_head_uses_settings_of_the_api_server_that_exist() -> None:
    from vllm import envs

    assert "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH" in envs.environment_variables
    names = {field.name for field in dataclasses.fields(interfaces.frontend_args())}
    assert names >= {"host", "port", "uds", "ssl_keyfile", "middleware"}


# ---- flags ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    install.install_flag_patches()
    added: argparse.ArgumentParser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return added


def test_flags_are_in_a_group_of_their_own(parser: argparse.ArgumentParser) -> None:
    groups = [group for group in parser._action_groups if group.title == "Stagewire"]
    assert len(groups) == 1, "vLLM's --help=Stagewire looks groups up by title"
    names = {action.option_strings[0] for action in groups[0]._group_actions}
    assert {
        "--pipeline-stage-mode",
        "--pipeline-stage-idx",
        "--pipeline-total-stages",
        "--pipeline-layer-range",
        "--pipeline-local-bind-port",
        "--pipeline-prev-stage-addr",
        "--pipeline-prev-stage-service-addr",
        "--external-pp-worker",
    } <= names


def test_without_flags_nothing_changes(parser: argparse.ArgumentParser, plain_environment: None) -> None:
    from vllm.engine.arg_utils import EngineArgs

    args = parser.parse_args(["--model", "somewhere"])
    vllms_own = inspect.unwrap(EngineArgs.from_cli_args)
    assert EngineArgs.from_cli_args(args) == vllms_own(EngineArgs, args)


def test_every_entry_point_translates_the_flags(
    parser: argparse.ArgumentParser, plain_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from stagewire.vllm_plugin.entry import llm_head

    prepared: list[str] = []
    monkeypatch.setattr(llm_head, "prepare_engine", lambda: prepared.append("an engine"))
    head = """--model somewhere --enforce-eager --pipeline-stage-mode external --pipeline-stage-idx 0
        --pipeline-total-stages 4 --pipeline-layer-range 0-8 --pipeline-local-bind-port 15550
        --pipeline-prev-stage-addr 127.0.0.1:15554"""
    args = EngineArgs.from_cli_args(parser.parse_args(head.split()))
    assert args.distributed_executor_backend is RingExecutor
    assert args.scheduler_cls is RingScheduler
    assert args.pipeline_parallel_size == NUM_STAGES
    assert args.async_scheduling is False, "not left to what vLLM makes of the executor"
    assert prepared == ["an engine"], "it is watched, as there is no API server of ours to do so"
    EngineArgs.from_cli_args(argparse.Namespace(**vars(parser.parse_args(head.split())), subparser="serve"))
    assert prepared == ["an engine"], "serve does it by itself"


def test_worker_stage_is_refused_outside_serve(parser: argparse.ArgumentParser, plain_environment: None) -> None:
    from vllm.engine.arg_utils import EngineArgs

    worker = """--model somewhere --pipeline-stage-mode external --pipeline-stage-idx 1 --pipeline-total-stages 4
        --pipeline-layer-range 8-16 --pipeline-local-bind-port 15550 --external-pp-worker
        --pipeline-prev-stage-service-addr 127.0.0.1:15550"""
    with pytest.raises(ConfigError, match="`vllm serve` only"):
        EngineArgs.from_cli_args(parser.parse_args(worker.split()))


def test_flag_wrappers_pass_through_what_is_not_ours() -> None:
    seen: list[Any] = []
    serve.with_stages(seen.append)(argparse.Namespace(model="somewhere"))
    assert seen == [argparse.Namespace(model="somewhere")]


# ---- arguments: C6 -------------------------------------------------------------------------------------------------


def engine_args(**options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model="", enforce_eager=True, **options)


# `_refuse` skips a field that does not exist.
@pytest.mark.parametrize("name", sorted(set(REFUSED) - {*before(0, 32, "enable_hc_sp")}))
def test_refused_argument_is_a_field_of_vllm(name: str, plain_environment: None) -> None:
    args = engine_args()
    assert hasattr(args, name), f"{name} is no field of EngineArgs any more: what does the feature hide behind now?"
    setattr(args, name, object())
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"^{flag} cannot be combined"):
        apply_external_mode(args, stage_config())


def test_arguments_that_are_set_are_fields_of_vllm() -> None:
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in dataclasses.fields(EngineArgs)}
    assert names >= {
        "additional_config",
        "async_scheduling",
        "compilation_config",
        "distributed_executor_backend",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "num_gpu_blocks_override",
        "optimization_level",
        "pipeline_parallel_size",
        "scheduler_cls",
    }


@pytest.mark.parametrize(("variable", "value"), [("VLLM_USE_V2_MODEL_RUNNER", "1"), ("VLLM_USE_RUST_FRONTEND", "1")])
def test_contradicting_environment_is_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, plain_environment: None
) -> None:
    from vllm import envs

    assert variable in envs.environment_variables
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=variable):
        apply_external_mode(engine_args(), stage_config())


def test_async_scheduling_is_refused(plain_environment: None) -> None:
    with pytest.raises(ConfigError, match="--async-scheduling"):
        apply_external_mode(engine_args(async_scheduling=True), stage_config())


@pytest.fixture(scope="module")
def external_config(model_dir: Path) -> Iterator[Any]:
    """A head's whole VllmConfig, as the API server and EngineCore see it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_WORKER_MULTIPROC_METHOD", "OMP_NUM_THREADS", "LD_PRELOAD"):
            patch.setenv(name, "")
            patch.delenv(name)
        from vllm.engine.arg_utils import EngineArgs

        args = EngineArgs(model=str(model_dir), enforce_eager=True, kv_cache_memory_bytes=1 << 26, dtype="float32")
        apply_external_mode(args, stage_config())
        yield args.create_engine_config()


def test_external_mode_resolves_to_what_the_ring_needs(external_config: Any) -> None:
    from vllm.v1.executor.abstract import Executor

    assert Executor.get_class(external_config) is RingExecutor
    assert external_config.scheduler_config.get_scheduler_cls() is RingScheduler
    assert external_config.max_concurrent_batches == NUM_STAGES, "one step in flight per stage"
    assert not external_config.scheduler_config.async_scheduling
    assert not external_config.use_v2_model_runner
    assert external_config.scheduler_config.max_num_batched_tokens == 2048
    assert external_config.scheduler_config.max_num_seqs in (128, 256)


def test_place_travels_to_other_processes(external_config: Any) -> None:
    copied = pickle.loads(pickle.dumps(external_config.additional_config))  # vLLM's own way to EngineCore: spawn
    assert RingSettings.read(SimpleNamespace(additional_config=copied)) == stage_config()


def test_place_in_the_compile_cache_key_has_no_ports() -> None:
    """vLLM hashes additional_config as JSON: two ports must give one cache entry, two layer ranges two."""
    texts = [json.dumps({KEY: RingSettings.of(stage_config(1, port))}, sort_keys=True) for port in (1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != json.dumps({KEY: RingSettings.of(stage_config(2, 1))}, sort_keys=True)


def names_of_table(text: str) -> set[str]:
    """What stands in backticks in a table's first column."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_identity_compares_what_the_documentation_says(external_config: Any) -> None:
    from stagewire.vllm_plugin.member.identity import make_identity

    shared = make_identity(stage_config(), external_config).shared
    page = (DOCS / "design" / "vllm-seams.md").read_text()
    assert set(shared) == names_of_table(page[page.index("## C5") : page.index("## C6")])
    assert shared["--dtype"] == "float32"
    assert make_identity(stage_config(), external_config).shared == shared, "stable, but for the incarnation"


# Stages that differ in one of these give other tokens than one process, and nothing says so.
@pytest.mark.parametrize(
    "option",
    [{"hf_overrides": {"rope_theta": 5.0}}, {"use_fp64_gumbel": True}, {"disable_sliding_window": True}],
    ids=str,
)
def test_identity_differs_with_the_tokens(
    option: dict[str, Any], external_config: Any, model_dir: Path, plain_environment: None
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from stagewire.vllm_plugin.member.identity import make_identity

    args = EngineArgs(
        model=str(model_dir), enforce_eager=True, kv_cache_memory_bytes=1 << 26, dtype="float32", **option
    )
    apply_external_mode(args, stage_config())
    other = make_identity(stage_config(), args.create_engine_config()).shared
    assert other != make_identity(stage_config(), external_config).shared


# ---- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [2, 3, 4, 7])
@pytest.mark.parametrize("num_layers", [7, 8, 30, 32, 61])
def test_default_split_is_vllms_own(num_layers: int, num_stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.utils import get_pp_indices

    monkeypatch.delenv("VLLM_PP_LAYER_PARTITION", raising=False)
    theirs = [get_pp_indices(num_layers, stage, num_stages) for stage in range(num_stages)]
    assert [(layers.start, layers.end) for layers in split_evenly(num_layers, num_stages)] == theirs


@pytest.mark.parametrize(
    ("stage", "layers"), [(0, "0-1"), (0, "0-29"), (1, "1-2"), (1, "7-15"), (2, "2-3"), (2, "16-24"), (3, "29-32")]
)
def test_partition_gives_a_stage_its_own_range(stage: int, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.utils import get_pp_indices

    own = LayerRange.parse(layers)
    counts = partition_counts(stage, NUM_STAGES, own, 32)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(map(str, counts)))
    assert get_pp_indices(32, stage, NUM_STAGES) == (own.start, own.end)


# ---- calls: C1 -----------------------------------------------------------------------------------------------------

OURS = {
    *("get_reorder_batch_threshold", "set_reorder_batch_threshold", "get_stage_state", "check_lora"),
    *("restore_requests", "prepare"),
}

# What vLLM asks of workers by name and the ring does not carry; table C1 has the reasons.
NOT_CARRIED = {
    *("apply_model", "update_weights"),
    *since(0, 31, "reload_weights"),
    *since(0, 32, "reset_weights", "shutdown_weight_transfer_engine"),
    *since(0, 33, "get_simple_cpu_offload_num_cpu_blocks"),
    "init_weight_transfer_engine",
    *("start_weight_update", "start_draft_weight_update", "finish_weight_update"),
    *("checkpoint_prepare", "checkpoint_restore", "save_sharded_state", "save_tensorized_model"),
    *("execute_dummy_batch", "handle_ft_command", "elastic_ep_execute"),
    *before(0, 33, "reinitialize_distributed"),
    *("get_encoder_timing_stats", "get_kv_connector_handshake_metadata"),
}
# Answered by RingExecutor without a call.
ANSWERED_BY_HEAD = {
    "check_health",
    "execute_model",
    "get_supported_tasks",
    "sample_tokens",
    "shutdown",
    "supports_draft_weight_updates",
    "take_draft_token_ids",
}
# Asked by executors that external mode does not use.
OTHER_EXECUTORS = {
    *before(0, 33, "adjust_rank", "init_device", "init_worker", "load_model", "update_environment_variables")
}
# On the list in vain with some versions, which never ask for them.
NOT_ASKED = {
    *before(0, 31, "discard"),
    *before(0, 32, "compute_weight_checksums", "release_late_interaction_query_cache"),
}


def vllm_root() -> Path:
    import vllm

    assert vllm.__file__ is not None
    return Path(vllm.__file__).parent


def test_every_call_of_vllm_is_known() -> None:
    """From the text of all of vLLM: who asks is spread over it, and most of it cannot be run here."""
    pattern = re.compile(r"""collective_rpc(?:_async)?\(\s*(?:\#.*\n\s*)*["'](\w+)["']""")
    asked = {name for path in vllm_root().rglob("*.py") for name in pattern.findall(path.read_text())}
    assert asked - set(CALLS) == NOT_CARRIED | ANSWERED_BY_HEAD | OTHER_EXECUTORS


@pytest.mark.parametrize("method", sorted(set(CALLS) - OURS - NOT_ASKED))
def test_every_call_is_a_method_of_vllms_worker(method: str) -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    function = vars(WorkerWrapperBase).get(method) or getattr(CPUWorker, method)
    names = parameters(function)
    expected = list(CALLS[method].args)
    first = len(expected) - CALLS[method].by_keyword
    assert names == ["self", *expected[:first], *(f"*{name}" for name in expected[first:])]


def test_we_take_back_of_a_kv_cache_what_vllm_does() -> None:
    """Without a device ours stands in for vLLM's method, and has to follow it."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from stagewire.vllm_plugin.seams import kv_cache_release

    touched = re.findall(
        r"\b(?:self|layer|layer\.impl)\.(\w+)", inspect.getsource(GPUModelRunner._cleanup_profiling_kv_cache)
    )
    ours = inspect.getsource(kv_cache_release)
    assert touched
    assert [name for name in touched if name not in ours] == []


def test_our_own_calls_hide_none_of_vllms() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert set(CALLS) >= OURS
    assert not [name for name in OURS if hasattr(CPUWorker, name)]


def test_executor_has_no_methods_that_we_have_not_read() -> None:
    """A new one may be a call that start-up makes."""
    from vllm.v1.executor.abstract import Executor

    kinds = (property, cached_property, classmethod, staticmethod)
    public = {name for name, value in vars(Executor).items() if callable(value) or isinstance(value, kinds)}
    assert {name for name in public if not name.startswith("_")} == {
        *("get_class", "supports_async_scheduling", "supported_tasks"),
        *("initialize_from_config", "compile_or_warm_up_model", "determine_available_memory", "get_kv_cache_specs"),
        *("get_supported_kv_cache_layouts", "set_kv_cache_layout", "get_kv_connector_handshake_metadata"),
        *("register_failure_callback", "collective_rpc", "execute_model", "sample_tokens", "execute_dummy_batch"),
        *("take_draft_token_ids", "profile", "save_sharded_state", "check_health", "shutdown"),
        *("init_kv_output_aggregator", "init_ec_output_aggregator", "supports_draft_weight_updates"),
        *("add_lora", "remove_lora", "pin_lora", "list_loras", "reset_mm_cache", "reset_encoder_cache"),
        *("sleep", "wake_up", "reinitialize_distributed"),
        *since(0, 31, "discard", "is_sleeping"),
        *since(0, 33, "get_simple_cpu_offload_num_blocks"),
    }


@pytest.mark.parametrize(
    "name",
    ["collective_rpc", "execute_model", "sample_tokens", "initialize_from_config", "get_supported_kv_cache_layouts"],
)
def test_overridden_methods_keep_vllms_parameters(name: str) -> None:
    from vllm.v1.executor.abstract import Executor

    assert parameters(getattr(RingExecutor, name)) == parameters(getattr(Executor, name))


PROFILED = (True, None, None, 3, *[None] * (CALLS["profile"].by_keyword - 2))


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "expected"),
    [
        ("sleep", (), {"level": 2}, (2,)),
        ("wake_up", (), {}, (None,)),
        ("wake_up", (), {"tags": ["weights"]}, (["weights"],)),
        ("profile", (True, "prefix"), {}, (True, "prefix", *[None] * CALLS["profile"].by_keyword)),
        *([("profile", (True,), {"max_iterations": 3}, PROFILED)] if is_at_least(0, 32) else []),
        ("remove_lora", (3,), {}, (3,)),
    ],
)
def test_arguments_are_bound_by_name(
    method: str, args: tuple[Any, ...], kwargs: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert bind_call(method, args, kwargs) == expected


@pytest.mark.parametrize(
    ("method", "args", "kwargs"),
    [
        ("sleep", (), {}),
        ("sleep", (1, 2), {}),
        ("sleep", (1,), {"level": 1}),
        ("sleep", (), {"depth": 1}),
        ("add_lora", ({"lora_name": "a"},), {}),
        ("list_loras", (1,), {}),
        ("discard", ((1,),), {}),
        ("save_sharded_state", (), {"path": "/"}),
    ],
)
def test_arguments_that_vllm_does_not_take(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=method):
        bind_call(method, args, kwargs)


def test_a_call_waits_for_the_steps_before_it() -> None:
    """But not for the one that vLLM has still to ask for: its grammar is not there yet."""
    executor: Any = RingExecutor.__new__(RingExecutor)

    def receive(*_: Any) -> None:
        executor._steps.pop(min(executor._steps)).future.set_result(None)

    executor._deadlines, executor._receive = StepDeadlines(1), receive
    for current, left in (((3, None), [3]), (None, [])):
        executor._current = current
        executor._steps = {
            step: SimpleNamespace(step=step, future=Future(), waited_s=0, req_ids=["a"], num_tokens=1)
            for step in (1, 2, 3)
        }
        executor._finish_steps()
        assert list(executor._steps) == left


def test_a_profile_without_limits_is_as_every_vllm_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    executor: Any = RingExecutor.__new__(RingExecutor)
    monkeypatch.setattr(RingExecutor, "collective_rpc", lambda _, *args, **kwargs: asked.append((args, kwargs)))
    executor.profile(True, "prefix")
    executor.profile(False)
    assert [kwargs["args"] for _, kwargs in asked] == [(True, "prefix"), (False, None)]


def test_a_callable_never_travels() -> None:
    executor = RingExecutor.__new__(RingExecutor)  # refused before it looks at itself
    with pytest.raises(NotImplementedError, match="a callable cannot run on all stages"):
        executor.collective_rpc(lambda worker: worker)
    with pytest.raises(NotImplementedError, match="save_sharded_state"):
        executor.collective_rpc("save_sharded_state")
    for value in (lambda: None, print, CPU_METHOD, [lambda: None], {"a": print}):
        with pytest.raises(TypeError, match="may travel the ring"):
            encode_value(value)


CPU_METHOD = Path.unlink


def make_specs() -> dict[str, Any]:
    from vllm.v1 import kv_cache_interface as kv
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    heads: dict[str, Any] = {"block_size": 16, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}
    stride = {"block_stride_alignment": MultipleOf(64) if is_at_least(0, 32) else 64} if is_at_least(0, 31) else {}
    full = kv.FullAttentionSpec(**heads, **stride)
    return {
        "full": full,
        "full, fp8, padded": kv.FullAttentionSpec(
            **(heads | {"dtype": torch.float8_e4m3fn}), kv_quant_mode=kv.KVQuantMode(1), page_size_padded=8192
        ),
        "sliding window": kv.SlidingWindowSpec(**heads, sliding_window=4096, extra_retained_tokens=3),
        "chunked local": kv.ChunkedLocalAttentionSpec(**heads, attention_chunk_size=8192),
        "MLA": kv.MLAAttentionSpec(
            **(heads | {"num_kv_heads": 1, "head_size": 576}),
            alignment=4096,
            tokens_per_state=Fraction(3, 2),
            cache_role=list(kv.SparseCacheRole)[-1],
        ),
        "sliding window MLA": kv.SlidingWindowMLASpec(
            **heads, sliding_window=128, **({"bounded_replay": True} if is_at_least(0, 31) else {})
        ),
        "mamba": kv.MambaSpec(
            block_size=256,
            shapes=((4, 96), (8, 16, 16)),
            dtypes=(torch.float32, torch.bfloat16),
            mamba_type=next(iter(MambaAttentionBackendEnum)),
            mamba_cache_mode="align",
        ),
        "sink": kv.SinkFullAttentionSpec(**heads, sink_len=4),
        "uniform": kv.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"layers.0": full, "layers.1": full}),
    }


def test_kv_cache_specs_round_trip() -> None:
    specs = make_specs()
    decoded = decode_value(encode_value(specs))
    assert decoded == specs
    assert {name: type(spec) for name, spec in decoded.items()} == {name: type(spec) for name, spec in specs.items()}
    assert CALLS["get_kv_cache_spec"].result(decoded)


def test_kv_cache_config_round_trips() -> None:
    from vllm.v1 import kv_cache_interface as kv

    specs = make_specs()
    config = kv.KVCacheConfig(
        num_blocks=1831,
        kv_cache_tensors=[
            kv.KVCacheTensor(size=1 << 20, layers=["layers.0", "layers.1"], layer_stride=7, block_stride=9)
        ],
        kv_cache_groups=[
            kv.KVCacheGroupSpec(["layers.0"], specs["full"]),
            kv.KVCacheGroupSpec(["layers.1"], specs["mamba"]),
        ],
        kv_cache_layout="LBHNC",
    )
    decoded = decode_value(encode_value((([config, config]),)))
    assert decoded == ([config, config],)
    assert CALLS["initialize_from_config"].args["kv_cache_configs"](decoded[0])


def test_every_class_of_the_kv_cache_interface_may_travel() -> None:
    """And no other: an object of a class by the same name from elsewhere is refused too."""
    from vllm.v1 import kv_cache_interface as kv

    for cls in vars(kv).values():
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == kv.__name__:
            fields = {field.name: "" for field in dataclasses.fields(cls) if field.init}
            impostor = dataclasses.make_dataclass(cls.__name__, list(fields))
            with pytest.raises(TypeError, match="may travel the ring"):
                encode_value(impostor(**fields))


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, -1, 2**40, 1.5, "text", b"bytes", [1, [2]], (1, "a"), {"a": (1,)}, {1, 2}),
        *(torch.bfloat16, Fraction(3, 7), {"nested": [{"dtype": torch.int8}]}),
    ],
)
def test_plain_values_round_trip(value: Any) -> None:
    decoded = decode_value(encode_value(value))
    assert decoded == value
    assert type(decoded) is type(value)


def test_lora_requests_round_trip() -> None:
    from vllm.lora.request import LoRARequest

    for request in (
        LoRARequest("name", 3, "/path"),
        LoRARequest("name", 3, "/path", base_model_name="base", load_inplace=True, is_3d_lora_weight=True),
    ):
        decoded = decode_value(encode_value((request,)))
        assert CALLS["add_lora"].args["lora_request"](decoded[0])
        assert msgspec.structs.asdict(decoded[0]) == msgspec.structs.asdict(request)


def test_compilation_times_round_trip() -> None:
    from vllm.v1.worker.worker_base import CompilationTimes

    decoded = decode_value(encode_value(CompilationTimes(1.5, 2.5)))
    assert decoded == CompilationTimes(1.5, 2.5)
    assert CALLS["compile_or_warm_up_model"].result(decoded)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1), np.zeros(1), Path("x"), object(), SimpleNamespace(a=1), int, Address("host", 1)],
    ids=lambda value: type(value).__name__,
)
def test_unknown_class_is_not_encoded(value: Any) -> None:
    with pytest.raises(TypeError, match="may travel the ring"):
        encode_value(value)


MALFORMED = {
    "not msgpack": b"\xc1",
    "empty": b"",
    "bare map": msgspec.msgpack.encode({"a": 1}),
    "no kind": msgspec.msgpack.encode([]),
    "unknown kind": msgspec.msgpack.encode(["eval", "1"]),
    "unknown class": msgspec.msgpack.encode(["object", "Popen", {"args": "true"}]),
    "class of another module": msgspec.msgpack.encode(["object", "Address", {"host": "a", "port": 1}]),
    "unknown field": msgspec.msgpack.encode(["object", "KVCacheTensor", {"path": "/etc/passwd"}]),
    "missing fields": msgspec.msgpack.encode(["object", "KVCacheTensor", {}]),
    "unknown enum": msgspec.msgpack.encode(["enum", "Signals", "SIGKILL"]),
    "unknown member": msgspec.msgpack.encode(["enum", "KVQuantMode", "nonsense"]),
    "unknown dtype": msgspec.msgpack.encode(["dtype", "nonsense"]),
    "enum without a member": msgspec.msgpack.encode(["enum", "KVQuantMode"]),
    "object with a list of fields": msgspec.msgpack.encode(["object", "KVCacheTensor", ["size"]]),
    "division by zero": msgspec.msgpack.encode(["fraction", 1, 0]),
    "dictionary of scalars": msgspec.msgpack.encode(["dict", 1]),
    "adapter without a path": msgspec.msgpack.encode(["lora_request", "name", 1]),
    "adapter with id 0": msgspec.msgpack.encode(["lora_request", "name", 0, "/path"]),
    "adapter of other types": msgspec.msgpack.encode(["lora_request", 1, 1, "/path"]),
    "unhashable key": msgspec.msgpack.encode(["dict", [["list", 1], 2]]),
    "bottomless": b"\x91" * 100_000,
}


# Still other exceptions than ProtocolError: the stage fails either way, but as a bug of ours in place of its peer's.


@pytest.mark.parametrize(
    "data",
    [pytest.param(data, id=name) for name, data in MALFORMED.items()],
)
def test_malformed_value_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_value(data)


def test_truncated_value_is_a_protocol_error() -> None:
    data = encode_value(make_specs())
    for end in range(0, len(data), 7):
        with pytest.raises(ProtocolError):
            decode_value(data[:end])


# ---- the pipeline group --------------------------------------------------------------------------------------------

# Asked of the group by code that external mode never runs.
NOT_OFFERED = {
    "broadcast_object": "KV connectors: refused",
    "broadcast_tensor_dict": "GPUModelRunner.broadcast_pp_output: only with the external_launcher backend",
    "send_tensor_dict": "GPUModelRunner.broadcast_pp_output: only with the external_launcher backend",
    "device_group": "tokens by broadcast: only under async scheduling",
    "make_sibling_device_group": "V2 model runner",
} | dict.fromkeys(since(0, 33, "recv_tensor_dict", "_should_use_all_gather"), "V2 model runner")


def attributes_asked_of_the_group() -> set[str]:
    """From the text of all of vLLM: every model, and every kind of device, may ask another thing."""
    asked: set[str] = set()
    for path in vllm_root().rglob("*.py"):
        text = path.read_text()
        if "get_pp_group" not in text and "pp_group." not in text:
            continue
        aliases = set(re.findall(r"^\s*([\w.]+) = get_pp_group\(\)$", text, re.MULTILINE)) | {"self.pp_group"}
        names = "|".join([r"get_pp_group\(\)", *(rf"(?<![\w.]){re.escape(alias)}" for alias in aliases)])
        asked.update(re.findall(rf"(?:{names})\s*\.\s*(\w+)", text))
    return asked


def test_group_offers_what_vllm_asks() -> None:
    group = PipelineGroup(1, NUM_STAGES)
    asked = attributes_asked_of_the_group()
    assert {"is_first_rank", "is_last_rank", "rank_in_group", "world_size", "isend_tensor_dict"} <= asked
    assert {name for name in asked if not hasattr(group, name)} == set(NOT_OFFERED)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Any]:
    """A real group of vLLM's, with this process alone in it."""
    from vllm.distributed import parallel_state

    parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
    yield parallel_state.get_world_group()
    parallel_state.destroy_distributed_environment()


def test_offered_attributes_are_the_coordinators(coordinator: Any) -> None:
    """Not fewer and not others than vLLM's own class has, so that a renamed one shows."""
    own = {"put_incoming", "take_outgoing", "forget"}
    offered = {name for name in {*vars(PipelineGroup(1, 4)), *vars(PipelineGroup)} if not name.startswith("_")}
    assert offered - own <= set(dir(coordinator))


@pytest.mark.parametrize(("stage", "is_first", "is_last"), [(0, True, False), (2, False, False), (3, False, True)])
def test_group_answers_for_its_stage(stage: int, is_first: bool, is_last: bool) -> None:
    group = PipelineGroup(stage, NUM_STAGES)
    assert (group.is_first_rank, group.is_last_rank, group.rank_in_group) == (is_first, is_last, stage)
    assert (group.first_rank, group.last_rank, group.world_size) == (0, 3, 4)
    assert (group.prev_rank, group.next_rank) == ((stage - 1) % 4, (stage + 1) % 4)


def test_group_hands_over_each_steps_tensors_once() -> None:
    group = PipelineGroup(1, NUM_STAGES)
    with pytest.raises(InternalError):
        group.irecv_tensor_dict(all_gather_group=None)
    sent, checks = {"hidden_states": torch.ones(2, 3)}, []
    group.put_incoming(sent, lambda: checks.append("checked"))
    tensors, handles, hooks = group.irecv_tensor_dict(all_gather_group=None)
    assert (tensors, handles, len(hooks)) == (sent, [], 1)
    assert group.isend_tensor_dict(sent, all_gather_group=None)[1:] == []
    assert group.take_outgoing() is sent
    with pytest.raises(InternalError):
        group.take_outgoing()


def test_worker_receives_and_sends_through_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stage between others: what was put in reaches the runner, and what that returns can be taken out."""
    from vllm.sequence import IntermediateTensors
    from vllm.v1.worker import gpu_worker

    group = PipelineGroup(1, NUM_STAGES)
    monkeypatch.setattr(gpu_worker, "get_pp_group", lambda: group)
    monkeypatch.setattr(gpu_worker, "get_tp_group", Mock())
    worker, seen = MagicMock(_pp_send_work=[], use_v2_model_runner=False), []

    def execute_model(schedule: Any, tensors: Any) -> Any:
        seen.append(tensors.tensors)
        return IntermediateTensors({"hidden_states": torch.ones(1)})

    worker.model_runner.execute_model = execute_model
    incoming = {"hidden_states": torch.zeros(1)}
    group.put_incoming(incoming, lambda: None)
    assert gpu_worker.Worker.execute_model(worker, SimpleNamespace(total_num_scheduled_tokens=1)) is None
    assert seen == [incoming]
    assert group.take_outgoing() == {"hidden_states": torch.ones(1)}


@pytest.mark.parametrize("access", [lambda t: t.tensors, lambda t: list(t.items()), lambda t: t["a"]])
def test_row_check_runs_before_the_tensors_are_used(access: Callable[[Any], Any]) -> None:
    from vllm.v1.worker.gpu_worker import AsyncIntermediateTensors

    checks: list[str] = []
    tensors = AsyncIntermediateTensors({"a": torch.ones(1)}, [], [lambda: checks.append("checked")])
    assert checks == []
    for _ in range(2):
        access(tensors)
    assert checks == ["checked"]


def test_groups_are_initialised_with_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import parallel_state

    first = parameters(parallel_state.init_distributed_environment)
    assert first[:5] == ["world_size", "rank", "distributed_init_method", "local_rank", "backend"]
    second = parameters(parallel_state.initialize_model_parallel)
    assert second[:2] == ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
    group: Any = PipelineGroup(1, NUM_STAGES)
    monkeypatch.setattr(parallel_state, "_PP", group)
    assert parallel_state.get_pp_group() is group


def test_ranks_find_each_other_under_a_name_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the names of their shared memory, and what the worker itself makes of the store's path later."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.v1.worker import cpu_worker

    place = RankPlace(0, 2, Path("/tmp/x/stagewire-0f1e"))
    monkeypatch.setenv("VLLM_DIST_IDENT", place.name)
    name = _CPUSHMDistributed.make_group_name(SimpleNamespace(unique_name="tp:0", ranks=[0, 1]))
    assert name.startswith("stagewire-0f1e-tp:0")

    found: list[str] = []

    def init_worker_distributed_environment(*_: Any) -> None:  # which the worker calls once it has set the name
        found.append(os.environ["VLLM_DIST_IDENT"])
        raise EOFError

    monkeypatch.setattr(cpu_worker, "init_worker_distributed_environment", init_worker_distributed_environment)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)
    monkeypatch.setenv("VLLM_DIST_IDENT", "another")
    with pytest.raises(EOFError):
        cpu_worker.CPUWorker.init_device(Mock(distributed_init_method=f"file://{place.store}"))
    assert found == [place.name]


def test_devices_of_ranks_are_chosen_as_vllms_worker_does() -> None:
    """By the names that its code asks for: it cannot be run here, without a GPU."""
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment

    asked = set(inspect.unwrap(Worker.init_device).__code__.co_names)
    assert {"logical_device_id_to_visible_device_id", "set_device_index"} <= asked
    assert callable(current_platform.logical_device_id_to_visible_device_id)
    assert "set_custom_all_reduce" in init_worker_distributed_environment.__code__.co_names
    assert parameters(parallel_state.set_custom_all_reduce) == ["enable"]


def test_worker_is_built_with_these_arguments() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    assert parameters(WorkerWrapperBase)[:2] == ["rpc_rank", "global_rank"]
    ours = {"vllm_config", "local_rank", "rank", "distributed_init_method", "is_driver_worker"}
    assert set(parameters(CPUWorker)) == set(parameters(Worker)) == ours
    wrapper = Mock(global_rank=2)
    WorkerWrapperBase.initialize_from_config(wrapper, ["first", "second", "third"])
    wrapper.worker.initialize_from_config.assert_called_once_with("third")


@pytest.mark.parametrize(
    ("vocabulary", "hidden", "seqs", "drafts", "largest"),
    [(151_936, 1024, 256, 4, 256 * 5 * 4748 * 4), (262_144, 640, 1024, 0, 1024 * 8192 * 4), (49_152, 576, 16, 0, 0)],
)
def test_a_grammars_bitmask_fits_a_frame(vocabulary: int, hidden: int, seqs: int, drafts: int, largest: int) -> None:
    """One row of bits of the vocabulary for each request and each of its drafts: more than a small model's batch."""
    model = SimpleNamespace(
        max_model_len=2048, get_hidden_size=lambda: hidden, get_vocab_size=lambda: vocabulary, runner_type="generate"
    )
    settings = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=seqs, max_num_batched_tokens=2048),
        model_config=model,
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts) if drafts else None,
    )
    assert max_frame_bytes(settings, is_head=False) > max(largest, 2048 * hidden * 8, 16 << 20)


def test_a_stage_plans_its_own_kv_cache_with_vllms_functions() -> None:
    """What they make of it is in test_stage_worker."""
    from vllm.v1 import core
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MambaSpec

    from stagewire.vllm_plugin.worker import own_kv_cache

    groups = "kv_cache_groups"
    modules = ("kv_cache_config_builder", "kv_cache_planning") if is_at_least(0, 33) else ("kv_cache_utils",) * 2
    planner, counter = (importlib.import_module(f"{core.__name__}.{name}") for name in modules)
    if is_at_least(0, 33):
        assert parameters(planner.get_kv_cache_config_builder) == ["vllm_config"]
        planned = parameters(planner.KVCacheConfigBuilder.get_kv_cache_config_from_groups)
        assert planned == ["self", "vllm_config", groups, "num_blocks"]
    else:
        assert parameters(planner.get_kv_cache_config_from_groups) == ["vllm_config", groups, "available_memory"]
    counted = ["vllm_config", groups] if is_at_least(0, 32) else [groups]
    assert parameters(counter._pool_bytes_per_block) == counted
    assert {groups, "kv_cache_tensors", "num_blocks"} <= {field.name for field in dataclasses.fields(KVCacheConfig)}
    known = {field.name for cls in (FullAttentionSpec, MambaSpec) for field in dataclasses.fields(cls)}
    assert {"num_kv_heads", "head_size", "dtype", "shapes", "dtypes", "page_size_padded"} <= known
    assert {"num_kv_heads", "head_size", "dtype", "shapes", "dtypes"} <= set(own_kv_cache._DECIDED)


def test_every_activation_dtype_exists() -> None:
    for name, num_bytes in ITEM_BYTES.items():
        assert getattr(torch, name).itemsize == num_bytes


# ---- steps: C2 and C3 ----------------------------------------------------------------------------------------------

# Every field of vLLM's step objects is here once: it travels, or table C2/C3 says why not. A new field is in neither.
TRAVELS = {
    "vllm.v1.core.sched.output:SchedulerOutput": {
        *("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens"),
        *("finished_req_ids", "free_encoder_mm_hashes", "preempted_req_ids", "has_structured_output_requests"),
        *("new_block_ids_to_zero", "kv_cache_block_copies"),
        *("scheduled_spec_decode_tokens", "num_spec_tokens_to_schedule", "scheduled_encoder_inputs"),
        "num_common_prefix_blocks",
    },
    "vllm.v1.core.sched.output:NewRequestData": {
        *("req_id", "prompt_token_ids", "sampling_params", "block_ids", "num_computed_tokens"),
        *("mm_features", "prompt_embeds"),  # what positions need of them
        *("pooling_params", "lora_request"),
    },
    "vllm.v1.core.sched.output:CachedRequestData": {
        *("req_ids", "resumed_req_ids", "new_token_ids", "new_block_ids", "num_computed_tokens", "num_output_tokens"),
    },
    "vllm.v1.core.sched.output:GrammarOutput": {
        *("structured_output_request_ids", "grammar_bitmask", *since(0, 32, "num_acceptable_drafts")),
    },
    "vllm.v1.outputs:ModelRunnerOutput": {
        *("req_ids", "req_id_to_index", "sampled_token_ids", "logprobs", "prompt_logprobs_dict"),
        *("num_nans_in_logits", "pooler_output"),
    },
}
STAYS = {
    "vllm.v1.core.sched.output:SchedulerOutput": {
        *("scheduled_encoder_input_stats", "pending_structured_output_tokens", "num_invalid_spec_tokens"),
        *("kv_connector_metadata", "kv_connector_block_state", "has_sync_kv_loads"),
        *("ec_connector_metadata", "ec_manager_metadata"),
        *since(0, 31, "aux_output_connector_metadata"),
        *before(0, 32, "block_table_updates"),  # a KV connector's
        *since(0, 33, "encoder_input_updates", "skip_drafts"),  # read by the V2 runner
    },
    "vllm.v1.core.sched.output:NewRequestData": {
        *("prompt_is_token_ids", "prefill_token_ids", *since(0, 31, "replay_start")),
    },
    "vllm.v1.core.sched.output:CachedRequestData": {"all_token_ids"},
    "vllm.v1.core.sched.output:GrammarOutput": set[str](),
    "vllm.v1.outputs:ModelRunnerOutput": {
        *("kv_connector_output", "ec_connector_output", "cudagraph_stats", "sampling_masks"),
        *before(0, 31, "routed_experts"),
        *since(0, 31, "prompt_token_id_logprobs_dict", "aux_output_connector_output"),
    },
}


@pytest.mark.parametrize("target", TRAVELS)
def test_step_objects_have_no_field_that_nobody_decided_about(target: str) -> None:
    owner, name = find(target)
    fields = {field.name for field in dataclasses.fields(getattr(owner, name))}
    assert fields == TRAVELS[target] | STAYS[target]
    assert not TRAVELS[target] & STAYS[target]


def test_logprobs_have_no_field_that_nobody_decided_about() -> None:
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    assert LogprobsLists._fields == ("logprob_token_ids", "logprobs", "sampled_token_ranks", "cu_num_generated_tokens")
    assert LogprobsTensors._fields == (
        *("logprob_token_ids", "logprobs", "selected_token_ranks", "cu_num_generated_tokens"),
        "cu_num_generated_tokens_tensor",
    )


def make_sampling_params() -> Any:
    from vllm.sampling_params import RepetitionDetectionParams, SamplingParams

    params = SamplingParams(
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=1234,
        stop_token_ids=[5, 6],
        ignore_eos=True,
        max_tokens=77,
        min_tokens=3,
        logprobs=4,
        prompt_logprobs=2,
        logit_bias={7: -1.5},
        allowed_token_ids=[1, 2, 7],
        bad_words=["bad"],
        extra_args={"a": [1, {"b": "c"}]},
        repetition_detection=RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=1, min_count=3),
    )
    # Filled in by the API server from the tokenizer and the model; `min_tokens` and `bad_words` need them on the tail.
    params._all_stop_token_ids = {2, 5, 6}
    params._eos_token_id = 2
    params._bad_words_token_ids = [[9, 8]]
    return params


def make_schedule(sampling_params: Any) -> Any:
    from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    new = NewRequestData(
        req_id="new",
        prompt_token_ids=[1, 2, 3, 49151],
        mm_features=[],
        sampling_params=sampling_params,
        pooling_params=None,
        block_ids=([4, 5], [6]),
        num_computed_tokens=2,
        lora_request=None,
    )
    cached = CachedRequestData(
        req_ids=["z", "a", "m"],
        resumed_req_ids={"m"},
        new_token_ids=[[11], [12], []],
        all_token_ids={"m": [1, 2, 3]},
        new_block_ids=[None, ([7], [8]), ([1, 2], [3])],
        num_computed_tokens=[100, 17, 0],
        num_output_tokens=[3, 1, 9],
    )
    return SchedulerOutput(
        scheduled_new_reqs=[new],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={"z": 1, "a": 1, "m": 64, "new": 2},
        total_num_scheduled_tokens=68,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids={"f", "g"},
        free_encoder_mm_hashes=["hash"],
        preempted_req_ids={"p"},
        has_structured_output_requests=True,
        new_block_ids_to_zero=[4, 7],
        kv_cache_block_copies=[KVCacheBlockCopy(1, 2)],
        num_common_prefix_blocks=[3, 0],
    )


def test_schedule_round_trips_in_everything_a_worker_reads() -> None:
    schedule = make_schedule(make_sampling_params())
    decoded = decode_schedule(encode_schedule(schedule))
    schedule.scheduled_cached_reqs.all_token_ids = {}  # read under async scheduling only (C2)
    assert dataclasses.asdict(decoded) == dataclasses.asdict(schedule)
    assert decoded.scheduled_new_reqs[0] == schedule.scheduled_new_reqs[0]
    assert list(decoded.num_scheduled_tokens) == ["z", "a", "m", "new"], "the order is part of the decision"
    assert type(decoded.kv_cache_block_copies[0]) is type(schedule.kv_cache_block_copies[0])


def test_sampling_params_round_trip() -> None:
    """Greedy, default and everything set: a tail that samples otherwise gives other tokens without an error."""
    from vllm.sampling_params import SamplingParams

    for params in (SamplingParams(), SamplingParams(temperature=0), make_sampling_params()):
        decoded = decode_schedule(encode_schedule(make_schedule(params))).scheduled_new_reqs[0].sampling_params
        assert msgspec.structs.asdict(decoded) == msgspec.structs.asdict(params) | {"stop": decoded.stop}


def test_pooling_params_round_trip() -> None:
    from vllm.pooling_params import LateInteractionParams, PoolingParams

    full = PoolingParams(
        use_activation=False,
        dimensions=64,
        step_tag_id=3,
        returned_token_ids=[1, 2],
        task="token_embed",
        requires_token_ids=True,
        skip_reading_prefix_cache=True,
        late_interaction_params=LateInteractionParams("cache_query", "key", 2),
        extra_kwargs={"compressed_token_type_ids": 7},
    )
    for params in (PoolingParams(task="embed"), full):
        schedule = make_schedule(None)
        schedule.scheduled_new_reqs[0].pooling_params = params
        decoded = decode_schedule(encode_schedule(schedule)).scheduled_new_reqs[0].pooling_params
        assert msgspec.structs.asdict(decoded) == msgspec.structs.asdict(params)


def test_an_adapter_travels_as_its_number_only() -> None:
    """So a stage reads no file for a schedule; what it knows of the adapter is its own."""
    from vllm.lora.request import LoRARequest

    schedule = make_schedule(None)
    schedule.scheduled_new_reqs[0].lora_request = LoRARequest("name", 3, "/head/path")
    data = encode_schedule(schedule)
    own = LoRARequest("name", 3, "/own/path")
    assert decode_schedule(data, {3: own}).scheduled_new_reqs[0].lora_request is own
    assert b"path" not in data
    with pytest.raises(ProtocolError, match="adapter 3, which was not added"):
        decode_schedule(data, {1: own})


def test_text_that_only_the_api_server_reads_stays_there() -> None:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    params = SamplingParams(stop=["END"], structured_outputs=StructuredOutputsParams(json={"type": "object"}))
    decoded = decode_schedule(encode_schedule(make_schedule(params))).scheduled_new_reqs[0].sampling_params
    assert not decoded.stop
    assert decoded.structured_outputs is None
    assert params.stop == ["END"]
    assert params.structured_outputs is not None, "the head's own object is untouched"


def test_idle_poll_is_nothing_and_a_finished_request_is_not() -> None:
    from vllm.v1.core.sched.output import SchedulerOutput

    assert is_nothing(SchedulerOutput.make_empty())
    for field, value in {
        "finished_req_ids": {"a"},
        "preempted_req_ids": {"a"},
        "free_encoder_mm_hashes": ["a"],
        "new_block_ids_to_zero": [1],
        "kv_cache_block_copies": [(1, 2)],
        "total_num_scheduled_tokens": 1,
    }.items():
        schedule = SchedulerOutput.make_empty()
        setattr(schedule, field, value)
        assert not is_nothing(schedule), field


@pytest.mark.parametrize("decode", [decode_schedule, decode_output, decode_grammar])
@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x80", b"\x91" * 100_000, b"\x9f" + b"\xc0" * 15])
def test_malformed_step_is_a_protocol_error(decode: Callable[[bytes], Any], data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def test_truncated_schedule_is_a_protocol_error() -> None:
    data = encode_schedule(make_schedule(make_sampling_params()))
    for end in range(len(data)):
        with pytest.raises(ProtocolError):
            decode_schedule(data[:end])


def test_sampling_params_that_contradict_themselves_are_a_protocol_error() -> None:
    """vLLM validates them as they are built, whoever builds them."""
    from vllm.sampling_params import SamplingParams

    params = SamplingParams()
    params.top_p = 7.0
    with pytest.raises(ProtocolError, match="top_p"):
        decode_schedule(encode_schedule(make_schedule(params)))


def test_output_with_logprobs_round_trips() -> None:
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors, ModelRunnerOutput

    random = np.random.default_rng(0)
    logprobs = LogprobsLists(
        random.integers(0, 49152, (2, 5), dtype=np.int32),
        random.standard_normal((2, 5), dtype=np.float32),
        random.integers(0, 9, 2, dtype=np.int32),
        [0, 1],
    )
    prompt = LogprobsTensors.empty_cpu(3, 2)
    for tensor in prompt[:3]:
        tensor.zero_()
    output = ModelRunnerOutput(
        req_ids=["b", "a"],
        req_id_to_index={"b": 0, "a": 1},
        sampled_token_ids=[[5], []],
        logprobs=logprobs,
        prompt_logprobs_dict={"b": prompt, "a": None},
        num_nans_in_logits={"b": 0},
    )
    decoded = decode_output(encode_output(output))
    assert decoded.req_ids == output.req_ids
    assert decoded.req_id_to_index == output.req_id_to_index
    assert decoded.sampled_token_ids == output.sampled_token_ids
    assert decoded.num_nans_in_logits == output.num_nans_in_logits
    assert decoded.logprobs is not None
    for ours, theirs in zip(decoded.logprobs[:3], logprobs[:3], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert decoded.logprobs.cu_num_generated_tokens == [0, 1]
    returned = decoded.prompt_logprobs_dict["b"]
    assert returned is not None
    for our_tensor, their_tensor in zip(returned[:3], prompt[:3], strict=True):
        assert our_tensor.dtype == their_tensor.dtype
        assert torch.equal(our_tensor, their_tensor)
    assert decoded.prompt_logprobs_dict["a"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_pooled_output_round_trips(dtype: torch.dtype) -> None:
    from vllm.v1.outputs import ModelRunnerOutput

    ragged = [torch.rand(5), None, torch.rand(3, 4), torch.tensor(1.5), torch.rand(0, 4), torch.rand(4, 6)[:, ::2]]
    pooled = [None if each is None else (each * 9).to(dtype) for each in ragged]
    names = [f"r{i}" for i in range(len(pooled))]
    output = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, pooler_output=pooled)
    decoded = decode_output(encode_output(output)).pooler_output
    assert decoded is not None
    for ours, theirs in zip(decoded, pooled, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(ours, theirs)
            ours.mul_(1)  # writable


@pytest.mark.parametrize(
    ("dtype", "shape", "num_bytes"),
    [
        ("object", [1], 8),
        ("__dict__", [1], 8),
        ("float32", [2], 4),
        ("float32", [-1, -1], 4),
        ("float32", [-1], 4),
        ("float32", [0, 2**63], 0),
        ("float32", [2**40], 4),
    ],
)
def test_a_tensor_that_is_none_is_a_protocol_error(dtype: str, shape: list[int], num_bytes: int) -> None:
    array = [dtype, shape, bytes(num_bytes)]
    with pytest.raises(ProtocolError):
        decode_output(msgspec.msgpack.encode([["a"], [], None, {}, None, [array]]))


def test_output_without_logprobs_equals_itself() -> None:
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

    output = ModelRunnerOutput(["a"], {"a": 0}, [[1]])
    assert decode_output(encode_output(output)) == output
    assert decode_output(encode_output(EMPTY_MODEL_RUNNER_OUTPUT)) == EMPTY_MODEL_RUNNER_OUTPUT


def test_grammar_round_trips() -> None:
    from vllm.v1.core.sched.output import GrammarOutput

    bitmask = np.arange(-3, 3, dtype=np.int32).reshape(2, 3)
    acceptable = {"num_acceptable_drafts": [0, 0]} if is_at_least(0, 32) else {}
    decoded = decode_grammar(encode_grammar(GrammarOutput(["b", "a"], bitmask, **acceptable)))
    assert decoded.structured_output_request_ids == ["b", "a"]
    assert vars(decoded).keys() - {"grammar_bitmask", "structured_output_request_ids"} == acceptable.keys()
    assert all(getattr(decoded, name) == value for name, value in acceptable.items())
    assert decoded.grammar_bitmask.dtype == np.int32
    assert decoded.grammar_bitmask.flags.writeable, "vLLM hands it to torch"
    np.testing.assert_array_equal(decoded.grammar_bitmask, bitmask)


@pytest.mark.parametrize("wants_grammar", [True, False])
def test_structured_output_is_announced_without_async_scheduling(wants_grammar: bool, scheduler: Any) -> None:
    """The comment on the field says otherwise; the head needs it to know that a bitmask will follow."""
    add_requests(scheduler, 1)
    scheduler.requests["r0"].structured_output_request = Mock() if wants_grammar else None
    assert scheduler.schedule().has_structured_output_requests is wants_grammar


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        (["b", "a"], {"a": 1, "b": 2}),  # another order
        (["a", "b"], {"a": 2, "b": 1}),  # another share
        (["a"], {"a": 1}),
        (["a", "b", "c"], {"a": 1, "b": 2, "c": 1}),
        (["a", "B"], {"a": 1, "B": 2}),
        (["a1", "b"], {"a1": 1, "b": 2}),
    ],
)
def test_digest_depends_on_rows_their_order_and_their_tokens(rows: list[str], tokens: dict[str, int]) -> None:
    digest = row_digest(["a", "b"], {"b": 2, "a": 1})
    assert digest == row_digest(["a", "b"], {"a": 1, "b": 2}), "the schedule's own order does not matter"
    assert 0 < digest < 2**64
    assert row_digest(rows, tokens) != digest


def test_the_digest_of_tokens_depends_on_each_of_them() -> None:
    """Every rank of a tensor parallel tail samples for itself; rank 0's tokens travel."""
    from vllm.v1.outputs import ModelRunnerOutput

    def digest(*tokens: list[int]) -> int:
        names = [f"r{index}" for index in range(len(tokens))]
        return token_digest(ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, list(tokens)))

    assert digest([5], [6, 7]) == digest([5], [6, 7])
    assert len({digest(*tokens) for tokens in ([[5], [6, 7]], [[5], [6, 8]], [[6, 7], [5]], [[5, 6], [7]])}) == 4


# ---- inputs besides token ids -------------------------------------------------------------------------------------


def make_feature(**changes: Any) -> Any:
    """An image of five positions, two of them no embeddings, with pixels and with a grid."""
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    on_cpu = MultiModalBatchedField(keep_on_cpu=True)
    data = MultiModalKwargsItem(
        {
            "pixel_values": MultiModalFieldElem(torch.ones(4, 1000), MultiModalBatchedField()),
            "image_grid_thw": MultiModalFieldElem(torch.tensor([1, 4, 6]), on_cpu),
            "second_per_grid_ts": MultiModalFieldElem(torch.tensor(0.5, dtype=torch.bfloat16), on_cpu),
            "timestamps": MultiModalFieldElem([0.5, [torch.tensor([True, False])]], on_cpu),
        }
    )
    mask = torch.tensor([True, False, True, True, False])
    fields = {"data": data, "modality": "image", "identifier": "abc", "mm_position": PlaceholderRange(2, 5, mask)}
    return MultiModalFeatureSpec(**(fields | changes))


def test_of_an_image_only_what_positions_need_travels() -> None:
    schedule = make_schedule(None)
    schedule.scheduled_new_reqs[0].mm_features = [make_feature()]
    schedule.scheduled_encoder_inputs = {"new": [0]}
    data = encode_schedule(schedule)
    assert len(data) < 1000, "pixels do not travel"
    decoded = decode_schedule(data)
    assert decoded.scheduled_encoder_inputs == {"new": [0]}
    (feature,) = decoded.scheduled_new_reqs[0].mm_features
    assert (feature.modality, feature.identifier) == ("image", "abc")
    assert feature.mm_position == make_feature().mm_position
    assert feature.mm_position.get_num_embeds() == 3
    assert feature.data is not None
    assert set(feature.data) == {"image_grid_thw", "second_per_grid_ts", "timestamps"}
    assert torch.equal(feature.data["image_grid_thw"].data, torch.tensor([1, 4, 6]))
    assert feature.data["second_per_grid_ts"].data.item() == 0.5
    number, (mask,) = feature.data["timestamps"].data
    assert number == 0.5
    assert torch.equal(mask, torch.tensor([True, False]))
    schedule = make_schedule(None)
    assert decode_schedule(encode_schedule(schedule)).scheduled_new_reqs[0].mm_features == []


def test_an_image_whose_positions_are_cached_has_no_data() -> None:
    """vLLM drops it by itself (`strip_covered_mm_data`); a mask may be absent too."""
    from vllm.multimodal.inputs import PlaceholderRange

    schedule = make_schedule(None)
    schedule.scheduled_new_reqs[0].mm_features = [make_feature(data=None, mm_position=PlaceholderRange(0, 3))]
    (feature,) = decode_schedule(encode_schedule(schedule)).scheduled_new_reqs[0].mm_features
    assert feature.data is None
    assert feature.mm_position == PlaceholderRange(0, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"is_embed": b"\1"},
        {"fields": {"a": {"dtype": "object", "shape": [1], "data": b"12345678"}}},
        {"fields": {"a": {"dtype": "int64", "shape": [2], "data": b"12345678"}}},
        {"fields": {"a": {"dtype": "int64", "shape": [1 << 60], "data": b"12345678"}}},
        {"fields": {"a": {"dtype": "int64", "shape": "x", "data": b"12345678"}}},
        {"fields": {"a": {"dtype": ["int64"], "shape": [1], "data": b"12345678"}}},
        {"fields": {"a": {"dtype": "int64", "shape": [1]}}},
        {"fields": {"a": {"dtype": "int64", "shape": [1], "data": 1 << 40}}},
        {"fields": {"a": {"dtype": "int64", "shape": [-1], "data": b"12345678"}}},
        {"fields": {"a": {"other": 1}}},
    ],
    ids=str,
)
def test_an_image_that_contradicts_itself_is_a_protocol_error(change: dict[str, Any]) -> None:
    from stagewire.vllm_plugin.codec.inputs import pack_features, unpack_features

    (feature,) = pack_features([make_feature()])
    assert unpack_features([feature])
    with pytest.raises(ProtocolError):
        unpack_features([msgspec.structs.replace(feature, **change)])


def test_of_a_prompts_embeddings_only_their_number_travels() -> None:
    schedule = make_schedule(None)
    schedule.scheduled_new_reqs[0].prompt_token_ids = None
    schedule.scheduled_new_reqs[0].prompt_embeds = torch.ones(300, 500)
    data = encode_schedule(schedule)
    assert len(data) < 1000
    request = decode_schedule(data).scheduled_new_reqs[0]
    assert request.prompt_token_ids is None
    assert request.prompt_embeds is not None
    assert request.prompt_len == 300
    assert request.prompt_embeds.untyped_storage().nbytes() == 4
    rows = torch.ones(8, 500)
    rows.copy_(request.prompt_embeds[4:12])  # as `_prepare_inputs` does, for the first stage's sake
    assert not rows.any()


def test_a_prompt_of_both_kinds_is_its_token_ids_to_other_stages() -> None:
    schedule = make_schedule(None)
    schedule.scheduled_new_reqs[0].prompt_embeds = torch.ones(4, 500)
    request = decode_schedule(encode_schedule(schedule)).scheduled_new_reqs[0]
    assert request.prompt_token_ids == [1, 2, 3, 49151]
    assert request.prompt_embeds is None


@pytest.mark.parametrize("takes", ["images", "embeddings"])
def test_only_the_first_stage_embeds_prompts(takes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `inputs.py` leaves out, and any embedding, a later stage's runner does not touch."""
    from vllm.v1.worker import gpu_model_runner

    monkeypatch.setattr(gpu_model_runner, "get_pp_group", lambda: PipelineGroup(1, NUM_STAGES))
    runner = Mock(supports_mm_inputs=takes == "images", enable_prompt_embeds=takes == "embeddings")
    runner.speculative_config, runner.uses_mrope, runner.positions = None, False, torch.arange(8)
    runner.input_ids.gpu = torch.arange(8)
    runner.model_config.is_encoder_decoder = False
    schedule = SimpleNamespace(total_num_scheduled_tokens=3, scheduled_encoder_inputs={"a": [0]})
    input_ids, inputs_embeds, *_ = gpu_model_runner.GPUModelRunner._preprocess(runner, schedule, 3, Mock())
    assert input_ids.tolist() == [0, 1, 2]
    assert inputs_embeds is None
    used = {name.partition(".")[0] for name, _, _ in runner.method_calls}
    assert not used & {"_execute_mm_encoder", "_gather_mm_embeddings", "_prepare_mm_inputs", "model"}


@pytest.mark.parametrize(("limit", "is_left_out"), [(0, True), (1, False)])
def test_a_limit_of_no_items_leaves_the_towers_out(limit: int, is_left_out: bool) -> None:
    from vllm.model_executor.models.interfaces import SupportsMultiModal
    from vllm.model_executor.models.utils import StageMissingLayer

    class Model(torch.nn.Module, SupportsMultiModal):  # type: ignore[misc]
        pass

    config, model = Mock(), Model()
    config.model_config.get_multimodal_config.return_value.get_limit_per_prompt = lambda modality: limit
    with model._mark_tower_model(config, "image"):
        model.tower = torch.nn.Linear(2, 2)
    assert isinstance(model.tower, StageMissingLayer) == is_left_out


# ---- speculation ---------------------------------------------------------------------------------------------------


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}


def test_drafts_and_accepted_tokens_round_trip() -> None:
    from stagewire.vllm_plugin.codec.speculative import SpeculativeRequestData

    schedule = make_schedule(None)
    schedule.scheduled_spec_decode_tokens = {"z": [5, 6], "m": [-1, -1]}
    schedule.num_spec_tokens_to_schedule = 3
    cached = schedule.scheduled_cached_reqs
    cached.all_token_ids = {}
    schedule.scheduled_cached_reqs = SpeculativeRequestData(**vars(cached), accepted_token_ids=[[1, 2], [], [9]])
    decoded = decode_schedule(encode_schedule(schedule))
    assert dataclasses.asdict(decoded) == dataclasses.asdict(schedule)
    assert type(decoded.scheduled_cached_reqs) is SpeculativeRequestData


def test_drafts_return_with_the_step() -> None:
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

    from stagewire.vllm_plugin.codec.speculative import DraftingOutput

    output = ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1}, [[1, 2], []])
    decoded = decode_output(encode_output(output, DraftTokenIds(["a", "b"], [[3, 4], []])))
    assert isinstance(decoded, DraftingOutput)
    assert decoded.draft_token_ids == DraftTokenIds(["a", "b"], [[3, 4], []])
    assert decoded.sampled_token_ids == [[1, 2], []]
    assert type(decode_output(encode_output(output))) is ModelRunnerOutput


def speculative_config(model_dir: Path, **changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=str(model_dir),
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        dtype="float32",
        speculative_config=NGRAM | changes,
    )
    apply_external_mode(args, stage_config())
    return args.create_engine_config()


def test_stages_must_agree_on_speculation(model_dir: Path, external_config: Any, plain_environment: None) -> None:
    from stagewire.vllm_plugin.member.identity import make_identity

    configs = [external_config, *(speculative_config(model_dir, num_speculative_tokens=k) for k in (3, 4))]
    found = [make_identity(stage_config(), config).shared["--speculative-config"] for config in configs]
    assert len(set(found)) == 3
    assert found[0] == ""
    assert json.loads(found[1])["num_speculative_tokens"] == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"method": "ngram_gpu"}, "'ngram_gpu' is not carried"),
        ({"method": "custom_class", "model": "a.module.MyProposer"}, "'custom_class' is not carried"),
        ({"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}, "synthetic"),
    ],
)
def test_other_speculation_is_refused(
    change: dict[str, Any], expected: str, model_dir: Path, plain_environment: None
) -> None:
    from stagewire.vllm_plugin.worker.speculation import check_speculation

    check_speculation(speculative_config(model_dir))
    with pytest.raises(ConfigError, match=expected):
        check_speculation(speculative_config(model_dir, **change))


def test_speculation_with_state_space_layers_is_refused(model_dir: Path, plain_environment: None) -> None:
    """vLLM counts what was accepted where it samples, and nowhere else. By the names that its code asks for: who calls
    it in which case cannot be seen without a model."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from stagewire.vllm_plugin.worker.speculation import check_speculation

    counts, name = inspect.unwrap(GPUModelRunner.sample_tokens), "_update_states_after_model_execute"
    assert name in counts.__code__.co_names
    assert name not in inspect.unwrap(GPUModelRunner.execute_model).__code__.co_names
    config = SimpleNamespace(
        speculative_config=speculative_config(model_dir).speculative_config,
        model_config=SimpleNamespace(is_hybrid=True, architecture="Jamba"),
    )
    with pytest.raises(ConfigError, match="Jamba has state-space layers"):
        check_speculation(config)


def test_runner_asks_for_a_drafter_that_only_the_last_stage_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `prepare_runner` exists: on another stage vLLM's runner fails with speculation, and works once it was
    prepared. The first half fails when vLLM looks before it asks."""
    from vllm.v1.worker import gpu_model_runner

    from stagewire.vllm_plugin.worker.speculation import prepare_runner

    for name in ("allocate_kv_cache", "bind_kv_cache", "map_kv_caches_to_kernel_blocks"):
        monkeypatch.setattr(gpu_model_runner, name, Mock(), raising=is_at_least(0, 32))

    def make_runner(speculative_config: Any) -> Any:
        made: Any = gpu_model_runner.GPUModelRunner.__new__(gpu_model_runner.GPUModelRunner)
        made.speculative_config, made.shared_kv_cache_layers, made.attn_groups = speculative_config, {}, []
        made.model_config = made.cache_config = made.compilation_config = Mock()
        made.device, made.kv_caches = torch.device("cpu"), []
        return made

    if is_at_least(0, 32):
        with pytest.raises(AttributeError, match="drafter"):
            make_runner(Mock()).initialize_kv_cache_tensors(Mock(), [])
        prepared = make_runner(Mock())
        prepare_runner(prepared, is_tail=False)
        prepared.initialize_kv_cache_tensors(Mock(), [])
    without = make_runner(None)
    prepare_runner(without, is_tail=False)
    assert not hasattr(without, "drafter")


@pytest.mark.parametrize(("longest", "fits_stock"), [(96, True), (97, True), (98, False), (100, False)])
def test_the_last_tokens_of_a_context_are_drafted_too(longest: int, fits_stock: bool) -> None:
    """The other half of `prepare_runner`: where drafts do not fit the drafter, vLLM drafts zeros for every row."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from stagewire.vllm_plugin.worker.speculation import prepare_runner

    runner = Mock(max_model_len=100, num_spec_tokens=3, effective_drafter_max_model_len=100)
    runner.speculative_config.use_dflash.return_value = False
    batch = SimpleNamespace(max_seq_len=longest)
    assert GPUModelRunner._input_fits_in_drafter(runner, batch) == fits_stock
    prepare_runner(runner, is_tail=True)
    assert GPUModelRunner._input_fits_in_drafter(runner, batch)


def test_the_tail_is_told_how_much_to_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documented as the scheduler's own, and read by the runner. The drafter is played: its module imports numba, after
    which no worker can be made in this process (vllm/triton_utils/dispatcher.py looks into every object).
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    class Drafter:
        propose = Mock(return_value=[[5, 6]])

    monkeypatch.setitem(sys.modules, "vllm.v1.spec_decode.ngram_proposer", Mock(NgramProposer=Drafter))
    runner = Mock(drafter=Drafter())
    runner.speculative_config.method = "ngram"
    schedule = SimpleNamespace(total_num_scheduled_tokens=1, num_spec_tokens_to_schedule=2)
    names = list(inspect.signature(GPUModelRunner.propose_draft_token_ids).parameters)[3:]
    drafts = GPUModelRunner.propose_draft_token_ids(runner, schedule, [[4]], **dict.fromkeys(names))
    assert drafts == [[5, 6]]
    assert Drafter.propose.call_args.args[0] == 2


@pytest.mark.parametrize("in_batch", [True, False])
def test_a_stage_takes_the_accepted_tokens_that_it_lacks(in_batch: bool) -> None:
    from vllm.v1.core.sched.output import CachedRequestData
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    from stagewire.errors import PeerError
    from stagewire.vllm_plugin.codec.speculative import SpeculativeRequestData
    from stagewire.vllm_plugin.worker.speculation import take_accepted

    # Three tokens of the prompt and one of the answer are known; of the drafts after it, two were accepted.
    state = CachedRequestState("a", [1, 2, 3], [], None, None, ([1],), 3, [4])
    batch = SimpleNamespace(
        req_id_to_index={"a": 1} if in_batch else {},
        token_ids_cpu=np.zeros((2, 10), dtype=np.int32),
        is_token_ids=np.zeros((2, 10), dtype=bool),
        num_tokens_no_spec=np.array([0, 4]),
    )
    runner = SimpleNamespace(requests={"a": state}, input_batch=batch)

    def schedule(num_computed: int, accepted: list[int]) -> Any:
        fields = CachedRequestData(["a"], set(), [[7]], {}, [None], [num_computed], [4])
        return SimpleNamespace(
            scheduled_cached_reqs=SpeculativeRequestData(**vars(fields), accepted_token_ids=[accepted])
        )

    take_accepted(runner, schedule(4, [3, 4]))
    assert state.output_token_ids == [4], "nothing is missing"
    take_accepted(runner, schedule(6, [4, 5, 6]))
    assert state.output_token_ids == [4, 5, 6]
    assert state.num_tokens == 6
    if in_batch:
        assert batch.token_ids_cpu[1].tolist() == [0, 0, 0, 0, 5, 6, 0, 0, 0, 0]
        assert batch.is_token_ids[1].tolist() == [False] * 4 + [True] * 2 + [False] * 4
        assert batch.num_tokens_no_spec.tolist() == [0, 6]
    take_accepted(runner, schedule(0, []))  # preempted, and computed again from its beginning
    assert state.output_token_ids == [4, 5, 6]
    with pytest.raises(PeerError, match="9 tokens are computed, this stage knows 6 and was sent 2"):
        take_accepted(runner, schedule(9, [8, 9]))


# ---- the scheduler -------------------------------------------------------------------------------------------------


class FakeRing:
    """The scheduler's `RingAccess`: whole, until a test breaks it."""

    def __init__(self) -> None:
        self.epoch, self.is_whole, self.is_draining = 1, True, False
        self.restored: list[list[tuple[str, list[int]]]] = []
        self.is_restoring = True
        self._losses: list[Loss] = []

    def poll(self, pause_s: float = 0.0) -> None: ...

    def take_losses(self) -> list[Loss]:
        losses, self._losses = self._losses, []
        return losses

    def restore(self, requests: Sequence[Restored]) -> bool:
        self.restored.append([(each.request.req_id, each.output_token_ids) for each in requests])
        return self.is_restoring

    def lose(self, in_flight: Sequence[Any], failed: Any = None) -> None:
        """``failed``: the schedule of the step that failed, if one did."""
        self.is_whole = False
        ids = [req_id for schedule in in_flight for req_id in schedule.num_scheduled_tokens]
        step = -1 if failed is None else 5
        suspects = [] if failed is None else list(failed.num_scheduled_tokens)
        self._losses.append(Loss(StageLost(2, "stage 2 is lost", step), suspects, ids))

    def mend(self) -> None:
        self.epoch, self.is_whole = self.epoch + 1, True


def make_scheduler(external_config: Any, num_blocks: int = 1000) -> Any:
    """A real one, without an engine around it."""
    from vllm.v1 import kv_cache_interface as kv
    from vllm.v1.structured_output import StructuredOutputManager

    spec = kv.FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = kv.KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[kv.KVCacheGroupSpec(["layer"], spec)]
    )
    config = copy.copy(external_config)
    config.cache_config = copy.copy(external_config.cache_config)
    config.cache_config.enable_prefix_caching = False  # or requests need hashes of their blocks
    config.cache_config.num_gpu_blocks = num_blocks
    config.cache_config.block_size = 16
    return RingScheduler(config, cache, StructuredOutputManager(config), block_size=16, ring=FakeRing())


@pytest.fixture
def scheduler(external_config: Any) -> Any:
    return make_scheduler(external_config)


def add_requests(
    scheduler: Any, count: int, num_prompt_tokens: int = 20, num_adapters: int = 0, first: int = 0
) -> None:
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    for index in range(first, first + count):
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        number = index % (num_adapters + 1)
        adapter = LoRARequest(f"adapter {number}", number, "/path") if number else None
        prompt = [index + 1] * num_prompt_tokens
        scheduler.add_request(Request(f"r{index}", prompt, params, None, lora_request=adapter))


def answer(scheduler: Any, schedule: Any) -> None:
    from vllm.v1.outputs import ModelRunnerOutput

    ids = list(schedule.num_scheduled_tokens)
    output = ModelRunnerOutput(ids, {req_id: i for i, req_id in enumerate(ids)}, [[7] for _ in ids])
    scheduler.update_from_output(schedule, output)


def fill_stages(scheduler: Any) -> set[str]:
    """A step for every stage, and all their answers. Who took part."""
    in_flight = [scheduler.schedule() for _ in range(NUM_STAGES)]
    for schedule in in_flight:
        answer(scheduler, schedule)
    return {req_id for schedule in in_flight for req_id in schedule.num_scheduled_tokens}


def answer_prompts(scheduler: Any) -> None:
    in_flight = []
    while scheduler.waiting:
        in_flight.append(scheduler.schedule())
    for schedule in in_flight:
        answer(scheduler, schedule)


def test_micro_batches_are_equal(scheduler: Any) -> None:
    add_requests(scheduler, 16)
    answer_prompts(scheduler)
    in_flight = [scheduler.schedule() for _ in range(NUM_STAGES)]
    assert [len(schedule.num_scheduled_tokens) for schedule in in_flight] == [4, 4, 4, 4]
    assert len({req_id for schedule in in_flight for req_id in schedule.num_scheduled_tokens}) == 16
    for _ in range(3 * NUM_STAGES):  # first in, first out, as the ring answers
        answer(scheduler, in_flight.pop(0))
        in_flight.append(scheduler.schedule())
        assert len(in_flight[-1].num_scheduled_tokens) == 4


def test_arrivals_and_ends_do_not_unbalance_for_long(scheduler: Any) -> None:
    add_requests(scheduler, 6)
    answer_prompts(scheduler)
    sizes = []
    in_flight = [scheduler.schedule() for _ in range(NUM_STAGES)]
    for _ in range(4 * NUM_STAGES):
        answer(scheduler, in_flight.pop(0))
        in_flight.append(scheduler.schedule())
        sizes.append(len(in_flight[-1].num_scheduled_tokens))
    assert max(sizes) <= 2, "six requests over four stages"
    assert sum(sizes[-NUM_STAGES:]) == 6, "nobody waits for ever"


@pytest.mark.parametrize(
    ("count", "num_prompt_tokens", "steps"),
    [
        (8, 100, [200, 200, 200, 200]),  # two prompts for each of the four stages
        (3, 200, [200, 200, 200, 0]),  # prompts are not cut
        (5, 60, [60, 60, 60, 60]),  # at least 64 tokens, to the nearest whole prompt; the fifth comes next
        (6, 20, [60, 60, 0, 0]),  # less than that is not worth a step
        (1, 300, [300, 0, 0, 0]),
    ],
)
def test_prompts_that_wait_together_are_shared_out(
    scheduler: Any, count: int, num_prompt_tokens: int, steps: list[int]
) -> None:
    add_requests(scheduler, count, num_prompt_tokens)
    assert [scheduler.schedule().total_num_scheduled_tokens for _ in range(NUM_STAGES)] == steps


def test_more_prompts_than_steps_can_hold_fill_each_step(scheduler: Any) -> None:
    limit = scheduler.max_num_scheduled_tokens
    add_requests(scheduler, NUM_STAGES * limit // 100 + 1, num_prompt_tokens=100)
    assert scheduler.schedule().total_num_scheduled_tokens == min(limit, 100 * scheduler.max_num_running_reqs)
    limit = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)  # vLLM 0.30 has one for both
    assert limit == scheduler.max_num_running_reqs == scheduler.scheduler_config.max_num_seqs, (
        "the limit is vLLM's own again"
    )


def test_vllm_counts_adapters_of_one_step_only(scheduler: Any) -> None:
    """Since 0.33 it counts those of all running requests, and keeps to `max_loras` with steps in flight by itself."""
    scheduler.lora_config = SimpleNamespace(max_loras=2)
    scheduler._hold_back_adapters = lambda _: None
    add_requests(scheduler, 15, num_adapters=4)
    for schedule in [scheduler.schedule(), scheduler.schedule()]:
        answer(scheduler, schedule)
    scheduler._hold_back_surplus = lambda: None
    with contextlib.nullcontext() if is_at_least(0, 33) else pytest.raises(AssertionError):
        scheduler.schedule()


def test_no_step_has_more_adapters_than_fit(scheduler: Any) -> None:
    scheduler.lora_config = SimpleNamespace(max_loras=2)
    add_requests(scheduler, 15, num_adapters=4)
    done = dict.fromkeys((f"r{index}" for index in range(15)), 0)
    in_flight = [scheduler.schedule() for _ in range(NUM_STAGES)]
    for _ in range(20 * NUM_STAGES):
        schedule = in_flight.pop(0)
        if schedule.num_scheduled_tokens:
            answer(scheduler, schedule)
        adapters = {int(req_id[1:]) % 5 for req_id in schedule.num_scheduled_tokens} - {0}
        assert len(adapters) <= 2
        for req_id in schedule.num_scheduled_tokens:
            done[req_id] += 1
        in_flight.append(scheduler.schedule())
    running = [request.request_id for request in scheduler.running]
    assert len(running) == 9 if is_at_least(0, 33) else 15  # two of the four adapters, and the base model
    assert min(done[req_id] for req_id in running) > 5, "nobody waits for ever"


def test_histories_are_not_copied_and_new_tokens_are(scheduler: Any) -> None:
    add_requests(scheduler, 4)
    answer(scheduler, scheduler.schedule())
    cached = scheduler.schedule().scheduled_cached_reqs
    assert cached.req_ids
    assert cached.all_token_ids == {}
    assert cached.new_token_ids == [[7] for _ in cached.req_ids], (
        "stages before the tail learn tokens from the schedule"
    )


@pytest.fixture
def speculating(scheduler: Any) -> Any:
    """With three drafts a step, as `speculative_config` would set it up."""
    scheduler.num_spec_tokens = 3
    return scheduler


def answer_with_drafts(scheduler: Any, schedule: Any, sampled: list[int], drafts: list[int]) -> None:
    from vllm.v1.outputs import DraftTokenIds

    from stagewire.vllm_plugin.codec.speculative import DraftingOutput

    ids = list(schedule.num_scheduled_tokens)
    output = DraftingOutput(
        ids,
        {req_id: i for i, req_id in enumerate(ids)},
        [list(sampled) for _ in ids],
        draft_token_ids=DraftTokenIds(ids, [list(drafts) for _ in ids]),
    )
    scheduler.update_from_output(schedule, output)


def test_drafts_are_scheduled_with_the_next_step_and_accepted_ones_follow(speculating: Any) -> None:
    add_requests(speculating, 1)
    first = speculating.schedule()
    assert first.num_spec_tokens_to_schedule == 3
    answer_with_drafts(speculating, first, [7], [8, 9, 10])
    second = speculating.schedule()
    assert second.scheduled_spec_decode_tokens == {"r0": [8, 9, 10]}
    assert second.num_scheduled_tokens == {"r0": 4}
    assert second.scheduled_cached_reqs.new_token_ids == [[7]]
    assert second.scheduled_cached_reqs.accepted_token_ids == [[]]
    answer_with_drafts(speculating, second, [8, 9, 11], [])  # two of three, and one that was sampled
    third = speculating.schedule()
    assert third.scheduled_cached_reqs.num_computed_tokens == [23]
    assert third.scheduled_cached_reqs.new_token_ids == [[11]], "stock vLLM sends this one alone"
    assert third.scheduled_cached_reqs.accepted_token_ids == [[7, 8, 9]]


def test_drafts_of_a_preempted_request_are_dropped(speculating: Any) -> None:
    add_requests(speculating, 1)
    answer_with_drafts(speculating, speculating.schedule(), [7], [])
    in_flight = speculating.schedule()
    assert speculating.reset_prefix_cache(reset_running_requests=True)
    answer_with_drafts(speculating, in_flight, [8], [9, 10, 11])
    assert speculating.requests["r0"].spec_token_ids == []


# ---- a lost stage --------------------------------------------------------------------------------------------------


def lost(scheduler: Any, schedule: Any) -> Any:
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    return scheduler.update_from_output(schedule, EMPTY_MODEL_RUNNER_OUTPUT)


def until_done(scheduler: Any, num_tokens: int) -> dict[str, int]:
    """How many tokens each request has, once all have ``num_tokens``; a step is in flight for each stage."""
    for _ in range(500):
        if all(request.num_output_tokens >= num_tokens for request in scheduler.requests.values()):
            return {req_id: request.num_output_tokens for req_id, request in scheduler.requests.items()}
        for schedule in [scheduler.schedule() for _ in range(NUM_STAGES)]:
            answer(scheduler, schedule)
    raise AssertionError("no progress")


def test_nothing_is_scheduled_while_the_ring_is_not_whole(scheduler: Any) -> None:
    add_requests(scheduler, 4)
    scheduler._ring.is_whole = False
    assert is_nothing(scheduler.schedule())
    scheduler._ring.is_whole = True
    assert scheduler.schedule().num_scheduled_tokens


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_head_that_stops_tells_its_stages_of_ended_requests_only_in_a_whole_ring(
    scheduler: Any, is_whole: bool
) -> None:
    from vllm.v1.request import RequestStatus

    add_requests(scheduler, 3)
    answer_prompts(scheduler)
    scheduler._ring.is_whole = is_whole
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert scheduler.has_requests() == is_whole, "EngineCore goes on while this is true"


def test_while_a_stage_drains_nobody_is_admitted_and_the_others_go_on(scheduler: Any) -> None:
    add_requests(scheduler, 3)
    answer_prompts(scheduler)
    running = {request.request_id for request in scheduler.running}
    preempted = scheduler.running.pop(0)
    scheduler._preempt_request(preempted, time.monotonic())  # its stages go on knowing it
    add_requests(scheduler, 2, first=3)
    scheduler._ring.is_draining = True
    assert fill_stages(scheduler) == running == {"r0", "r1", "r2"}
    scheduler._ring.is_draining = False
    assert fill_stages(scheduler) | fill_stages(scheduler) == running | {"r3", "r4"}


def test_after_a_loss_live_requests_are_restored_and_computed_again(scheduler: Any) -> None:
    ring = scheduler._ring
    add_requests(scheduler, 6)
    answer_prompts(scheduler)
    in_flight = [scheduler.schedule() for _ in range(3)]
    ring.lose(in_flight)
    assert is_nothing(scheduler.schedule())
    for schedule in in_flight:
        lost(scheduler, schedule)
    assert ring.restored == []
    ring.mend()
    again = scheduler.schedule()
    assert sorted(ring.restored[0]) == [(f"r{index}", [7]) for index in range(6)]
    assert set(again.num_scheduled_tokens.values()) == {21}  # the prompt and the token that it has
    answer(scheduler, again)
    assert len(until_done(scheduler, 5)) == 6
    assert len(ring.restored) == 1


def test_nothing_is_scheduled_on_stages_that_have_not_got_their_requests_back(scheduler: Any) -> None:
    """The ring may break again while they are given them; the ring's own word of that comes a moment later."""
    ring = scheduler._ring
    add_requests(scheduler, 3)
    answer_prompts(scheduler)
    ring.lose([])
    ring.mend()
    ring.is_restoring = False
    assert is_nothing(scheduler.schedule())
    ring.is_restoring = True
    assert sum(len(scheduler.schedule().num_scheduled_tokens) for _ in range(NUM_STAGES)) == 3
    assert len(ring.restored) == 2


def answer_chunks(scheduler: Any, schedule: Any) -> None:
    """As `answer`, but a prompt that is not complete has no token yet."""
    from vllm.v1.outputs import ModelRunnerOutput

    ids = list(schedule.num_scheduled_tokens)
    tokens = [[] if scheduler.requests[req_id].is_prefill_chunk else [7] for req_id in ids]
    scheduler.update_from_output(schedule, ModelRunnerOutput(ids, {req_id: i for i, req_id in enumerate(ids)}, tokens))


def test_suspects_that_do_not_fit_together_run_all_the_same(external_config: Any) -> None:
    """The first is cleared and held back with its blocks; vLLM would preempt nobody for the second one's prompt."""
    scheduler = make_scheduler(external_config, num_blocks=301)
    scheduler.scheduler_config = copy.copy(scheduler.scheduler_config)
    scheduler.scheduler_config.long_prefill_token_threshold = 512
    add_requests(scheduler, 2, num_prompt_tokens=3000)  # 188 blocks each
    answer_chunks(scheduler, scheduler.schedule())
    both = scheduler.schedule()
    assert len(both.num_scheduled_tokens) == 2
    scheduler._ring.lose([both], both)
    lost(scheduler, both)
    scheduler._ring.mend()
    for _ in range(500):
        schedule = scheduler.schedule()
        if schedule.num_scheduled_tokens:
            answer_chunks(scheduler, schedule)
    assert not scheduler.requests


class TestSessions:
    """Requests whose client goes on sending (`AsyncLLM.generate` of a generator): their past is not kept by vLLM."""

    @staticmethod
    def part(tokens: list[int]) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        return Request("s", tokens, SamplingParams(max_tokens=1, ignore_eos=True), None, resumable=True)

    @pytest.mark.parametrize("has_next_part", [False, True], ids=["waiting for its client", "with its next part"])
    def test_ends_with_a_loss_and_its_client_is_told(self, scheduler: Any, has_next_part: bool) -> None:
        scheduler.add_request(self.part([1] * 40))
        answer(scheduler, scheduler.schedule())
        if has_next_part:
            scheduler.add_request(self.part([2] * 10))
        scheduler._ring.lose([])
        told = [
            each.request_id
            for _ in range(3)
            for group in lost(scheduler, scheduler.schedule()).values()
            for each in group.outputs
        ]
        assert told == ["s"]
        assert not scheduler.requests


def test_a_loss_while_idle_empties_the_prefix_cache(scheduler: Any) -> None:
    """Blocks that a new stage has never computed must not be hit, nor images that it has never seen."""
    resets = []
    scheduler.encoder_cache_manager = Mock()
    original = scheduler.kv_cache_manager.reset_prefix_cache

    def reset() -> bool:
        resets.append(1)
        return bool(original())

    scheduler.kv_cache_manager.reset_prefix_cache = reset
    scheduler._ring.lose([])
    scheduler._ring.mend()
    add_requests(scheduler, 1)
    scheduler.schedule()
    assert resets == [1]
    assert scheduler.encoder_cache_manager.reset.called
    assert scheduler._ring.restored == [[]]


def test_an_ordinarily_preempted_request_with_a_step_in_flight_survives_a_loss(scheduler: Any) -> None:
    """Its output was still to be delivered; without a mark vLLM would look for it in the lost step's empty output."""
    import time

    add_requests(scheduler, 2)
    in_flight = scheduler.schedule()
    request = scheduler.running[-1]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic())
    assert request.num_stale_output_tokens
    assert not request.drop_stale_output
    scheduler._ring.lose([in_flight])
    lost(scheduler, in_flight)
    scheduler._ring.mend()
    assert len(until_done(scheduler, 3)) == 2


def test_a_request_whose_steps_fail_is_failed_alone(scheduler: Any) -> None:
    from vllm.v1.engine import FinishReason

    ring = scheduler._ring
    add_requests(scheduler, 3)
    failed, found = [], []
    for _ in range(300):
        schedule = scheduler.schedule()
        if "r1" in schedule.num_scheduled_tokens:
            ring.lose([schedule], schedule)
            failed.append(sorted(schedule.num_scheduled_tokens))
            outputs = lost(scheduler, schedule)
            found += [each for group in outputs.values() for each in group.outputs]
            ring.mend()
        else:
            answer(scheduler, schedule)
        if "r1" not in scheduler.requests:
            break
    assert failed[-1] == ["r1"]  # the last time alone
    assert [(each.request_id, each.finish_reason) for each in found] == [("r1", FinishReason.ERROR)]
    assert sorted(until_done(scheduler, 10)) == ["r0", "r2"]


# ---- documentation -------------------------------------------------------------------------------------------------


def test_seams_page_names_every_patch_call_and_refusal() -> None:
    page = (DOCS / "design" / "vllm-seams.md").read_text()
    missing = [patch.target for patch in catalogue.PATCHES if f"`{patch.target}`" not in page]
    table = page[page.index("## C1") : page.index("## C2/C3")]
    missing += [name for name in {*CALLS, *NOT_CARRIED, *ANSWERED_BY_HEAD} if f"`{name}`" not in table]
    assert missing == []
    refused = {name.partition(" ")[0] for name in names_of_table(page[page.index("## C6") : page.index("## Not")])}
    assert refused == {f"--{name.replace('_', '-')}" for name in REFUSED}


def test_seams_page_names_every_field_of_a_step() -> None:
    page = (DOCS / "design" / "vllm-seams.md").read_text()
    table = page[page.index("## C2/C3") : page.index("## C5")]
    fields = {name for part in (TRAVELS, STAYS) for names in part.values() for name in names}
    assert [name for name in sorted(fields) if f"`{name}`" not in table] == []


def test_seams_page_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "design" / "vllm-seams.md").read_text()))
    paths = list(Path(__file__).parents[1].rglob("test_*.py"))
    files = {path.stem for path in paths}
    elsewhere = {name for path in paths for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert named - set(globals()) - files - elsewhere == set()


def test_wire_page_has_every_message_with_its_number() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", (DOCS / "reference" / "wire.md").read_text(), re.MULTILINE))
    assert {int(number): name for number, name in rows.items()} == {n: cls.__name__ for n, cls in KINDS.items()}


# ---- loading -------------------------------------------------------------------------------------------------------


def test_our_load_format_gives_our_loader() -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    from stagewire.vllm_plugin.loading import range_loader
    from stagewire.vllm_plugin.loading.load_formats import LOAD_FORMAT

    range_loader.register()
    given = LoadConfig(load_format=LOAD_FORMAT)
    loader = get_model_loader(given)
    assert type(loader) is range_loader.RangeLoader
    assert loader.load_config.load_format == "auto", "what vLLM decides by format"
    assert given.load_format == LOAD_FORMAT, "the given one is not changed"


def test_names_are_mapped_as_vllms_models_do() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    mapper = WeightsMapper(orig_to_new_prefix={"visual.": "tower.", "gone.": None})
    names = ["visual.a.weight", "gone.b", "model.c"]
    assert [interfaces.mapped_name(mapper, name) for name in names] == ["tower.a.weight", None, "model.c"]
    assert interfaces.mapped_name(None, "visual.a.weight") == "visual.a.weight"


def test_default_loader_asks_the_methods_that_are_overridden() -> None:
    """Both hooks exist with these parameters, and loading goes through them."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from stagewire.vllm_plugin.loading.range_loader import RangeLoader

    for name in ("load_weights", "_prepare_weights", "_get_weights_iterator"):
        ours, theirs = (inspect.signature(getattr(each, name)) for each in (RangeLoader, DefaultModelLoader))
        assert list(ours.parameters) == list(theirs.parameters), name
    prepared = inspect.signature(DefaultModelLoader._prepare_weights, eval_str=True).return_annotation
    assert get_args(prepared) == (str, list[str], bool, *([str] if is_at_least(0, 31) else []))
    fields = {field.name for field in dataclasses.fields(DefaultModelLoader.Source)}
    assert {"model_or_path", "revision", "subfolder", "prefix", *since(0, 32, "is_unused_weight")} <= fields


def test_default_loader_loads_through_the_methods_that_are_overridden(external_config: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class Loader(DefaultModelLoader):  # type: ignore[misc]
        asked = ""

        def _prepare_weights(self, model_name_or_path: str, *_: Any, **__: Any) -> Any:
            self.asked = model_name_or_path
            raise EOFError

        def _get_weights_iterator(self, source: Any) -> Any:
            with pytest.raises(EOFError):
                next(iter(super()._get_weights_iterator(source)))
            yield "a.weight", torch.ones(1)

    model, config = Mock(secondary_weights=()), Mock(model="somewhere", quantization=None)
    model.load_weights = lambda weights: seen.extend(weights)
    config.multimodal_config, config.is_moe = None, False
    seen: list[Any] = []
    loader = Loader(LoadConfig())
    loader.counter_before_loading_weights = 0.0
    with set_current_vllm_config(external_config):
        loader.load_weights(model, config)
    assert seen == [("a.weight", torch.ones(1))]
    assert loader.asked == "somewhere"


def test_a_container_s_memory_is_what_machine_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import cpu_worker

    from stagewire import machine
    from stagewire.vllm_plugin.seams import container_memory

    theirs = cpu_worker.get_memory_node_info(0)
    monkeypatch.setattr(cpu_worker, "get_memory_node_info", inspect.unwrap(cpu_worker.get_memory_node_info))
    container_memory.count_page_cache_as_free()
    assert cpu_worker.get_memory_node_info(0).total_memory == theirs.total_memory
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: 3 << 30)
    monkeypatch.setattr(machine, "available_bytes", lambda: 2 << 30)
    found = cpu_worker.get_memory_node_info(0)
    assert (found.total_memory, found.available_memory) == (3 << 30, 2 << 30)
