"""LoRA adapters made on the spot, in the files that PEFT writes: random, and strong enough to change tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RANK = 8


def make_adapter(folder: Path, model: Path, seed: int, with_ends: bool = False, as_pickle: bool = False) -> Path:
    """An adapter of every linear module of a Llama's layers; returns ``folder``.

    Args:
        with_ends: of the embedding and the output projection too, which only the first and the last stage have.
        as_pickle: adapter_model.bin in place of safetensors.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    # name: (in, out)
    shapes = {
        **{f"self_attn.{name}": (hidden, out) for name, out in (("q_proj", hidden), ("v_proj", key_value))},
        "self_attn.o_proj": (hidden, hidden),
        **{f"mlp.{name}": (hidden, inner) for name in ("gate_proj", "up_proj")},
        "mlp.down_proj": (inner, hidden),
    }
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def add(module: str, names: tuple[str, str], num_in: int, num_out: int) -> None:
        tensors[f"base_model.model.{module}.{names[0]}"] = torch.randn(RANK, num_in, generator=random) * 0.1
        tensors[f"base_model.model.{module}.{names[1]}"] = torch.randn(num_out, RANK, generator=random) * 0.1

    for layer in range(config["num_hidden_layers"]):
        for name, (num_in, num_out) in shapes.items():
            add(f"model.layers.{layer}.{name}", ("lora_A.weight", "lora_B.weight"), num_in, num_out)
    if with_ends:
        add("model.embed_tokens", ("lora_embedding_A", "lora_embedding_B"), vocab, hidden)
        add("lm_head", ("lora_A.weight", "lora_B.weight"), hidden, vocab)
    folder.mkdir(parents=True)
    modules = sorted(
        {name.rpartition(".")[2] for name in shapes} | ({"embed_tokens", "lm_head"} if with_ends else set())
    )
    settings: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if as_pickle:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder
