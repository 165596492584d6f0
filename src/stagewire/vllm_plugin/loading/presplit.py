"""Models that build every embedding and norm on every stage, in a stage whose folder has only its own tensors.

Many of vLLM's models do (Mixtral, Gemma, Qwen3-MoE, GPT-2), and use each on one stage. From the full checkpoint they
are loaded and lie idle. Here they are taken out, which also saves their memory, and whoever uses one after all is
stopped: parameters that nothing has loaded would give wrong tokens, and vLLM's own check lets some of them pass.
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
    """In the place of a module whose weights another stage has. Raises ``ConfigError`` when it is used."""

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
    """Replaces modules outside the layers that belong to another stage and are not in this one's folder.

    Args:
        model: built, not loaded.
        stage: whose.
        num_layers: of the whole model.
        is_tied: whether the head is the embedding, as vLLM resolved it.
        present: names of the folder's tensors, as the model's mapper spells them.

    Returns:
        The names of what was replaced.
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
                setattr(parent, name, absent[id(child)])  # under every name: a tied head is the embedding itself
    return names
