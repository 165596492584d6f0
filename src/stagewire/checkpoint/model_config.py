"""Reads from a model's configuration what Stagewire needs before vLLM is imported: depth, ties, dtype, architectures.

Must not import transformers, because the validator runs on machines without it, and a custom config class is remote
code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagewire.checkpoint.files import LOAD_FORMATS, describe_absence, is_mistral
from stagewire.checkpoint.mistral_config import from_params
from stagewire.errors import ConfigError

__all__ = [
    "CONFIG_NAME",
    "PARAMS_NAME",
    "LoadFlags",
    "ModelShape",
    "config_path",
    "language_settings",
    "parse_overrides",
    "read_config",
    "read_model_shape",
    "shape_of",
]

CONFIG_NAME = "config.json"
PARAMS_NAME = "params.json"
# ModelOpt before 0.31 writes this file, and no quantization_config into config.json.
_QUANTIZATION_NAME = "hf_quant_config.json"

# The sections in which multimodal models keep the language model's settings. text_config, decoder and generator are of
# transformers' get_text_config(), llm_config is vLLM's alias, the others are of DeepSeek-VL2 and Qwen-Omni.
_TEXT_CONFIG_KEYS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator")
# transformers' own name, then those that its attribute_map translates for decoders (GPT-2, MPT and DBRX, GPT-Neo).
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# LongCat's num_hidden_layers counts attention sublayers, two per decoder layer (vLLM's model_arch_config_convertor.py).
_DEPTH_KEYS_OF_TYPE = {"longcat_flash": ("num_layers",), "longcat_flash_ngram": ("num_layers",)}
# Nemotron-H has one layer per entry of its pattern, and transformers ignores num_hidden_layers beside it. transformers
# 5 leaves that number out of config.json and writes the pattern as a list (configuration_nemotron_h.py).
_PATTERN_KEYS_OF_TYPE = {"nemotron_h": ("layers_block_type", "hybrid_override_pattern")}
_MAX_NESTING = 3


@dataclass(frozen=True)
class ModelShape:
    """``num_layers``: decoder layers, as vLLM's ``get_total_num_hidden_layers`` counts them.

    ``tie_word_embeddings`` is config.json's setting. vLLM ignores it when the checkpoint holds a head of its own
    (``ownership.shares_embedding``). Without the setting it is True: transformers before 5 left it out when it was
    True, and since 5 the default differs by class. True is the safe guess, because the checkpoint of an untied model
    holds the head. Only the top level counts, because vLLM overwrites a nested value of a multimodal model with it
    (``VllmConfig.with_hf_config``). ``is_untied``: config.json sets False.

    ``torch_dtype`` is config.json's spelling ("bfloat16"), ``None`` when absent.
    """

    num_layers: int
    tie_word_embeddings: bool
    architectures: tuple[str, ...]
    torch_dtype: str | None
    is_untied: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class LoadFlags:
    """vLLM's flags about reading a checkpoint, with their defaults."""

    load_format: str = "auto"
    config_format: str = "auto"
    hf_config_path: str | None = None
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads_whole_checkpoints(self) -> bool:
        """False for formats like ``dummy`` and ``sharded_state``, whose files this package does not know."""
        return self.load_format.lower() in LOAD_FORMATS

    @classmethod
    def of(cls, arguments: object) -> LoadFlags:
        """The flags in vLLM's arguments or its model configuration. An override that is a function is left out."""
        overrides = getattr(arguments, "hf_overrides", None)
        return cls(
            str(getattr(arguments, "load_format", None) or "auto"),
            str(getattr(arguments, "config_format", None) or "auto"),
            getattr(arguments, "hf_config_path", None),
            overrides if isinstance(overrides, dict) else {},
        )


def read_model_shape(model_dir: Path, flags: LoadFlags | None = None) -> ModelShape:
    """The shape of the model in a folder.

    Raises ``ConfigError`` when the folder or its configuration is missing or malformed, or does not name the depth.
    """
    return shape_of(read_config(model_dir, flags), config_path(model_dir, flags))


def shape_of(config: Mapping[str, Any], path: Path | str = CONFIG_NAME) -> ModelShape:
    """The shape that a parsed config.json describes; ``path`` is for messages.

    Raises ``ConfigError`` when it does not name the depth.
    """
    sections = [config, *_text_sections(config)]
    tied, architectures = config.get("tie_word_embeddings"), config.get("architectures")
    return ModelShape(
        num_layers=_read_depth(sections, path),
        tie_word_embeddings=True if tied is None else bool(tied),
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        torch_dtype=_read_dtype(sections),
        is_untied=tied is False,
    )


def read_config(model_dir: Path, flags: LoadFlags | None = None) -> dict[str, Any]:
    """The model's configuration as vLLM resolves it, from config.json or from params.json of Mistral's format.

    A quantization that hf_quant_config.json describes and ``--hf-overrides`` are included. Raises ``ConfigError`` when
    there is no configuration, or it is not a JSON object.
    """
    flags = flags or LoadFlags()
    path = config_path(model_dir, flags)
    if path.name == PARAMS_NAME:
        beside = path.with_name(CONFIG_NAME)
        config = from_params(_read_json(path), _read_json(beside) if beside.is_file() else {})
    else:
        config = _read_json(path)
    described = path.with_name(_QUANTIZATION_NAME)
    if config.get("quantization_config") is None and described.is_file():
        config["quantization_config"] = _read_json(described)
    return _with_overrides(config, flags.hf_overrides)


def config_path(model_dir: Path, flags: LoadFlags | None = None) -> Path:
    """The file that vLLM reads the model's configuration from (``get_config``, transformers_utils/config.py).

    Raises ``ConfigError`` when the folder has none of its format.
    """
    flags = flags or LoadFlags()
    folder = model_dir if flags.hf_config_path is None else Path(flags.hf_config_path).expanduser()
    if not folder.is_dir():
        flag = "model folder" if flags.hf_config_path is None else "--hf-config-path"
        raise ConfigError(
            f"{flag} {folder} does not exist or is not a folder; "
            "expected a local HuggingFace checkpoint (a folder with config.json)"
        )
    own, params = folder / CONFIG_NAME, folder / PARAMS_NAME
    if flags.config_format == "mistral" or (flags.config_format == "auto" and params.is_file() and is_mistral(folder)):
        return params
    if not own.is_file() and params.is_file():
        raise ConfigError(
            f"{own} {describe_absence(own)}, and vLLM reads {PARAMS_NAME} only beside consolidated*.safetensors: give "
            "--config-format mistral (and --load-format mistral, if the weights are Mistral's), or add config.json"
        )
    return own


def parse_overrides(text: str) -> dict[str, Any]:
    """Parses ``--hf-overrides``. Raises ``ConfigError`` for text that is no JSON object."""
    try:
        overrides = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--hf-overrides {text!r:.80} is not JSON ({error})") from error
    if not isinstance(overrides, dict):
        raise ConfigError(f"--hf-overrides must be a JSON object, found {text!r:.80}")
    return overrides


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        reason = describe_absence(path)
        reason = "does not exist" if reason == "is missing" else reason
        raise ConfigError(f"{path} {reason}; expected a checkpoint in HuggingFace format") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); is the download complete?") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(config).__name__}")
    return config


def _with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merges overrides. They change keys within a section, as ``ModelConfig._apply_dict_overrides`` does."""
    changed = dict(config)
    for key, value in overrides.items():
        old = config.get(key)
        is_section = isinstance(value, dict) and isinstance(old, dict) and key in _TEXT_CONFIG_KEYS
        changed[key] = _with_overrides(old, value) if is_section and isinstance(old, dict) else value
    return changed


def language_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings; ``None`` counts as absent.

    They are those of the innermost section that names num_attention_heads. vLLM takes a nested config whole or not at
    all (``get_hf_text_config``), because top-level numbers may belong to another part. Without such a section, all
    sections are merged.
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
    """The outermost section's dtype, as vLLM's ``get_torch_dtype`` finds it. transformers 5 renamed the key."""
    found = (section.get(key) for section in sections for key in ("dtype", "torch_dtype"))
    dtype = next((value for value in found if value is not None), None)
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else None


def _read_depth(sections: Sequence[Mapping[str, Any]], path: Path | str) -> int:
    """The innermost section's depth, because top-level numbers beside a text_config may be a tower's."""
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
