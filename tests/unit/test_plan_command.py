"""`stagewire plan` and the validator: what is typed, printed and returned."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stagewire import cli
from stagewire.checkpoint.index import read_index
from stagewire.checkpoint.model_config import read_model_shape
from stagewire.checkpoint.ownership import stage_bytes
from stagewire.commands import export, plan
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange
from support.nvml import FakeNvml

TOOL = Path(__file__).parents[2] / "tools" / "offline_pipelining" / "validate_layer_ranges.py"
GIB = 2**30
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192,
}
EXPECTED = """\
✓ Model: {model}
✓ Detected 32 layers from config.json
✓ Auto-calculated layer ranges for 4 stages

Layer Range Configuration:
------------------------------------------------------------
  Stage 0: [ 0- 8)  ( 8 layers)
  Stage 1: [ 8-16)  ( 8 layers)
  Stage 2: [16-24)  ( 8 layers)
  Stage 3: [24-32)  ( 8 layers)
------------------------------------------------------------

✓ Configuration is VALID
  - All 32 layers are covered exactly once
  - No overlaps or gaps detected
  - Ready for pipeline parallelism
"""


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        attention = {
            "q_proj": (hidden, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, hidden),
        }
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        shapes |= {f"model.layers.{i}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"model.layers.{i}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {
            f"model.layers.{i}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def make_model(folder: Path, config: Mapping[str, Any], dtype: str | None = "BF16") -> Path:
    """config.json and a sparse file with the real header of such weights; without weights for no ``dtype``."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if dtype is None:
        return folder
    header, end = {}, 0
    for name, shape in llama_shapes(config).items():
        begin, size = end, {"BF16": 2, "F32": 4, "F8_E4M3": 1}[dtype]
        for length in shape:
            size *= length
        end = begin + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "Llama-3-8B", LLAMA_3_8B)


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the validator: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = plan.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def figures(ask: Any, *arguments: object) -> dict[str, Any]:
    code, out, err = ask(*arguments, "--json")
    assert err == ""
    answer: dict[str, Any] = json.loads(out)
    assert code == (0 if answer["valid"] else 1)
    return answer


def test_the_quick_start_to_the_byte(ask: Any, llama: Path) -> None:
    assert ask("--model", llama, "--num-stages", 4) == (0, EXPECTED.format(model=llama), "")


def test_a_bare_python_from_anywhere_prints_the_same(llama: Path, tmp_path: Path) -> None:
    """No site-packages, no environment, not even the user's: a clone is enough."""
    command = [
        getattr(sys, "_base_executable", sys.executable),
        "-I",
        "-S",
        str(TOOL),
        "--model",
        str(llama),
        "--num-stages",
        "4",
    ]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert done.stdout.decode() == EXPECTED.format(model=llama)
    done = subprocess.run(
        [*command, "--memory", "24GiB"], cwd=tmp_path, env={}, capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")


def test_given_ranges_of_a_model(ask: Any, llama: Path) -> None:
    code, out, _ = ask("--model", llama, "--ranges", "0-8", "8-16", "16-24", "24-32")
    assert (code, out) == (0, EXPECTED.format(model=llama).replace("Auto-calculated", "Given"))


def test_given_ranges_of_a_number_of_layers(ask: Any) -> None:
    code, out, _ = ask("--total-layers", 32, "--ranges", "0-10", "10-18", "18-24", "24-32")
    assert code == 0
    lines = out.splitlines()
    assert lines[:3] == ["✓ 32 layers (--total-layers)", "✓ Given layer ranges for 4 stages", ""]
    assert lines[5:9] == [
        "  Stage 0: [ 0-10)  (10 layers)",
        "  Stage 1: [10-18)  ( 8 layers)",
        "  Stage 2: [18-24)  ( 6 layers)",
        "  Stage 3: [24-32)  ( 8 layers)",
    ]
    assert lines[11:] == EXPECTED.splitlines()[12:]


def test_columns_grow_with_the_numbers(ask: Any) -> None:
    _, out, _ = ask("--total-layers", 126, "--num-stages", 11)
    assert "  Stage  0: [  0- 11)  ( 11 layers)\n" in out
    assert "  Stage 10: [115-126)  ( 11 layers)\n" in out
    _, out, _ = ask("--total-layers", 3, "--num-stages", 3)
    assert "  Stage 2: [ 2- 3)  ( 1 layer)\n" in out


def test_every_problem_at_once_and_the_line_to_paste(ask: Any, llama: Path) -> None:
    code, out, err = ask("--model", llama, "--ranges", "0-8", "9-16", "14-24", "24-33")
    assert (code, err) == (1, "")
    verdict = out[out.index("✗") :].splitlines()
    assert verdict[0] == "✗ Configuration is INVALID"
    assert [line.partition(";")[0] for line in verdict[1:4]] == [
        "  - stage 0 owns layers [0, 8) but stage 1 starts at 9: layer 8 has no owner",
        "  - stage 1 owns layers [9, 16) but stage 2 owns [14, 24): layers 14 to 15 would be owned twice",
        "  - stage 3 owns layers [24, 33) but the model has 32 layers, 0 to 31",
    ]
    assert verdict[4:] == ["", 'The given ends kept: --ranges "0-8" "8-16" "16-24" "24-32"']
    assert "Ready" not in out


def test_order_counts(ask: Any) -> None:
    code, out, _ = ask("--total-layers", 32, "--ranges", "16-32", "0-16")
    assert code == 1
    assert out.endswith('\nThe same ranges in order: --ranges "0-16" "16-32"\n')


def test_more_stages_than_layers(ask: Any, llama: Path) -> None:
    code, out, _ = ask("--model", llama, "--num-stages", 33)
    assert code == 1
    assert "33 stages need at least 33 layers, the model has 32" in out
    assert out.endswith("Give --num-stages 32 or less\n")
    code, out, _ = ask("--total-layers", 2, "--ranges", "0-1", "1-2", "2-3")
    assert code == 1
    assert "stage 2 owns layers [2, 3) but the model has 2 layers, 0 to 1" in out
    assert out.endswith("Give 2 ranges or fewer: every stage needs a layer\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ["give --model PATH, or --total-layers N"]),
        (("--total-layers", 32), ["how many stages?"]),
        (("--total-layers", 0, "--num-stages", 0), ["--total-layers must be", "--num-stages must be", "2 things"]),
        (("--total-layers", 32, "--num-stages", 3, "--ranges", "0-16", "16-32"), ["--num-stages 3, 2 in --ranges"]),
        (
            ("--total-layers", 32, "--ranges", "0:8", "16-8", "8-8", "24-32"),
            ['"0:8"', '"16-8" is reversed', '"8-8" is empty'],
        ),
        (("--total-layers", 32, "--num-stages", 2, "--memory", "24GiB"), ["--memory is about a model's"]),
        (("--total-layers", 32, "--num-stages", 2, "--details"), ["--details is about a model's"]),
        (("--model", "/nowhere", "--num-stages", 2), ["/nowhere does not exist"]),
        (("--model", "MODEL", "--total-layers", 30, "--num-stages", 2), ["--total-layers 30 but", "has 32 layers"]),
        (
            ("--model", "MODEL", "--num-stages", 2, "--memory", "24,x"),
            ['"24" is no size', '"x" is no size', "for instance 24GiB"],
        ),
        (("--model", "MODEL", "--num-stages", 2, "--memory", "24GiB,1GB,1GB"), ["--num-stages 2, 3 in --memory"]),
        (("--model", "MODEL", "--memory", "24GiB"), ["how many stages?"]),
        (("--model", "MODEL", "--num-stages", 2, "--gpu-memory-utilization", 0.5), ["is a share of --memory"]),
        (
            ("--model", "MODEL", "--num-stages", 2, "--gpu-memory-utilization", 2, "--memory", "1GB"),
            ["at most 1, found 2"],
        ),
        (("--total-layers", 32, "--num-stages", 2, "--layer-ms", 1), ["--layer-ms is for --balance time"]),
        (("--total-layers", 32, "--num-stages", 2, "--balance", "time"), ["needs --layer-ms", "needs --head-ms"]),
        (
            ("--total-layers", 32, "--balance", "time", "--num-stages", 2, "--layer-ms", "1,-2", "--head-ms", "x"),
            ['"-2" is no time', '"x" is no time'],
        ),
    ],
)
def test_malformed_questions(ask: Any, llama: Path, arguments: tuple[object, ...], said: list[str]) -> None:
    code, out, err = ask(*(llama if argument == "MODEL" else argument for argument in arguments))
    assert (code, out) == (2, "")
    assert all(part in err for part in said), err


def test_unreadable_models(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert ask("--model", tmp_path, "--num-stages", 2)[0] == 2
    make_model(tmp_path, LLAMA_3_8B, dtype=None)
    assert ask("--model", tmp_path, "--num-stages", 2)[0] == 0
    code, _, err = ask("--model", tmp_path, "--num-stages", 2, "--details")
    assert code == 2
    assert "--details needs the headers of safetensors weights" in err


def test_malformed_for_a_program(ask: Any) -> None:
    code, out, err = ask("--total-layers", 32, "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["valid"] is False
    assert "how many stages?" in json.loads(out)["error"]


def test_the_launchers_command_prints_the_same_block_then_details(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--model", str(llama), "--num-stages", "4"]) == 0
    assert capsys.readouterr().out == EXPECTED.format(model=llama) + (
        "\n"
        "Each stage (weights in bfloat16, KV cache in bfloat16, 1 GB = 10^9 bytes):\n"
        "  stage  layers   weights  KV bytes/token\n"
        "      0     0-8   4.54 GB           32768\n"
        "      1    8-16   3.49 GB           32768\n"
        "      2   16-24   3.49 GB           32768\n"
        "      3   24-32   4.54 GB           32768\n"
        "    all      32  16.06 GB          131072\n"
    )
    assert cli.main(["plan", "--num-stages", "4"]) == 2
    assert capsys.readouterr().err.startswith("stagewire: no model")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_stages", [1, 3, 4])
def test_weights_are_those_that_stages_load(ask: Any, tmp_path: Path, tied: bool, num_stages: int) -> None:
    model = make_model(tmp_path, {**LLAMA_3_8B, "tie_word_embeddings": tied})
    index, shape = read_index(model), read_model_shape(model)
    assert index is not None
    for stage in figures(ask, "--model", model, "--num-stages", num_stages, "--details")["stages"]:
        assert stage["weight_bytes"] == stage_bytes(index, shape, LayerRange(stage["start"], stage["end"]))


@pytest.mark.parametrize(
    ("stored", "config", "options", "weight_bytes", "kv_bytes"),
    [
        ("BF16", {}, (), 16_060_522_496, 131_072),
        ("BF16", {}, ("--dtype", "float32"), 2 * 16_060_522_496, 2 * 131_072),
        ("BF16", {}, ("--kv-cache-dtype", "fp8"), 16_060_522_496, 131_072 // 2),
        # vLLM serves float32 checkpoints in 16 bits unless it is told otherwise.
        ("F32", {"torch_dtype": "float32"}, (), 16_060_522_496, 131_072),
        ("F32", {"torch_dtype": "float32"}, ("--dtype", "float32"), 2 * 16_060_522_496, 2 * 131_072),
        # Quantized tensors stay what they are.
        ("F8_E4M3", {"quantization_config": {"quant_method": "fp8"}}, (), 16_060_522_496 // 2, 131_072),
        (
            "F8_E4M3",
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "kv_cache_scheme": {"num_bits": 8, "type": "float"},
                }
            },
            (),
            16_060_522_496 // 2,
            131_072 // 2,
        ),
    ],
)
def test_bytes_as_served(
    ask: Any,
    tmp_path: Path,
    stored: str,
    config: dict[str, Any],
    options: tuple[str, ...],
    weight_bytes: int,
    kv_bytes: int,
) -> None:
    model = make_model(tmp_path, {**LLAMA_3_8B, **config}, stored)
    (stage,) = figures(ask, "--model", model, "--num-stages", 1, "--details", *options)["stages"]
    assert (stage["weight_bytes"], stage["kv_bytes_per_token"]) == (weight_bytes, kv_bytes)


def test_memory_of_unequal_machines(ask: Any, llama: Path) -> None:
    answer = figures(ask, "--model", llama, "--memory", "24GiB,12GiB,12288MiB")
    own, best = answer["compared"]
    assert answer["ranges"] == best["ranges"] == ["0-16", "16-24", "24-32"]
    assert own["ranges"] == ["0-11", "11-22", "22-32"]
    tokens = [stage["kv_tokens"] for stage in answer["stages"]]
    first = answer["stages"][0]
    # 0.92 is vLLM's default share.
    usable = -(-24 * GIB * 92 // 100)
    assert abs(first["free_bytes"] - (usable - first["weight_bytes"])) <= 1
    assert tokens[0] == first["free_bytes"] // (16 * 4096)
    assert best["kv_tokens"] == min(tokens) > own["kv_tokens"]
    assert tokens[best["fewest_stage"]] == min(tokens)


def test_memory_of_all_and_a_share(ask: Any, llama: Path) -> None:
    half = figures(ask, "--model", llama, "--num-stages", 4, "--memory", "16GiB", "--gpu-memory-utilization", 0.5)
    whole = figures(ask, "--model", llama, "--num-stages", 4, "--memory", "8GiB", "--gpu-memory-utilization", 1)
    assert [stage["kv_tokens"] for stage in half["stages"]] == [stage["kv_tokens"] for stage in whole["stages"]]
    assert [stage["num_layers"] for stage in whole["stages"]] == [7, 9, 9, 7]


def test_what_does_not_fit_is_named_with_what_it_lacks(ask: Any, llama: Path) -> None:
    code, out, _ = ask("--model", llama, "--num-stages", 4, "--memory", "4GiB")
    assert code == 1
    assert (
        "  - stage 0 with layers [0, 7) does not fit: 4.10 GB of weights, 3.95 GB usable (0.92 of 4.29 GB), "
        "0.15 GB too little\n" in out
    )
    assert "No split into so many stages fits" in out
    code, out, _ = ask("--model", llama, "--ranges", "0-16", "16-24", "24-32", "--memory", "8GiB,12GiB,12GiB")
    assert code == 1
    assert "stage 0 with layers [0, 16) does not fit: 8.03 GB of weights, 7.90 GB usable" in out
    assert '\nThese fit: --ranges "0-' in out
    answer = figures(ask, "--model", llama, "--ranges", "0-16", "16-24", "24-32", "--memory", "8GiB,12GiB,12GiB")
    again = figures(ask, "--model", llama, "--memory", "8GiB,12GiB,12GiB", "--ranges", *answer["corrected_ranges"])
    assert again["valid"] is True


def test_less_room_than_one_long_request(ask: Any, llama: Path) -> None:
    _, out, _ = ask("--model", llama, "--num-stages", 1, "--memory", "17GiB")
    assert "That is less than one request of 8,192 tokens: give vLLM a smaller --max-model-len." in out


def test_the_gpus_here(ask: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([("A", 24 * GIB), ("A", 24 * GIB), ("B", 12 * GIB)]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def memory(*arguments: object) -> list[int]:
        stages = figures(ask, "--model", llama, "--memory", *arguments)["stages"]
        return [stage["memory_bytes"] // GIB for stage in stages]

    assert memory() == [24, 24, 12]
    assert memory("--num-stages", 2) == [24, 24]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-c,GPU-b")
    assert memory() == [12, 24]
    code, _, err = ask("--model", llama, "--memory", "--num-stages", 3)
    assert code == 2
    assert "--num-stages 3, 2 GPUs here" in err


def test_no_library_for_gpus(ask: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare clone."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    code, _, err = ask("--model", llama, "--memory")
    assert code == 2
    assert "pip install nvidia-ml-py" in err
    assert "give the figures instead: --memory 24GiB" in err


def test_time(ask: Any) -> None:
    answer = figures(
        ask, "--total-layers", 32, "--num-stages", 4, "--balance", "time", "--layer-ms", 1.2, "--head-ms", 2.5
    )
    assert [stage["num_layers"] for stage in answer["stages"]] == [8, 9, 9, 6]
    assert [stage["time_ms"] for stage in answer["stages"]] == [9.6, 10.8, 10.8, 9.7]
    own, best = answer["compared"]
    assert (own["time_ms"], own["slowest_stage"], best["time_ms"]) == (12.1, 3, 10.8)


def test_time_of_unequal_machines_counts_the_stages(ask: Any) -> None:
    answer = figures(
        ask, "--total-layers", 12, "--balance", "time", "--layer-ms", "1,2,1", "--head-ms", 1, "--embed-ms", 0.5
    )
    assert answer["ranges"] == ["0-4", "4-7", "7-12"]
    assert [stage["time_ms"] for stage in answer["stages"]] == [4.5, 6.0, 6.0]


def test_time_within_memory(ask: Any, llama: Path) -> None:
    """The fast machine is too small for as many layers as would be fastest."""
    times = ("--balance", "time", "--layer-ms", "1,3", "--head-ms", 0)
    assert figures(ask, "--model", llama, *times)["ranges"] == ["0-24", "24-32"]
    answer = figures(ask, "--model", llama, *times, "--memory", "8GiB,24GiB")
    assert answer["ranges"] == ["0-15", "15-32"]
    assert answer["chosen_for"] == "shortest time"


QWEN3_NEXT = {"model_type": "qwen3_next", "num_hidden_layers": 16, "full_attention_interval": 4}


def test_a_hybrid_model(ask: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path, {**LLAMA_3_8B, **QWEN3_NEXT}, dtype=None)
    assert ask("--model", model, "--num-stages", 4)[0] == 0
    answer = figures(ask, "--model", model, "--ranges", "0-3", "3-8", "8-16")
    assert answer["problems"][0].startswith("stage 0 with layers [0, 3): no KV cache layer, those are 3, 7, 11, 15")
    assert answer["corrected_ranges"] == ["0-4", "4-8", "8-16"]
    # vLLM's own split is what the launcher would start: refused, with one that works.
    kinds = ["mamba", "full_attention", "full_attention", *["mamba"] * 5]
    uneven = make_model(tmp_path / "uneven", {**LLAMA_3_8B, "num_hidden_layers": 8, "layer_types": kinds})
    answer = figures(ask, "--model", uneven, "--num-stages", 2)
    assert (answer["ranges"], answer["corrected_ranges"]) == (["0-4", "4-8"], ["0-2", "2-8"])
    assert "no KV cache layer, those are 1 to 2" in answer["problems"][0]
    answer = figures(ask, "--model", uneven, "--num-stages", 2, "--memory", "24GiB")
    assert (answer["valid"], answer["ranges"]) == (True, ["0-2", "2-8"])
    assert answer["compared"][0]["problem"].startswith("stage 1 with layers [4, 8): no KV cache layer")
    assert answer["compared"][0]["kv_tokens"] is None
    code, out, _ = ask("--model", model, "--num-stages", 5)
    assert code == 1
    assert "5 stages are not possible, 4 at most" in out


def test_a_hybrid_model_by_memory(ask: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path, {**LLAMA_3_8B, **QWEN3_NEXT})
    answer = figures(ask, "--model", model, "--memory", "4GiB,24GiB,24GiB")
    assert answer["valid"] is True
    assert answer["stages"][0]["end"] == 4  # with fewer it would have no attention layer
    for stage in answer["stages"]:
        num_attention = len([layer for layer in (3, 7, 11, 15) if stage["start"] <= layer < stage["end"]])
        assert stage["kv_bytes_per_token"] == num_attention * 4096
        assert stage["num_state_layers"] == stage["num_layers"] - num_attention


def test_a_size_that_is_not_known(ask: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path, {**LLAMA_3_8B, "index_topk": 2048})
    code, _, err = ask("--model", model, "--num-stages", 2, "--memory", "24GiB")
    assert code == 2
    assert "index_topk" in err
    code, out, _ = ask("--model", model, "--num-stages", 2, "--details")
    assert code == 0
    assert "KV bytes/token" not in out
    assert "KV cache: not known, because config.json has index_topk" in out


def test_an_export_is_split_as_the_plan_says(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By memory and by time; a planned split differs from vLLM's own, or this would show nothing."""
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    even = ("0-8", "8-16", "16-24", "24-32")
    for options in (
        ["--memory", "24GiB,12GiB,12GiB,12GiB"],
        ["--balance", "time", "--layer-ms", "1", "--head-ms", "4"],
    ):
        assert cli.main(["plan", "--model", str(llama), "--num-stages", "4", "--json", *options]) == 0
        planned = json.loads(capsys.readouterr().out)["ranges"]
        args = parser.parse_args(
            ["--model", str(llama), "--pipeline-parallel-size", "4", "--output-dir", "unused", *options]
        )
        chosen = tuple(str(layers) for layers in export._choose_ranges(args, 32))
        assert list(chosen) == planned
        assert chosen != even
    args = parser.parse_args(["--model", str(llama), "--output-dir", "unused", "--ranges", *even, "--memory", "1GiB"])
    with pytest.raises(ConfigError, match="drop --memory"):
        export._choose_ranges(args, 32)
    args = parser.parse_args(
        ["--model", str(llama), "--output-dir", "unused", "--pipeline-parallel-size", "2", "--memory", "1GiB"]
    )
    with pytest.raises(ConfigError, match=r"stage 0 with layers .* does not fit"):
        export._choose_ranges(args, 32)


# ---- docs/guide/plan.md --------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "plan.md"
SHOWN = re.findall(r"```text\n\$ (.*)\n((?:.*\n)*?)```", PAGE.read_text())
SMOLLM2 = {
    **LLAMA_3_8B,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def test_the_page_has_its_examples() -> None:
    assert len(SHOWN) == 7


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_page_shows_what_is_printed(
    command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the byte, but for lines that the page leaves out: ``[...]``."""
    make_model(tmp_path / "Llama-3-8B", LLAMA_3_8B)
    make_model(tmp_path / "Qwen3-Next-80B-A3B", {**LLAMA_3_8B, **QWEN3_NEXT, "num_hidden_layers": 48}, dtype=None)
    (tmp_path / "models").mkdir()
    make_model(tmp_path / "models" / "SmolLM2-135M-Instruct", SMOLLM2)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if words[0] == "python":
        assert words[1] == f"tools/offline_pipelining/{TOOL.name}"
        plan.main(words[2:])
    else:
        cli.main(words[1:])
    printed = "".join(capsys.readouterr())
    assert re.fullmatch(re.escape(output).replace(r"\[\.\.\.\]", "(?s:.*)"), printed), printed
