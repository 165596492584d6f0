"""The manual launch of docs/guide/by-hand.md, typed as it stands there, with only the model's path replaced; and the
network variant.

Each stage is one shell command in its own network namespace or on one host. The ports are the page's own, so on one
host they run in a namespace of their own too when that is possible; else on this host, where they must be free.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from stagewire.observe.status_events import LAUNCHER_SOCKET_ENV, Phase, StatusReceiver
from support.models import make_llama
from support.stages import VLLM, Process, StageFailedError, start

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "by-hand.md"
PLACEHOLDER = "/path/to/Llama-3-8B"
# vLLM's switch for small machines: the commands compile as typed, with torch's eager backend instead of a C++ compiler.
ENVIRONMENT = {"VLLM_CPU_CI_ENV": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
DEADLINE_S = 240.0

can_make_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama32"), model_dir)


def typed_commands() -> list[str]:
    """The four launches of the page, and the request."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    launches = [block for block in blocks if block.startswith("CUDA_VISIBLE_DEVICES=")]
    (request,) = [block for block in blocks if block.startswith("curl ") and "San Francisco is a" in block]
    assert len(launches) == 4
    return [*launches, request]


@dataclass
class Host:
    """A network namespace, or this host (`name` None)."""

    name: str | None

    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.name] if self.name else []


class Launch:
    """Shell commands as typed, watched by status messages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        self.receiver = StatusReceiver(str(folder / "s"))
        self.ready: set[int] = set()
        self.lines: dict[int, str] = {}

    def type(self, command: str, host: Host, *, is_forked: bool) -> Process:
        """``is_forked``: from a process that has imported vLLM, without a shell; else as it stands."""
        index = len(self.processes)
        env = {**ENVIRONMENT, LAUNCHER_SOCKET_ENV: self.receiver.path}
        log = self.folder / f"{index}.log"
        words = ["bash", "-c", f"exec env {command}"]
        if is_forked:
            assignment, program, *arguments = shlex.split(command.replace("\\\n", " "))
            name, _, value = assignment.partition("=")
            assert (name, program) == ("CUDA_VISIBLE_DEVICES", "vllm")
            words, env = [VLLM, *arguments], {**env, name: value}
        process = start(f"command {index}", words, log, env, host.name)
        self.processes.append(process)
        return process

    def wait(self, is_true: object) -> None:
        assert callable(is_true)
        ends_at = time.monotonic() + DEADLINE_S
        while not is_true():
            dead = [process for process in self.processes if process.popen.poll() is not None]
            if dead or time.monotonic() > ends_at:
                raise StageFailedError("\n".join(f"{p.name}:\n{p.text()[-2500:]}" for p in dead or self.processes))
            select.select([self.receiver], [], [], 0.3)
            self.ready |= {event.stage for event in self.receiver.receive() if event.phase is Phase.READY}

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill_group()
        self.receiver.close()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    made = Launch(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def namespaces() -> Iterator[list[Host]]:
    """Four hosts, 10.77.0.1 to .4, joined by veth pairs to one bridge (in a fifth namespace)."""
    switch = f"swx{os.getpid()}"
    names = [f"sw{index}x{os.getpid()}" for index in range(4)]
    commands = [f"ip netns add {switch}", f"ip -n {switch} link add br0 type bridge", f"ip -n {switch} link set br0 up"]
    for index, name in enumerate(names):
        commands += [
            f"ip netns add {name}",
            f"ip link add e{index} netns {name} type veth peer name p{index} netns {switch}",
            f"ip -n {switch} link set p{index} master br0 up",
            f"ip -n {name} addr add 10.77.0.{index + 1}/24 dev e{index}",
            f"ip -n {name} link set e{index} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for command in commands:
            subprocess.run(shlex.split(command), check=True, capture_output=True)
        yield [Host(name) for name in names]
    finally:
        for name in [*names, switch]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ask(command: str, host: Host) -> str:
    done = subprocess.run(
        [*host.prefix(), "bash", "-c", command], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def serve(
    launch: Launch, commands: Sequence[str], hosts: Sequence[Host], order: Sequence[int], *, is_forked: bool = False
) -> None:
    """Types the commands in ``order``, each when the one before has bound its port."""
    for stage in order:
        process = launch.type(commands[stage], hosts[stage], is_forked=is_forked)
        if stage != 0:
            launch.wait(lambda process=process: "listening on" in process.text())
    launch.wait(lambda: launch.ready == set(range(4)))
    launch.wait(lambda: any("Application startup complete" in p.text() for p in launch.processes))


def with_model(model: Path) -> list[str]:
    return [command.replace(PLACEHOLDER, str(model)) for command in typed_commands()]


def check_answer(text: str) -> None:
    assert '"completion_tokens":50' in text.replace(" ", ""), text


@pytest.mark.parametrize(
    "order",
    [
        pytest.param((0, 1, 2, 3), id="in order"),
        # A minute each, as are the tests with several hosts.
        pytest.param((3, 2, 1, 0), id="last first", marks=pytest.mark.slow),
    ],
)
def test_typed_commands_on_one_host(
    order: tuple[int, ...], launch: Launch, model: Path, request: pytest.FixtureRequest
) -> None:
    """Stages 0, 1 and 2 share port 15550."""
    can_isolate = os.geteuid() == 0 and shutil.which("ip") is not None
    host = request.getfixturevalue("namespaces")[0] if can_isolate else Host(None)
    *commands, request_line = with_model(model)
    serve(launch, commands, [host] * 4, order)
    for stage, layers in enumerate(("0-7", "8-15", "16-23", "24-31")):
        text = launch.processes[order.index(stage)].text()
        assert re.search(rf"^Stage {stage}: Loading layers {layers}\.\.\. \(\d+\.\d\d GB\)$", text, re.MULTILINE)
    check_answer(ask(request_line, host))


def network_commands(model: Path, addresses: Sequence[str]) -> list[str]:
    """The page's commands with each predecessor's address on the network instead of loopback."""
    *commands, request_line = with_model(model)
    changed = [
        re.sub(r"(--pipeline-prev-stage-(?:service-)?addr) 127\.0\.0\.1:", rf"\1 {addresses[stage - 1]}:", command)
        for stage, command in enumerate(commands)
    ]
    return [*changed, request_line]


@pytest.mark.slow
@can_make_namespaces
def test_each_stage_on_its_own_host(launch: Launch, model: Path, namespaces: list[Host]) -> None:
    *commands, request_line = network_commands(model, [f"10.77.0.{stage + 1}" for stage in range(4)])
    serve(launch, commands, namespaces, (2, 0, 3, 1), is_forked=True)
    bound = [re.findall(r"listening on (\S+)", process.text())[0] for process in launch.processes]
    assert sorted(bound) == ["10.77.0.1:15550", "10.77.0.2:15550", "10.77.0.3:15550", "10.77.0.4:15554"]
    check_answer(ask(request_line, namespaces[0]))


@pytest.mark.slow
@can_make_namespaces
def test_two_stages_on_each_of_two_hosts(launch: Launch, model: Path, namespaces: list[Host]) -> None:
    """Stages 0 and 1 share a port of host A, 2 and 3 have one each on host B; LAN addresses everywhere."""
    hosts = [namespaces[0], namespaces[0], namespaces[1], namespaces[1]]
    *commands, request_line = network_commands(model, ["10.77.0.1", "10.77.0.1", "10.77.0.2", "10.77.0.2"])
    serve(launch, commands, hosts, (3, 1, 2, 0), is_forked=True)
    check_answer(ask(request_line, hosts[0]))
