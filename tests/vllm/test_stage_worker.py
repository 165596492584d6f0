"""One middle stage's worker in this process: what it accepts as a step, and what it refuses.

A wrong step must never become an answer: rows in another order, a tensor that is missing, renamed or of another shape.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stagewire.errors import ConfigError, PeerError, ProtocolError
from stagewire.wire.messages import TensorSpec
from support.models import make_llama

pytestmark = pytest.mark.vllm

HIDDEN_SIZE = 128


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Any]:
    """Layers 2-4 of 8, stage 1 of 3, with a KV cache."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    from stagewire.config import Address, StageConfig
    from stagewire.plan.ranges import LayerRange
    from stagewire.vllm_plugin.entry.external_mode import apply_external_mode
    from stagewire.vllm_plugin.ranks.stage_ranks import StageRanks
    from vllm import AsyncEngineArgs

    model = make_llama(tmp_path_factory.mktemp("llama8"), model_dir, num_layers=8)
    before = dict(os.environ)
    config = StageConfig(1, 3, LayerRange(2, 4), 15550, Address("127.0.0.1", 15549))
    arguments = AsyncEngineArgs(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        kv_cache_memory_bytes=20_000_000,
    )
    apply_external_mode(arguments, config)
    vllm_config = arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    ranks = StageRanks(config, vllm_config)
    ranks.load()
    made = ranks.own
    specs = made.call("get_kv_cache_spec", ())
    made.call("set_kv_cache_layout", (made.call("get_supported_kv_cache_layouts", ())[0],))
    (kv_config,) = get_kv_cache_configs(vllm_config, [specs], [made.call("determine_available_memory", ())])
    made.call("initialize_from_config", ([kv_config] * 3,))
    made.call("compile_or_warm_up_model", ())
    yield made
    gc.unfreeze()
    made.shutdown()
    cleanup_dist_env_and_memory()
    os.environ.clear()
    os.environ.update(before)


def test_what_lives_as_long_as_the_stage_is_not_collected_again(worker: Any) -> None:
    assert gc.get_freeze_count() > 100_000


def test_the_runner_keeps_the_state_that_is_read_and_set(worker: Any) -> None:
    names = ("reorder_batch_threshold", "intermediate_tensors", "input_batch", "requests", "max_num_tokens")
    assert [name for name in names if not hasattr(worker.runner, name)] == []


def schedule(num_tokens: int, names: tuple[str, ...] = ("a", "b"), finished: tuple[str, ...] = ()) -> Any:
    """The first step of new requests of ``num_tokens`` tokens each."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    new = [
        NewRequestData(
            req_id=name,
            prompt_token_ids=list(range(5, 5 + num_tokens)),
            mm_features=[],
            sampling_params=SamplingParams(temperature=0),
            pooling_params=None,
            block_ids=([index + 1],),
            num_computed_tokens=0,
            lora_request=None,
        )
        for index, name in enumerate(names)
    ]
    return SchedulerOutput(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=CachedRequestData.make_empty(),
        num_scheduled_tokens=dict.fromkeys(names, num_tokens),
        total_num_scheduled_tokens=num_tokens * len(names),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set(finished),
        free_encoder_mm_hashes=[],
        num_common_prefix_blocks=[0],
    )


def finish(worker: Any, *names: str) -> None:
    assert worker.execute(schedule(0, (), names), 0, (), ()) is None


def tensors(
    num_rows: int, names: tuple[str, ...] = ("hidden_states", "residual")
) -> tuple[list[TensorSpec], list[bytes]]:
    import numpy as np

    values = np.linspace(-1, 1, num_rows * HIDDEN_SIZE, dtype=np.float32).tobytes()
    return [TensorSpec(name, "float32", [num_rows, HIDDEN_SIZE]) for name in names], [values for _ in names]


def test_a_right_step_passes_its_digest_on(worker: Any) -> None:
    from stagewire.vllm_plugin.codec.schedules import row_digest

    step = schedule(3)
    digest = row_digest(["a", "b"], step.num_scheduled_tokens)
    out = worker.execute(step, digest, *tensors(6))
    assert out.digest == digest
    assert [spec.shape for spec in out.specs] == [[6, HIDDEN_SIZE]] * 2
    assert [len(frame) for frame in out.frames] == [6 * HIDDEN_SIZE * 4] * 2
    assert bytes(out.frames[0]) != tensors(6)[1][0], "the layers changed the hidden states"
    assert worker.call("get_stage_state", ())["cached_requests"] == 2
    finish(worker, "a", "b")
    assert worker.call("get_stage_state", ())["cached_requests"] == 0


def test_activations_keep_their_bytes_while_the_next_step_runs(worker: Any) -> None:
    """What is queued for sending must not be a view of a buffer that the next step overwrites."""
    from stagewire.vllm_plugin.codec.schedules import row_digest

    step = schedule(3)
    first = worker.execute(step, row_digest(["a", "b"], step.num_scheduled_tokens), *tensors(6))
    before = [bytes(frame) for frame in first.frames]
    other = schedule(5, ("c", "d"), ("a", "b"))
    worker.execute(other, row_digest(["c", "d"], other.num_scheduled_tokens), *tensors(10))
    assert [bytes(frame) for frame in first.frames] == before
    finish(worker, "c", "d")


def test_of_its_own_buffers_a_stage_sends_copies(worker: Any) -> None:
    """Some models hand on what came in, which lies where the next step's tensors are written."""
    buffers = worker.runner.intermediate_tensors.tensors
    _, frames = worker._send(2, dict(buffers))
    before = [bytes(frame) for frame in frames]
    for tensor in buffers.values():
        tensor.add_(1)
    assert [bytes(frame) for frame in frames] == before


def test_every_row_that_came_in_is_used(worker: Any) -> None:
    for tensor in worker.runner.intermediate_tensors.tensors.values():
        tensor.fill_(7)
    specs, frames = tensors(6)
    received = worker._receive(6, specs, frames)
    assert [received[spec.name][:6].numpy().tobytes() for spec in specs] == frames
    assert all(tensor[6:].eq(7).all() for tensor in received.values())


def test_rows_in_another_order_fail_the_step(worker: Any) -> None:
    from stagewire.vllm_plugin.codec.schedules import row_digest

    step = schedule(3)
    swapped = row_digest(["b", "a"], step.num_scheduled_tokens)
    with pytest.raises(PeerError, match="stage 1 orders 2 rows otherwise than stage 0"):
        worker.execute(step, swapped, *tensors(6))
    finish(worker, "a", "b")


@pytest.mark.parametrize(
    ("specs", "frames"),
    [
        tensors(6, ("hidden_states",)),
        tensors(6, ("hidden_states", "hidden_states")),
        tensors(6, ("hidden_states", "residual", "more")),
        tensors(5),
        ([TensorSpec(s.name, "float64", s.shape) for s in tensors(6)[0]], tensors(6)[1]),
        (tensors(6)[0], [frame[:-4] for frame in tensors(6)[1]]),
    ],
    ids=["missing residual", "twice", "one more", "fewer rows", "other dtype", "fewer bytes"],
)
def test_tensors_that_are_not_the_plan_fail_the_step(worker: Any, specs: Any, frames: Any) -> None:
    with pytest.raises(ProtocolError):
        worker.execute(schedule(3), 0, specs, frames)
    assert worker.call("get_stage_state", ())["cached_requests"] == 0, "nothing was taken in"


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("save_sharded_state", ("folder",)),
        ("__class__", ()),
        ("apply_model", (print,)),
        ("sleep", ("1",)),
        ("add_lora", ("/path",)),
        ("update_max_model_len", ()),
        ("get_kv_cache_spec", (1,)),
    ],
)
def test_calls_outside_the_closed_list(worker: Any, method: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError):
        worker.call(method, args)


# ---- a KV cache of its own sizes -------------------------------------------------------------------------------------


@pytest.fixture
def specs(worker: Any) -> Any:
    return worker.call("get_kv_cache_spec", ())


def planned(worker: Any, specs: Any, num_bytes: int) -> Any:
    """By vLLM, for one worker."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    return get_kv_cache_configs(worker.vllm_config, [specs], [num_bytes])[0]


def test_a_stage_like_the_one_before_takes_the_heads_configuration(worker: Any, specs: Any) -> None:
    from stagewire.vllm_plugin.worker.own_kv_cache import own_kv_cache_config

    config, other = planned(worker, specs, 20_000_000), planned(worker, {"other": next(iter(specs.values()))}, 1 << 24)
    assert own_kv_cache_config([other, config], 1, specs, worker.vllm_config) is config
    assert own_kv_cache_config([other, config], 7, specs, worker.vllm_config) is config, "ranks were added before it"
    assert own_kv_cache_config([config, other], 1, specs, worker.vllm_config) is config, "ranks were taken away"


@pytest.mark.parametrize("changes", [{"num_kv_heads": 1}, {"dtype": "bfloat16"}, {"num_kv_heads": 1, "dtype": "int8"}])
def test_another_size_of_kv_cache_is_planned_as_vllm_would(worker: Any, specs: Any, changes: dict[str, Any]) -> None:
    """With as many blocks as the head has, whatever they take."""
    from dataclasses import replace

    import torch

    from stagewire.vllm_plugin.seams.interfaces import bytes_per_kv_block
    from stagewire.vllm_plugin.worker.own_kv_cache import own_kv_cache_config

    values = {name: getattr(torch, value) if name == "dtype" else value for name, value in changes.items()}
    own = {name: replace(spec, **values) for name, spec in specs.items()}
    config = planned(worker, specs, 20_000_000)
    found = own_kv_cache_config([config], 0, own, worker.vllm_config)
    num_bytes = config.num_blocks * bytes_per_kv_block(worker.vllm_config, found.kv_cache_groups)
    assert num_bytes < 20_000_000
    assert found == planned(worker, own, num_bytes)
    assert found.num_blocks == config.num_blocks
    assert found != config


@pytest.mark.parametrize("difference", [-1, 1])
def test_another_number_of_blocks_than_the_heads_is_refused(
    difference: int, worker: Any, specs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer the stage would write beyond its cache."""
    from dataclasses import replace

    from stagewire.vllm_plugin.worker import own_kv_cache

    config = planned(worker, specs, 20_000_000)
    monkeypatch.setattr(
        own_kv_cache, "plan_kv_cache", lambda *_: replace(config, num_blocks=config.num_blocks + difference)
    )
    own = {name: replace(spec, num_kv_heads=1) for name, spec in specs.items()}
    with pytest.raises(ConfigError, match=f"this stage plans {config.num_blocks + difference} KV blocks"):
        own_kv_cache.own_kv_cache_config([config], 0, own, worker.vllm_config)


def test_a_kv_cache_of_other_layers_or_of_padded_pages_is_refused(worker: Any, specs: Any) -> None:
    from dataclasses import replace

    from stagewire.vllm_plugin.worker.own_kv_cache import own_kv_cache_config

    config = planned(worker, specs, 20_000_000)
    with pytest.raises(ConfigError, match="stage 0 has made no KV cache for 1 layers"):
        own_kv_cache_config([config], 0, {"another": next(iter(specs.values()))}, worker.vllm_config)
    padded = {name: replace(spec, page_size_padded=spec.page_size_bytes * 2) for name, spec in specs.items()}
    own = {name: replace(spec, num_kv_heads=1) for name, spec in padded.items()}
    with pytest.raises(ConfigError, match="num_kv_heads, and the pages of this model's kinds of layers are padded"):
        own_kv_cache_config([planned(worker, padded, 20_000_000)], 0, own, worker.vllm_config)


def test_a_kv_cache_larger_than_this_machines_memory_is_refused(worker: Any, specs: Any) -> None:
    from dataclasses import replace

    config = planned(worker, specs, 20_000_000)
    with pytest.raises(ConfigError, match=r"KV blocks take \d+\.\d\d GB here and this machine, or this container, has"):
        worker.call("initialize_from_config", ([replace(config, num_blocks=1 << 40)],))
    worker.call("initialize_from_config", ([config],))
