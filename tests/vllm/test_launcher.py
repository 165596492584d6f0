"""The launcher with real stages: the quick start's script, a stage killed while serving, the ordered stop, a kill."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import pytest

from support.api import strict_client
from support.launcher import Up, stages_of
from support.models import make_llama
from support.stages import free_ports

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parents[2] / "tools" / "offline_pipelining" / "run_from_full_model.sh"
START_DEADLINE_S = 240.0
SETTINGS = ("--", "--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", "50M", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama8"), model_dir, num_layers=8)


@pytest.fixture
def ports() -> tuple[int, int]:
    """For the API, and the first of the ring's."""
    api, base = free_ports(2)
    return api, base


def script_environment(model: Path, api_port: int) -> dict[str, str]:
    # The script looks for .venv, an active environment, and PATH; this is the environment that runs the tests.
    bin_folder = Path(sys.executable).parent
    return {
        "FULL_MODEL_PATH": str(model),
        "NUM_STAGES": "2",
        "API_PORT": str(api_port),
        "VIRTUAL_ENV": str(bin_folder.parent),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }


def test_the_quick_starts_script(model: Path, tmp_path: Path, ports: tuple[int, int]) -> None:
    """From start to end: a first answer, a stage that is lost, and a stop while a client still reads."""
    api_port, base_port = ports
    options = ["--base-port", str(base_port), *SETTINGS, "--shutdown-timeout", "60"]
    up = Up(["bash", str(SCRIPT), *options], tmp_path, script_environment(model, api_port))
    is_told = False
    try:
        up.read_until("Ctrl-C stops everything", START_DEADLINE_S)
        assert f"http://localhost:{api_port}" in up.text
        for stage, layers in enumerate(("0-3", "4-7")):
            log = (tmp_path / "zeromq_pp_full_model_logs" / f"stage_{stage}.log").read_text()
            assert f"Stage {stage}: Loading layers {layers}..." in log
            assert f"loading layers {layers} (0." in up.text.lower()
        served = stages_of(model)
        by_index = {words[words.index("--pipeline-stage-idx") + 1]: pid for pid, words in served.items()}
        assert sorted(by_index) == ["0", "1"]
        client = strict_client(f"http://localhost:{api_port}")

        def ask() -> str:
            answer = client.completions.create(
                model=str(model),
                prompt="San Francisco is a",
                max_tokens=50,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 50
            return str(answer.choices[0].text)

        before = ask()
        os.kill(by_index["1"], signal.SIGKILL)
        up.read_until("stage 1 is started again", START_DEADLINE_S)
        assert "stage 1 was killed by SIGKILL" in up.text
        assert ask() == before  # it waits
        up.read_until("serving again", START_DEADLINE_S)

        stream = client.completions.create(
            model=str(model), prompt="Once", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        up.popen.send_signal(signal.SIGTERM)
        is_told = True
        reasons = [event.choices[0].finish_reason for event in stream]
        assert reasons[-1] == "length"
    finally:
        if not is_told:  # a second time would mean at once
            up.popen.send_signal(signal.SIGTERM)
        code = up.wait()
    assert code == 0, up.text
    assert not stages_of(model), "nothing is left behind"


@pytest.mark.slow
def test_stages_end_when_their_launcher_was_killed(model: Path, tmp_path: Path, ports: tuple[int, int]) -> None:
    """SIGKILL leaves the launcher no time to stop anything: each stage sees it by itself."""
    api_port, base_port = ports
    command = [str(Path(sys.executable).parent / "stagewire"), "up", "--model", str(model), "--num-stages", "2"]
    up = Up([*command, "--port", str(api_port), "--base-port", str(base_port), *SETTINGS], tmp_path, {})
    try:
        up.read_until("Ctrl-C stops everything", START_DEADLINE_S)
        running = [os.pidfd_open(pid) for pid in stages_of(model)]
        assert len(running) == 2
        # (The launcher stays a zombie until this test has asked for its exit code.)
    finally:
        up.popen.kill()
    for descriptor in running:
        assert select.select([descriptor], [], [], 30)[0], f"left behind: {stages_of(model)}"
        os.close(descriptor)
