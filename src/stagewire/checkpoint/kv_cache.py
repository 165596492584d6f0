"""What each layer keeps of a request (KV cache, constant state, another layer's cache), and which splits that allows.

Computed from config.json alone; pure. Stock vLLM forces four rules on a split:

- A stage needs a layer of every kind that the model has. A process derives block size, layout and order of rows from
  the kinds of its layers, and the stages must agree on them.
- Layers that share a cache must be in one process, because vLLM looks the cache up by the layer's name.
- The ends of a skip connection (Solar) must be in one process, because the model keeps it in a variable of its own.
- Some models with experts cannot be built from dense layers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Any

from stagewire.checkpoint.model_config import language_settings, shape_of
from stagewire.errors import ConfigError
from stagewire.plan.balance import best_split, most_stages, nearest_split
from stagewire.plan.ranges import LayerRange, ranges_line, repairs, split_evenly

__all__ = [
    "Kind",
    "KvLayer",
    "KvLayout",
    "advise_split",
    "check_kv",
    "check_own_kv",
    "find_kv_problems",
    "fitting_split",
    "most_even_split",
    "read_layout",
]


class Kind(Flag):
    """What a layer keeps. Layers of Zamba2 and Falcon-H1 keep both, MLP layers of Nemotron-H nothing."""

    NOTHING = 0
    ATTENTION = auto()
    STATE = auto()


_BOTH = Kind.ATTENTION | Kind.STATE
_KIND_NAMES = {Kind.ATTENTION: "KV cache", Kind.STATE: "Mamba, linear attention or convolution"}

# The words in layer_types, layers_block_type and hybrid_override_pattern: transformers' ALLOWED_ATTN_LAYER_TYPES with
# the legacy names that it translates (configuration_utils.py), and vLLM's _ATTENTION_LAYER_TYPES
# (vllm/config/model.py).
_WORDS_OF_KIND = {
    Kind.ATTENTION: """attention full_attention sliding_attention chunked_attention indexed_attention
        deepseek_sparse_attention qwen_sparse_attention compressed_sparse_attention heavily_compressed_attention
        minimax_m3_sparse *""",
    Kind.STATE: "mamba mamba2 linear_attention conv M",
    _BOTH: "hybrid hybrid_sliding",
    Kind.NOTHING: "mlp moe - E",
}
_KIND_OF_WORD = {word: kind for kind, words in _WORDS_OF_KIND.items() for word in words.split()}
_MODEL_TYPES = {
    "states only": "mamba mamba2 falcon_mamba",
    "every fourth": """qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text glm5_next
        glm5_next_text olmo_hybrid""",
    # One KV head unless config.json says otherwise.
    "multi-query": "falcon RefinedWeb RefinedWebModel gpt_bigcode",
    # One latent vector per token: vLLM's is_deepseek_mla (model_arch_config_convertor.py) without the drafters.
    "MLA": """axk1 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 deepseek_v41 dots3_note glm5_next glm5_next_text
        glm_moe_dsa glm4_moe_lite kimi_k2 kimi_linear longcat_flash pangu_ultra_moe bailing_hybrid hy_v4""",
    # vLLM's classes of these raise when the layers of a process have no experts.
    "experts": """afmoe glm4_moe glm4_moe_lite hy_v3 pangu_ultra_moe PanguProMoE param2moe qwen3_moe qwen3_next
        sarvam_mla step3p5""",
}
_STATE_ONLY_TYPES, _EVERY_FOURTH, _MULTI_QUERY_TYPES, _MLA_TYPES, _EXPERT_TYPES = (
    frozenset(types.split()) for types in _MODEL_TYPES.values()
)
# Keys of models whose caches the formula does not fit: an index for sparse attention, compressed or per-kind heads.
_OTHER_SHAPES = (
    *("index_topk", "indexer_n_heads", "compress_ratios", "sparse_attention_config", "swa_head_dim"),
    *("swa_num_key_value_heads", "local_layer_ids", "is_encoder_decoder"),
)
# The order is that of vLLM's get_total_num_kv_heads. Without any of them, there are as many as attention heads.
_KV_HEADS_KEYS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
_HEADS_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model")
_HEAD_DIM_KEYS = ("head_dim", "hidden_size_per_head", "attention_head_dim")


@dataclass(frozen=True)
class KvLayer:
    """What one layer keeps. ``shares``: the earlier layer whose cache it uses.

    ``elements_per_token``: how many numbers it caches per token, keys and values together; 0 for a layer that shares or
    has no attention; ``None`` when not known.
    """

    kind: Kind
    shares: int | None
    elements_per_token: int | None


@dataclass(frozen=True)
class KvLayout:
    """Every layer of a model. ``unknown``: why the size of its KV cache is not known, ``None`` when it is known.

    ``skips``: pairs of layers; the model keeps the hidden states before the first and uses them before the second.
    ``experts``: the layers with experts, if every stage needs one; else ``None``.
    """

    layers: tuple[KvLayer, ...]
    unknown: str | None
    skips: tuple[tuple[int, int], ...] = ()
    experts: frozenset[int] | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of which every stage needs a layer."""
        return tuple(kind for kind in _KIND_NAMES if any(kind in layer.kind for layer in self.layers))

    def of_kind(self, kind: Kind) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if kind in layer.kind]

    def cut_sharers(self, boundary: int) -> list[int]:
        """The layers from ``boundary`` on that use the cache of a layer before it."""
        return [i for i, layer in enumerate(self.layers) if layer.shares is not None and layer.shares < boundary <= i]

    def cut_skips(self, boundary: int) -> list[tuple[int, int]]:
        return [skip for skip in self.skips if skip[0] < boundary <= skip[1]]

    def rule(self) -> Callable[[int, int], bool]:
        """A function that says in constant time whether one stage may own layers ``start`` to ``end - 1``."""
        counts = [_running([kind in layer.kind for layer in self.layers]) for kind in self.kinds]
        boundaries = range(len(self.layers) + 1)
        can_cut = [not self.cut_sharers(boundary) and not self.cut_skips(boundary) for boundary in boundaries]

        if self.experts is not None:
            counts.append(_running([i in self.experts for i in range(len(self.layers))]))

        def allowed(start: int, end: int) -> bool:
            return can_cut[start] and can_cut[end] and all(count[end] > count[start] for count in counts)

        return allowed


def read_layout(config: Mapping[str, Any]) -> KvLayout:
    """The layers that a parsed config.json describes. Raises ``ConfigError`` when it does not name the depth."""
    model = _read_model(config)
    kinds = _read_kinds(model)
    targets = _read_targets(model)
    unknown = _why_unknown(model, kinds)
    counts = [0 if i in targets else _count_elements(model, kind, i) for i, kind in enumerate(kinds)]
    if unknown is None and None in counts:
        unknown = "config.json does not name heads and head size as other models do"
    layers = tuple(
        # An unknown word is no reason to refuse a split. Then every layer counts as both kinds.
        KvLayer(_BOTH if kind is None or None in kinds else kind, targets.get(i), None if unknown else counts[i])
        for i, kind in enumerate(kinds)
    )
    return KvLayout(layers, unknown, _read_skips(model), _read_experts(model))


def check_own_kv(config: Mapping[str, Any], layers: LayerRange) -> list[str]:
    """The problems of one stage's range, as far as that stage can tell; empty when there are none."""
    layout = read_layout(config)
    own = {_describe(layers): layers}
    return [*_missing_kinds(layout, own), *_missing_experts(layout, own), *_cuts(layout, own)]


def find_kv_problems(layout: KvLayout, ranges: Sequence[LayerRange]) -> list[str]:
    """The problems of a split: stages without a kind of layer or without experts, and boundaries that cut layers apart
    that share a cache or are ends of a skip connection.
    """
    stages = {f"stage {stage} with {_describe(layers)}": layers for stage, layers in enumerate(ranges)}
    return [*_missing_kinds(layout, stages), *_missing_experts(layout, stages), *_cuts(layout, stages)]


def fitting_split(layout: KvLayout, ranges: Sequence[LayerRange]) -> tuple[str, tuple[LayerRange, ...]] | None:
    """The valid split into as many stages that keeps most of ``ranges``, after words for what was kept.

    ``None`` when the model cannot be split into so many stages.
    """
    valid = list(repairs(ranges, len(layout.layers)))
    for kept, split in valid[:-1]:  # the last is the even one
        if not find_kv_problems(layout, split):
            return kept, split
    return _repair_kv(layout, valid[0][1]) if valid else None


def _repair_kv(layout: KvLayout, split: Sequence[LayerRange]) -> tuple[str, tuple[LayerRange, ...]] | None:
    """Moves chosen boundaries as little as possible. For an even split, returns the most even split that works."""
    num_layers, count = len(layout.layers), len(split)
    if tuple(split) == split_evenly(num_layers, count):
        found = most_even_split(layout, count)
        kept = "An even split" if found == tuple(split) else "The most even split that works"
    else:
        kept, found = "The nearest split that works", nearest_split(split, layout.rule())
    return None if found is None else (kept, found)


def most_even_split(layout: KvLayout, num_stages: int) -> tuple[LayerRange, ...] | None:
    """vLLM's own split if the layout allows it, else the allowed one whose largest stage is smallest.

    ``None`` when the layout allows no split into so many stages.
    """
    return best_split(len(layout.layers), num_stages, lambda stage, start, end: end - start, layout.rule())


def check_kv(layout: KvLayout, ranges: Sequence[LayerRange]) -> None:
    """Raises ``ConfigError`` with all of ``find_kv_problems`` and, if there is one, a split that works."""
    problems = find_kv_problems(layout, ranges)
    if not problems:
        return
    split = ", ".join(map(str, ranges))
    lines = [f"  - {problem}" for problem in problems]
    raise ConfigError("\n".join([f"this model cannot be split as {split}:", *lines, advise_split(layout, ranges)[0]]))


def advise_split(layout: KvLayout, ranges: Sequence[LayerRange]) -> tuple[str, tuple[LayerRange, ...] | None]:
    """What to give instead of ``ranges``: a line with ranges to paste, and those ranges.

    When so many stages are not possible, the line names the largest possible number with its ranges, and the second
    value is ``None``.
    """
    found = fitting_split(layout, ranges)
    if found is not None:
        return f"{found[0]}: {ranges_line(found[1])}", found[1]
    most = most_stages(len(layout.layers), layout.rule())
    largest = most_even_split(layout, most)
    example = f": {ranges_line(largest)}" if largest else ""
    return f"{len(ranges)} stages are not possible, {most} at most{example}", None


def _missing_kinds(layout: KvLayout, stages: Mapping[str, LayerRange]) -> Iterator[str]:
    """One problem for each kind, with every one of ``stages`` (names and ranges) that lacks it."""
    for kind in layout.kinds:
        of_kind = layout.of_kind(kind)
        lacking = [
            name
            for name, layers in stages.items()
            if layers.start < len(layout.layers) and not any(layer in layers for layer in of_kind)
        ]
        if lacking:
            needed = " and a ".join(f"{_KIND_NAMES[each]} layer" for each in layout.kinds)
            yield (
                f"{', '.join(lacking)}: no {_KIND_NAMES[kind]} layer, those are {_list_layers(of_kind)}; each stage "
                f"needs a {needed}, because vLLM takes block size and row order from the layers that a process holds"
            )


def _missing_experts(layout: KvLayout, stages: Mapping[str, LayerRange]) -> Iterator[str]:
    if layout.experts is None:
        return
    lacking = [
        name
        for name, layers in stages.items()
        if layers.start < len(layout.layers) and not any(layer in layers for layer in layout.experts)
    ]
    if lacking:
        yield (
            f"{', '.join(lacking)}: no layer with experts, those are {_list_layers(sorted(layout.experts))}; vLLM's "
            "model cannot be built without one"
        )


def _cuts(layout: KvLayout, stages: Mapping[str, LayerRange]) -> Iterator[str]:
    """One problem for each group of layers that a boundary cuts apart.

    The message names the stage that starts at the boundary, or else the stage that ends there.
    """
    ends = {layers.end: f"{name}: the end {layers.end}" for name, layers in stages.items()}
    starts = {layers.start: f"{name}: the start {layers.start}" for name, layers in stages.items()}
    for boundary, name in sorted((ends | starts).items()):
        sharers = layout.cut_sharers(boundary)
        if sharers:
            targets = sorted({target for i in sharers if (target := layout.layers[i].shares) is not None})
            yield (
                f"{name} cuts layers that share a KV cache: {_list_layers(sharers)} use the cache of "
                f"{_list_layers(targets)}, which vLLM looks for in the same process"
            )
        for first, last in layout.cut_skips(boundary):
            yield (
                f"{name} cuts a skip connection: layer {last} uses what layer {first} was given, and vLLM's model "
                "keeps that in its own process"
            )


def _describe(layers: LayerRange) -> str:
    return f"layers [{layers.start}, {layers.end})"


def _list_layers(layers: Sequence[int]) -> str:
    """``3, 7, 11``; consecutive ones joined, ``0 to 5``."""
    starts = [layer for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer - 1]
    ends = [layer for i, layer in enumerate(layers) if i == len(layers) - 1 or layers[i + 1] != layer + 1]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def _running(flags: Sequence[bool]) -> list[int]:
    counts = [0]
    for flag in flags:
        counts.append(counts[-1] + flag)
    return counts


@dataclass(frozen=True)
class _Model:
    """``words``: one for the kind of each layer, if config.json has them. ``types``: model_type of each section."""

    settings: Mapping[str, Any]
    types: frozenset[str]
    words: tuple[str, ...] | None
    num_layers: int
    architectures: tuple[str, ...]

    @property
    def is_gemma3n(self) -> bool:
        return bool(self.types & {"gemma3n", "gemma3n_text"})

    @property
    def is_gemma4(self) -> bool:
        return any(name.startswith("gemma4") for name in self.types)

    def count(self, *keys: str, default: int | None = None) -> int | None:
        """The first of these settings that is set, else ``default``. ``None`` if that is no positive whole number."""
        return _first_count(self.settings, keys, default)


def _read_model(config: Mapping[str, Any]) -> _Model:
    settings = language_settings(config)
    shape = shape_of(config)
    types = frozenset(str(section.get("model_type")) for section in (config, settings))
    words = _layer_words(settings, shape.num_layers)
    return _Model(settings, types, words, shape.num_layers, shape.architectures)


def _layer_words(settings: Mapping[str, Any], num_layers: int) -> tuple[str, ...] | None:
    """The word of each layer. A longer list (Step-3.5) ends with drafting layers, which are left out."""
    for key in ("layers_block_type", "layer_types", "hybrid_override_pattern"):
        words = settings.get(key)
        if isinstance(words, list | str) and len(words) >= num_layers:
            return tuple(str(word) for word in words[:num_layers])
    return None


def _read_kinds(model: _Model) -> list[Kind | None]:
    """The kind of each layer; ``None`` for a word that is not known."""
    if model.types & _STATE_ONLY_TYPES:
        return [Kind.STATE] * model.num_layers
    if "falcon_h1" in model.types:
        return [_BOTH] * model.num_layers
    if model.words is not None:
        return [_KIND_OF_WORD.get(word) for word in model.words]
    if (blocks := _searched_blocks(model)) is not None:
        return [Kind.NOTHING if _skips_attention(block) else Kind.ATTENTION for block in blocks]
    has_attention = _attention_rule(model)
    return [Kind.ATTENTION if has_attention(i) else Kind.STATE for i in range(model.num_layers)]


def _attention_rule(model: _Model) -> Callable[[int], bool]:
    """Whether a layer has attention, by the rule in config.json or the default of the model's class.

    Sources: each model's config class in transformers; bailing_moe_linear.py and bailing_moe_v3.py in vLLM.
    """
    linear = model.settings.get("linear_attn_config")
    if isinstance(linear, dict) and isinstance(linear.get("kda_layers"), list):
        kda_layers = frozenset(linear["kda_layers"])  # counted from 1
        return lambda i: i + 1 not in kda_layers
    attn_types = model.settings.get("attn_type_list")
    if isinstance(attn_types, list) and len(attn_types) >= model.num_layers:  # MiniMax-Text-01
        return lambda i: bool(attn_types[i] == 1)
    for key in ("full_attn_idxs", "attn_layer_indices"):  # LFM2, Bamba
        if isinstance(model.settings.get(key), list):
            return frozenset(model.settings[key]).__contains__
    if "jamba" in model.types or model.count("attn_layer_period"):
        period, offset = model.count("attn_layer_period", default=8), model.settings.get("attn_layer_offset", 4)
        return lambda i: i % (period or 1) == offset
    if group := model.count("layer_group_size"):  # Bailing
        # Version 3 has full attention in the layers after the last whole group.
        is_v3 = any("BailingMoeV3" in name for name in model.architectures)
        grouped = model.num_layers // group * group if is_v3 else model.num_layers
        return lambda i: (i + 1) % group == 0 or i >= grouped
    if interval := model.count("full_attention_interval", default=4 if model.types & _EVERY_FOURTH else None):
        return lambda i: (i + 1) % interval == 0
    has_only_states = "granitemoehybrid" in model.types
    return lambda i: not has_only_states


def _searched_blocks(model: _Model) -> list[Any] | None:
    """The blocks of Nemotron-NAS, where an architecture search chose each layer's attention; ``None`` elsewhere."""
    blocks = model.settings.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) < model.num_layers:
        return None
    are_complete = all(isinstance(block, dict) and isinstance(block.get("attention"), dict) for block in blocks)
    return blocks[: model.num_layers] if are_complete else None


def _skips_attention(block: Mapping[str, Any]) -> bool:
    return bool(block["attention"].get("no_op") or block["attention"].get("replace_with_linear"))


def _read_targets(model: _Model) -> dict[int, int]:
    """For each layer that uses another layer's cache, that layer (gemma3n.py and gemma4.py in vLLM's models)."""
    if not (model.is_gemma3n or model.is_gemma4):
        return {}
    first = model.num_layers - (model.count("num_kv_shared_layers", default=15 if model.is_gemma3n else None) or 0)
    if not 0 < first < model.num_layers:
        return {}
    words = _gemma_words(model)
    if model.is_gemma3n:
        targets = {i: first - (2 if words[i] == "sliding_attention" else 1) for i in range(first, model.num_layers)}
        return {i: target for i, target in targets.items() if target >= 0}
    last_of_word = {word: i for i, word in enumerate(words[:first])}
    return {i: last_of_word[words[i]] for i in range(first, model.num_layers) if words[i] in last_of_word}


def _read_skips(model: _Model) -> tuple[tuple[int, int], ...]:
    """Solar's block skip connections (solar.py in vLLM's models).

    The model keeps the hidden states before the layers of bskcn_1 and uses them before those of bskcn_3, likewise for
    bskcn_2 and bskcn_4.
    """
    pairs = []
    for kept_key, used_key in (("bskcn_1", "bskcn_3"), ("bskcn_2", "bskcn_4")):
        kept, used = model.settings.get(kept_key), model.settings.get(used_key)
        if isinstance(kept, list) and isinstance(used, list):
            found = ((max((i for i in kept if i <= layer), default=layer), layer) for layer in used)
            pairs += [(first, last) for first, last in found if first < last < model.num_layers]
    return tuple(sorted(pairs))


def _read_experts(model: _Model) -> frozenset[int] | None:
    """The layers with experts, as vLLM's models read it; ``None`` if a stage needs none."""
    if not model.types & _EXPERT_TYPES:
        return None
    settings, layers = model.settings, range(model.num_layers)
    if isinstance(words := settings.get("mlp_layer_types"), list) and len(words) >= model.num_layers:
        return frozenset(i for i in layers if words[i] == "sparse")
    if isinstance(chosen := settings.get("moe_layers_enum"), str):
        return frozenset(int(i) for i in chosen.split(",") if i.strip().isdecimal()) & frozenset(layers)
    dense = settings.get("mlp_only_layers") or ()
    step = model.count("decoder_sparse_step", default=1) or 1
    first = model.count("first_k_dense_replace", "num_dense_layers", default=1 if "step3p5" in model.types else 0) or 0
    found = frozenset(i for i in layers if i >= first and i not in dense and (i + 1) % step == 0)
    return found or None


def _gemma_words(model: _Model) -> tuple[str, ...]:
    """The word of each layer, with the defaults of Gemma's config classes.

    Gemma 4's last layer has full attention, whatever config.json says.
    """
    period = 5 if model.is_gemma3n else 6
    defaults = ("sliding_attention" if (i + 1) % period else "full_attention" for i in range(model.num_layers))
    words = model.words or tuple(defaults)
    return words if model.is_gemma3n else (*words[:-1], "full_attention")


def _why_unknown(model: _Model, kinds: Sequence[Kind | None]) -> str | None:
    if None in kinds:
        return "config.json names a kind of layer that is not known here"
    for key in _OTHER_SHAPES:
        if model.settings.get(key):
            return f"config.json has {key}: caches of another shape"
    is_mla = bool(model.types & _MLA_TYPES)
    if model.settings.get("kv_lora_rank") is not None and not is_mla:
        return "config.json has kv_lora_rank, but vLLM does not run this type of model with MLA"
    value_dim = model.settings.get("v_head_dim")
    if value_dim is not None and not is_mla and value_dim != model.settings.get("head_dim"):
        return "config.json has a v_head_dim: keys and values of different sizes"
    return None


def _count_elements(model: _Model, kind: Kind | None, layer: int) -> int | None:
    """2 * KV heads * head size, or the size of MLA's latent vector. Sliding layers count as full ones."""
    if kind is None or Kind.ATTENTION not in kind:
        return 0
    if model.types & _MLA_TYPES and (rank := model.count("kv_lora_rank")) is not None:
        sublayers = 2 if any(name.startswith("longcat_flash") for name in model.types) else 1
        return sublayers * (rank + (model.count("qk_rope_head_dim") or 0))
    own = replace(model, settings={**model.settings, **_layer_overrides(model, layer)})
    kv_heads, head_dim = _kv_heads(own, layer), _head_dim(own)
    return None if kv_heads is None or head_dim is None else 2 * kv_heads * head_dim


def _layer_overrides(model: _Model, layer: int) -> Mapping[str, Any]:
    """The settings that config.json has for one layer alone.

    transformers 5 writes them as per_layer_config ("05": {...}). Older Gemma 4 checkpoints have global_head_dim, for
    the layers with full attention.
    """
    written = model.settings.get("per_layer_config")
    if isinstance(written, dict):
        own = (value for key, value in written.items() if str(key).isdecimal() and int(key) == layer)
        return next((value for value in own if isinstance(value, dict)), {})
    if not model.is_gemma4 or _gemma_words(model)[layer] != "full_attention":
        return {}
    heads = model.count("num_global_key_value_heads") if model.settings.get("attention_k_eq_v") else None
    return {"head_dim": model.count("global_head_dim", default=512)} | ({"num_key_value_heads": heads} if heads else {})


def _kv_heads(model: _Model, layer: int) -> int | None:
    has_one = model.settings.get("multi_query", True) and not model.settings.get("new_decoder_architecture")
    if has_one and model.types & _MULTI_QUERY_TYPES:
        return 1
    if isinstance(dbrx := model.settings.get("attn_config"), dict) and (heads := _first_count(dbrx, ("kv_n_heads",))):
        return heads
    heads = model.count(*_HEADS_KEYS)
    if (blocks := _searched_blocks(model)) is not None and heads is not None:
        group = _first_count(blocks[layer]["attention"], ("n_heads_in_group",))
        return None if group is None else heads // group
    return model.count(*_KV_HEADS_KEYS, *_HEADS_KEYS)


def _head_dim(model: _Model) -> int | None:
    named = model.count(*_HEAD_DIM_KEYS)
    heads, hidden = model.count(*_HEADS_KEYS), model.count(*_HIDDEN_KEYS)
    if named is not None or heads is None or hidden is None:
        return named
    # Zamba2's attention reads the layer's input and the embedding side by side.
    return (2 if "zamba2" in model.types else 1) * hidden // heads


def _first_count(settings: Mapping[str, Any], keys: Sequence[str], default: int | None = None) -> int | None:
    value = next((settings[key] for key in keys if settings.get(key)), default)
    return value if type(value) is int and value > 0 else None
