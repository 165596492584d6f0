"""Cores that are kept from halting: held while steps come, let go a second after the last."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from stagewire.vllm_plugin.member import awake
from stagewire.vllm_plugin.member.awake import LET_HALT_ENV, LINGER_S, AwakeCores


@pytest.fixture
def latency_file(tmp_path: Path) -> Path:
    path = tmp_path / "cpu_dma_latency"
    path.touch()
    return path


def num_open(path: Path) -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link) == str(path) for link in links)


def test_held_from_the_first_step_until_a_second_after_the_last(latency_file: Path) -> None:
    cores = AwakeCores(latency_file)
    cores.release_when_idle(0.0)
    assert num_open(latency_file) == 0
    for now_s in (10.0, 10.5, 11.2):
        cores.hold(now_s)
        cores.release_when_idle(now_s + 0.1)
        assert num_open(latency_file) == 1
    cores.release_when_idle(11.2 + LINGER_S - 0.01)
    assert cores.is_held
    cores.release_when_idle(11.2 + LINGER_S)
    assert not cores.is_held
    assert num_open(latency_file) == 0
    assert latency_file.read_bytes() == struct.pack("=i", 0)


def test_it_is_held_again_by_the_next_step(latency_file: Path) -> None:
    cores = AwakeCores(latency_file)
    cores.hold(0.0)
    cores.release_when_idle(5.0)
    cores.hold(6.0)
    assert num_open(latency_file) == 1


def test_without_the_file_nothing_happens(tmp_path: Path) -> None:
    for path in (None, tmp_path / "absent", tmp_path):
        cores = AwakeCores(path)
        cores.hold(0.0)
        cores.hold(0.1)
        assert not cores.is_held


@pytest.mark.parametrize(
    ("flags", "on_cpu", "variable", "is_wanted"),
    [
        ("fpu hypervisor sse2", True, "", True),
        ("fpu hypervisor sse2", True, "1", False),
        ("fpu hypervisor sse2", False, "", False),
        ("fpu nohypervisor sse2", True, "", False),
        (None, True, "", False),
    ],
)
def test_only_for_layers_on_the_cores_of_a_virtual_machine(
    latency_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: str | None,
    on_cpu: bool,
    variable: str,
    is_wanted: bool,
) -> None:
    cpu_info = tmp_path / "cpuinfo"
    if flags is not None:
        cpu_info.write_text(f"model name\t: a hypervisor's CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(awake, "CPU_INFO_FILE", cpu_info)
    monkeypatch.setattr(awake, "LATENCY_FILE", latency_file)
    monkeypatch.setenv(LET_HALT_ENV, variable)
    cores = AwakeCores.for_stage(on_cpu=on_cpu)
    cores.hold(0.0)
    assert cores.is_held is is_wanted


def test_a_file_that_may_not_be_written_is_left_alone(latency_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "LATENCY_FILE", latency_file)
    monkeypatch.setattr(awake, "_is_virtual", lambda: True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    cores = AwakeCores.for_stage(on_cpu=True)
    cores.hold(0.0)
    assert not cores.is_held
