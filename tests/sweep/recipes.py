"""For each architecture a tiny configuration that keeps what is peculiar to it.

A recipe is data. Where transformers has the architecture's class, most need only a few settings on top of `BASE`; the
others say which config.json a hub has and how its tensors are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["BASE", "HUB_BASE", "RECIPES", "VOCAB_SIZE", "Recipe", "recipe_for"]

VOCAB_SIZE = 512
SIX_LAYERS = ("0-1", "1-4", "4-6")
EIGHT_LAYERS = ("0-2", "2-5", "5-8")
# Layer 0 is dense, and some of vLLM's models cannot be built without experts.
EXPERTS_EVERYWHERE = ("0-2", "2-5", "5-6")

# Tiny sizes under every name that a config class may have for them. Head sizes are those of vLLM's CPU kernels.
BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 192),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 6),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    "head_dim": 32,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": 16,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 8),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    # The one size of vLLM's MLA kernel on CPU: 512 + 64.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 64,
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 64),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}
_NAMED_SO_ON_HUBS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
# What config.json of a hub's own architecture has besides; classes of transformers have their own default.
HUB_BASE = {
    **{key: BASE[key] for key in _NAMED_SO_ON_HUBS},
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        architecture: as vLLM's registry and config.json spell it.
        says: what is peculiar, for people.
        config: settings on top of `BASE`.
        ranges: layers of each stage.
        weights: who makes them.
        like: class of transformers that makes the weights, when it is not the architecture's own.
        model_type: of config.json, when the one of ``like`` is not right; always with ``weights="vllm"``.
        attribute_map, config_code: of the config class beside config.json.
        renames: (pattern, replacement) from vLLM's names to a checkpoint's, in order.
        parts: fused module of vLLM to the checkpoint's; an empty tuple leaves it fused, two of three join the last two.
        experts: names of gate, down and up projection; ``experts_are_stacked``: one tensor for all experts.
        buffers: that checkpoints hold.
        drops: pattern of what transformers writes and a real checkpoint has not.
        gain, embedding_std, seed: of the random weights.
        engine: arguments of vLLM that the model needs.
        impossible: why no checkpoint is made here.
    """

    architecture: str
    says: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    ranges: Sequence[str] = SIX_LAYERS
    weights: Literal["transformers", "vllm"] = "transformers"
    like: str = ""
    model_type: str = ""
    attribute_map: Mapping[str, str] = field(default_factory=dict)
    config_code: str = ""
    renames: Sequence[tuple[str, str]] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: tuple[str, str, str] = ("gate_proj", "down_proj", "up_proj")
    experts_are_stacked: bool = False
    buffers: Sequence[str] = ()
    drops: str = ""
    gain: float = 1.5
    embedding_std: float = 0.1
    seed: int = 0
    engine: Mapping[str, Any] = field(default_factory=dict)
    impossible: str = ""


def hub(architecture: str, model_type: str, says: str = "", **options: Any) -> Recipe:
    """An architecture whose weights vLLM's own model has to name."""
    return Recipe(architecture, says, weights="vllm", model_type=model_type, **options)


def alias(architecture: str, like: str, model_type: str = "", says: str = "", **options: Any) -> Recipe:
    """Another name for what transformers calls ``like``."""
    return Recipe(architecture, says or f"weights as {like}", like=like, model_type=model_type, **options)


def _layers(words: str) -> list[str]:
    """``"s f"``: one letter for each layer."""
    names = {
        "s": "sliding_attention",
        "f": "full_attention",
        "l": "linear_attention",
        "c": "conv",
        "m": "mamba",
        "a": "attention",
        "M": "mlp",
    }
    return [names[letter] for letter in words.split()]


# MLA has no prefix caching on CPU, which a model with states has to be told.
_OWN_BLOCKS = {"block_size": None, "enable_prefix_caching": False}
_MAMBA2 = {
    "mamba_d_ssm": 256,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
}
_GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
# vLLM's gated delta net on CPU.
_BFLOAT16 = {"dtype": "bfloat16"}
_SCALED = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2}
_MLA = {key: BASE[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "q_lora_rank", "qk_nope_head_dim", "v_head_dim")}
_BAILING = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "moe_shared_expert_intermediate_size": 64,
    "embedding_dropout": 0.0,
    "rope_theta": 10000.0,
    "use_rmsnorm": True,
}
_MIMO = {
    "hybrid_layer_pattern": [0, 1, 1, 0, 1, 0],
    "moe_layer_freq": [0, 1, 1, 1, 1, 1],
    "n_routed_experts": 8,
    "layer_types": _layers("f s s f s f"),
    "mlp_layer_types": ["dense", *["sparse"] * 5],
    "head_dim": 64,
    "v_head_dim": 32,
    "swa_head_dim": 64,
    "swa_v_head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "sliding_window_size": 16,
    "sliding_window": 16,
    "layernorm_epsilon": 1e-6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "attention_bias": False,
    "rope_theta": 10000.0,
    "swa_rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_value_scale": 0.7,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
}
_BAILING_NAMES = ((r"\.attention\.qkv_proj\.", ".attention.query_key_value."),)

_OF_TRANSFORMERS = (
    Recipe(
        "AfmoeForCausalLM",
        "MoE behind a dense layer, sliding and full attention, gated attention, muP",
        {
            "global_attn_every_n_layers": 3,
            "mup_enabled": True,
            "score_func": "softmax",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
        ranges=EXPERTS_EVERYWHERE,
    ),
    Recipe("ApertusForCausalLM", "xIELU activation"),
    Recipe("AXK1ForCausalLM", "MLA, MoE, a norm after each", {"first_k_dense_replace": 0}),
    Recipe("ArceeForCausalLM", "Transformers backend, ReLU squared, no gate", {"hidden_act": "relu2"}),
    Recipe("BloomForCausalLM", "ALiBi, norm after the embedding, tied embeddings", gain=4.0, embedding_std=0.02),
    Recipe("CohereForCausalLM", "parallel blocks, logit scaling, tied embeddings", {"use_qk_norm": True}),
    Recipe("Cohere2ForCausalLM", "parallel blocks, sliding and full attention, logit scaling, tied embeddings"),
    Recipe("Cohere2MoeForCausalLM", "parallel blocks, MoE, logit scaling, tied embeddings"),
    Recipe("CwmForCausalLM", "Transformers backend, sliding and full attention"),
    Recipe(
        "DbrxForCausalLM",
        "MoE in one fused tensor, clipped QKV",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 128},
        },
    ),
    Recipe("DeepseekV2ForCausalLM", "MLA, MoE with groups behind a dense layer", {"head_dim": None}),
    Recipe(
        "DeepseekV3ForCausalLM",
        "MLA, MoE with groups behind a dense layer",
        {"n_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    Recipe("DeepseekV32ForCausalLM", "sparse MLA", {"index_n_heads": 4, "index_head_dim": 128, "index_topk": 64}),
    hub(
        "DeepseekV4ForCausalLM",
        "deepseek_v4",
        "compressed sparse attention, hyper-connections",
        config={
            "head_dim": 512,
            "num_key_value_heads": 1,
            "q_lora_rank": 64,
            "o_lora_rank": 64,
            "o_groups": 2,
            "compress_ratios": [0, 0, 4, 128, 4, 128],
            "hc_mult": 2,
            "hc_sinkhorn_iters": 2,
            "hc_eps": 1e-6,
            "index_n_heads": 4,
            "index_head_dim": 128,
            "index_topk": 64,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "swiglu_limit": 10.0,
            "num_hash_layers": 0,
            "compress_rope_theta": 160000.0,
            "sliding_window": 16,
            "qk_rope_head_dim": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "expert_dtype": "fp32",
        },
        engine={"load_format": "dummy"},  # it fails before weights matter
    ),
    Recipe("Ernie4_5ForCausalLM", "tied embeddings", {"tie_word_embeddings": True}),
    Recipe(
        "Ernie4_5_MoeForCausalLM",
        "MoE behind a dense layer, tied embeddings",
        {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "tie_word_embeddings": True},
    ),
    Recipe("Exaone4ForCausalLM", "norms after the layers, sliding and full attention"),
    Recipe("ExaoneMoeForCausalLM", "MoE behind a dense layer, sliding and full attention"),
    Recipe("FalconForCausalLM", "parallel blocks, one KV head, tied embeddings", {"ffn_hidden_size": 512}, gain=2.0),
    Recipe(
        "FalconH1ForCausalLM",
        "every layer both Mamba-2 and attention",
        {**_MAMBA2, "mamba_rms_norm": True, "attention_out_multiplier": 0.9, "ssm_out_multiplier": 0.8},
    ),
    Recipe("FalconMambaForCausalLM", "Mamba, no attention at all"),
    Recipe("FlexOlmoForCausalLM", "Transformers backend, MoE"),
    Recipe("GPT2LMHeadModel", "learned positions, transposed weights, tied embeddings", {"tie_word_embeddings": True}),
    Recipe("GPTBigCodeForCausalLM", "Transformers backend, one KV head, learned positions, tied embeddings"),
    Recipe("GPTJForCausalLM", "parallel blocks, partial rotary, head with a bias", {"rotary_dim": 16}),
    Recipe("GPTNeoXForCausalLM", "Transformers backend, parallel blocks, partial rotary"),
    Recipe("GemmaForCausalLM", "scaled embeddings, tied", {"tie_word_embeddings": True}),
    Recipe(
        "Gemma2ForCausalLM",
        "sliding and full attention, capped logits, tied embeddings",
        {"tie_word_embeddings": True, "query_pre_attn_scalar": 32},
        gain=4.0,
        embedding_std=0.02,
    ),
    Recipe(
        "Gemma3ForCausalLM",
        "sliding and full attention with a rope of their own, tied embeddings",
        {"tie_word_embeddings": True, "query_pre_attn_scalar": 32},
        gain=4.0,
        embedding_std=0.02,
    ),
    Recipe("Gemma3nForCausalLM", "inputs for each layer, shared KV caches"),
    Recipe(
        "Gemma4ForCausalLM",
        "inputs for each layer travel along, shared KV caches, head sizes by kind of layer",
        {
            "num_hidden_layers": 8,
            "layer_types": _layers("s s f s f s s f"),
            "num_kv_shared_layers": 2,
            "enable_moe_block": False,
            "num_experts": None,
            "moe_intermediate_size": None,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "global_head_dim": 64,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 30.0,
        },
        ranges=("0-1", "1-4", "4-8"),
    ),
    Recipe("GlmForCausalLM", "Transformers backend, interleaved partial rotary"),
    Recipe("Glm4ForCausalLM", "norms before and after"),
    Recipe(
        "Glm4MoeForCausalLM",
        "MoE behind a dense layer, norms of Q and K",
        {"use_qk_norm": True, "head_dim": 32},
        ranges=EXPERTS_EVERYWHERE,
    ),
    Recipe(
        "Glm4MoeLiteForCausalLM",
        "MLA, MoE behind a dense layer",
        {"first_k_dense_replace": 1, "topk_method": "noaux_tc"},
        ranges=EXPERTS_EVERYWHERE,
    ),
    Recipe("GlmMoeDsaForCausalLM", "sparse MLA", {"index_n_heads": 4, "index_head_dim": 128, "index_topk": 64}),
    Recipe(
        "GptOssForCausalLM", "attention sinks, sliding and full attention, MoE with biases", {"intermediate_size": 64}
    ),
    Recipe("GraniteForCausalLM", "scaled embeddings, residuals and logits", _SCALED),
    Recipe(
        "GraniteSWAForCausalLM",
        "sliding and full attention, scaled, tied embeddings",
        {**_SCALED, "layer_types": _layers("s f s s f s"), "tie_word_embeddings": True},
    ),
    Recipe("GraniteMoeForCausalLM", "MoE in fused tensors, scaled", _SCALED),
    Recipe(
        "GraniteMoeSWAForCausalLM",
        "MoE with a shared expert, sliding and full attention, scaled",
        {**_SCALED, "layer_types": _layers("s f s s f s")},
    ),
    Recipe("GraniteMoeSharedForCausalLM", "MoE with a shared expert, scaled", _SCALED),
    Recipe(
        "GraniteMoeHybridForCausalLM",
        "Mamba-2 and attention, MoE, scaled",
        {**_SCALED, **_MAMBA2, "num_hidden_layers": 8, "layer_types": _layers("m a m m a a m m")},
        ranges=EIGHT_LAYERS,
    ),
    Recipe(
        "HYV3ForCausalLM",
        "MoE behind a dense layer",
        {
            "first_k_dense_replace": 1,
            "expert_hidden_dim": 64,
            "route_norm": True,
            "moe_router_use_sigmoid": True,
            "moe_router_enable_expert_bias": True,
            "qk_norm": True,
        },
        ranges=EXPERTS_EVERYWHERE,
    ),
    Recipe(
        "HYV4ForCausalLM",
        "sparse MLA, independent hyper-connections",
        {"index_n_heads": 4, "index_head_dim": 128, "index_topk": 64, "hc_mult": 2},
    ),
    Recipe("HrmTextForCausalLM", "recurrent stacks"),
    Recipe("HunYuanDenseV1ForCausalLM", "Transformers backend, norms of Q and K"),
    Recipe("HunYuanMoEV1ForCausalLM", "Transformers backend, MoE", {"num_experts": 4, "moe_topk": 2}),
    Recipe("HyperCLOVAXForCausalLM", "norms after, scaled", {**_SCALED, "use_post_norm": True}),
    Recipe("Jais2ForCausalLM", "Transformers backend, ReLU squared, biases", {"hidden_act": "relu2"}),
    Recipe(
        "JambaForCausalLM",
        "Mamba and attention, MoE in every second layer",
        {
            "num_hidden_layers": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
        },
        ranges=EIGHT_LAYERS,
    ),
    Recipe(
        "LagunaForCausalLM",
        "heads by layer, gated attention, MoE, sliding and full attention",
        {
            "num_attention_heads_per_layer": [4, 8, 4, 8, 4, 4],
            "layer_types": _layers("f s s f s s"),
            "mlp_layer_types": ["dense", *["sparse"] * 5],
        },
    ),
    Recipe(
        "Lfm2ForCausalLM",
        "short convolutions and attention, tied embeddings",
        {
            "num_hidden_layers": 8,
            "layer_types": _layers("c f c c f c f c"),
            "block_multiple_of": 32,
            "conv_dim": 128,
            "block_dim": 128,
            "tie_word_embeddings": True,
        },
        ranges=EIGHT_LAYERS,
    ),
    Recipe(
        "Lfm2MoeForCausalLM",
        "short convolutions and attention, MoE, tied embeddings",
        {
            "num_hidden_layers": 8,
            "layer_types": _layers("c f c c f c f c"),
            "conv_dim": 128,
            "tie_word_embeddings": True,
        },
        ranges=EIGHT_LAYERS,
    ),
    Recipe("LlamaForCausalLM", "the plain one"),
    Recipe(
        "Llama4ForCausalLM",
        "chunked attention, layers without rope, MoE",
        {"num_experts_per_tok": 1, "attention_chunk_size": 32},
    ),
    Recipe(
        "LongcatFlashForCausalLM",
        "two MLA sublayers in each layer, experts that do nothing",
        {
            "num_layers": 6,
            "n_routed_experts": 6,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 64,
            "qk_head_dim": 128,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
            "num_hidden_layers": 12,
        },
        drops=r"\.experts\.[67]\.",
    ),
    Recipe("MambaForCausalLM", "Mamba, no attention at all, tied embeddings", {"tie_word_embeddings": True}),
    Recipe(
        "Mamba2ForCausalLM",
        "Mamba-2, no attention at all",
        {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 32},
    ),
    Recipe("MellumForCausalLM", "Transformers backend, MoE, sliding and full attention"),
    Recipe(
        "MiMoV2FlashForCausalLM", "keys and values of different sizes, sliding and full attention, MoE, sinks", _MIMO
    ),
    Recipe(
        "MiniCPM3ForCausalLM",
        "latent attention without a latent cache, scaled, tied embeddings",
        {
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
            "dim_model_base": 64,
            "tie_word_embeddings": True,
        },
        gain=4.0,
        embedding_std=0.02,
    ),
    Recipe(
        "MiniMaxM2ForCausalLM",
        "MoE, norms over all heads",
        {"intermediate_size": 64, "rotary_dim": 16, "scoring_func": "softmax", "use_routing_bias": True},
    ),
    Recipe("Ministral3ForCausalLM", "attention scaled by position", {"sliding_window": None}),
    Recipe("MistralForCausalLM", "sliding attention"),
    Recipe("MixtralForCausalLM", "MoE", {"sliding_window": None, "intermediate_size": 64}),
    Recipe("NemotronForCausalLM", "LayerNorm plus one, partial rotary, ReLU squared"),
    Recipe(
        "NemotronHForCausalLM",
        "Mamba-2, attention and MLP as layers of their own",
        {
            "layers_block_type": _layers("m a M m a m M a m M"),
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 32,
        },
        ranges=("0-3", "3-7", "7-10"),
    ),
    Recipe(
        "OPTForCausalLM",
        "learned positions, projections in and out, tied embeddings",
        {"word_embed_proj_dim": 64, "tie_word_embeddings": True},
    ),
    Recipe("OlmoForCausalLM", "Transformers backend, norms without weights"),
    Recipe("Olmo2ForCausalLM", "Transformers backend, norms after the layers"),
    Recipe("Olmo3ForCausalLM", "Transformers backend, sliding and full attention"),
    Recipe("OlmoeForCausalLM", "MoE, norms over all heads"),
    Recipe(
        "OlmoHybridForCausalLM",
        "gated delta net and attention",
        {**_GATED_DELTA, "num_hidden_layers": 8, "layer_types": _layers("l f l l f f l l")},
        ranges=EIGHT_LAYERS,
    ),
    Recipe("PhiForCausalLM", "Transformers backend, parallel blocks, partial rotary, head with a bias"),
    Recipe("Phi3ForCausalLM", "fused weights in the checkpoint"),
    alias(
        "PhiMoEForCausalLM",
        "PhimoeForCausalLM",
        says="MoE with sparse mixing, LayerNorm, head with a bias",
        config={"lm_head_bias": True, "attention_bias": True, "intermediate_size": 64, "sliding_window": None},
    ),
    Recipe("Qwen2ForCausalLM", "biases, tied embeddings", {"tie_word_embeddings": True}),
    Recipe("Qwen2MoeForCausalLM", "MoE with a shared expert in every second layer", {"decoder_sparse_step": 2}),
    Recipe("Qwen3ForCausalLM", "norms of Q and K"),
    Recipe("Qwen3MoeForCausalLM", "MoE but for chosen layers", {"mlp_only_layers": [2]}),
    Recipe(
        "Qwen3NextForCausalLM",
        "gated delta net and gated attention, MoE",
        {**_GATED_DELTA, "num_hidden_layers": 8, "layer_types": _layers("l f l l f f l l")},
        ranges=EIGHT_LAYERS,
        engine=_BFLOAT16,
    ),
    Recipe(
        "Qwen3_5ForCausalLM",
        "gated delta net and gated attention",
        {**_GATED_DELTA, "num_hidden_layers": 8, "layer_types": _layers("l f l l f f l l")},
        ranges=EIGHT_LAYERS,
        engine=_BFLOAT16,
    ),
    Recipe(
        "Qwen3_5MoeForCausalLM",
        "gated delta net and gated attention, MoE",
        {**_GATED_DELTA, "num_hidden_layers": 8, "layer_types": _layers("l f l l f f l l")},
        ranges=EIGHT_LAYERS,
        engine=_BFLOAT16,
    ),
    Recipe(
        "Qwen4ExpForCausalLM",
        "hyper-connections, n-gram embeddings, gated delta net, MoE",
        {
            **_GATED_DELTA,
            "num_hidden_layers": 8,
            "layer_types": _layers("l f l l f f l l"),
            "hc_count": 2,
            "hc_lowrank": 16,
            "ngram_vocab_size_base": 1000,
            "ngram_size": 3,
            "heads_per_ngram": 2,
        },
        ranges=EIGHT_LAYERS,
    ),
    Recipe("SeedOssForCausalLM", "Transformers backend, biases"),
    Recipe(
        "SmolLM3ForCausalLM",
        "Transformers backend, layers without rope, tied embeddings",
        {"tie_word_embeddings": True},
    ),
    Recipe("StableLmForCausalLM", "LayerNorm, partial rotary, biases", {"use_qkv_bias": True}),
    Recipe(
        "Starcoder2ForCausalLM",
        "Transformers backend, LayerNorm, biases, tied embeddings",
        {"tie_word_embeddings": True},
    ),
    Recipe(
        "VaultGemmaForCausalLM", "Transformers backend, capped logits, tied embeddings", {"tie_word_embeddings": True}
    ),
    Recipe("Zamba2ForCausalLM", "Mamba-2 with shared attention"),
    hub(
        "KimiLinearForCausalLM",
        "kimi_linear",
        "Kimi delta attention and MLA, MoE",
        config={
            **_MLA,
            "q_lora_rank": None,
            "num_hidden_layers": 8,
            "num_experts": 8,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "mla_use_nope": True,
            "num_key_value_heads": 4,
            "linear_attn_config": {
                "kda_layers": [1, 3, 4, 7, 8],
                "full_attn_layers": [2, 5, 6],
                "head_dim": 32,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
        },
        ranges=EIGHT_LAYERS,
        engine=_OWN_BLOCKS,
    ),
    hub(
        "InklingForCausalLM",
        "inkling_model",
        "relative positions, short convolutions, MoE",
        config={
            "d_rel": 16,
            "rel_extent": 64,
            "local_layer_ids": [0, 2, 3, 5],
            "sliding_window_size": 16,
            "use_sconv": True,
            "sconv_kernel_size": 4,
            "dense_mlp_idx": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "shared_expert_sink": True,
            "num_experts_per_tok": 2,
        },
        engine={"dtype": "bfloat16"},
    ),
    alias(
        "TransformersForCausalLM", "HeliumForCausalLM", says="Transformers backend for a model that vLLM does not name"
    ),
    alias(
        "TransformersMoEForCausalLM",
        "SolarOpenForCausalLM",
        says="Transformers backend for an MoE that vLLM does not name",
    ),
)

_ALIASES = (
    alias("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"),
    alias("IQuestCoderForCausalLM", "LlamaForCausalLM", "iquestcoder"),
    alias("InternLM3ForCausalLM", "LlamaForCausalLM", "internlm3"),
    alias("LLaMAForCausalLM", "LlamaForCausalLM"),
    alias("TeleChat3ForCausalLM", "LlamaForCausalLM", "telechat3"),
    alias("MiMoForCausalLM", "Qwen2ForCausalLM", "mimo", "no norm in the model's own loop, MTP layers left out"),
    alias(
        "NemotronHPuzzleForCausalLM",
        "NemotronHForCausalLM",
        config={
            "layers_block_type": _layers("m a M m a m M a m M"),
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 32,
        },
        ranges=("0-3", "3-7", "7-10"),
    ),
    alias(
        "TeleFLMForCausalLM",
        "LlamaForCausalLM",
        "teleflm",
        "muP output scaling",
        config={"use_mup": True, "mup_scale_factor": 2.0, "output_mult": 1.5, "input_mult": 1.0},
    ),
)

_OF_HUBS = (
    hub(
        "BailingMoeForCausalLM",
        "bailing_moe",
        "MoE behind a dense layer, fused QKV",
        config=_BAILING,
        renames=_BAILING_NAMES,
    ),
    hub(
        "BailingMoeV2ForCausalLM",
        "bailing_moe_v2",
        "MoE with a router correction, norms of Q and K",
        config={
            **_BAILING,
            "use_qk_norm": True,
            "moe_router_enable_expert_bias": True,
            "score_function": "sigmoid",
            "n_group": 1,
            "topk_group": 1,
        },
        renames=_BAILING_NAMES,
    ),
    hub(
        "BailingMoeV2_5ForCausalLM",
        "bailing_hybrid",
        "linear attention and MLA, MoE",
        config={
            **_BAILING,
            **_MLA,
            "num_hidden_layers": 8,
            "layer_group_size": 2,
            "moe_router_enable_expert_bias": True,
            "score_function": "sigmoid",
            "n_group": 1,
            "topk_group": 1,
            "group_norm_size": 1,
        },
        ranges=EIGHT_LAYERS,
        renames=_BAILING_NAMES,
        engine={"block_size": 16, "enable_prefix_caching": False},
    ),
    hub(
        "BailingMoeV3ForCausalLM",
        "bailing_hybrid",
        "Kimi delta attention and MLA, MoE",
        config={
            **_BAILING,
            **_MLA,
            "num_hidden_layers": 8,
            "layer_group_size": 2,
            "n_group": 1,
            "topk_group": 1,
            "short_conv_kernel_size": 4,
            "no_kda_lora": True,
        },
        ranges=EIGHT_LAYERS,
        engine=_OWN_BLOCKS,
    ),
    *(
        hub(
            name,
            "chatglm",
            "fused weights, a decoder called encoder, interleaved partial rotary",
            config={
                "num_layers": 6,
                "padded_vocab_size": VOCAB_SIZE,
                "ffn_hidden_size": 192,
                "kv_channels": 32,
                "multi_query_attention": True,
                "multi_query_group_num": 2,
                "add_qkv_bias": True,
                "seq_length": 256,
                "num_hidden_layers": None,
                "num_key_value_heads": None,
                "head_dim": None,
                "vocab_size": None,
                "rope_ratio": 1.0,
                "original_rope": True,
            },
            renames=((r"transformer\.embedding\.weight", "transformer.embedding.word_embeddings.weight"),),
            parts={"query_key_value": (), "dense_h_to_4h": ()},
        )
        for name in ("ChatGLMModel", "ChatGLMForConditionalGeneration")
    ),
    hub(
        "DeciLMForCausalLM",
        "nemotron-nas",
        "layers without attention, layers without MLP",
        config={
            "num_hidden_layers": 6,
            "rope_theta": 10000.0,
            "block_configs": [
                {
                    "attention": {
                        "no_op": no_attention,
                        "n_heads_in_group": None if no_attention else 2,
                        "replace_with_linear": False,
                    },
                    "ffn": {"no_op": no_ffn, "ffn_mult": 1.0, "replace_with_linear": False},
                }
                for no_attention, no_ffn in (
                    (False, False),
                    (False, False),
                    (True, False),
                    (False, False),
                    (False, True),
                    (False, False),
                )
            ],
        },
        config_code="""        from types import SimpleNamespace as Space

        def spaces(value):
            return Space(**{key: spaces(item) for key, item in value.items()}) if isinstance(value, dict) else value

        self.block_configs = [spaces(block) for block in settings.get("block_configs", ())]

    def to_dict(self):
        kept, self.block_configs = self.block_configs, []
        found = super().to_dict()
        self.block_configs = kept
        return found
""",
    ),
    hub(
        "DeepseekForCausalLM",
        "deepseek",
        "MoE behind a dense layer, no latent attention",
        config={
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "norm_topk_prob": True,
            "rope_theta": 10000.0,
            "scoring_func": "softmax",
        },
    ),
    hub(
        "ExaoneForCausalLM",
        "exaone",
        "GPT-2's names",
        config={
            "activation_function": "silu",
            "layer_norm_epsilon": 1e-6,
            "rope_theta": 10000.0,
            "num_layers": 6,
            "num_hidden_layers": None,
        },
        attribute_map={"num_hidden_layers": "num_layers"},
        parts={"gate_up_proj": ("c_fc_0", "c_fc_1")},
        renames=((r"\.attn\.(?!attention)", ".attn.attention."),),
    ),
    hub(
        "InternLM2ForCausalLM",
        "internlm2",
        "fused QKV by groups",
        config={"rope_theta": 10000.0},
        parts={"gate_up_proj": ("w1", "w3"), "wqkv": ()},
    ),
    hub("IQuestLoopCoderForCausalLM", "iquestloopcoder", "layers that run twice", config={"loop_num": 2}),
    hub(
        "K2HorizonForCausalLM",
        "k2_horizon",
        "MoE, norms over all heads",
        config={
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "attention_bias": False,
            "mova_num_experts": 0,
            "mova_num_experts_per_tok": 0,
            "query_key_norm": True,
            "rope_head_dim": 32,
            "layernorm_num_groups": 1,
            "moe_gate_bias": False,
            "router_scaling_factor": 1.0,
            "router_score_func": "softmax",
            "attention_gate_func": None,
            "rope_theta": 10000.0,
        },
    ),
    hub(
        "LongcatFlashNgramForCausalLM",
        "longcat_flash_ngram",
        "n-gram embeddings, two MLA sublayers in each layer",
        config={
            **_MLA,
            "num_layers": 6,
            "num_hidden_layers": 12,
            "n_routed_experts": 6,
            "zero_expert_num": 2,
            "zero_expert_type": "identity",
            "moe_topk": 2,
            "expert_ffn_hidden_size": 64,
            "ffn_hidden_size": 192,
            "routed_scaling_factor": 1.0,
            "rope_theta": 10000.0,
            "emb_neighbor_num": 2,
            "emb_split_num": 1,
            "ngram_vocab_size_ratio": 2,
        },
    ),
    hub(
        "MiMoV2ForCausalLM",
        "mimo_v2",
        "keys and values of different sizes, sliding and full attention, MoE",
        config=_MIMO,
    ),
    hub(
        "MiniCPMForCausalLM",
        "minicpm",
        "scaled embeddings, residuals and logits, tied embeddings",
        config={
            "scale_emb": 3,
            "scale_depth": 1.4,
            "dim_model_base": 64,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        },
    ),
    hub(
        "MistralLarge3ForCausalLM",
        "deepseek_v3",
        "DeepSeek-V3 under Mistral's names",
        config={
            **_MLA,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "head_dim": None,
            "num_key_value_heads": 4,
        },
        renames=(
            (r"^model\.norm\.", "norm."),
            (r"^lm_head\.", "output."),
            (r"^model\.embed_tokens", "tok_embeddings"),
            (r"^model\.", ""),
            (r"\.input_layernorm\.", ".attention_norm."),
            (r"\.post_attention_layernorm\.", ".ffn_norm."),
            (r"\.self_attn\.q_a_proj", ".attention.wq_a"),
            (r"\.self_attn\.q_b_proj", ".attention.wq_b"),
            (r"\.self_attn\.q_a_layernorm", ".attention.q_a_norm"),
            (r"\.self_attn\.kv_a_proj_with_mqa", ".attention.wkv_a_with_mqa"),
            (r"\.self_attn\.kv_a_layernorm", ".attention.kv_a_norm"),
            (r"\.self_attn\.kv_b_proj", ".attention.wkv_b"),
            (r"\.self_attn\.o_proj", ".attention.wo"),
            (r"\.mlp\.gate\.", ".gate."),
            (r"\.mlp\.(shared_experts|experts\.\d+)\.", r".\1."),
            (r"\.mlp\.", ".feed_forward."),
            (r"\.gate_proj\.", ".w1."),
            (r"\.down_proj\.", ".w2."),
            (r"\.up_proj\.", ".w3."),
        ),
    ),
    hub("MiniMaxM3SparseForCausalLM", "minimax_m3_text", "block-sparse attention, MoE"),
    Recipe(
        "NanbeigeForCausalLM",
        "Transformers backend",
        impossible="its code is on the hub only, and the backend runs that code",
    ),
    hub(
        "OrionForCausalLM",
        "orion",
        "LayerNorm with biases",
        config={"rope_theta": 10000.0},
        gain=2.5,
        embedding_std=0.02,
        seed=5,
    ),
    hub(
        "PanguEmbeddedForCausalLM", "PanguEmbedded", "biases in attention", config={"bias": True, "rope_theta": 10000.0}
    ),
    hub(
        "PanguUltraMoEForCausalLM",
        "pangu_ultra_moe",
        "MLA, MoE, sandwich norms",
        config={
            **_MLA,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "sandwich_norm": True,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "rope_theta": 10000.0,
            "routed_scaling_factor": 1.0,
            "router_enable_expert_bias": False,
            "head_dim": None,
            "num_key_value_heads": 4,
            "torch_dtype": "float32",
        },
        ranges=EXPERTS_EVERYWHERE,
    ),
    hub(
        "PanguProMoEV2ForCausalLM",
        "PanguProMoE",
        "attention with learned sinks, MoE, sandwich norms",
        config={
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "sandwich_norm": True,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "rope_theta": 10000.0,
            "routed_scaling_factor": 1.0,
            "router_enable_expert_bias": True,
            "bias": False,
            "head_dim": 32,
            "param_sink_number": 0,
            "torch_dtype": "float32",
        },
        renames=((r"\.mlp\.gate\.e_score", ".mlp.e_score"),),
        ranges=EXPERTS_EVERYWHERE,
    ),
    hub(
        "Param2MoEForCausalLM",
        "param2moe",
        "MoE with a router correction, fused QKV, norms of Q and K",
        config={
            **_BAILING,
            "use_qk_norm": True,
            "score_function": "sigmoid",
            "rope_scaling": None,
            "n_group": 1,
            "topk_group": 1,
        },
        ranges=EXPERTS_EVERYWHERE,
        parts={"qkv_proj": ()},
        renames=(
            (r"model\.embed_tokens", "model.word_embeddings"),
            (r"\.self_attn\.qkv_proj", ".attention.query_key_value"),
            (r"\.self_attn\.o_proj", ".attention.dense"),
            (r"\.self_attn\.q_layernorm", ".attention.query_layernorm"),
            (r"\.self_attn\.k_layernorm", ".attention.key_layernorm"),
            (r"\.mlp\.gate\.e_score_correction_bias", ".mlp.gate.expert_bias"),
        ),
    ),
    hub(
        "Plamo3ForCausalLM",
        "plamo3",
        "norms before and after with offsets, sliding and full attention, fused weights",
        config={
            "interleaved_sliding_window": [16, None, 16, 16, None, 16],
            "rope_theta": 10000.0,
            "layer_types": _layers("s f s s f s"),
            "rope_local_theta": 10000.0,
            "window_size": 16,
        },
        parts={"qkv_proj": (), "gate_up_proj": ()},
        renames=((r"^model\.layers\.(?!layers)", "model.layers.layers."), (r"layers\.layers\.layers", "layers.layers")),
    ),
    hub(
        "Rnj1ForCausalLM",
        "rnj1",
        "norms before and after, capped logits",
        config={
            "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 32,
            "layer_types": _layers("f f f f f f"),
            "sliding_window": 16,
            "attention_bias": False,
            "rope_theta": 10000.0,
        },
    ),
    hub(
        "SarvamMoEForCausalLM",
        "sarvam_moe",
        "MoE with a router correction, fused QKV",
        config={
            **_BAILING,
            "use_qk_norm": True,
            "moe_router_enable_expert_bias": True,
            "score_function": "sigmoid",
            "n_group": 1,
            "topk_group": 1,
        },
        renames=_BAILING_NAMES,
    ),
    hub(
        "SarvamMLAForCausalLM",
        "sarvam_mla",
        "MLA, MoE with a router correction",
        config={
            **_MLA,
            **_BAILING,
            "moe_router_enable_expert_bias": True,
            "score_function": "sigmoid",
            "rope_parameters": {
                "rope_type": "deepseek_yarn",
                "rope_theta": 10000.0,
                "factor": 1.0,
                "original_max_position_embeddings": 256,
            },
            "head_dim": 576,
            "num_key_value_heads": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
        },
        ranges=EXPERTS_EVERYWHERE,
    ),
    hub(
        "SolarForCausalLM",
        "solar",
        "skip connections over several layers",
        config={
            "rope_theta": 10000.0,
            "num_hidden_layers": 8,
            "bskcn_1": [2],
            "bskcn_2": [5],
            "bskcn_3": [4],
            "bskcn_4": [7],
            "bskcn_tv": [0.9, 0.8],
        },
        ranges=("0-2", "2-5", "5-8"),
    ),
    hub("Step1ForCausalLM", "step1", "ALiBi", config={"num_attention_groups": 2}),
    hub(
        "Step3TextForCausalLM",
        "step3_text",
        "attention with factored queries, MoE",
        config={
            "share_expert_dim": 64,
            "share_q_dim": 64,
            "head_dim": 32,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "moe_intermediate_size": 64,
            "moe_layers_enum": "1,2,3,4,5",
            "norm_expert_weight": True,
            "max_position_embedding": 256,
            "max_seq_len": 256,
            "num_attention_groups": 1,
            "rope_theta": 10000.0,
        },
        parts={"qkv_proj": ("q_proj", "k_proj", "v_proj")},
        experts_are_stacked=True,
    ),
    hub(
        "Step3p5ForCausalLM",
        "step3p5",
        "sliding and full attention, gates by head, MoE",
        config={
            "share_expert_dim": 64,
            "head_dim": 32,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "moe_intermediate_size": 64,
            "moe_layers_enum": "1,2,3,4,5",
            "norm_expert_weight": True,
            "max_seq_len": 256,
            "num_attention_groups": 2,
            "rope_theta": 10000.0,
            "moe_router_activation": "softmax",
            "use_head_wise_attn_gate": True,
            "layer_types": _layers("f s s f s s"),
            "sliding_window": 16,
        },
        ranges=EXPERTS_EVERYWHERE,
        renames=((r"\.moe\.share_expert\.", ".share_expert."),),
        experts_are_stacked=True,
    ),
    hub(
        "TeleChat2ForCausalLM",
        "telechat",
        "keys and values interleaved by head",
        config={
            "n_head": 4,
            "n_layer": 6,
            "num_key_value_heads": 4,
            "head_dim": None,
            "ffn_hidden_size": 192,
            "layer_norm_epsilon": 1e-6,
            "rope_theta": 10000.0,
            "seq_length": 256,
            "mlp_bias": False,
        },
        parts={"qkv_proj": ("query", "key_value")},
        renames=(
            (r"^model\.", "transformer."),
            (r"\.layers\.", ".h."),
            (r"\.self_attn\.", ".self_attention."),
            (r"\.embed_tokens\.", ".word_embeddings."),
            (r"\.o_proj\.", ".dense."),
            (r"transformer\.norm\.", "transformer.ln_f."),
        ),
    ),
    hub("Glm5NextForCausalLM", "glm5_next_text", "sparse MLA, hyper-connections, linear attention"),
)

RECIPES: dict[str, Recipe] = {recipe.architecture: recipe for recipe in (*_OF_TRANSFORMERS, *_ALIASES, *_OF_HUBS)}


def recipe_for(architecture: str) -> Recipe | None:
    return RECIPES.get(architecture)
