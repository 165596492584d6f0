"""Wrong pipelines of real processes: the wrong stage exits with both values, the others wait for the corrected one.

All combinations are in tests/unit/test_ring_*.py, in memory; here is what only real processes show: exit codes, what
stands on the screen, and that a stage deep in loading still obeys a refusal.
"""

from __future__ import annotations

import contextlib
import http.server
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from stagewire.checkpoint.index import read_index
from support.models import make_llama
from support.stages import Process, Ring, StageFailedError, free_ports, start

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SETTINGS = ("--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", "50M", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama8"), model_dir, num_layers=8)


def changed(command: list[str], flag: str, value: str) -> list[str]:
    at = command.index(flag)
    return [*command[: at + 1], value, *command[at + 2 :]]


def tuned_copy(model: Path, folder: Path) -> Path:
    """One value of the last norm is another."""
    copy = shutil.copytree(model, folder / "tuned")
    index = read_index(copy)
    assert index is not None
    norm = index.tensors["model.norm.weight"]
    with (copy / norm.file).open("r+b") as stream:
        stream.seek(norm.offset)
        stream.write(b"\x12")
    return copy


def last_lines(process: Process) -> str:
    return "\n".join(process.text().splitlines()[-6:])


def test_wrong_stages_leave_and_the_corrected_one_completes_the_ring(model: Path) -> None:
    ring = Ring(model, ("0-4", "4-8"), SETTINGS)
    try:
        head = ring.start_stage(0)
        right = ring.command(1)
        other_dtype = start("other dtype", changed(right, "--dtype", "bfloat16"), ring.folder / "dtype.log")
        assert other_dtype.wait(150) == 2
        assert "--dtype is bfloat16 on stage 1 but float32 on stage 0" in last_lines(other_dtype)

        gap = start("gap", changed(right, "--pipeline-layer-range", "5-8"), ring.folder / "gap.log")
        assert gap.wait(150) == 2
        assert "layer 4 has no owner" in last_lines(gap)
        length = start("length", changed(right, "--max-model-len", "256"), ring.folder / "length.log")
        assert length.wait(150) == 2
        assert "--max-model-len is 256 on stage 1 but 512 on stage 0" in last_lines(length)
        tuned = start("fine-tune", changed(right, "serve", str(tuned_copy(model, ring.folder))), ring.folder / "ft.log")
        assert tuned.wait(150) == 2
        assert "stage 1 has other weights than stage 0" in last_lines(tuned)
        assert head.popen.poll() is None, "the head waits for the corrected stage"
        for text in (
            "stage 1 has other weights",
            "--dtype is bfloat16",
            "layer 4 has no owner",
            "--max-model-len is 256",
        ):
            assert text in head.text(), "the head says why, too"

        ring.start_stage(1)
        ring.wait_ready()
        second = start("second stage 1", changed(right, "--pipeline-local-bind-port", "0"), ring.folder / "two.log")
        assert second.wait(150) == 2  # port 0
        other_port = str(free_ports(1)[0])
        twin = start("twin", changed(right, "--pipeline-local-bind-port", other_port), ring.folder / "twin.log")
        assert twin.wait(150) == 2
        assert "already a stage 1" in last_lines(twin)

        with contextlib.closing(socket.create_connection(("127.0.0.1", ring.ports[1]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(100_000))
        body = {"model": str(model), "prompt": "The ring goes on", "max_tokens": 4}
        assert httpx.post(f"{ring.url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200
    finally:
        ring.stop()
    assert [stage.popen.returncode for stage in ring.stages] == [0, 0]


@pytest.fixture
def web_server() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,))
    thread.start()
    yield int(server.server_address[1])
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_that_are_somebody_elses(model: Path, web_server: int, tmp_path: Path) -> None:
    """A predecessor that is a web server, a bind port that a web server has, and a predecessor that never comes."""
    ring = Ring(model, ("0-4", "4-8"), SETTINGS)
    right = ring.command(1)
    try:
        no_stage = start(
            "predecessor is a web server",
            changed(right, "--pipeline-prev-stage-service-addr", f"127.0.0.1:{web_server}"),
            tmp_path / "a.log",
        )
        own_port = changed(right, "--pipeline-local-bind-port", str(free_ports(1)[0]))
        alone = start("alone", [*own_port, "--pipeline-start-timeout", "12"], tmp_path / "b.log")
        assert no_stage.wait(120) == 2
        assert f"--pipeline-prev-stage-service-addr 127.0.0.1:{web_server}" in last_lines(no_stage)
        assert alone.wait(120) == 3
        assert f"waited 12 s for stage 0 at 127.0.0.1:{ring.ports[0]}" in last_lines(alone)
        assert "waiting for stage 0" in alone.text(), "it says every 10 s whom it waits for"
        taken = start("port taken", changed(right, "--pipeline-local-bind-port", str(web_server)), tmp_path / "c.log")
        assert taken.wait(120) == 2
        assert f"port {web_server} is taken by another program" in last_lines(taken)
    finally:
        ring.stop()


def test_a_step_past_its_deadline_ends_the_stage_that_has_not_run_it(model: Path) -> None:
    """No stage is lost here: they answer heartbeats, but a step takes longer than it may."""
    ring = Ring(model, ("0-4", "4-8"), [*SETTINGS, "--pipeline-step-timeout", "0.002"])
    try:
        for stage in range(2):
            ring.start_stage(stage)
        with contextlib.suppress(StageFailedError):  # a call may already be too slow for this limit
            ring.wait_ready()
            body = {"model": str(model), "prompt": "word " * 300, "max_tokens": 4}
            with contextlib.suppress(httpx.TimeoutException):  # it waits for the stage to come back
                httpx.post(f"{ring.url}/v1/completions", json=body, timeout=5, trust_env=False)
        assert ring.stages[1].wait(60) == 3
        assert "did not come back within 0.002 s" in ring.stages[0].text()
        assert "stage 0 has ended this stage: stage 1 hangs or is too slow" in last_lines(ring.stages[1])
    finally:
        ring.stop()


def test_head_refuses_with_its_own_exit_code(model: Path, web_server: int, tmp_path: Path) -> None:
    """What EngineCore finds out reaches the person: the API server's process ends with the ring's reason and code."""
    ring = Ring(model, ("0-4", "4-8"), SETTINGS)
    try:
        command = changed(ring.command(0), "--pipeline-prev-stage-addr", f"127.0.0.1:{web_server}")
        head = start("head", command, tmp_path / "head.log")
        assert head.wait(150) == 2
        assert f"--pipeline-prev-stage-addr 127.0.0.1:{web_server}" in last_lines(head)
    finally:
        ring.stop()
