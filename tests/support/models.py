"""Small checkpoints made on the spot: random weights, real tokenizer."""

from __future__ import annotations

import json
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


def make_int8_llama(folder: Path, tokenizer_of: Path, num_layers: int = 6) -> Path:
    """A random Llama whose linear layers are 8 bits, in the format of compressed-tensors: a scale for each row."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    config = LlamaConfig(**_text_settings(num_layers))
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in _spread(LlamaForCausalLM(config)).state_dict().items():
        if name.endswith("proj.weight"):
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127  # [rows, 1]
            weights[name] = (tensor / scale).round().to(torch.int8)
            weights[f"{name}_scale"] = scale.float()
        else:
            weights[name] = tensor.contiguous()
    save_file(weights, folder / "model.safetensors")
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }
    _write(
        folder / "config.json",
        config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization},
    )
    copy_tokenizer(tokenizer_of, folder)
    return folder


IMAGE_TOKENS = ("<image>", "<|image_pad|>")
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_blip2(folder: Path, tokenizer_of: Path, num_layers: int = 6) -> Path:
    """BLIP-2, random: a ViT, a Q-Former, and a Llama with the positions of text. One image, of 16 positions, in front.

    Of the models without M-RoPE that have pipeline support, one that needs no torchvision.
    """
    import torch
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        LlamaConfig,
    )

    torch.manual_seed(0)
    image_token_id = _add_image_tokens(folder, tokenizer_of)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION, image_size=32, patch_size=8).to_dict(),
        qformer_config=Blip2QFormerConfig(**VISION, encoder_hidden_size=VISION["hidden_size"], vocab_size=8).to_dict(),
        text_config=LlamaConfig(**_text_settings(num_layers), architectures=["LlamaForCausalLM"]).to_dict(),
        num_query_tokens=16,
        image_token_index=image_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    _spread(Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    _write(folder / "preprocessor_config.json", {"image_processor_type": "BlipImageProcessor", "size": size})
    _write(folder / "processor_config.json", {"processor_class": "Blip2Processor"})
    return folder


def make_isaac(folder: Path, tokenizer_of: Path, num_layers: int = 6) -> Path:
    """Isaac, random: a SigLIP 2 tower and a Qwen3 with M-RoPE, so that an image's size moves the positions after it.

    Of the models that have both M-RoPE and pipeline support, the one whose processor needs no torchvision: it is
    vLLM's own. Its weights are written by name, as transformers has no class for it.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    _add_image_tokens(folder, tokenizer_of)
    text = _text_settings(num_layers) | {"head_dim": 32}
    weights = dict(_spread(Qwen3ForCausalLM(Qwen3Config(**text))).state_dict())
    width, inner = VISION["hidden_size"], VISION["intermediate_size"]
    tower = "model.vision_embedding.0"
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.patch_embedding.weight": (width, 3 * 16 * 16),
        f"{tower}.embeddings.patch_embedding.bias": (width,),
        f"{tower}.embeddings.position_embedding.weight": (256, width),
        f"{tower}.post_layernorm.weight": (width,),
        f"{tower}.post_layernorm.bias": (width,),
        "model.vision_embedding.1.weight": (16 * width, 4 * width),
        "model.vision_embedding.3.weight": (text["hidden_size"], 16 * width),
    }
    for layer in range(VISION["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= {f"{prefix}.{name}.weight": (width, width), f"{prefix}.{name}.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}.{name}.weight": (width,), f"{prefix}.{name}.bias": (width,)}
        shapes |= {f"{prefix}.mlp.fc1.weight": (inner, width), f"{prefix}.mlp.fc1.bias": (inner,)}
        shapes |= {f"{prefix}.mlp.fc2.weight": (width, inner), f"{prefix}.mlp.fc2.bias": (width,)}
    for name, shape in shapes.items():
        norm = "norm" in name and name.endswith("weight")
        weights[name] = torch.ones(shape) if norm else torch.randn(shape) * 0.2
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    text |= {"rope_scaling": rope, "rope_parameters": rope, "model_type": "qwen3"}
    vision = VISION | {"patch_size": 16, "num_channels": 3, "num_patches": 256, "pixel_shuffle_scale_factor": 2}
    config = text | {
        "architectures": ["IsaacForConditionalGeneration"],
        "model_type": "isaac",
        "text_config": text,
        "vision_config": vision,
        "vision_max_num_patches": 6144,
        "vision_min_num_patches": 256,
        "pixel_shuffle_scale": 2,
        "vision_token": IMAGE_TOKENS[0],
    }
    _write(folder / "config.json", config)
    return folder


def _text_settings(num_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 49160,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def _spread(model: Any) -> Any:
    """Weights large enough for an answer that depends on its prompt: as initialised, one token repeats."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def _add_image_tokens(folder: Path, tokenizer_of: Path) -> int:
    """The demo model's tokenizer and chat template with tokens for images; the id of the first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS)})
    tokenizer.save_pretrained(folder)
    token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[0])
    return token_id


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
