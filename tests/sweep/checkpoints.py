"""A tiny random checkpoint of an architecture, under the names that real ones have.

Two ways. Where transformers has the model, transformers makes and saves it. Where only a hub's own code has it, vLLM
builds its model and every parameter is written back under the name that vLLM's `load_weights` looks for; config.json
then gets a config class of its own beside it, as on a hub. Both run in a child of forks.py.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweep.recipes import BASE, HUB_BASE, VOCAB_SIZE, Recipe

__all__ = ["make_checkpoint"]

_CONFIG_CODE = """from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "{model_type}"
    attribute_map = {attribute_map}

    def __init__(self, **settings):
        super().__init__(**settings)
{more}"""
# Shards small enough that layers and embeddings do not lie in one file.
_SHARD_BYTES = 1 << 20

# How vLLM's fused modules are called in checkpoints.
_PARTS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def make_checkpoint(recipe: Recipe, folder: Path) -> int:
    """Writes the checkpoint; returns how many tensors it has."""
    folder.mkdir(parents=True, exist_ok=True)
    return _from_vllm(recipe, folder) if recipe.weights == "vllm" else _from_transformers(recipe, folder)


# ---- transformers ----------------------------------------------------------------------------------------------------


def _from_transformers(recipe: Recipe, folder: Path) -> int:
    import torch
    import transformers

    model_class = getattr(transformers, recipe.like or recipe.architecture)
    config_class = model_class.config_class
    config = config_class(**{**_declared(config_class), **recipe.config})
    config.dtype = torch.float32
    torch.manual_seed(recipe.seed)
    model = model_class(config).float()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            _randomise(name, tensor, recipe)
    model.save_pretrained(folder, max_shard_size=_SHARD_BYTES)
    if recipe.drops:
        _drop(re.compile(recipe.drops), folder)
    _edit_config(recipe, folder)
    return len(model.state_dict())


def _drop(pattern: re.Pattern[str], folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(file).items() if not pattern.search(name)}
        save_file(tensors, file, metadata={"format": "pt"})
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        index = json.loads(index_path.read_text())
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not pattern.search(name)}
        index_path.write_text(json.dumps(index))


def _declared(config_class: Any) -> dict[str, Any]:
    """The tiny sizes under the names that this config class knows."""
    declared = {key: getattr(config_class, key) for key in BASE if hasattr(config_class, key)}
    return {key: BASE[key] for key, default in declared.items() if not isinstance(default, property)}


def _edit_config(recipe: Recipe, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = [recipe.architecture]
    if recipe.model_type:
        config["model_type"] = recipe.model_type
        _add_config_code(recipe, folder, config)
    path.write_text(json.dumps(config, indent=1))


def _add_config_code(recipe: Recipe, folder: Path, config: dict[str, Any]) -> None:
    """Unless vLLM or transformers know the type: as on a hub, the class lies beside config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    if recipe.model_type in CONFIG_MAPPING or recipe.model_type in _CONFIG_REGISTRY:
        return
    code = _CONFIG_CODE.format(
        model_type=recipe.model_type, attribute_map=recipe.attribute_map, more=recipe.config_code
    )
    (folder / "configuration_tiny.py").write_text(code)
    config["auto_map"] = {"AutoConfig": "configuration_tiny.TinyConfig"}


def _randomise(name: str, tensor: Any, recipe: Recipe) -> None:
    """In place. Weights that keep activations near one; embeddings so small that layers decide the next token.

    What a model computes from by itself (decay rates of state space layers, router corrections) stays as it is.
    """
    import torch

    if tensor.ndim >= 2 and "conv" not in name and "A_log" not in name and tensor.numel() > 1:
        is_embedding = tensor.ndim == 2 and tensor.shape[0] >= VOCAB_SIZE
        fan_in = tensor.shape[0] if _is_transposed(name, recipe) else tensor.shape[-1]
        tensor.normal_(0.0, recipe.embedding_std if is_embedding else recipe.gain / math.sqrt(fan_in))
    elif "norm" in name or re.search(r"\bln|_ln", name):
        tensor.add_(torch.randn_like(tensor) * 0.1)
    elif name.endswith("bias") and not re.search("dt_bias|correction|conv", name):
        tensor.normal_(0.0, 0.05)


def _is_transposed(name: str, recipe: Recipe) -> bool:
    """GPT-2's Conv1D."""
    return recipe.architecture == "GPT2LMHeadModel" and ".c_" in name


# ---- vLLM ------------------------------------------------------------------------------------------------------------


def _from_vllm(recipe: Recipe, folder: Path) -> int:
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": [recipe.architecture],
        "model_type": recipe.model_type,
        "dtype": "float32",
        **HUB_BASE,
        **recipe.config,
    }
    config = {key: value for key, value in config.items() if value is not None or key not in HUB_BASE}
    _add_config_code(recipe, folder, config)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    model = _build(recipe, folder)
    torch.manual_seed(recipe.seed)
    tensors: dict[str, Any] = {}
    with torch.no_grad():
        for name, shape in _invent(model, recipe):
            for pattern, replacement in recipe.renames:
                name = re.sub(pattern, replacement, name)
            tensor = torch.ones(shape) if len(shape) == 1 and "norm" in name else torch.zeros(shape)
            _randomise(name, tensor, recipe)
            tensors[name] = tensor
    names = list(tensors)
    half = len(names) // 2
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(tensors)


def _build(recipe: Recipe, folder: Path) -> Any:
    """vLLM's model of the whole checkpoint, without weights."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    from sweep.engines import engine_settings

    vllm_config = EngineArgs(**engine_settings(recipe, folder)).create_engine_config()
    with tempfile.TemporaryDirectory() as place, set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{place}/world", 0, "gloo")
        initialize_model_parallel(1, 1)
        return initialize_model(vllm_config=vllm_config)


def _invent(model: Any, recipe: Recipe) -> Iterator[tuple[str, Sequence[int]]]:
    """Every parameter by the name and shape that it has in a checkpoint."""
    parts = {**_PARTS, **recipe.parts}
    shared: set[int] = set()
    for path, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in shared:
                continue  # a tied head
            shared.add(id(parameter))
            yield from _split(path, own_name, parameter, module, parts, recipe)
        for own_name, buffer in module.named_buffers(recurse=False):
            if own_name in recipe.buffers:
                yield f"{path}.{own_name}", tuple(buffer.shape)


def _split(
    path: str, own_name: str, parameter: Any, module: Any, parts: Mapping[str, Sequence[str]], recipe: Recipe
) -> Iterator[tuple[str, Sequence[int]]]:
    before, _, last = path.rpartition(".")
    if own_name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
        yield from _experts(path.removesuffix(".routed_experts"), own_name, tuple(parameter.shape), recipe)
        return
    sizes = _part_sizes(module)
    names = parts.get(last, ())
    if sizes is not None and len(names) == 2 and len(sizes) == 3:
        sizes = [sizes[0], sizes[1] + sizes[2]]
    if len(names) < 2 or sizes is None or len(sizes) != len(names):
        yield f"{path}.{own_name}" if path else own_name, tuple(parameter.shape)
        return
    for name, size in zip(names, sizes, strict=True):
        yield f"{before}.{name}.{own_name}", (size, *parameter.shape[1:])


def _part_sizes(module: Any) -> list[int] | None:
    if hasattr(module, "total_num_kv_heads") and hasattr(module, "head_size"):  # QKVParallelLinear
        value_size = getattr(module, "v_head_size", module.head_size)
        heads, kv_heads = module.total_num_heads, module.total_num_kv_heads
        return [heads * module.head_size, kv_heads * module.head_size, kv_heads * value_size]
    sizes = getattr(module, "output_sizes", None)
    return None if sizes is None else list(sizes)


def _experts(path: str, own_name: str, shape: Sequence[int], recipe: Recipe) -> Iterator[tuple[str, Sequence[int]]]:
    """vLLM keeps all experts of a layer in two tensors.

    # w13: [experts, 2 * size, hidden], w2: [experts, hidden, size]
    """
    gate, down, up = recipe.experts
    kind = own_name.partition("_")[2]
    count, rows, *rest = shape
    if recipe.experts_are_stacked:
        before = path.rpartition(".")[0]
        names = [f"{before}.{gate}", f"{before}.{up}"] if own_name.startswith("w13") else [f"{before}.{down}"]
        for name in names:
            yield f"{name}.{kind}", (count, rows // len(names), *rest)
        return
    for expert in range(count):
        names = [gate, up] if own_name.startswith("w13") else [down]
        for name in names:
            yield f"{path}.{expert}.{name}.{kind}", (rows // len(names), *rest)
