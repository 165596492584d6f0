"""A real ring whose connections are protected: by local sockets, and by a key."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from stagewire.ring.transport.security import make_key_file, runtime_folder
from support.models import make_llama
from support.stages import Ring, free_ports, start

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SETTINGS = ("--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", "50M", "--dtype", "float32")
START_DEADLINE_S = 400.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama8"), model_dir, num_layers=8)


def answer(ring: Ring) -> str:
    body = {"model": str(ring.model), "prompt": "The ring goes on", "max_tokens": 8, "temperature": 0}
    response = httpx.post(f"{ring.url}/v1/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def up(ring: Ring, commands: Sequence[list[str]]) -> None:
    for stage, command in enumerate(commands):
        ring.start_stage(stage, command)
    ring.wait_ready(START_DEADLINE_S)


def assert_nobody_listens(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(str(path))


def test_a_ring_with_and_without_a_key(model: Path, tmp_path: Path) -> None:
    key = tmp_path / "ring.key"
    make_key_file(key)
    config = tmp_path / "stage.yaml"
    config.write_text(f"pipeline-key-file: {key}\n")

    local = Ring(model, ("0-4", "4-8"), SETTINGS)
    try:
        up(local, [local.command(0), local.command(1)])
        folder = runtime_folder(os.environ, os.geteuid())
        for port in local.ports:
            assert list(folder.glob(f"127.0.0.1-{port}-*"))
        expected = answer(local)
        assert "NOT PROTECTED" not in local.stages[1].text()
    finally:
        local.stop()
    for port in local.ports:
        for path in folder.glob(f"127.0.0.1-{port}-*"):  # of a process that was killed because its end took too long
            assert_nobody_listens(path)

    keyed = Ring(model, ("0-4", "4-8"), SETTINGS)
    try:
        up(keyed, [[*keyed.command(0), "--pipeline-key-file", str(key)], [*keyed.command(1), "--config", str(config)]])
        assert answer(keyed) == expected
        command = keyed.command(1)
        at = command.index("--pipeline-local-bind-port")
        command[at + 1] = str(free_ports(1)[0])
        stranger = start("no key", command, tmp_path / "stranger.log")
        assert stranger.wait(START_DEADLINE_S) == 2
        assert "the stage there has a key: start this one with the same --pipeline-key-file" in stranger.text()
        assert answer(keyed) == expected
        key.chmod(0o640)
        careless = start("mode", [*command, "--pipeline-key-file", str(key)], tmp_path / "careless.log")
        assert careless.wait(START_DEADLINE_S) == 2
        assert "has mode 0640: others than its owner can use it; chmod 600" in careless.text()
        for stage in keyed.stages:
            assert not any(half in stage.text() for half in key.read_text().split()[-2:])
    finally:
        keyed.stop()
