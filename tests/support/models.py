"""Small checkpoints made on the spot: random weights, real tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def make_llama(
    folder: Path, tokenizer_of: Path, num_layers: int = 32, max_shard_size: str = "5MB", **overrides: Any
) -> Path:
    """A Llama with random weights and the demo model's vocabulary; returns ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "dtype": "float32",
        **overrides,
    }
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder, max_shard_size=max_shard_size)
    copy_tokenizer(tokenizer_of, folder)
    return folder


def copy_tokenizer(tokenizer_of: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (tokenizer_of / name).is_file():
            shutil.copy(tokenizer_of / name, folder / name)
