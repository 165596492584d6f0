"""Cores that are kept from halting: held while steps come, let go a second after the last."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from stagewire.vllm_plugin.member import awake
from stagewire.vllm_plugin.member.awake import KEEP_AWAKE_ENV, LINGER_S, AwakeCores


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


VIRTUAL = "fpu hypervisor sse2"


@pytest.mark.parametrize(
    ("variable", "flags", "on_cpu", "may_write", "is_held", "warning"),
    [
        (None, VIRTUAL, True, True, False, ""),
        ("", VIRTUAL, True, True, False, ""),
        ("0", VIRTUAL, True, True, False, ""),
        ("1", VIRTUAL, True, True, True, ""),
        ("1", VIRTUAL, False, True, False, "the layers are not on the processor"),
        ("1", "fpu nohypervisor sse2", True, True, False, "this is not a virtual machine"),
        ("1", None, True, True, False, "this is not a virtual machine"),
        ("1", VIRTUAL, True, False, False, "cannot be written"),
    ],
)
def test_only_when_asked_for_and_only_on_the_cores_of_a_virtual_machine(
    latency_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    flags: str | None,
    on_cpu: bool,
    may_write: bool,
    is_held: bool,
    warning: str,
) -> None:
    cpu_info = tmp_path / "cpuinfo"
    if flags is not None:
        cpu_info.write_text(f"model name\t: a hypervisor's CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(awake, "CPU_INFO_FILE", cpu_info)
    monkeypatch.setattr(awake, "LATENCY_FILE", latency_file)
    monkeypatch.setattr(os, "access", lambda *_: may_write)
    if variable is None:
        monkeypatch.delenv(KEEP_AWAKE_ENV, raising=False)
    else:
        monkeypatch.setenv(KEEP_AWAKE_ENV, variable)
    warnings: list[str] = []
    monkeypatch.setattr(awake.logger, "warning", lambda text, *args: warnings.append(text % args))
    cores = AwakeCores.for_stage(on_cpu=on_cpu)
    cores.hold(0.0)
    assert cores.is_held is is_held
    assert len(warnings) == bool(warning)
    assert all(f"{KEEP_AWAKE_ENV} has no effect here: " in each and warning in each for each in warnings)
