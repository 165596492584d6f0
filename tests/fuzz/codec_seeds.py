"""Inputs to begin with for what vLLM's own objects travel as: one of each, with most of its fields used."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1 import kv_cache_interface as kv
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, LogprobsLists, LogprobsTensors, ModelRunnerOutput

from stagewire.vllm_plugin.codec.schedules import encode_grammar, encode_output, encode_schedule
from stagewire.vllm_plugin.codec.values import encode_value

__all__ = ["codec_seeds"]


def codec_seeds(name: str) -> list[bytes]:
    """Of one target of fuzz/targets.py."""
    return {"schedule": _schedules, "output": _outputs, "grammar": _grammars, "call_value": _values}[name]()


def _schedules() -> list[bytes]:
    params = (SamplingParams(), SamplingParams(temperature=0, logprobs=3, stop_token_ids=[7], seed=4, bad_words=["x"]))
    return [encode_schedule(_schedule(each)) for each in params]


def _schedule(params: SamplingParams) -> SchedulerOutput:
    new = NewRequestData("new", [1, 2, 3], [], params, None, ([4, 5], [6]), 2, None)
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
        new_block_ids_to_zero=[4, 7],
        num_common_prefix_blocks=[1],
    )


def _outputs() -> list[bytes]:
    ids, values, ranks = np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32), np.zeros(2, np.int64)
    prompt = LogprobsTensors(torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    output = ModelRunnerOutput(
        req_ids=["b", "a"],
        req_id_to_index={"b": 0, "a": 1},
        sampled_token_ids=[[5], [6]],
        logprobs=LogprobsLists(ids, values, ranks),
        prompt_logprobs_dict={"b": prompt, "a": None},
    )
    pooled = ModelRunnerOutput(["a"], {"a": 0}, pooler_output=[torch.ones(4, dtype=torch.bfloat16)])
    return [encode_output(output), encode_output(output, DraftTokenIds(["b"], [[1, 2]])), encode_output(pooled)]


def _grammars() -> list[bytes]:
    return [encode_grammar(GrammarOutput(["a", "b"], np.full((2, 4), -1, np.int32)))]


def _values() -> list[bytes]:
    spec = kv.FullAttentionSpec(block_size=16, num_kv_heads=3, head_size=64, dtype=torch.float32)
    config = kv.KVCacheConfig(
        num_blocks=9,
        kv_cache_tensors=[kv.KVCacheTensor(size=1 << 20, layers=["layers.0"], layer_stride=7, block_stride=9)],
        kv_cache_groups=[kv.KVCacheGroupSpec(["layers.0"], spec)],
        kv_cache_layout="LBHNC",
    )
    plain: list[Any] = [None, True, 2**40, 1.5, "text", b"bytes", [1, [2]], (1, "a"), {"a": (1,)}, {1, 2}]
    return [encode_value(each) for each in (*plain, Fraction(3, 7), [config], (LoRARequest("name", 3, "/path"),))]
