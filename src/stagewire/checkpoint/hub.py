"""Downloads from a sharded checkpoint on a model hub only the weight files that hold tensors of one stage.

The hub's index says which file holds which tensor. Imports huggingface_hub only inside its functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from stagewire.checkpoint.files import INDEX_NAME
from stagewire.checkpoint.model_config import CONFIG_NAME, PARAMS_NAME, LoadFlags
from stagewire.errors import ConfigError

__all__ = ["download_own", "find_file", "with_config_folder"]


def find_file(repo: str, revision: str | None, file: str, cache_dir: str | None = None) -> Path | None:
    """The path of one small file in the local cache, downloaded if needed; ``None`` when the repository has none.

    The name of its folder is the commit. Raises ``ConfigError`` when the hub does not know the repository or the
    revision, refuses access, or cannot be reached while the cache has no copy.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise _not_to_be_had(repo, file, error) from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:  # such as no such repository, no such revision, no right to read it
        raise _not_to_be_had(repo, file, error) from error


def with_config_folder(flags: LoadFlags, revision: str | None) -> LoadFlags:
    """``flags`` with a local folder as ``hf_config_path``, if that names a repository on a hub.

    Raises ``ConfigError`` as ``find_file`` does, and when the repository has no configuration.
    """
    repo = flags.hf_config_path
    if repo is None or Path(repo).expanduser().is_dir():
        return flags
    config = find_file(repo, revision, CONFIG_NAME) or find_file(repo, revision, PARAMS_NAME)
    if config is None:
        raise ConfigError(f"--hf-config-path {repo}: neither a folder here, nor a hub model with {CONFIG_NAME}")
    return replace(flags, hf_config_path=str(config.parent))


def _not_to_be_had(repo: str, file: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(
        f"{repo} is no folder here, and {file} of a hub model of that name is neither in the local cache nor to be had "
        f"from the hub: {reason}; give a folder's path, or check the name, --revision, the network and HF_ENDPOINT"
    )


def download_own(
    repo: str,
    revision: str | None,
    subfolder: str | None,
    cache_dir: str | None,
    choose: Callable[[Sequence[str]], Iterable[str]],
    index_name: str = INDEX_NAME,
) -> tuple[Path, dict[str, str]] | None:
    """Downloads the files that hold the tensors that ``choose`` picks from all names.

    Returns the folder, and each chosen tensor's file in it; ``None`` when the repository has no safetensors index.
    Raises ``ConfigError`` as ``find_file`` does.
    """
    from huggingface_hub import snapshot_download

    inside = "" if subfolder is None else f"{subfolder.strip('/')}/"
    index = find_file(repo, revision, inside + index_name, cache_dir)
    if index is None:
        return None
    weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    own = {name: weight_map[name] for name in choose(list(weight_map))}
    patterns = [inside + file for file in sorted(set(own.values()))]
    folder = snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)
    return Path(folder) / inside, own
