"""What it costs to compare a checkpoint's values: fingerprint and samples, from memory and from a cold disk.

    python -m benches.samples                  # on generated checkpoints of 1 to 4 GB each, removed afterwards
    python -m benches.samples --model PATH     # on another one

The cost is that of the reads, and their number follows from the tensors' number, hardly from their size: the generated
checkpoints have as many tensors as the model that they are named after, and smaller ones. "Cold" means that the files
were dropped from the page cache right before.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benches.common import print_table
from benches.loading import forget

from stagewire.checkpoint.files import checkpoint_files
from stagewire.checkpoint.index import fingerprint_of, read_tensors
from stagewire.checkpoint.samples import Samples, sample_weights

MB = 10**6
# Bytes of each tensor of a layer; {e} stands for the number of an expert.
ATTENTION = dict.fromkeys((f"self_attn.{part}_proj.weight" for part in "qkvo"), 6 * MB)
NORMS = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), 8192)
EXPERT = [f"mlp.experts.{{e}}.{part}_proj" for part in ("gate", "up", "down")]
MODELS: Mapping[str, tuple[int, int, Mapping[str, int]]] = {  # layers, experts, tensors of a layer
    "8B (Llama 3), bfloat16": (
        32,
        0,
        ATTENTION | NORMS | dict.fromkeys((f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")), 32 * MB),
    ),
    "30B of 128 experts (Qwen3), bfloat16": (
        48,
        128,
        ATTENTION | NORMS | dict.fromkeys((f"{name}.weight" for name in EXPERT), 100_000),
    ),
    "30B of 128 experts, AWQ in 4 bits: 16 GB": (
        48,
        128,
        ATTENTION
        | NORMS
        | dict.fromkeys((f"{name}.qweight" for name in EXPERT), 100_000)
        | dict.fromkeys((f"{name}.scales" for name in EXPERT), 24_576)
        | dict.fromkeys((f"{name}.qzeros" for name in EXPERT), 6_144),
    ),
}
ENDS = {"model.embed_tokens.weight": 100 * MB, "model.norm.weight": 8192, "lm_head.weight": 100 * MB}
SHARD_BYTES = 10**9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: generated ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    return parser.parse_args()


def tensor_sizes(num_layers: int, num_experts: int, layer: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    yield from ENDS.items()
    for i in range(num_layers):
        for name, size in layer.items():
            for expert in range(num_experts if "{e}" in name else 1):
                yield f"model.layers.{i}.{name.format(e=expert)}", size


def write_checkpoint(folder: Path, sizes: Iterator[tuple[str, int]]) -> None:
    """Shards of some gigabyte with random bytes, and a config.json."""
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    shard: dict[str, int] = {}
    number = 0
    for name, size in sizes:
        shard[name] = size
        if sum(shard.values()) >= SHARD_BYTES:
            write_shard(folder / f"model-{number}.safetensors", shard)
            shard, number = {}, number + 1
    write_shard(folder / f"model-{number}.safetensors", shard)


def write_shard(path: Path, sizes: Mapping[str, int]) -> None:
    header, end = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        block = os.urandom(MB)
        for at in range(0, end, MB):
            stream.write(block[: end - at])
        stream.flush()
        os.fsync(stream.fileno())


def measure(folder: Path) -> tuple[float, Samples]:
    """Seconds of all that a stage does to know what it compares."""
    began_at = time.perf_counter()
    files = checkpoint_files(folder)
    index = read_tensors(files)
    fingerprint_of(files, index)
    samples = sample_weights(files, index)
    return time.perf_counter() - began_at, samples


def measure_both(name: str, folder: Path, rounds: int) -> list[str]:
    cold, warm = [], []
    for _ in range(rounds):
        forget(folder)
        cold.append(measure(folder)[0])
        took_s, samples = measure(folder)
        warm.append(took_s)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return [
        name,
        f"{size / 1e9:.1f}",
        str(samples.num_reads),
        f"{samples.num_bytes / 1e6:.1f}",
        *(f"{min(times):.3f} to {max(times):.3f}" for times in (warm, cold)),
    ]


def main() -> None:
    arguments = parse_arguments()
    rows = []
    if arguments.model:
        rows.append(measure_both(arguments.model.name, arguments.model, arguments.rounds))
    for name, (num_layers, num_experts, layer) in () if arguments.model else MODELS.items():
        with tempfile.TemporaryDirectory(prefix="samples-", dir=arguments.folder) as folder:
            sizes = list(tensor_sizes(num_layers, num_experts, layer))
            write_checkpoint(Path(folder), iter(sizes))
            rows.append(measure_both(f"{name}: {len(sizes)} tensors", Path(folder), arguments.rounds))
    print_table("fingerprint and samples", ["checkpoint", "GB here", "reads", "MB read", "warm, s", "cold, s"], rows)


if __name__ == "__main__":
    main()
