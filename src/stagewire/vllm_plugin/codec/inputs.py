"""What a request brings besides token ids (images, audio, video, embeddings of a prompt), and which stage gets it.

Only the head embeds a prompt. So only the head gets pixels and embedding vectors, and these stay in its EngineCore
process. The other stages get what decides positions: where an item lies in the prompt, the small fields that vLLM's
models keep on the CPU for it (image grids for M-RoPE), and the number of a prompt's embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec
import numpy as np
import torch
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalSharedField,
    PlaceholderRange,
)

from stagewire.errors import ProtocolError

__all__ = ["Feature", "pack_features", "stand_in_for_embeds", "unpack_features"]

Position = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]

Dtype = Literal["bool", "uint8", "int32", "int64", "float32", "float64"]


class Feature(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One image (or other item) of a prompt, without its content.

    ``is_embed``: which of its ``length`` positions are embeddings, one byte each; ``None``: all. ``fields``: the packed
    fields that stay on the CPU; ``None`` if the scheduler dropped the item's data because its positions are cached.
    """

    modality: str
    identifier: str
    offset: Position
    length: Position
    is_embed: bytes | None
    fields: dict[str, Any] | None


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: Dtype
    shape: list[Position]
    data: bytes


def pack_features(features: Sequence[MultiModalFeatureSpec]) -> list[Feature]:
    """The items as they travel.

    Raises TypeError for a field that is no tensor, number, text, None or list of these. No model of vLLM has one.
    """
    return [
        Feature(
            modality=feature.modality,
            identifier=feature.identifier,
            offset=feature.mm_position.offset,
            length=feature.mm_position.length,
            is_embed=_pack_mask(feature.mm_position.is_embed),
            fields=None if feature.data is None else _pack_fields(feature.data),
        )
        for feature in features
    ]


def unpack_features(features: Sequence[Feature]) -> list[MultiModalFeatureSpec]:
    """The items for vLLM, without content.

    Raises ProtocolError for a mask of another length than the item, or a malformed tensor.
    """
    return [
        MultiModalFeatureSpec(
            data=None if feature.fields is None else _unpack_fields(feature.fields),
            modality=feature.modality,
            identifier=feature.identifier,
            mm_position=PlaceholderRange(feature.offset, feature.length, _unpack_mask(feature)),
        )
        for feature in features
    ]


def stand_in_for_embeds(length: int) -> torch.Tensor:
    """Stands for a prompt's embeddings where only their number matters; takes no memory. # [length, 1]"""
    return torch.zeros(1, 1).expand(length, 1)


def _pack_mask(mask: torch.Tensor | None) -> bytes | None:
    return None if mask is None else mask.to(torch.bool).numpy().tobytes()


def _unpack_mask(feature: Feature) -> torch.Tensor | None:
    if feature.is_embed is None:
        return None
    if len(feature.is_embed) != feature.length:
        raise ProtocolError(f"an item of {feature.length} positions with a mask of {len(feature.is_embed)}")
    return torch.frombuffer(bytearray(feature.is_embed), dtype=torch.uint8).bool() if feature.length else None


def _pack_fields(data: MultiModalKwargsItem) -> dict[str, Any]:
    return {name: _pack(element.data) for name, element in data.items() if element.field.keep_on_cpu}


def _unpack_fields(fields: dict[str, Any]) -> MultiModalKwargsItem:
    field = MultiModalSharedField(batch_size=1, keep_on_cpu=True)
    try:
        elements = {name: MultiModalFieldElem(_unpack(value), field) for name, value in fields.items()}
    except RecursionError as error:
        raise ProtocolError("a multimodal field nested too deeply") from error
    return MultiModalKwargsItem(elements)


def _pack(value: Any) -> Any:
    """A tensor becomes a map; msgpack has everything else. 16-bit floats become float32, because numpy has no bfloat16.

    A tensor of another dtype that is not in ``Dtype`` becomes int64.
    """
    if isinstance(value, torch.Tensor):
        array = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().contiguous().numpy()
        if array.dtype.name not in get_args(Dtype):
            array = array.astype(np.int64)
        return _Tensor(array.dtype.name, list(array.shape), array.tobytes())
    if isinstance(value, np.ndarray):
        return _pack(torch.from_numpy(value))
    if isinstance(value, (list, tuple)):
        return [_pack(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a multimodal field of type {type(value).__name__} cannot travel between stages")


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        tensor = msgspec.convert(value, _Tensor)
        array = np.frombuffer(bytearray(tensor.data), tensor.dtype).reshape(tensor.shape)
    except (msgspec.ValidationError, ValueError) as error:
        raise ProtocolError(f"a malformed tensor of a multimodal field: {error}") from error
    return torch.from_numpy(array)
