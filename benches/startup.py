"""Ready time and memory of a ring of stages, against one stock process.

    python -m benches.startup                    # ready time, memory per stage
    python -m benches.startup --large --rounds 0 # the memory law on a generated checkpoint of more than 4 GB

1. Ready time: four stages started together until the whole ring is ready and the API listens, against one stock
   `vllm serve` of the same model on all cores; alternately, with the checkpoint in the page cache before each start.
2. Resident memory of each stage (all its processes) right after it is ready and has answered one request, as a ratio to
   one process: RSS counts shared libraries in full in every process, PSS divides them among those who share them.
3. The law: sum over stages of (resident - KV cache that is resident - a process that only imports) <= 1.1 x checkpoint.
   Resident is RSS, so that shared libraries cancel against the importing process, which preloads the same libraries and
   imports what the stage's process of that kind imports (the head has two kinds: API server and engine). What part of
   the KV budget is resident is measured too: a process that allocates as many zeros as vLLM does. One process is put
   through the same sum, to tell what stages add from what vLLM itself keeps.
   The checkpoint has random bfloat16 weights, is written shard by shard and removed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benches.common import (
    DEFAULT_MODEL,
    PinnedRing,
    Ratios,
    SingleProcess,
    begin,
    drive,
    even_ranges,
    print_table,
    process_tree,
    prompts,
    wait_until_quiet,
)

from stagewire.checkpoint.index import read_index
from stagewire.launch.resources import preload_libraries

MIB = 1 << 20
LIMIT = 1.1
IMPORT_DEADLINE_S = 120.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# What each kind of process has imported before it loads anything.
_COMMON = "import vllm.entrypoints.cli.main, vllm.engine.arg_utils, transformers, stagewire.vllm_plugin.entry.serve\n"
_WORKER = (
    "import vllm.v1.worker.cpu_worker, vllm.v1.worker.cpu_model_runner, vllm.model_executor.models.llama\n"
    "import vllm.model_executor.model_loader, vllm.v1.attention.backends.cpu_attn\n"
)
IMPORTS = {
    "api": _COMMON + "import vllm.entrypoints.launchers.api_server.entry, vllm.v1.engine.async_llm\n",
    "engine": _COMMON + _WORKER + "import vllm.v1.engine.core, stagewire.vllm_plugin.head.executor\n",
    "stage": _COMMON + _WORKER + "import vllm.entrypoints.cli.serve, stagewire.vllm_plugin.host.stage_host\n",
}
_WAIT = "print('ready', flush=True); import sys; sys.stdin.read()"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each side; 0: no ready times")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--large", action="store_true", help="also the memory law on a generated checkpoint")
    parser.add_argument("--large-layers", type=int, default=28, help="of 134 MB each, and 0.4 GB at both ends")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the generated checkpoint")
    parser.add_argument("--max-foreign", type=float, default=0.04, help="share of the machine")
    parser.add_argument("--max-wait", type=float, default=60.0, help="seconds to wait for a quiet machine")
    return parser.parse_args()


def settings(dtype: str, kv_bytes: int) -> list[str]:
    return [
        *("--dtype", dtype, "--max-model-len", "1024", "--max-num-batched-tokens", "512", "--max-num-seqs", "64"),
        *("--block-size", "32", "--kv-cache-memory-bytes", str(kv_bytes), "--enforce-eager"),
    ]


# ---- memory of processes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    rss: int = 0
    pss: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.rss + other.rss, self.pss + other.pss)

    @classmethod
    def of(cls, pid: int) -> Memory:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
        return cls(kib["Rss"] * 1024, kib["Pss"] * 1024)

    @classmethod
    def of_tree(cls, pid: int) -> Memory:
        return sum((cls.of(each) for each in process_tree(pid)), cls())


@contextlib.contextmanager
def python_process(code: str) -> Iterator[int]:
    """The id of a Python process that has run ``code`` and waits; it preloads what a stage preloads."""
    preload = preload_libraries(os.environ.get("LD_PRELOAD", ""))
    env = {**os.environ, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code + "\n" + _WAIT], env=env, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ready"):
                    break
            else:
                raise RuntimeError(f"it ended: {code}")
            yield process.pid
        finally:
            process.kill()


def resident_zeros(num_bytes: int) -> int:
    """How much of a KV cache of this size is resident right after vLLM's way of allocating it."""
    before = "import torch\n"
    allocate = f"kept = torch.zeros({num_bytes}, dtype=torch.int8)\n"
    with python_process(before) as pid:
        empty = Memory.of(pid).rss
    with python_process(before + allocate) as pid:
        return max(0, min(num_bytes, Memory.of(pid).rss - empty))


# ---- ready time and memory per stage -------------------------------------------------------------------------------


def warm(model: Path) -> None:
    """Reads the checkpoint once, so that it is in the page cache."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(16 * MIB):
                pass


def as_launched() -> dict[str, str]:
    """What `stagewire up` puts into a stage's environment; without it a stage starts over when it knows its needs."""
    return {"LD_PRELOAD": preload_libraries(os.environ.get("LD_PRELOAD", ""))}


def measure_ready(options: argparse.Namespace) -> None:
    model: Path = options.model
    ranges = even_ranges(model, options.stages)
    kv_bytes = 512 * MIB
    ready = Ratios()
    stages: list[Memory] = []
    single = Memory()
    for index in range(options.rounds):
        took = {}
        for side in ("ring", "one") if index % 2 else ("one", "ring"):
            wait_until_quiet(options.max_foreign, options.max_wait)
            warm(model)
            began_at = time.monotonic()
            if side == "ring":
                # A stage holds its share of the layers, so a share of the bytes gives it as many blocks.
                own = settings(options.dtype, kv_bytes // options.stages)
                with PinnedRing(model, ranges, own, as_launched()) as ring:
                    took[side] = time.monotonic() - began_at
                    drive(ring.url, model, prompts(1, 24, index), 8)
                    stages = [Memory.of_tree(stage.pid) for stage in ring.stages]
            else:
                one_env = {"OMP_NUM_THREADS": str(os.cpu_count())}
                with SingleProcess(model, settings(options.dtype, kv_bytes), one_env) as process:
                    took[side] = time.monotonic() - began_at
                    drive(process.url, model, prompts(1, 24, index), 8)
                    single = Memory.of_tree(process.process.pid)
        print(
            f"round {index + 1}: {options.stages} stages {took['ring']:.1f} s, one process {took['one']:.1f} s",
            flush=True,
        )
        ready.add(took["ring"], took["one"])
    print_table(
        f"Ready time, {options.dtype}, eager, {options.rounds} rounds, seconds",
        [f"{options.stages} stages", "one process", "ratio", "spread"],
        [ready.cells(".1f")],
    )
    rows = [[f"stage {i} ({ranges[i]})", *_ratio_cells(memory, single)] for i, memory in enumerate(stages)]
    rows.append(["all stages", *_ratio_cells(sum(stages, Memory()), single)])
    rows.append(["one process", *_ratio_cells(single, single)])
    print_table(
        f"Resident memory after the first answer, KV budget {kv_bytes / MIB:.0f} MiB in all, MB",
        ["", "RSS", "ratio", "PSS", "ratio"],
        rows,
    )


def _ratio_cells(memory: Memory, single: Memory) -> list[str]:
    pairs = ((memory.rss, single.rss), (memory.pss, single.pss))
    return [cell for value, whole in pairs for cell in (f"{value / 1e6:.0f}", f"{value / whole:.2f}")]


# ---- the law -------------------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, tokenizer_of: Path, num_layers: int, layers_per_shard: int = 1) -> None:
    """A random untied Llama in bfloat16, never more than one of its shards in memory."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocabulary = 2048, 8192, 49152
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        if (tokenizer_of / name).is_file():
            shutil.copy(tokenizer_of / name, folder / name)
    layer = {
        **{f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"},
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocabulary, hidden)}]
    for first in range(0, num_layers, layers_per_shard):
        layers = range(first, min(first + layers_per_shard, num_layers))
        shards.append({f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()})
    shards.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)})
    weight_map: dict[str, str] = {}
    total = 0
    for index, shapes in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)


def measure_law(options: argparse.Namespace) -> None:
    needed = (options.large_layers * 135 + 410) * 10**6
    free = shutil.disk_usage(options.folder).free
    if free < 1.2 * needed:
        raise SystemExit(f"{options.folder} has {free / 1e9:.1f} GB left, the checkpoint needs {needed / 1e9:.1f} GB")
    kv_bytes = 64 * MIB  # of a stage; one process has all the layers, and needs as much as all stages for one request
    imports = {}
    for kind, code in IMPORTS.items():
        with python_process(code) as pid:
            imports[kind] = Memory.of(pid).rss
    kv_resident, kv_resident_single = (resident_zeros(each) for each in (kv_bytes, kv_bytes * options.stages))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = Path(folder)
        make_checkpoint(model, options.model, options.large_layers)
        index = read_index(model)
        assert index is not None
        checkpoint = index.total_bytes
        ranges = even_ranges(model, options.stages)
        with PinnedRing(model, ranges, settings("bfloat16", kv_bytes), as_launched()) as ring:
            drive(ring.url, model, prompts(1, 24, 0), 2)
            found = {f"stage {i} ({ranges[i]})": _processes(stage.pid) for i, stage in enumerate(ring.stages)}
        with SingleProcess(model, settings("bfloat16", kv_bytes * options.stages)) as single:
            drive(single.url, model, prompts(1, 24, 0), 2)
            alone = {"one process": _processes(single.process.pid)}
    header = ["process", "resident", "KV resident", "imports only", "rest"]
    ring_rows, total = _account(found, imports, kv_resident)
    single_rows, single_total = _account(alone, imports, kv_resident_single)
    print_table(
        f"Memory of a checkpoint of {checkpoint / 1e9:.2f} GB, bfloat16, eager, MB",
        header,
        [*ring_rows, *single_rows],
    )
    verdict = "holds" if total <= LIMIT * checkpoint else "does NOT hold"
    print(
        f"\nsum over stages {total / 1e6:.0f} MB / checkpoint {checkpoint / 1e6:.0f} MB = {total / checkpoint:.3f}: "
        f"the law (<= {LIMIT}) {verdict}; one process {single_total / checkpoint:.3f}; "
        f"KV budget {kv_bytes / MIB:.0f} MiB per stage, {kv_resident / kv_bytes:.0%} of it resident"
    )


def _account(
    trees: Mapping[str, Sequence[tuple[str, int]]], imports: Mapping[str, int], kv_resident: int
) -> tuple[list[list[str]], int]:
    """Table rows, and the sum of what neither the KV cache nor imports explain."""
    rows, total = [], 0
    for name, processes in trees.items():
        for kind, rss in processes:
            has_layers = kind in ("stage", "worker") or (kind == "engine" and "stage" in name)
            imported = min(imports.get("stage" if kind == "worker" else kind, rss), rss)  # helpers are all imports
            kv = kv_resident if has_layers else 0
            total += rss - kv - imported
            rows.append([f"{name} {kind}", *(f"{each / 1e6:.0f}" for each in (rss, kv, imported, rss - kv - imported))])
    return rows, total


def _processes(pid: int) -> Sequence[tuple[str, int]]:
    """Kind and resident bytes of each process of a stage."""
    found = []
    for each in process_tree(pid):
        comm = Path(f"/proc/{each}/comm").read_text().strip()
        command = Path(f"/proc/{each}/cmdline").read_bytes()
        if comm.startswith("VLLM::EngineCor"):
            kind = "engine"
        elif comm.startswith("VLLM::Worker"):
            kind = "worker"
        elif each == pid:
            kind = "stage" if b"--external-pp-worker" in command else "api"
        else:
            kind = "helper"
        found.append((kind, Memory.of(each).rss))
    return found


def main() -> None:
    options = parse_arguments()
    begin(options.model)
    if options.rounds:
        measure_ready(options)
    if options.large:
        measure_law(options)


if __name__ == "__main__":
    main()
