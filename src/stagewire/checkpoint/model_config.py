"""What Stagewire needs to know of a model before vLLM is asked: its depth and its ends. Reads config.json only.

Must not import transformers: the validator runs on machines without it, and a custom config class is remote code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagewire.errors import ConfigError

__all__ = ["CONFIG_NAME", "ModelShape", "language_settings", "read_config", "read_model_shape", "shape_of"]

CONFIG_NAME = "config.json"

# Where multimodal models keep the language model's settings: text_config, decoder and generator are transformers'
# get_text_config(), llm_config is vLLM's own alias for it, the others are the models' own (DeepSeek-VL2, Qwen-Omni).
_TEXT_CONFIG_KEYS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator")
# transformers' own name first, then those its attribute_map translates for decoders (GPT-2, MPT and DBRX, GPT-Neo).
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# LongCat's num_hidden_layers counts attention sublayers, two per decoder layer (vLLM's model_arch_config_convertor.py).
_DEPTH_KEYS_OF_TYPE = {"longcat_flash": ("num_layers",), "longcat_flash_ngram": ("num_layers",)}
# Nemotron-H has one layer per entry of its pattern, and transformers ignores num_hidden_layers beside it; since 5 it
# leaves that number out of config.json and writes the pattern as a list (configuration_nemotron_h.py).
_PATTERN_KEYS_OF_TYPE = {"nemotron_h": ("layers_block_type", "hybrid_override_pattern")}
_MAX_NESTING = 3


@dataclass(frozen=True)
class ModelShape:
    """``num_layers``: decoder layers, as vLLM's ``get_total_num_hidden_layers`` counts them.

    ``tie_word_embeddings`` is config.json's setting, not the fact: vLLM ignores it when the checkpoint holds a head of
    its own (``ownership.shares_embedding``). Where config.json is silent it is True. Transformers before 5 left the
    setting out when it was True; since 5 the default differs by class, and True is the safe guess: of an untied model
    the head is in the checkpoint. Only the top level counts: for multimodal models vLLM overwrites the nested value
    with it (``VllmConfig.with_hf_config``), so a nested False next to no top-level value proves nothing.
    ``torch_dtype`` is config.json's spelling ("bfloat16"), ``None`` when absent.
    """

    num_layers: int
    tie_word_embeddings: bool
    architectures: tuple[str, ...]
    torch_dtype: str | None


def read_model_shape(model_dir: Path) -> ModelShape:
    """Raises ``ConfigError`` when the folder or config.json is missing or malformed, or names no depth."""
    return shape_of(read_config(model_dir), model_dir / CONFIG_NAME)


def shape_of(config: Mapping[str, Any], path: Path | str = CONFIG_NAME) -> ModelShape:
    """The shape that a parsed config.json describes; ``path`` is for messages. Raises ``ConfigError`` for no depth."""
    sections = [config, *_text_sections(config)]
    tied, architectures = config.get("tie_word_embeddings"), config.get("architectures")
    return ModelShape(
        num_layers=_read_depth(sections, path),
        tie_word_embeddings=True if tied is None else bool(tied),
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        torch_dtype=_read_dtype(sections),
    )


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json of a model's folder. Raises ``ConfigError`` when there is none, or it is not a JSON object."""
    path = model_dir / CONFIG_NAME
    if not model_dir.is_dir():
        raise ConfigError(
            f"model folder {model_dir} does not exist or is not a folder; "
            "expected a local HuggingFace checkpoint (a folder with config.json)"
        )
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; expected a checkpoint in HuggingFace format") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); is the download complete?") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(config).__name__}")
    return config


def language_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings; ``None`` counts as absent.

    Those of the innermost section that names its attention heads, as vLLM takes a nested config whole or not at all
    (``get_hf_text_config``): top-level numbers may be of another part. Without such a section, all of them in one.
    """
    sections = [_present(section) for section in (config, *_text_sections(config))]
    whole = next((section for section in reversed(sections) if "num_attention_heads" in section), None)
    return whole or {key: value for section in sections for key, value in section.items()}


def _present(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def _text_sections(config: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The language model's nested sections, outermost first."""
    for key in _TEXT_CONFIG_KEYS:
        section = config.get(key)
        if isinstance(section, dict) and depth < _MAX_NESTING:
            yield section
            yield from _text_sections(section, depth + 1)
            return


def _read_dtype(sections: Sequence[Mapping[str, Any]]) -> str | None:
    """The outermost section's dtype, as vLLM's ``get_torch_dtype`` looks for it; renamed in transformers 5."""
    found = (section.get(key) for section in sections for key in ("dtype", "torch_dtype"))
    dtype = next((value for value in found if value is not None), None)
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else None


def _read_depth(sections: Sequence[Mapping[str, Any]], path: Path | str) -> int:
    """The innermost section's depth: beside a text_config, top-level numbers may be a tower's."""
    for section in reversed(sections):
        for key in _PATTERN_KEYS_OF_TYPE.get(str(section.get("model_type")), ()):
            if isinstance(section.get(key), list | str) and section[key]:
                return len(section[key])
        for key in _DEPTH_KEYS_OF_TYPE.get(str(section.get("model_type")), _DEPTH_KEYS):
            if section.get(key) is not None:
                return _check_depth(section[key], key, path)
    raise ConfigError(
        f"{path} does not say how many layers the model has: tried {', '.join(_DEPTH_KEYS)}, at the top level and in "
        f"{', '.join(_TEXT_CONFIG_KEYS)}; add num_hidden_layers beside the language model's other settings"
    )


def _check_depth(value: object, key: str, path: Path | str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: {key} must be a whole number of at least 1, found {value!r}")
    return value
