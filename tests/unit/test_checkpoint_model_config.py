"""A model's depth and ends, from config.json as published models write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagewire.checkpoint.model_config import ModelShape, language_settings, read_model_shape
from stagewire.errors import ConfigError


def write_config(model_dir: Path, config: object) -> Path:
    (model_dir / "config.json").write_text(json.dumps(config))
    return model_dir


def test_a_llama(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    assert read_model_shape(write_config(tmp_path, config)) == ModelShape(32, False, ("LlamaForCausalLM",), "bfloat16")


@pytest.mark.parametrize(
    ("config", "num_layers"),
    [
        ({"num_hidden_layers": 30}, 30),
        ({"n_layer": 12}, 12),
        ({"n_layers": 40}, 40),
        ({"num_layers": 28}, 28),
        ({"num_hidden_layers": None, "n_layer": 12}, 12),
        ({"text_config": {"num_hidden_layers": 34}, "vision_config": {"num_hidden_layers": 27}}, 34),
        ({"llm_config": {"num_hidden_layers": 24}}, 24),
        ({"language_config": {"num_hidden_layers": 12}}, 12),
        ({"thinker_config": {"text_config": {"num_hidden_layers": 28}}}, 28),
        ({"num_hidden_layers": 6, "text_config": {"num_hidden_layers": 34}}, 34),
        ({"num_hidden_layers": 32, "text_config": {"model_type": "llama"}}, 32),
        ({"model_type": "nemotron_h", "num_hidden_layers": 52, "hybrid_override_pattern": "M-M*E"}, 5),
        ({"model_type": "nemotron_h", "layers_block_type": ["linear_attention", "moe", "full_attention"]}, 3),
        ({"llm_config": {"model_type": "nemotron_h", "hybrid_override_pattern": "M*"}, "num_hidden_layers": 9}, 2),
        ({"model_type": "longcat_flash", "num_hidden_layers": 56, "num_layers": 28}, 28),
    ],
)
def test_depth(tmp_path: Path, config: dict[str, Any], num_layers: int) -> None:
    assert read_model_shape(write_config(tmp_path, config)).num_layers == num_layers


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, True),
        ({"text_config": {"tie_word_embeddings": False}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_tied(tmp_path: Path, config: dict[str, Any], tied: bool) -> None:
    assert read_model_shape(write_config(tmp_path, {"n_layer": 2, **config})).tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({}, None),
    ],
)
def test_dtype(tmp_path: Path, config: dict[str, Any], dtype: str | None) -> None:
    assert read_model_shape(write_config(tmp_path, {"n_layer": 2, **config})).torch_dtype == dtype


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("\xff", "cannot be read as JSON"),
        ("[1]", "must hold a JSON object, found list"),
        ("{}", "tried num_hidden_layers, n_layer, n_layers, num_layers"),
        ('{"num_hidden_layers": 0}', "at least 1, found 0"),
        ('{"num_hidden_layers": "32"}', "found '32'"),
        ('{"num_hidden_layers": true}', "found True"),
    ],
)
def test_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=said) as caught:
        read_model_shape(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_model_shape(tmp_path)
    with pytest.raises(ConfigError, match="does not exist or is not a folder"):
        read_model_shape(tmp_path / "nowhere")


def test_the_settings_of_the_language_model() -> None:
    text = {"num_attention_heads": 8, "head_dim": None}
    assert language_settings({"head_dim": 1280, "num_attention_heads": 2, "text_config": text}) == {
        "num_attention_heads": 8
    }
    assert (
        language_settings({"num_attention_heads": 2, "text_config": {"model_type": "llama"}})["num_attention_heads"]
        == 2
    )
