"""Takes modules out of a stage's model whose weights are not in the stage's folder.

Many of vLLM's models (Mixtral, Gemma, Qwen3-MoE, GPT-2) build every embedding and norm on every stage, and use each on
one stage. A full checkpoint has weights for all of them; a folder with one stage's tensors does not. A module without
weights is replaced by one that raises when it is used: parameters that nothing has loaded would give wrong tokens, and
vLLM's own check does not find all of them. This also saves their memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from stagewire.checkpoint.ownership import layer_of, owns
from stagewire.config import StageConfig
from stagewire.errors import ConfigError

__all__ = ["AbsentModule", "drop_absent"]


class AbsentModule(nn.Module):
    """Replaces a module whose weights another stage has. Raises ``ConfigError`` when it is used."""

    def __init__(self, stage: int, name: str) -> None:
        super().__init__()
        self._text = (
            f"stage {stage}'s model uses {name}, whose weights are in another stage's folder: this kind of model "
            "cannot be served from pre-split folders; serve the full checkpoint"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(self._text)


def drop_absent(
    model: nn.Module, stage: StageConfig, num_layers: int, *, is_tied: bool, present: Iterable[str]
) -> list[str]:
    """Replaces modules outside the layers that belong to another stage and have no tensor in this stage's folder.

    Args:
        model: built, not loaded.
        stage: this stage's settings.
        num_layers: of the whole model.
        is_tied: whether the head is the embedding, as vLLM resolved it.
        present: names of the folder's tensors, as the model's mapper spells them.

    Returns:
        The names of the modules that were replaced.
    """
    modules = {name.rpartition(".")[0] for name in present}

    def is_absent(name: str) -> bool:
        if layer_of(name) is not None or owns(name, stage.layers, num_layers, shared_embedding=is_tied):
            return False
        module = name.rpartition(".")[0]
        return not any(module == each or module.endswith(f".{each}") for each in modules)

    absent: dict[int, AbsentModule] = {}
    for name, module in model.named_modules():
        own = [f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)]
        if own and not module._modules and all(map(is_absent, own)):
            absent[id(module)] = AbsentModule(stage.stage, name)
    names = [name for name, module in model.named_modules() if id(module) in absent]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in absent:
                setattr(parent, name, absent[id(child)])  # a tied head is the embedding under a second name
    return names
