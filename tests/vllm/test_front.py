"""The quick start's HTTP entry point with real stages: one pipeline of two, shared by the tests of this file.

The last tests kill a stage and the launcher, so the order of the file matters.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from support.api import strict_client
from support.launcher import Up, stages_of
from support.models import make_llama
from support.stages import free_ports, process_tree

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TOOL = Path(__file__).parents[2] / "tools" / "offline_pipelining" / "http_index.py"
STAGEWIRE = str(Path(sys.executable).parent / "stagewire")
START_DEADLINE_S = 240.0
DEADLINE_S = 30.0
KEY = "sesame"
SETTINGS = [
    *("--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", "50M", "--dtype", "float32"),
    *("--api-key", KEY),
]


@dataclass
class Pipeline:
    model: Path
    up: Up
    port: int
    api_port: int

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def client(self, url: str | None = None) -> openai.OpenAI:
        return strict_client(url or self.url, KEY)

    def stream(self, max_tokens: int) -> openai.Stream[Any]:
        options: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
        prompt = "San Francisco is a"
        made: openai.Stream[Any] = self.client().completions.create(
            model=str(self.model), prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True, **options
        )
        return made

    def metric(self, name: str) -> float:
        """As the head counts, not the front."""
        text = httpx.get(f"http://localhost:{self.api_port}/metrics", trust_env=False).text
        (line,) = [each for each in text.splitlines() if each.startswith(f"vllm:{name}{{")]
        return float(line.split()[-1])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Pipeline]:
    model = make_llama(tmp_path_factory.mktemp("llama8"), model_dir, num_layers=8)
    port, api_port, base_port = free_ports(3)
    ports = ("--port", str(port), "--api-port", str(api_port), "--base-port", str(base_port))
    command = [sys.executable, str(TOOL), "--model", str(model), "--num-stages", "2", *ports, "--", *SETTINGS]
    up = Up(command, tmp_path_factory.mktemp("run"), {})
    try:
        up.read_until(f"Serving {model} at http://localhost:{port}", START_DEADLINE_S)
        yield Pipeline(model, up, port, api_port)
    finally:
        if up.popen.poll() is None:
            up.popen.send_signal(signal.SIGTERM)
        up.wait()
    assert not stages_of(model), "nothing is left behind"


def until(is_true: Callable[[], bool], what: str) -> None:
    """Asks again and again; each question is a request, which is what makes the time pass."""
    ends_at = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < ends_at, f"{what}: not within {DEADLINE_S:g} s"


def test_requests_and_streams_are_the_heads(pipeline: Pipeline) -> None:
    for path in ("/health", "/ready", "/live", "/metrics", "/version"):
        assert httpx.get(pipeline.url + path, trust_env=False).status_code == 200, path
    assert httpx.get(f"{pipeline.url}/v1/models", trust_env=False).status_code == 401
    direct = pipeline.client(f"http://localhost:{pipeline.api_port}")
    answers = [
        client.completions.create(model=str(pipeline.model), prompt="San Francisco is a", max_tokens=50, temperature=0)
        for client in (pipeline.client(), direct)
    ]
    assert answers[0].choices == answers[1].choices
    streamed = list(pipeline.stream(50))
    assert len(streamed) > 40, "the tokens did not come one by one"
    assert "".join(event.choices[0].text for event in streamed).startswith(answers[0].choices[0].text)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        pipeline.client().completions.create(model="another", prompt="x")


def test_a_client_that_hangs_up_frees_its_request(pipeline: Pipeline) -> None:
    before = pipeline.metric("generation_tokens_total")
    stream = pipeline.stream(2000)
    next(iter(stream))
    assert pipeline.metric("num_requests_running") == 1
    stream.close()
    until(lambda: pipeline.metric("num_requests_running") == 0, "the head still runs a request whose client is gone")
    # It ended because nobody waits for it, long before its 2000 tokens.
    assert pipeline.metric("generation_tokens_total") - before < 1000


def status(*arguments: str) -> tuple[int, str]:
    found = subprocess.run(
        [STAGEWIRE, "status", *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert not found.stderr
    return found.returncode, found.stdout


def test_status_of_every_stage(pipeline: Pipeline, say: Callable[[str], None]) -> None:
    list(pipeline.stream(100))
    list(pipeline.stream(100))  # reports come once a second
    code, text = status("--url", pipeline.url)
    say("\n".join(["stagewire status", *text.splitlines()]))
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "serving"
    assert re.match(r"\d+ steps, .* decode steps: 1 requests, [\d.]+ ms once round", lines[1])
    assert [line.split()[:3] for line in lines[-2:]] == [["0", "0-4", "serving"], ["1", "4-8", "serving"]]

    code, text = status("--url", f"http://localhost:{pipeline.api_port}", "--json")
    found = json.loads(text)
    assert (code, found["is_ready"]) == (0, True)
    first, last = found["stages"]
    head_pid, worker_pid = _by_index(pipeline.model)
    assert last["pid"] == worker_pid
    assert first["pid"] in process_tree(head_pid)
    assert found["api_server"]["pid"] == head_pid
    assert first["kv_blocks"] == last["kv_blocks"] > 0
    for stage in (first, last):
        assert 100 << 20 < stage["rss_bytes"] < 8 << 30
        assert 0 < stage["compute_ms"] < found["steps"]["round_ms"]
        assert 0 < stage["hop_us"] < 1e6
        assert stage["age_s"] < 5
        assert stage["num_layers"] == 4
        assert stage["last_step"] >= 100
    assert found["steps"]["num_answered"] >= 200


def _by_index(model: Path) -> list[int]:
    pids = {words[words.index("--pipeline-stage-idx") + 1]: pid for pid, words in stages_of(model).items()}
    return [pids["0"], pids["1"]]


def test_a_front_before_a_head_that_runs_already(pipeline: Pipeline, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    head = f"http://localhost:{pipeline.api_port}"
    front = Up([STAGEWIRE, "front", "--head", head, "--port", str(port)], tmp_path, {})
    try:
        front.read_until("is the front of", DEADLINE_S)
        assert httpx.get(f"http://localhost:{port}/ready", trust_env=False).status_code == 200
        assert pipeline.client(f"http://localhost:{port}").models.list().data[0].id == str(pipeline.model)
    finally:
        front.popen.send_signal(signal.SIGTERM)
        code = front.wait()
    assert code == 0
    assert httpx.get(f"{pipeline.url}/ready", trust_env=False).status_code == 200, "it stopped what it did not start"


def test_a_lost_stage_ends_readiness_and_no_stream(pipeline: Pipeline) -> None:
    events = iter(pipeline.stream(600))
    next(events)
    os.kill(_by_index(pipeline.model)[1], signal.SIGKILL)
    with httpx.Client(trust_env=False) as client:
        until(lambda: client.get(f"{pipeline.url}/ready").status_code == 503, "the front is not ready")
        assert sum(1 for _ in events) >= 600 - 2
        until(lambda: client.get(f"{pipeline.url}/ready").status_code == 200, "the front is ready again")
    pipeline.up.read_until("serving again", DEADLINE_S)
    assert "stage 1 was killed by SIGKILL" in pipeline.up.text


def test_stages_end_when_their_launcher_was_killed(pipeline: Pipeline) -> None:
    """Last in this file. SIGKILL leaves the launcher no time to stop anything: each stage sees it by itself."""
    running = [os.pidfd_open(pid) for pid in stages_of(pipeline.model)]
    assert len(running) == 2
    # (The launcher stays a zombie until the fixture asks for its exit code.)
    pipeline.up.popen.kill()
    for descriptor in running:
        assert select.select([descriptor], [], [], 30)[0], f"left behind: {stages_of(pipeline.model)}"
        os.close(descriptor)
