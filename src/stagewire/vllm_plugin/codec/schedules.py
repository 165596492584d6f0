"""Encodes vLLM's step objects to bytes and back: schedules, grammar bitmasks, model outputs.

It has structs of its own, so that the ring does not depend on vLLM's fields; msgspec could not decode vLLM's
dataclasses, whose annotations are TYPE_CHECKING imports. Everything that a worker of the V1 runner reads travels, and
nothing that only the scheduler reads: table C2/C3 of docs/design/vllm-seams.md.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, LogprobsLists, LogprobsTensors, ModelRunnerOutput

from stagewire.errors import ProtocolError
from stagewire.vllm_plugin.codec.inputs import Feature, pack_features, stand_in_for_embeds, unpack_features
from stagewire.vllm_plugin.codec.speculative import DraftingOutput, SpeculativeRequestData
from stagewire.wire.codec import Frame
from stagewire.wire.tensors import ITEM_BYTES

__all__ = [
    "decode_grammar",
    "decode_output",
    "decode_schedule",
    "encode_grammar",
    "encode_output",
    "encode_schedule",
    "is_nothing",
    "row_digest",
    "token_digest",
]


class _Struct(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    pass


class _NewRequest(_Struct):
    req_id: str
    prompt_token_ids: list[int] | None
    sampling_params: SamplingParams | None
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int
    features: list[Feature]
    num_prompt_embeds: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] | None  # of a prompt without token ids
    pooling_params: PoolingParams | None
    lora_id: int  # 0: the base model


class _Schedule(_Struct):
    new: list[_NewRequest]
    cached_ids: list[str]
    resumed_ids: list[str]
    new_token_ids: list[list[int]]
    new_block_ids: list[tuple[list[int], ...] | None]
    num_computed_tokens: list[int]
    num_output_tokens: list[int]
    num_scheduled_tokens: dict[str, int]  # its order is part of the decision
    finished_ids: list[str]
    preempted_ids: list[str] | None
    freed_mm_hashes: list[str]
    block_ids_to_zero: list[int] | None
    block_copies: list[tuple[int, int]] | None
    has_structured_output: bool
    encoder_inputs: dict[str, list[int]]
    spec_token_ids: dict[str, list[int]]
    num_spec_tokens: int  # how many the tail may draft for the next step
    accepted_token_ids: list[list[int]] | None
    num_common_prefix_blocks: list[int]  # of each KV cache group; vLLM 0.30 and 0.31 choose cascade attention by it


class _Array(_Struct):
    dtype: str
    shape: list[int]
    data: bytes


class _Logprobs(_Struct):
    token_ids: _Array  # [num_positions, num_logprobs + 1]
    logprobs: _Array
    ranks: _Array  # [num_positions]
    cu_num_generated_tokens: list[int] | None


class _Drafts(_Struct):
    req_ids: list[str]
    token_ids: list[list[int]]


class _Output(_Struct):
    req_ids: list[str]
    sampled_token_ids: list[list[int]]
    logprobs: _Logprobs | None
    prompt_logprobs: dict[str, _Logprobs | None]
    num_nans_in_logits: dict[str, int] | None
    drafts: _Drafts | None
    pooled: list[_Array | None] | None


class _Grammar(_Struct):
    req_ids: list[str]
    bitmask: _Array  # int32 [num_rows, ceil(vocab_size / 32)]
    num_acceptable_drafts: list[int] | None


_ENCODER = msgspec.msgpack.Encoder()
_SCHEDULE_DECODER = msgspec.msgpack.Decoder(_Schedule)
_OUTPUT_DECODER = msgspec.msgpack.Decoder(_Output)
_GRAMMAR_DECODER = msgspec.msgpack.Decoder(_Grammar)
_ARRAY_DTYPES = frozenset({"int32", "int64", "float32", "float64"})


# ---- schedules -----------------------------------------------------------------------------------------------------


def is_nothing(schedule: SchedulerOutput) -> bool:
    """Whether no stage needs to see this schedule (vLLM's idle polls). Then no stage may run it, not even the head."""
    return not (
        schedule.total_num_scheduled_tokens
        or schedule.finished_req_ids
        or schedule.preempted_req_ids
        or schedule.free_encoder_mm_hashes
        or schedule.new_block_ids_to_zero
        or schedule.kv_cache_block_copies
    )


def encode_schedule(schedule: SchedulerOutput) -> bytes:
    """The bytes that every stage decodes. Stages pass them on as they are.

    Raises:
        TypeError: a request has a multimodal field that cannot travel (`pack_features`).
    """
    cached = schedule.scheduled_cached_reqs
    return _ENCODER.encode(
        _Schedule(
            new=[_new_request(request) for request in schedule.scheduled_new_reqs],
            cached_ids=cached.req_ids,
            resumed_ids=list(cached.resumed_req_ids),
            new_token_ids=cached.new_token_ids,
            new_block_ids=cached.new_block_ids,
            num_computed_tokens=cached.num_computed_tokens,
            num_output_tokens=cached.num_output_tokens,
            num_scheduled_tokens=schedule.num_scheduled_tokens,
            finished_ids=list(schedule.finished_req_ids),
            preempted_ids=None if schedule.preempted_req_ids is None else list(schedule.preempted_req_ids),
            freed_mm_hashes=schedule.free_encoder_mm_hashes,
            block_ids_to_zero=schedule.new_block_ids_to_zero,
            block_copies=_pairs(schedule.kv_cache_block_copies),
            has_structured_output=schedule.has_structured_output_requests,
            encoder_inputs=schedule.scheduled_encoder_inputs,
            spec_token_ids=schedule.scheduled_spec_decode_tokens,
            num_spec_tokens=schedule.num_spec_tokens_to_schedule,
            accepted_token_ids=cached.accepted_token_ids if isinstance(cached, SpeculativeRequestData) else None,
            num_common_prefix_blocks=schedule.num_common_prefix_blocks,
        )
    )


def decode_schedule(data: Frame, adapters: Mapping[int, LoRARequest] | None = None) -> SchedulerOutput:
    """The head's schedule, with everything that a worker reads.

    Args:
        adapters: the LoRA adapters that this stage knows, by number.

    Raises:
        ProtocolError: malformed bytes, or an adapter that this stage does not know.
    """
    wire = _decode(_SCHEDULE_DECODER, data, "schedule")
    return SchedulerOutput(
        scheduled_new_reqs=[
            NewRequestData(
                req_id=request.req_id,
                prompt_token_ids=request.prompt_token_ids,
                mm_features=unpack_features(request.features),
                sampling_params=request.sampling_params,
                pooling_params=request.pooling_params,
                block_ids=request.block_ids,
                num_computed_tokens=request.num_computed_tokens,
                lora_request=_known_adapter(request.lora_id, adapters or {}),
                prompt_embeds=(
                    None if request.num_prompt_embeds is None else stand_in_for_embeds(request.num_prompt_embeds)
                ),
            )
            for request in wire.new
        ],
        scheduled_cached_reqs=_cached_requests(wire),
        num_scheduled_tokens=wire.num_scheduled_tokens,
        total_num_scheduled_tokens=sum(wire.num_scheduled_tokens.values()),
        scheduled_spec_decode_tokens=wire.spec_token_ids,
        scheduled_encoder_inputs=wire.encoder_inputs,
        finished_req_ids=set(wire.finished_ids),
        free_encoder_mm_hashes=wire.freed_mm_hashes,
        preempted_req_ids=None if wire.preempted_ids is None else set(wire.preempted_ids),
        has_structured_output_requests=wire.has_structured_output,
        new_block_ids_to_zero=wire.block_ids_to_zero,
        kv_cache_block_copies=(
            None if wire.block_copies is None else [KVCacheBlockCopy(src, dst) for src, dst in wire.block_copies]
        ),
        num_spec_tokens_to_schedule=wire.num_spec_tokens,
        num_common_prefix_blocks=wire.num_common_prefix_blocks,
    )


def row_digest(req_ids: Iterable[str], num_scheduled_tokens: Mapping[str, int]) -> int:
    """64 bits of (request, tokens) in row order. Each worker orders rows by its own history, so stages compare them."""
    digest = hashlib.blake2b(digest_size=8)
    for req_id in req_ids:
        digest.update(f"{req_id}\0{num_scheduled_tokens[req_id]}\0".encode())
    return int.from_bytes(digest.digest(), "big")


def token_digest(output: ModelRunnerOutput) -> int:
    """64 bits of the sampled tokens in row order. The ranks of a tail compare them, because each samples by itself."""
    encoded = _ENCODER.encode((output.req_ids, output.sampled_token_ids))
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")


def _new_request(request: NewRequestData) -> _NewRequest:
    params = copy.copy(request.sampling_params)
    if params is not None:
        # Only the API server and the scheduler read these; stages get the grammar as a bitmask.
        params.structured_outputs = None
        params.stop = None
    return _NewRequest(
        req_id=request.req_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling_params=params,
        block_ids=request.block_ids,
        num_computed_tokens=request.num_computed_tokens,
        features=pack_features(request.mm_features),
        num_prompt_embeds=request.prompt_len if request.prompt_token_ids is None else None,
        pooling_params=request.pooling_params,
        lora_id=request.lora_request.lora_int_id if request.lora_request else 0,
    )


def _known_adapter(lora_id: int, adapters: Mapping[int, LoRARequest]) -> LoRARequest | None:
    if not lora_id:
        return None
    if lora_id not in adapters:
        raise ProtocolError(f"a request with LoRA adapter {lora_id}, which was not added on this stage before")
    return adapters[lora_id]


def _cached_requests(wire: _Schedule) -> CachedRequestData:
    cached = CachedRequestData(
        req_ids=wire.cached_ids,
        resumed_req_ids=set(wire.resumed_ids),
        new_token_ids=wire.new_token_ids,
        all_token_ids={},
        new_block_ids=wire.new_block_ids,
        num_computed_tokens=wire.num_computed_tokens,
        num_output_tokens=wire.num_output_tokens,
    )
    if wire.accepted_token_ids is None:
        return cached
    return SpeculativeRequestData(**vars(cached), accepted_token_ids=wire.accepted_token_ids)


def _pairs(copies: list[KVCacheBlockCopy] | None) -> list[tuple[int, int]] | None:
    return None if copies is None else [(pair.src_block_id, pair.dst_block_id) for pair in copies]


# ---- what the tail returns -----------------------------------------------------------------------------------------


def encode_output(output: ModelRunnerOutput, drafts: DraftTokenIds | None = None) -> bytes:
    """Token ids and what else the requests asked for, but no hidden states. ``drafts``: for the next step, if any."""
    logprobs = output.logprobs
    return _ENCODER.encode(
        _Output(
            req_ids=output.req_ids,
            sampled_token_ids=output.sampled_token_ids,
            logprobs=None if logprobs is None else _logprobs(*logprobs),
            prompt_logprobs={
                req_id: None
                if tensors is None
                else _logprobs(
                    tensors.logprob_token_ids.numpy(),
                    tensors.logprobs.numpy(),
                    tensors.selected_token_ranks.numpy(),
                    tensors.cu_num_generated_tokens,
                )
                for req_id, tensors in output.prompt_logprobs_dict.items()
            },
            num_nans_in_logits=output.num_nans_in_logits,
            drafts=None if drafts is None else _Drafts(drafts.req_ids, drafts.draft_token_ids),
            pooled=None if output.pooler_output is None else [_optional_tensor(each) for each in output.pooler_output],
        )
    )


def decode_output(data: Frame) -> ModelRunnerOutput:
    """The result of a step; a `DraftingOutput` if the tail has drafted. Raises ProtocolError for malformed bytes."""
    wire = _decode(_OUTPUT_DECODER, data, "result")
    logprobs = wire.logprobs
    output = ModelRunnerOutput(
        req_ids=wire.req_ids,
        req_id_to_index={req_id: index for index, req_id in enumerate(wire.req_ids)},
        sampled_token_ids=wire.sampled_token_ids,
        logprobs=None if logprobs is None else LogprobsLists(*_arrays(logprobs), logprobs.cu_num_generated_tokens),
        prompt_logprobs_dict={
            req_id: None if item is None else LogprobsTensors(*(torch.from_numpy(a) for a in _arrays(item)))
            for req_id, item in wire.prompt_logprobs.items()
        },
        num_nans_in_logits=wire.num_nans_in_logits,
        pooler_output=None if wire.pooled is None else [None if each is None else _torch(each) for each in wire.pooled],
    )
    if wire.drafts is None:
        return output
    return DraftingOutput(**vars(output), draft_token_ids=DraftTokenIds(wire.drafts.req_ids, wire.drafts.token_ids))


def _logprobs(ids: Any, logprobs: Any, ranks: Any, cu: list[int] | None) -> _Logprobs:
    return _Logprobs(_array(ids), _array(logprobs), _array(ranks), cu)


def _arrays(item: _Logprobs) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return _numpy(item.token_ids), _numpy(item.logprobs), _numpy(item.ranks)


# ---- structured output ---------------------------------------------------------------------------------------------


def encode_grammar(grammar: GrammarOutput) -> bytes:
    num_acceptable_drafts = getattr(grammar, "num_acceptable_drafts", None)  # since vLLM 0.32
    return _ENCODER.encode(
        _Grammar(grammar.structured_output_request_ids, _array(grammar.grammar_bitmask), num_acceptable_drafts)
    )


def decode_grammar(data: Frame) -> GrammarOutput:
    """Raises ProtocolError for malformed bytes."""
    wire = _decode(_GRAMMAR_DECODER, data, "grammar")
    grammar = GrammarOutput(wire.req_ids, _numpy(wire.bitmask))
    if hasattr(grammar, "num_acceptable_drafts"):
        grammar.num_acceptable_drafts = wire.num_acceptable_drafts
    return grammar


# ---- helpers -------------------------------------------------------------------------------------------------------


def _array(values: Any) -> _Array:
    array = np.ascontiguousarray(values)
    return _Array(array.dtype.name, list(array.shape), array.tobytes())


def _optional_tensor(tensor: torch.Tensor | None) -> _Array | None:
    """Takes any dtype that activations have; goes through bytes, because numpy has no bfloat16."""
    if tensor is None:
        return None
    values = tensor.contiguous()
    dtype = str(values.dtype).removeprefix("torch.")
    return _Array(dtype, list(values.shape), values.view(-1).view(torch.uint8).numpy().tobytes())


def _torch(array: _Array) -> torch.Tensor:
    if array.dtype not in ITEM_BYTES or min(array.shape, default=0) < 0:
        raise ProtocolError(f"a tensor of {array.dtype!r} {array.shape}: expected one of {sorted(ITEM_BYTES)}")
    if math.prod(array.shape) * ITEM_BYTES[array.dtype] != len(array.data):
        raise ProtocolError(f"a tensor of {array.dtype} {array.shape} in {len(array.data)} bytes")
    # torch.frombuffer refuses an empty buffer.
    flat = torch.frombuffer(bytearray(array.data) or bytearray(1), dtype=torch.uint8)[: len(array.data)]
    try:
        return flat.view(getattr(torch, array.dtype)).view(array.shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ProtocolError(f"a tensor of {array.dtype} {array.shape}: {error}") from error


def _numpy(array: _Array) -> np.ndarray[Any, Any]:
    if array.dtype not in _ARRAY_DTYPES:
        raise ProtocolError(f"an array of dtype {array.dtype!r}: expected one of {sorted(_ARRAY_DTYPES)}")
    try:
        # Writable, because vLLM hands such arrays to torch.
        return np.frombuffer(bytearray(array.data), dtype=array.dtype).reshape(array.shape)
    except ValueError as error:
        raise ProtocolError(f"an array of shape {array.shape} in {len(array.data)} bytes: {error}") from error


def _decode(decoder: Any, data: Frame, what: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, VLLMValidationError, RecursionError, ValueError, TypeError, AssertionError) as error:
        raise ProtocolError(f"malformed {what}: {error}") from error
