"""What a stage reads and how long it takes, from a cold disk and from the page cache.

    python -m benches.loading                  # on a generated checkpoint of more than 4 GB, removed afterwards
    python -m benches.loading --model PATH     # on another one

Each stage of the split is loaded in a process of its own; its load phase alone is measured (benches/load_stage.py), by
the process's own I/O counters and clock. Sides are interleaved, and "cold" means that the files were dropped from the
page cache right before.

1. Bytes from the disk over the stage's own tensor bytes: ours and vLLM's default loader. What the headers add is in it.
2. Load time, ours over vLLM's; and ours from the full checkpoint over ours from a pre-split folder of the same stage.
3. Reading alone: our reader against a plain sequential read of the same ranges, on one core each; and, with the copy
   into a parameter and in a process of its own each, against what the safetensors library has for it
   (benches/read_stage.py): time, bytes from the disk, memory, and how long the process's other threads stood still,
   of which one watches the launcher and one answers the ring. How far a device or mount reads ahead matters: --folder.
4. Peak resident memory above what was resident before loading, over own weights plus the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benches.common import ROOT, Ratios, begin, even_ranges, print_table, wait_until_quiet
from benches.startup import make_checkpoint

from stagewire.checkpoint.export_plan import plan_export
from stagewire.checkpoint.export_writer import run_export
from stagewire.checkpoint.index import TensorInfo, read_index
from stagewire.checkpoint.model_config import read_model_shape
from stagewire.checkpoint.ownership import stage_tensors
from stagewire.checkpoint.reader import TensorReader
from stagewire.plan.ranges import LayerRange

SIDES = ("full", "stock", "pre-split")
READERS = ("ours", "mmap", "pread", "rows")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: a generated one")
    parser.add_argument("--layers", type=int, default=28, help="of the generated one; 134 MB each, 0.4 GB at both ends")
    parser.add_argument("--layers-per-shard", type=int, default=5, help="stages end in the middle of files")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / ".demo" / "model")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--measure", type=int, nargs="+", metavar="STAGE", help="default: every stage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reading-only", action="store_true", help="only 3.: a minute per stage and round")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--max-foreign", type=float, default=0.04, help="share of the machine")
    parser.add_argument("--max-wait", type=float, default=60.0, help="seconds to wait for a quiet machine")
    return parser.parse_args()


def forget(folder: Path) -> None:
    """Drops a folder's weights from the page cache."""
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def remember(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def load(model: Path, stage: int, ranges: Sequence[str], loader: str) -> dict[str, float]:
    return measure("benches.load_stage", str(model), str(stage), str(len(ranges)), ranges[stage], loader)


def measure(module: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- loading -------------------------------------------------------------------------------------------------------


def measure_loading(options: argparse.Namespace, model: Path, export_dir: Path) -> None:
    ranges = even_ranges(model, options.stages)
    own = [own_tensors(model, layers) for layers in ranges]
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for index in range(options.rounds):
        for warmth in ("cold", "warm"):
            for stage in measured_stages(options):
                for side in SIDES if index % 2 else SIDES[::-1]:
                    folder = export_dir / f"stage_{stage}" if side == "pre-split" else model
                    wait_until_quiet(options.max_foreign, options.max_wait)
                    (forget if warmth == "cold" else remember)(folder)
                    result = load(folder, stage, ranges, "stock" if side == "stock" else "stagewire")
                    found.setdefault((warmth, side, stage), []).append(result)
            print(f"round {index + 1}, {warmth}: done", flush=True)
    names = {stage: f"stage {stage} ({ranges[stage]})" for stage in measured_stages(options)}
    print_reads(names, own, found)
    print_times(names, found)
    print_memory(names, own, found)


def measured_stages(options: argparse.Namespace) -> Sequence[int]:
    stages: Sequence[int] = options.measure or range(options.stages)
    return stages


def own_tensors(model: Path, layers: str) -> list[TensorInfo]:
    index = read_index(model)
    assert index is not None
    return stage_tensors(index, read_model_shape(model), LayerRange.parse(layers))


def print_reads(names: Mapping[int, str], own: Sequence[Sequence[TensorInfo]], found: Any) -> None:
    rows = []
    for stage, name in names.items():
        own_bytes = sum(tensor.num_bytes for tensor in own[stage])
        cells = []
        for side in SIDES:
            read = [result["disk_bytes"] for result in found["cold", side, stage]]
            cells += [f"{min(read) / 1e6:.1f}", f"{min(read) / own_bytes:.3f}-{max(read) / own_bytes:.3f}"]
        rows.append([name, f"{own_bytes / 1e6:.1f}", *cells])
    print_table(
        "Read from a cold disk in the load phase, MB: the least of all rounds (code that the system has dropped is\n"
        "read again, which counts too); ratio to own tensor bytes, least and most",
        ["", "own", "full", "ratio", "vLLM's loader", "ratio", "pre-split", "ratio"],
        rows,
    )


def print_times(names: Mapping[int, str], found: Any) -> None:
    for other, title in (("stock", "vLLM's loader"), ("pre-split", "pre-split")):
        rows = []
        for warmth in ("cold", "warm"):
            together = Ratios()
            for stage, name in names.items():
                ratios = Ratios()
                for ours, theirs in zip(found[warmth, "full", stage], found[warmth, other, stage], strict=True):
                    ratios.add(ours["seconds"], theirs["seconds"])
                    together.add(ours["seconds"], theirs["seconds"])
                rows.append([f"{warmth}, {name}", *ratios.cells(".2f")])
            rows.append([f"{warmth}, all", *together.cells(".2f")])
        print_table(
            f"Load phase, seconds: ours from the full checkpoint against {title}",
            ["", "full checkpoint", title, "ratio", "spread"],
            rows,
        )


def print_memory(names: Mapping[int, str], own: Sequence[Sequence[TensorInfo]], found: Any) -> None:
    rows = []
    for stage, name in names.items():
        largest = max(tensor.num_bytes for tensor in own[stage])
        cells = []
        for side in ("full", "stock"):
            results = [result for warmth in ("cold", "warm") for result in found[warmth, side, stage]]
            peak = max(result["peak_bytes"] for result in results)
            limit = results[0]["weight_bytes"] + largest
            cells += [f"{peak / 1e6:.0f}", f"{peak / limit:.3f}"]
        rows.append([name, f"{limit / 1e6:.0f}", *cells])
    print_table(
        "Peak resident memory of the load phase above what was resident before, MB; limit: own weights + one tensor",
        ["", "limit", "ours", "ratio", "vLLM's loader", "ratio"],
        rows,
    )


# ---- reading alone -------------------------------------------------------------------------------------------------


def measure_reading(options: argparse.Namespace, model: Path) -> None:
    """Both sides read a stage's ranges into memory that they use again, so that only reading is compared.

    A round has each side twice, A B B A: what comes second often finds the host's own cache, and a plain read here has
    two speeds, 3 apart, by which core it happens to run on.
    """
    rows = []
    ranges = even_ranges(model, options.stages)
    for stage in measured_stages(options):
        layers = ranges[stage]
        tensors = own_tensors(model, layers)
        buffer = memoryview(bytearray(max(tensor.num_bytes for tensor in tensors)))
        for warmth in ("cold", "warm"):
            ratios = Ratios()
            for index in range(options.rounds):
                wait_until_quiet(options.max_foreign, options.max_wait)
                took = {"ours": 0.0, "plain": 0.0}
                for side in ("ours", "plain", "plain", "ours") if index % 2 else ("plain", "ours", "ours", "plain"):
                    (forget if warmth == "cold" else remember)(model)
                    began_at = time.perf_counter()
                    (read_ours if side == "ours" else read_plainly)(model, tensors, buffer)
                    took[side] += (time.perf_counter() - began_at) / 2
                ratios.add(took["ours"], took["plain"])
            rows.append([f"{warmth}, stage {stage} ({layers})", *ratios.cells(".2f")])
    print_table(
        "Reading alone, seconds: our reader against a plain sequential read of the same ranges",
        ["", "ours", "plain", "ratio", "spread"],
        rows,
    )


def read_ours(model: Path, tensors: Sequence[TensorInfo], buffer: memoryview) -> None:
    for _ in TensorReader(model, tensors, lambda size: buffer[:size]):
        pass


def read_plainly(model: Path, tensors: Sequence[TensorInfo], buffer: memoryview) -> None:
    """One thread, the system's own reading ahead, reads of 1 MiB."""
    with ExitStack() as stack:
        files = {}
        for tensor in tensors:
            if tensor.file not in files:
                files[tensor.file] = stack.enter_context((model / tensor.file).open("rb", buffering=0))
            file = files[tensor.file]
            file.seek(tensor.offset)
            done = 0
            while done < tensor.num_bytes:
                done += file.readinto(buffer[done : min(done + (1 << 20), tensor.num_bytes)])


def measure_readers(options: argparse.Namespace, model: Path) -> None:
    """Each reader in turn, forwards in one round and backwards in the next."""
    ranges = even_ranges(model, options.stages)
    found: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for index in range(options.rounds):
        for warmth in ("cold", "warm"):
            for stage in measured_stages(options):
                for reader in READERS if index % 2 else READERS[::-1]:
                    wait_until_quiet(options.max_foreign, options.max_wait)
                    (forget if warmth == "cold" else remember)(model)
                    result = measure("benches.read_stage", str(model), ranges[stage], reader)
                    found.setdefault((warmth, stage, reader), []).append(result)
        print(f"readers, round {index + 1}: done", flush=True)
    checksums = {(stage, result["checksum"]) for (_, stage, _), results in found.items() for result in results}
    assert len(checksums) == len(measured_stages(options)), "readers read different bytes"
    print_readers(options, model, ranges, found)


def print_readers(options: argparse.Namespace, model: Path, ranges: Sequence[str], found: Any) -> None:
    times, costs = [], []
    for warmth in ("cold", "warm"):
        for stage in measured_stages(options):
            name = f"{warmth}, stage {stage} ({ranges[stage]})"
            tensors = own_tensors(model, ranges[stage])
            own_bytes = sum(tensor.num_bytes for tensor in tensors)
            largest = max(tensor.num_bytes for tensor in tensors)
            ours = found[warmth, stage, "ours"]
            for reader in READERS:
                theirs = found[warmth, stage, reader]
                if reader != "ours":
                    ratios = Ratios()
                    for one, other in zip(ours, theirs, strict=True):
                        ratios.add(one["seconds"], other["seconds"])
                    times.append([name, reader, *ratios.cells(".3f")])
                disk = [result["disk_bytes"] / own_bytes for result in theirs]
                memory = [max(result[key] for result in theirs) for key in ("peak_bytes", "anonymous_bytes")]
                used, stall = (statistics.median(each[key] for each in theirs) for key in ("cpu_seconds", "stall_s"))
                costs.append(
                    [
                        *(name, reader, f"{min(disk):.3f}-{max(disk):.3f}"),
                        *(f"{each / 1e6:.0f}" for each in memory),
                        *(f"{largest / 1e6:.0f}", f"{used:.2f}", f"{stall * 1e3:.0f}"),
                    ]
                )
    print_table(
        "Reading and copying into a parameter, seconds: our reader against the library's",
        ["", "library", "ours", "library", "ratio", "spread"],
        times,
    )
    print_table(
        "What it takes: bytes from the disk over own bytes; the most memory above what was there before, MB: all, and\n"
        "what is no file's; the largest tensor, MB; processor time, s, and the longest time in which no other thread\n"
        "ran, ms, both medians",
        ["", "reader", "disk", "memory", "anonymous", "tensor", "processor", "stall"],
        costs,
    )


def main() -> None:
    options = parse_arguments()
    begin(options.model or options.tokenizer)
    with ExitStack() as stack:
        model = options.model
        if model is None:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
            make_checkpoint(model, options.tokenizer, options.layers, options.layers_per_shard)
        index = read_index(model)
        assert index is not None
        print(f"checkpoint: {index.total_bytes / 1e9:.2f} GB", flush=True)
        measure_reading(options, model)
        measure_readers(options, model)
        if options.reading_only:
            return
        export_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        layers = [LayerRange.parse(each) for each in even_ranges(model, options.stages)]
        run_export(plan_export(model, lambda _: layers), export_dir, lambda _: None)
        measure_loading(options, model, export_dir)


if __name__ == "__main__":
    main()
