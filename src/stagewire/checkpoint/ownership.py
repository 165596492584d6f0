"""Decides which stage reads a tensor, from the tensor's name alone. Pure.

A stage knows only its own range, which is enough: the first stage's range starts at 0, the last one's ends at the
model's depth. Every stage reads tensors with unknown names. Reading too much is only slower, but a missing tensor gives
wrong tokens. vLLM's models skip tensors that they have no place for, because each stage of stock vLLM reads them all.
"""

from __future__ import annotations

import re
from enum import Enum

from stagewire.checkpoint.files import CheckpointFiles
from stagewire.checkpoint.index import CheckpointIndex, TensorInfo
from stagewire.checkpoint.model_config import ModelShape
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange

__all__ = [
    "Role",
    "check_absent",
    "describe_load",
    "is_built",
    "is_lm_head",
    "layer_of",
    "owns",
    "role_of",
    "shares_embedding",
    "stage_bytes",
    "stage_tensors",
]

_BYTES_PER_GB = 10**9


class Role(Enum):
    """What a tensor is for. The comments say which stage owns it."""

    LAYER = "layer"  # the stage whose range has it; none beyond the model's depth (DeepSeek's MTP layers)
    EMBEDDING = "embedding"  # of tokens: the first, and the last too if it is also the head
    HEAD = "head"  # output projection, classifier: the last
    FINAL_NORM = "final norm"  # the last
    MTP = "multi-token prediction"  # with names of their own, unlike the decoder's layers: none
    OTHER = "other"  # towers, projectors, position embeddings, all else before layer 0: the first
    UNKNOWN = "unknown"  # every stage


_LAST_STAGE_ROLES = frozenset((Role.HEAD, Role.FINAL_NORM))

# Names of modules in checkpoints, taken from vLLM 0.32's models and their weight mappers.
_LAYER_LISTS = frozenset(("layers", "h", "blocks", "layer"))
_TOWER = re.compile(
    r"visi|visual|image|video|^vit(?:_|$)|vpm|audio|speech|sound|apm|whisper|encoder|qformer|q_former|resampler"
    r"|perceiver|projector|adapt[eo]r|connector|aligner|merger|^mm_|^mlp1$|talker|token2wav|code2wav"
)
_MODULES_OF_ROLE = {
    Role.EMBEDDING: """embed_tokens wte word_embeddings tok_embeddings token_embedding embed_in embed
        embedding embeddings""",
    Role.HEAD: """lm_head output output_layer embed_out ff_out proj_out project_out head
        score classifier v_head""",
    Role.FINAL_NORM: "norm ln_f norm_f final_layernorm final_layer_norm final_norm ln_out embedding_norm",
    Role.OTHER: """wpe embed_positions position_embeddings token_type_embeddings word_embeddings_layernorm project_in
        embed_tokens_per_layer per_layer_model_projection per_layer_projection_norm""",
}
_ROLE_OF_MODULE = {module: role for role, modules in _MODULES_OF_ROLE.items() for module in modules.split()}


def layer_of(name: str) -> int | None:
    """The decoder layer of a tensor; ``None`` for any other tensor, such as one of a vision tower's layer.

    ``model.layers.12.self_attn.q_proj.weight`` -> 12. MTP modules with numbers of their own (``mtp.layers.0``) give
    ``None``. Those with numbers after the decoder's (``model.layers.61`` of 61 layers) give a number beyond the depth.
    """
    return _place(name)[1]


def role_of(name: str) -> Role:
    """The role of a tensor. A name that fits nothing known is ``UNKNOWN``."""
    return _place(name)[0]


def shares_embedding(index: CheckpointIndex, shape: ModelShape) -> bool:
    """Whether the head is the token embedding, so that the last stage needs a copy of it.

    The rule is vLLM's (``ModelConfig.maybe_untie_word_embeddings``, vllm/config/model.py). A checkpoint that holds
    ``lm_head.weight``, in any *.safetensors, is untied, whatever its config says. A quantized head
    (``lm_head.qweight``) does not untie it.
    """
    return shape.tie_word_embeddings and not any(map(is_lm_head, (*index.tensors, *index.beside)))


def is_lm_head(name: str) -> bool:
    """Whether this tensor makes vLLM take the checkpoint for one with a head of its own."""
    return name.endswith("lm_head.weight")


def is_built(name: str, num_layers: int) -> bool:
    """Whether vLLM's model of ``num_layers`` has the tensor. It does not have layers for multi-token prediction.

    These are named ``mtp``, or have numbers after the decoder's layers. vLLM's model skips them while it loads.
    """
    role, layer = _place(name)
    return role is not Role.MTP and (layer is None or layer < num_layers)


def check_absent(index: CheckpointIndex, shape: ModelShape, files: CheckpointFiles) -> None:
    """Raises ``ConfigError`` for a tensor that the index names, no file holds, and every model of this depth needs.

    That is the weight of a module in a layer, of the embedding or of the final norm, if the files hold nothing else of
    that module. Others may be missing (a head may be tied, a buffer may have a default): vLLM decides when it loads.
    """
    modules = {name.rpartition(".")[0] for name in index.tensors}
    for name in index.absent:
        module, _, kind = name.rpartition(".")
        role = role_of(name)
        is_needed = kind == "weight" and role in (Role.LAYER, Role.EMBEDDING, Role.FINAL_NORM)
        if is_needed and is_built(name, shape.num_layers) and module not in modules:
            raise ConfigError(
                f"{files.index_name} says that tensor {name} is in {files.folder / files.weight_map[name]}, which does "
                "not hold it; the index and the shards are of different checkpoints: download both again"
            )


def owns(name: str, layers: LayerRange, num_layers: int, *, shared_embedding: bool) -> bool:
    """Whether the stage with ``layers`` of ``num_layers`` reads this tensor.

    ``shared_embedding``: the result of ``shares_embedding``.
    """
    is_first, is_last = layers.start == 0, layers.end == num_layers
    role, layer = _place(name)
    if layer is not None:
        return layer in layers and layer < num_layers
    if role is Role.EMBEDDING:
        return is_first or (is_last and shared_embedding)
    if role in _LAST_STAGE_ROLES:
        return is_last
    if role is Role.MTP:
        return False
    return is_first or role is Role.UNKNOWN


def stage_tensors(index: CheckpointIndex, shape: ModelShape, layers: LayerRange) -> list[TensorInfo]:
    """The tensors that the stage with ``layers`` reads, in the order of the files and of their data."""
    shared = shares_embedding(index, shape)
    return [
        tensor
        for name, tensor in index.tensors.items()
        if owns(name, layers, shape.num_layers, shared_embedding=shared)
    ]


def stage_bytes(index: CheckpointIndex, shape: ModelShape, layers: LayerRange) -> int:
    """Bytes of ``stage_tensors`` as they are in the checkpoint, before any change of dtype."""
    return sum(tensor.num_bytes for tensor in stage_tensors(index, shape, layers))


def describe_load(stage: int, layers: LayerRange, num_bytes: int) -> str:
    """The line each stage prints: ``Stage 0: Loading layers 0-7... (4.54 GB)``. 1 GB is 10^9 bytes."""
    return f"Stage {stage}: Loading {layers.describe()}... ({num_bytes / _BYTES_PER_GB:.2f} GB)"


def _place(name: str) -> tuple[Role, int | None]:
    """Role and layer, by the first module from the left that decides it.

    The order matters: a layer may hold ``vision_experts``, and a tower has layers of its own.
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.startswith("mtp"):
            return Role.MTP, None
        if part in _LAYER_LISTS and parts[i + 1].isdecimal():
            return Role.LAYER, int(parts[i + 1])
        if _is_tower(parts, i):
            return Role.OTHER, None
    return _role_of_end(parts), None


def _is_tower(parts: list[str], i: int) -> bool:
    # ChatGLM's whole decoder is called transformer.encoder.
    is_chatglm = parts[i] == "encoder" and i > 0 and parts[i - 1] == "transformer"
    return not is_chatglm and _TOWER.search(parts[i]) is not None


def _role_of_end(parts: list[str]) -> Role:
    """The role of the rightmost known module, because inner modules are more specific
    (``embeddings.position_embeddings``).
    """
    return next((_ROLE_OF_MODULE[part] for part in reversed(parts) if part in _ROLE_OF_MODULE), Role.UNKNOWN)
