"""GPUs as NVIDIA's library lists them and CUDA_VISIBLE_DEVICES hides them; what is said where there is no figure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from stagewire.errors import ConfigError
from stagewire.launch import gpus
from stagewire.launch.gpus import amd_cards, ask_nvidia, gpu_memory_bytes, list_gpus, visible_gpus
from stagewire.launch.resources import assign_resources, count_stages
from support.nvml import FakeNvml, Spec

GB = 10**9
ALIKE: list[Spec] = [("L4", 24 * GB), ("L4", 24 * GB), ("L4", 24 * GB)]
MIXED: list[Spec] = [("T4", 16 * GB), ("H100", 80 * GB), ("L4", 24 * GB)]
SLICED: list[Spec] = [("H100", 80 * GB, (20 * GB, 10 * GB)), ("H100", 80 * GB)]
UNIFIED: list[Spec] = [("GB10", None)]
BY_BUS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def install(monkeypatch: pytest.MonkeyPatch, specs: list[Spec], failing: str = "") -> FakeNvml:
    nvml = FakeNvml(specs, failing)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpus, "amd_cards", list)
    return nvml


def chosen(value: str, **others: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": value, **others}


def test_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install(monkeypatch, [*SLICED, *UNIFIED])
    found, problem = ask_nvidia()
    assert (problem, nvml.num_open) == ("", 0)
    assert [(gpu.name, gpu.memory_bytes) for gpu in found] == [
        ("MIG-a0", 20 * GB),
        ("MIG-a2", 10 * GB),
        ("1", 80 * GB),
        ("2", None),
    ]
    assert found == list_gpus(nvml)


@pytest.mark.parametrize(
    ("specs", "environ", "names"),
    [
        (ALIKE, {}, ["0", "1", "2"]),
        (ALIKE, chosen("2, 0"), ["2", "0"]),
        (ALIKE, chosen("GPU-c,1"), ["GPU-c", "1"]),
        (ALIKE, chosen("1,-1,0"), ["1"]),
        (ALIKE, chosen("0,,1"), ["0"]),
        (ALIKE, chosen("-1"), []),
        (ALIKE, chosen(""), []),
        (SLICED, {}, ["MIG-a0", "MIG-a2", "1"]),
        (SLICED, chosen("MIG-a2,1"), ["MIG-a2", "1"]),
        ([], {}, []),
        ([], {"HIP_VISIBLE_DEVICES": "0,1"}, ["0", "1"]),
    ],
)
def test_visible(
    specs: list[Spec], environ: Mapping[str, str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, specs)
    assert list(visible_gpus(environ).names) == names


@pytest.mark.parametrize(
    ("specs", "environ", "num_ranks", "num_stages"),
    [
        (ALIKE, {}, 1, 3),
        (ALIKE, {}, 2, 1),
        (ALIKE, chosen("1,-1,0"), 1, 1),
        (SLICED, {}, 1, 3),
        (UNIFIED, {}, 1, 1),
        ([], {}, 1, 0),
        ([], {"HIP_VISIBLE_DEVICES": "0,1"}, 1, 2),
    ],
)
def test_as_many_stages_as_gpus(
    specs: list[Spec],
    environ: Mapping[str, str],
    num_ranks: int,
    num_stages: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, specs)
    assert count_stages(environ, is_cpu=False, num_ranks=num_ranks) == num_stages
    assert count_stages(environ, is_cpu=True, num_ranks=num_ranks) == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0,0", "CUDA_VISIBLE_DEVICES=0,0 names 0 twice, and shows no GPU for that"),
        ("0,GPU-a", "names one GPU twice, as 0 and as GPU-a: 0 (L4, 24.0 GB)"),
        ("3", "names 3, this machine has 0 (L4, 24.0 GB) GPU-a, 1 (L4"),
        ("GPU-x", "names GPU-x, this machine has"),
        ("GPU-", "GPU- is the beginning of several UUIDs"),
        ("all", "names all, this machine has"),
    ],
)
def test_names_that_do_not_do(value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ALIKE)
    for ask in (visible_gpus, gpu_memory_bytes):
        with pytest.raises(ConfigError) as caught:
            ask(chosen(value))
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("specs", "environ", "expected"),
    [
        (MIXED, {}, [16, 80, 24]),
        (MIXED, chosen("2,1", **BY_BUS), [24, 80]),
        (MIXED, chosen("GPU-c,GPU-a"), [24, 16]),
        (ALIKE, chosen("2,1"), [24, 24]),
        (SLICED, {}, [20, 10, 80]),
        (SLICED, chosen("0"), [20]),
        (SLICED, chosen("MIG-a2"), [10]),
        ([*UNIFIED, *ALIKE], chosen("GPU-b"), [24]),
    ],
)
def test_memory(
    specs: list[Spec], environ: Mapping[str, str], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, specs)
    assert gpu_memory_bytes(environ) == [each * GB for each in expected]


@pytest.mark.parametrize(
    ("specs", "failing", "environ", "said"),
    [
        (UNIFIED, "", {}, "GPU 0 (GB10) has no memory of its own, it shares the machine's"),
        (MIXED, "", chosen("0,1"), "set CUDA_DEVICE_ORDER=PCI_BUS_ID here and for the stages, name them by UUID"),
        (ALIKE, "", chosen("-1"), "CUDA_VISIBLE_DEVICES=-1 shows no GPU"),
        (ALIKE, "nvmlInit", {}, "NVIDIA's library says: Driver Not Loaded"),
        (ALIKE, "nvmlDeviceGetHandleByIndex", {}, "NVIDIA's library says of a GPU: Driver Not Loaded"),
        ([], "", {}, "NVIDIA's library lists none"),
    ],
)
def test_no_figure(
    specs: list[Spec], failing: str, environ: Mapping[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = install(monkeypatch, specs, failing)
    with pytest.raises(ConfigError) as caught:
        gpu_memory_bytes(environ)
    text = str(caught.value)
    assert said in text
    assert "--memory 24GiB" in text
    assert ("CUDA_VISIBLE_DEVICES" in text) == ("CUDA_VISIBLE_DEVICES" in environ), "never blames what is not set"
    assert nvml.num_open == 0


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(gpus, "amd_cards", lambda: ["card0 (17.2 GB)"])
    with pytest.raises(ConfigError, match=r"pip install nvidia-ml-py.* AMD's card0 \(17\.2 GB\).* --memory 24GiB"):
        gpu_memory_bytes({})
    assert visible_gpus(chosen("0,1")).names == ("0", "1"), "what a person says is believed"
    with pytest.raises(ConfigError, match=r"2 stages need 2 GPUs, one each: none was found: .*pip install") as caught:
        assign_resources(2, {}, is_cpu=False)
    assert "set HIP_VISIBLE_DEVICES" in str(caught.value)


def test_stages_take_them_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, MIXED)
    assert [each.environ for each in assign_resources(2, {}, is_cpu=False)] == [
        {"CUDA_VISIBLE_DEVICES": "0", **BY_BUS},
        {"CUDA_VISIBLE_DEVICES": "1", **BY_BUS},
    ]
    own_order = assign_resources(2, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, is_cpu=False)
    assert own_order[1].environ == {"CUDA_VISIBLE_DEVICES": "1"}
    hip = assign_resources(1, {"HIP_VISIBLE_DEVICES": "1,0"}, is_cpu=False, num_ranks=2)
    assert hip[0].environ == {"HIP_VISIBLE_DEVICES": "1,0"}
    with pytest.raises(ConfigError, match=r"this machine has 3 \(0 \(T4, 16\.0 GB\), 1 \(H100"):
        assign_resources(4, {}, is_cpu=False)


def test_cards_that_the_kernel_lists(tmp_path: Path) -> None:
    for name, vendor, memory in (
        ("card0", "0x1002", "17163091968"),
        ("card1", "0x8086", "1"),
        ("card2", "0x1002", "x"),
    ):
        device = tmp_path / name / "device"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "mem_info_vram_total").write_text(f"{memory}\n")
    assert amd_cards(tmp_path) == ["card0 (17.2 GB)"]
    assert amd_cards(tmp_path / "none") == []
