"""LoRA adapters as files: which folder a stage may read for a name, and whether two stages read the same bytes.

An adapter's path comes from another stage. A stage reads only folders that its own command line allows. Knows no vLLM
and no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from stagewire.errors import ConfigError

__all__ = ["ROOT_FLAG", "check_roots", "digest_adapter", "find_adapter"]

ROOT_FLAG = "--pipeline-lora-root"

_CONFIG = "adapter_config.json"
_SAFE_WEIGHTS = "adapter_model.safetensors"
# Without safetensors, vLLM reads the first of these with torch.load.
_OTHER_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")


def check_roots(roots: Sequence[str]) -> None:
    """Raises ConfigError for a root that is no folder. Otherwise the stage would refuse every adapter later."""
    for root in roots:
        if not Path(root).is_dir():
            raise ConfigError(f"{ROOT_FLAG} {root}: there is no such folder on this machine")


def find_adapter(stage: int, name: str, path: str, roots: Sequence[str], named: Sequence[tuple[str, str]]) -> Path:
    """The folder from which a worker stage reads adapter ``name``, which stage 0 reads from ``path``.

    Args:
        stage: this stage's index, for messages.
        name: the adapter's.
        path: stage 0's. It is allowed below one of ``roots``, symbolic links followed. A relative path is looked up
            below each root.
        roots: folders of this machine.
        named: (name, path) of this stage's own ``--lora-modules``, for adapters elsewhere on this machine.

    Raises:
        ConfigError: the folder is not allowed, not there, or not in safetensors. The message names the flag.
    """
    folder = _below_a_root(path, roots) or next((Path(own) for each, own in named if each == name), None)
    if folder is None:
        allowed = ", ".join(roots) if roots else "none given"
        raise ConfigError(
            f"stage {stage} does not read adapter {name!r} from {path}: that is below none of its {ROOT_FLAG} folders "
            f"({allowed}) and its --lora-modules do not name {name!r}; start stage {stage} with {ROOT_FLAG} FOLDER, or "
            f"with --lora-modules {name}=PATH"
        )
    if (folder / _SAFE_WEIGHTS).is_file() and (folder / _CONFIG).is_file():
        return folder
    other = next((each for each in _OTHER_WEIGHTS if (folder / each).is_file()), None)
    if other is not None:
        raise ConfigError(
            f"stage {stage} does not read adapter {name!r} from {other} (in {folder}): that format is loaded by "
            f"unpickling; save it as {_SAFE_WEIGHTS}"
        )
    raise ConfigError(
        f"stage {stage} has no adapter {name!r} at {folder}: expected {_CONFIG} and {_SAFE_WEIGHTS} there; each stage "
        "reads adapters from its own machine"
    )


def digest_adapter(folder: Path) -> str:
    """16 hexadecimal digits over all bytes of the adapter's settings and weights.

    Stages compare it, because different bytes give wrong tokens. Raises OSError when a file is missing.
    """
    weights = next((each for each in (_SAFE_WEIGHTS, *_OTHER_WEIGHTS) if (folder / each).is_file()), _SAFE_WEIGHTS)
    digest = hashlib.sha256()
    for name in (_CONFIG, weights):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _below_a_root(path: str, roots: Sequence[str]) -> Path | None:
    """The first allowed folder that exists; if none exists, the first allowed one."""
    tops = [Path(root).resolve() for root in roots]
    folders = [(top, (top / path).resolve()) for top in tops]  # an absolute path stays itself
    allowed = [folder for top, folder in folders if folder.is_relative_to(top)]
    return next((folder for folder in allowed if folder.is_dir()), allowed[0] if allowed else None)
