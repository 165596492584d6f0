"""Which stage reads which tensor, by the names of published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewire.checkpoint.index import CheckpointIndex, TensorInfo
from stagewire.checkpoint.model_config import ModelShape
from stagewire.checkpoint.ownership import (
    Role,
    describe_load,
    layer_of,
    owns,
    role_of,
    shares_embedding,
    stage_bytes,
    stage_tensors,
)
from stagewire.plan.ranges import LayerRange, split_evenly


def make_index(shapes: Mapping[str, tuple[int, ...]]) -> CheckpointIndex:
    tensors = {
        name: TensorInfo(name, "BF16", shape, 2 * math.prod(shape), "model.safetensors", 0)
        for name, shape in shapes.items()
    }
    return CheckpointIndex(tensors, sum(tensor.num_bytes for tensor in tensors.values()), 0)


def make_shape(num_layers: int, *, tied: bool) -> ModelShape:
    return ModelShape(num_layers, tied, ("LlamaForCausalLM",), "bfloat16")


def llama_3_8b() -> CheckpointIndex:
    hidden, kv, mlp, vocab = 4096, 1024, 14336, 128256
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    return make_index(layers | ends | {"model.norm.weight": (hidden,)})


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12),
        ("transformer.h.3.attn.c_attn.weight", 3),
        ("h.0.ln_1.bias", 0),
        ("transformer.blocks.7.ffn.up_proj.weight", 7),
        ("model.decoder.layers.5.fc1.weight", 5),
        ("language_model.model.layers.31.mlp.up_proj.weight", 31),
        ("model.language_model.layers.4.mlp.up_proj.weight", 4),
        ("thinker.model.layers.2.mlp.up_proj.weight", 2),
        ("gpt_neox.layers.6.attention.dense.weight", 6),
        ("backbone.layers.11.mixer.A_log", 11),
        ("transformer.encoder.layers.9.mlp.dense_4h_to_h.weight", 9),
        ("layers.1.attention.wq.weight", 1),
        ("model.layers.3.mlp.experts.17.down_proj.weight", 3),
        ("model.layers.3.mlp.vision_experts.0.down_proj.weight", 3),
        ("model.layers.61.shared_head.head.weight", 61),
    ],
)
def test_a_decoder_layer(name: str, layer: int) -> None:
    assert (layer_of(name), role_of(name)) == (layer, Role.LAYER)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", Role.EMBEDDING),
        ("model.language_model.embed_tokens.weight", Role.EMBEDDING),
        ("transformer.wte.weight", Role.EMBEDDING),
        ("transformer.word_embeddings.weight", Role.EMBEDDING),
        ("transformer.embedding.word_embeddings.weight", Role.EMBEDDING),
        ("gpt_neox.embed_in.weight", Role.EMBEDDING),
        ("backbone.embeddings.weight", Role.EMBEDDING),
        ("model.tok_embeddings.weight", Role.EMBEDDING),
        ("lm_head.weight", Role.HEAD),
        ("lm_head.qweight", Role.HEAD),
        ("language_model.lm_head.weight", Role.HEAD),
        ("output.weight", Role.HEAD),
        ("embed_out.weight", Role.HEAD),
        ("transformer.output_layer.weight", Role.HEAD),
        ("score.weight", Role.HEAD),
        ("model.decoder.project_out.weight", Role.HEAD),
        ("model.norm.weight", Role.FINAL_NORM),
        ("transformer.ln_f.bias", Role.FINAL_NORM),
        ("backbone.norm_f.weight", Role.FINAL_NORM),
        ("gpt_neox.final_layer_norm.weight", Role.FINAL_NORM),
        ("transformer.encoder.final_layernorm.weight", Role.FINAL_NORM),
        ("model.embedding_norm.weight", Role.FINAL_NORM),
        ("mtp.layers.0.mlp.up_proj.weight", Role.MTP),
        ("model.mtp_layers.0.input_layernorm.weight", Role.MTP),
        ("transformer.wpe.weight", Role.OTHER),
        ("transformer.word_embeddings_layernorm.weight", Role.OTHER),
        ("model.decoder.embed_positions.weight", Role.OTHER),
        ("visual.blocks.3.attn.qkv.weight", Role.OTHER),
        ("model.visual.blocks.3.norm1.weight", Role.OTHER),
        ("vision_tower.vision_model.encoder.layers.5.mlp.fc1.weight", Role.OTHER),
        ("vision_model.encoder.layers.0.norm1.weight", Role.OTHER),
        ("vision_model.transformer.layers.0.norm1.weight", Role.OTHER),
        ("audio_tower.layers.1.fc1.weight", Role.OTHER),
        ("thinker.audio_tower.layers.1.fc1.weight", Role.OTHER),
        ("talker.model.layers.1.mlp.up_proj.weight", Role.OTHER),
        ("model.encoder.layers.1.fc1.weight", Role.OTHER),
        ("multi_modal_projector.linear_1.weight", Role.OTHER),
        ("mlp1.0.weight", Role.OTHER),
        ("image_newline", Role.UNKNOWN),
        ("transformer.rotary_pos_emb.inv_freq", Role.UNKNOWN),
    ],
)
def test_no_decoder_layer(name: str, role: Role) -> None:
    assert (layer_of(name), role_of(name)) == (None, role)


@pytest.mark.parametrize(
    ("name", "shared", "stages"),
    [
        ("model.layers.0.w", False, [0]),
        ("model.layers.7.w", False, [1]),
        ("model.layers.8.w", False, [2]),
        ("model.layers.12.w", False, []),
        ("model.embed_tokens.weight", False, [0]),
        ("model.embed_tokens.weight", True, [0, 2]),
        ("transformer.wpe.weight", True, [0]),
        ("lm_head.weight", False, [2]),
        ("model.norm.weight", False, [2]),
        ("mtp.layers.0.w", False, []),
        ("visual.blocks.8.w", False, [0]),
        ("something.new", False, [0, 1, 2]),
    ],
)
def test_owners_among_three_stages_of_twelve_layers(name: str, shared: bool, stages: list[int]) -> None:
    ranges = split_evenly(12, 3)
    assert [i for i, layers in enumerate(ranges) if owns(name, layers, 12, shared_embedding=shared)] == stages


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("tied", "names", "shared"),
    [
        (True, [EMBEDDING], True),
        (True, [EMBEDDING, HEAD], False),
        (True, [EMBEDDING, "language_model.lm_head.weight"], False),
        (True, [EMBEDDING, "lm_head.qweight"], True),
        (False, [EMBEDDING, HEAD], False),
        (False, [EMBEDDING], False),
    ],
)
def test_shared_embedding(tied: bool, names: list[str], shared: bool) -> None:
    index = make_index(dict.fromkeys(names, (4, 2)))
    assert shares_embedding(index, make_shape(4, tied=tied)) is shared


def test_llama_3_8b() -> None:
    index, shape = llama_3_8b(), make_shape(32, tied=False)
    lines = [
        describe_load(i, layers, stage_bytes(index, shape, layers)) for i, layers in enumerate(split_evenly(32, 4))
    ]
    assert lines == [
        "Stage 0: Loading layers 0-7... (4.54 GB)",
        "Stage 1: Loading layers 8-15... (3.49 GB)",
        "Stage 2: Loading layers 16-23... (3.49 GB)",
        "Stage 3: Loading layers 24-31... (4.54 GB)",
    ]
    assert sum(stage_bytes(index, shape, layers) for layers in split_evenly(32, 4)) == index.total_bytes


def test_describe_load_keeps_two_decimals() -> None:
    assert describe_load(0, LayerRange(0, 8), 2_100_000_000) == "Stage 0: Loading layers 0-7... (2.10 GB)"
    assert describe_load(2, LayerRange(5, 6), 114_000_000) == "Stage 2: Loading layer 5... (0.11 GB)"


@given(st.integers(1, 12), st.booleans(), st.booleans(), st.data())
def test_all_stages_together_read_all_that_is_built(
    num_layers: int, tied: bool, has_head: bool, data: st.DataObject
) -> None:
    layer_names = [f"model.layers.{i}.w" for i in range(num_layers)]
    names = [EMBEDDING, *layer_names, "model.norm.weight", "visual.blocks.0.w", *([HEAD] if has_head else [])]
    drafters = [f"model.layers.{num_layers}.w", "mtp.layers.0.w"]
    index, shape = make_index(dict.fromkeys([*names, *drafters], (2, 3))), make_shape(num_layers, tied=tied)
    ranges = split_evenly(num_layers, data.draw(st.integers(1, num_layers)))
    read = [tensor.name for layers in ranges for tensor in stage_tensors(index, shape, layers)]
    copies = 1 if tied and not has_head and len(ranges) > 1 else 0
    assert sorted(read) == sorted(names + [EMBEDDING] * copies)
