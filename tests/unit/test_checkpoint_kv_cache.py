"""Kinds, sizes and sharing of KV caches, from config.json as published hybrid models write it."""

from __future__ import annotations

from typing import Any

import pytest

from stagewire.checkpoint.kv_cache import (
    Kind,
    check_kv,
    check_own_kv,
    find_kv_problems,
    fitting_split,
    read_layout,
)
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange, split_evenly

LLAMA_3_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
JAMBA = {**LLAMA_3_8B, "model_type": "jamba", "attn_layer_period": 8, "attn_layer_offset": 4}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA_3N = {
    "model_type": "gemma3n",
    "text_config": {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 35,
        "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
        "num_kv_shared_layers": 15,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
    },
}
GEMMA_4 = {
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 35,
        "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
        "num_kv_shared_layers": 20,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
    },
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


def ranges_of(*texts: str) -> tuple[LayerRange, ...]:
    return tuple(LayerRange.parse(text) for text in texts)


def letters(config: dict[str, Any]) -> str:
    """One letter per layer: Attention, State, Both, Nothing."""
    names = {Kind.ATTENTION: "A", Kind.STATE: "S", Kind.ATTENTION | Kind.STATE: "B", Kind.NOTHING: "N"}
    return "".join(names[layer.kind] for layer in read_layout(config).layers)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"num_hidden_layers": 4}, "AAAA"),
        ({"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}, "AA"),
        (
            {
                "model_type": "llama4",
                "text_config": {"num_hidden_layers": 2, "layer_types": ["chunked_attention", FULL]},
            },
            "AA",
        ),
        # Step-3.5 lists its drafting layers too.
        ({"num_hidden_layers": 2, "layer_types": [FULL, SLIDING, FULL]}, "AA"),
        (
            {"num_hidden_layers": 9, **{k: JAMBA[k] for k in ("model_type", "attn_layer_period", "attn_layer_offset")}},
            "SSSSASSSS",
        ),
        ({"num_hidden_layers": 5, "model_type": "jamba"}, "SSSSA"),
        ({"num_hidden_layers": 3, "model_type": "bamba", "attn_layer_indices": [1]}, "SAS"),
        (
            {"num_hidden_layers": 3, "model_type": "granitemoehybrid", "layer_types": ["mamba", "attention", "mamba"]},
            "SAS",
        ),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*E"}, "SNSAN"),
        ({"model_type": "nemotron_h", "layers_block_type": ["linear_attention", "moe", FULL, "mlp"]}, "SNAN"),
        (
            {
                "num_hidden_layers": 4,
                "model_type": "zamba2",
                "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
            },
            "SSBS",
        ),
        ({"num_hidden_layers": 2, "model_type": "falcon_h1"}, "BB"),
        ({"num_hidden_layers": 2, "model_type": "mamba2"}, "SS"),
        ({"num_hidden_layers": 8, "model_type": "qwen3_next", "full_attention_interval": 4}, "SSSASSSA"),
        ({"num_hidden_layers": 4, "model_type": "qwen3_next"}, "SSSA"),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", "num_hidden_layers": 4}}, "SSSA"),
        ({"num_hidden_layers": 3, "model_type": "lfm2", "layer_types": ["conv", "conv", FULL]}, "SSA"),
        ({"num_hidden_layers": 3, "model_type": "lfm2", "full_attn_idxs": [2]}, "SSA"),
        ({"num_hidden_layers": 3, "attn_type_list": [0, 0, 1]}, "SSA"),
        (
            {
                "num_hidden_layers": 4,
                "model_type": "kimi_linear",
                "linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [4]},
            },
            "SSSA",
        ),
        ({"num_hidden_layers": 6, "layer_group_size": 4, "architectures": ["BailingMoeV2_5ForCausalLM"]}, "SSSASS"),
        ({"num_hidden_layers": 6, "layer_group_size": 4, "architectures": ["BailingMoeV3ForCausalLM"]}, "SSSAAA"),
        (
            {
                "num_hidden_layers": 2,
                "block_configs": [{"attention": {"no_op": True}}, {"attention": {"no_op": False}}],
            },
            "NA",
        ),
    ],
)
def test_kinds(config: dict[str, Any], kinds: str) -> None:
    assert letters(config) == kinds


@pytest.mark.parametrize(
    ("config", "elements"),
    [
        (LLAMA_3_8B, {0: 2 * 8 * 128, 31: 2 * 8 * 128}),
        ({**LLAMA_3_8B, "num_key_value_heads": None}, {0: 2 * 32 * 128}),
        ({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}, {0: 2 * 768}),
        ({"model_type": "falcon", "num_hidden_layers": 2, "num_attention_heads": 71, "hidden_size": 4544}, {0: 2 * 64}),
        (
            {
                "model_type": "falcon",
                "num_hidden_layers": 2,
                "num_attention_heads": 128,
                "num_kv_heads": 8,
                "hidden_size": 8192,
                "new_decoder_architecture": True,
            },
            {0: 2 * 8 * 64},
        ),
        (
            {
                "model_type": "chatglm",
                "num_layers": 28,
                "num_attention_heads": 32,
                "hidden_size": 4096,
                "multi_query_group_num": 2,
            },
            {0: 2 * 2 * 128},
        ),
        (
            {"model_type": "dbrx", "n_layers": 40, "n_heads": 48, "d_model": 6144, "attn_config": {"kv_n_heads": 8}},
            {0: 2 * 8 * 128},
        ),
        (
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 64,
                "hidden_size": 8192,
                "block_configs": [{"attention": {"no_op": True}}, {"attention": {"n_heads_in_group": 8}}],
            },
            {0: 0, 1: 2 * 8 * 128},
        ),
        (DEEPSEEK_V3, {0: 512 + 64, 60: 512 + 64}),
        (JAMBA, {3: 0, 4: 2 * 8 * 128}),
        (QWEN3_NEXT, {0: 0, 3: 2 * 2 * 256}),
        (GEMMA_3N, {0: 1024, 4: 1024, 19: 1024, 20: 0, 34: 0}),
        (GEMMA_4, {0: 512, 4: 1024, 14: 1024, 15: 0, 34: 0}),
        (
            {
                "model_type": "gemma4_text",
                "num_hidden_layers": 6,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "per_layer_config": {"05": {"head_dim": 512}},
            },
            {4: 2 * 4 * 256, 5: 2 * 4 * 512},
        ),
    ],
)
def test_elements_per_token(config: dict[str, Any], elements: dict[int, int]) -> None:
    layout = read_layout(config)
    assert layout.unknown is None
    assert {i: layout.layers[i].elements_per_token for i in elements} == elements


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index_topk": 2048}, "index_topk"),
        ({"model_type": "minicpm3"}, "kv_lora_rank"),
        ({"model_type": "llama", "kv_lora_rank": None}, "v_head_dim"),
        (
            {
                "model_type": "x",
                "kv_lora_rank": None,
                "v_head_dim": None,
                "num_attention_heads": [1, 2],
                "num_key_value_heads": [1, 2],
            },
            "does not name",
        ),
        ({"layer_types": ["brand_new"] * 61}, "a kind of layer"),
    ],
)
def test_sizes_that_are_not_known_are_not_guessed(change: dict[str, Any], said: str) -> None:
    layout = read_layout({**DEEPSEEK_V3, **change})
    assert layout.unknown is not None
    assert said in layout.unknown
    assert {layer.elements_per_token for layer in layout.layers} == {None}
    assert find_kv_problems(layout, split_evenly(61, 4)) == []


def test_an_unknown_kind_refuses_no_split() -> None:
    layout = read_layout({"num_hidden_layers": 4, "layer_types": [FULL, FULL, "brand_new", "brand_new"]})
    assert find_kv_problems(layout, ranges_of("0-2", "2-4")) == []


def test_whose_cache_is_shared() -> None:
    """Gemma3n: 2 before the first sharer for sliding layers, 1 for full ones. Gemma4: the last one of the same type."""
    three, four = read_layout(GEMMA_3N).layers, read_layout(GEMMA_4).layers
    assert [three[i].shares for i in (0, 19, 20, 23, 24, 34)] == [None, None, 18, 18, 19, 19]
    assert [four[i].shares for i in (0, 14, 15, 18, 19, 34)] == [None, None, 13, 13, 14, 14]


def test_gemma4_ends_with_full_attention_whatever_is_written() -> None:
    text = {**GEMMA_4["text_config"], "num_hidden_layers": 12, "layer_types": None, "num_kv_shared_layers": 4}  # type: ignore[dict-item]
    assert [layer.shares for layer in read_layout({**GEMMA_4, "text_config": text}).layers[8:]] == [7, 7, 7, 5]
    written = {**text, "layer_types": [SLIDING] * 5 + [FULL] + [SLIDING] * 6}
    assert read_layout({**GEMMA_4, "text_config": written}).layers[11].shares == 5


def test_a_stage_without_a_kind_is_refused_with_a_split_that_works() -> None:
    layout = read_layout(JAMBA)
    with pytest.raises(ConfigError) as caught:
        check_kv(layout, ranges_of("0-4", "4-20", "20-21", "21-32"))
    lines = str(caught.value).splitlines()
    assert lines[1].startswith(
        "  - stage 0 with layers [0, 4): no KV cache layer, those are 4, 12, 20, 28; each stage needs"
    )
    assert lines[2].startswith(
        "  - stage 2 with layers [20, 21): no Mamba, linear attention or convolution layer, those"
    )
    assert lines[3:] == ['The nearest split that works: --ranges "0-5" "5-19" "19-21" "21-32"']


def test_given_boundaries_that_work_are_kept() -> None:
    layout = read_layout(JAMBA)
    assert find_kv_problems(layout, split_evenly(32, 4)) == []
    assert fitting_split(layout, ranges_of("0-5", "6-20", "20-32")) == (
        "The given ends kept",
        ranges_of("0-5", "5-20", "20-32"),
    )
    # The ends leave stage 1 with layers 5 and 6 only: no attention among them; the starts do not.
    assert fitting_split(layout, ranges_of("0-5", "6-7", "13-32")) == (
        "The given starts kept",
        ranges_of("0-6", "6-13", "13-32"),
    )


def test_no_boundary_between_a_sharer_and_its_target() -> None:
    layout = read_layout(GEMMA_4)
    with pytest.raises(ConfigError) as caught:
        check_kv(layout, split_evenly(35, 4))
    message = str(caught.value)
    assert (
        "stage 2 with layers [18, 27): the start 18 cuts layers that share a KV cache: 18 to 34 use the cache of 13 to"
        in message
    )
    assert "stage 3 with layers [27, 35): the start 27 cuts" in message
    assert message.count("cuts") == 2
    assert message.endswith('The most even split that works: --ranges "0-5" "5-9" "9-13" "13-35"')
    with pytest.raises(ConfigError, match='The nearest split that works: --ranges "0-8" "8-13" "13-35"'):
        check_kv(layout, ranges_of("0-8", "8-20", "20-35"))
    # The boundary may lie before both targets, never between them.
    assert find_kv_problems(layout, ranges_of("0-13", "13-35")) == []
    assert "18 to 34" not in find_kv_problems(layout, ranges_of("0-14", "14-35"))[0]
    assert "of 13, which" in find_kv_problems(layout, ranges_of("0-14", "14-35"))[0]


def test_more_stages_than_layers_of_a_kind() -> None:
    with pytest.raises(ConfigError, match="5 stages are not possible, 4 at most: --ranges"):
        check_kv(read_layout(JAMBA), split_evenly(32, 5))


def test_what_one_stage_can_tell_alone() -> None:
    assert check_own_kv(JAMBA, LayerRange(8, 16)) == []
    assert "no KV cache layer" in check_own_kv(JAMBA, LayerRange(13, 20))[0]
    assert check_own_kv(LLAMA_3_8B, LayerRange(3, 4)) == []
    (start,) = check_own_kv(GEMMA_4, LayerRange(20, 35))
    assert "layers [20, 35): the start 20 cuts" in start
    (end,) = check_own_kv(GEMMA_4, LayerRange(0, 14))
    assert "layers [0, 14): the end 14 cuts" in end
    assert check_own_kv(GEMMA_4, LayerRange(0, 35)) == []


GLM_4_5 = {"model_type": "glm4_moe", "num_hidden_layers": 92, "num_attention_heads": 96, "first_k_dense_replace": 3}


@pytest.mark.parametrize(
    ("config", "dense"),
    [
        (GLM_4_5, {0, 1, 2}),
        ({"model_type": "afmoe", "num_hidden_layers": 4, "num_dense_layers": 2}, {0, 1}),
        ({"model_type": "step3p5", "num_hidden_layers": 4}, {0}),
        ({"model_type": "step3p5", "num_hidden_layers": 4, "moe_layers_enum": "2,3"}, {0, 1}),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 4, "decoder_sparse_step": 2}, {0, 2}),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 4, "mlp_only_layers": [1]}, {1}),
        ({"model_type": "glm4_moe", "num_hidden_layers": 2, "mlp_layer_types": ["sparse", "dense"]}, {1}),
    ],
)
def test_layers_without_experts(config: dict[str, Any], dense: set[int]) -> None:
    layout = read_layout(config)
    assert layout.experts == frozenset(range(len(layout.layers))) - dense


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama"])
def test_other_models_can_do_without_experts(model_type: str) -> None:
    assert read_layout({**GLM_4_5, "model_type": model_type}).experts is None


def test_a_stage_of_dense_layers_alone_is_refused_where_vllm_cannot_build_it() -> None:
    layout = read_layout(GLM_4_5)
    (problem,) = find_kv_problems(layout, ranges_of("0-3", "3-92"))
    assert problem == (
        "stage 0 with layers [0, 3): no layer with experts, those are 3 to 91; vLLM's model cannot be built without one"
    )
    assert fitting_split(layout, ranges_of("0-3", "3-92")) == ("The nearest split that works", ranges_of("0-4", "4-92"))
    assert check_own_kv(GLM_4_5, LayerRange(0, 4)) == []


# Upstage's Solar Pro.
SOLAR_PRO = {
    "model_type": "solar",
    "num_hidden_layers": 64,
    "bskcn_1": [12, 20, 32, 44],
    "bskcn_2": [20, 32],
    "bskcn_3": [16, 24, 36, 48],
    "bskcn_4": [28, 40],
}


def test_no_boundary_within_a_skip_connection() -> None:
    layout = read_layout(SOLAR_PRO)
    assert layout.skips == ((12, 16), (20, 24), (20, 28), (32, 36), (32, 40), (44, 48))
    (problem,) = find_kv_problems(layout, ranges_of("0-14", "14-41", "41-64"))
    assert problem.startswith("stage 1 with layers [14, 41): the start 14 cuts a skip connection: layer 16 uses what")
    assert find_kv_problems(layout, ranges_of("0-12", "12-44", "44-64")) == []
    with pytest.raises(ConfigError, match="skip connection"):
        check_kv(layout, ranges_of("0-32", "32-46", "46-64"))


def test_a_boundary_before_a_skip_connection_is_none_within() -> None:
    """Layer 20 keeps what it is given, so it may be a stage's first; layer 28 uses it, so it may not."""
    layout = read_layout(SOLAR_PRO)
    assert check_own_kv(SOLAR_PRO, LayerRange(20, 29)) == []
    assert layout.cut_skips(20) == []
    assert layout.cut_skips(28) == [(20, 28)]
