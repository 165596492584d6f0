"""Stop means stop, and a death is seen: each role of a ring, in each phase, told to stop or killed.

Two tables. What is told to stop ends within three seconds with its documented code, without a traceback; what is killed
is known at once by whoever depends on it, and nobody is left. Neither leaves a process or a folder. A third table is of
heads without an API, whose process is the user's: how long that takes to end, and its traceback, are Python's.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from stagewire.folders import remove_abandoned
from stagewire.observe.status_events import Phase
from stagewire.ring.rules.timeouts import PROBE_PATIENCE_ENV
from support.models import make_llama
from support.stages import START_DEADLINE_S, Process, Ring, process_tree
from support.stages import start as start_process

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
SETTINGS = ("--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "33554432")
TWO_RANKS = ("--tensor-parallel-size", "2")
# Of a whole stop, and of the news of a death.
STOP_LIMIT_S, NEWS_LIMIT_S = 3.0, 1.0


def limit_s(seconds: float) -> float:
    """On a machine whose cores are also busy with something else, as much longer."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.fixture(scope="module")
def model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("stops"), model_dir, num_layers=4)


@pytest.fixture
def place() -> Iterator[Path]:
    """TMPDIR of all stages: what is left there is left behind."""
    folder = Path(tempfile.mkdtemp(prefix="sw-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ring(model: Path, place: Path) -> Iterator[Ring]:
    """Of two stages, none of which is started yet."""
    ring = Ring(model, ["0-2", "2-4"], SETTINGS, {"TMPDIR": str(place)})
    yield ring
    ring.stop()


# ---- phases ----------------------------------------------------------------------------------------------------------


def said(ring: Ring, stage: int, text: str) -> Callable[[], bool]:
    return lambda: text in ring.stages[stage].text()


def heard(ring: Ring, stage: int, phase: Phase) -> Callable[[], bool]:
    return lambda: any(event.stage == stage and event.phase is phase for event in ring.events)


def start(ring: Ring) -> None:
    for stage in range(ring.num_stages):
        ring.start_stage(stage)


def importing(ring: Ring, stage: int) -> None:
    start(ring)
    ring.wait_for(heard(ring, stage, Phase.IMPORTING), START_DEADLINE_S)


def loading(ring: Ring, stage: int) -> None:
    start(ring)
    ring.wait_for(heard(ring, stage, Phase.LOADING), START_DEADLINE_S)


def loaded(ring: Ring, stage: int) -> None:
    start(ring)
    ring.wait_for(heard(ring, stage, Phase.LOADED), START_DEADLINE_S)


def waiting(ring: Ring, stage: int) -> None:
    """For a stage that nobody has started."""
    ring.start_stage(stage)
    ring.wait_for(lambda: f"Stage {stage}: waiting for" in ring.stages[0].text(), START_DEADLINE_S)
    ring.wait_for(heard(ring, stage, Phase.LOADED), START_DEADLINE_S)


def serving(ring: Ring, stage: int) -> None:
    start(ring)
    ring.wait_ready()
    until_ready(ring, 200, START_DEADLINE_S)


def recovering(ring: Ring, stage: int) -> None:
    """From the loss of the other one; of the head all its processes."""
    serving(ring, stage)
    lost = ring.stages[1 - stage]
    for pid in process_tree(lost.pid):
        os.kill(pid, KILL)
    lost.wait()
    if stage == 0:
        until_ready(ring, 503, 30)
    else:
        wait(said(ring, 1, "waiting for stage 0"), 60)


def lingering(ring: Ring, stage: int) -> None:
    serving(ring, stage)
    os.kill(ring.worker_pid(0), KILL)
    until_ready(ring, 503, 30)


def draining(ring: Ring, stage: int) -> None:
    """A request is at the other stage, which does not answer and still does not count as lost."""
    ring.env = {**ring.env, PROBE_PATIENCE_ENV: "60"}
    ring.extra = (*ring.extra, "--shutdown-timeout", "600")
    serving(ring, stage)
    body = {"model": str(ring.model), "prompt": "So", "max_tokens": 200, "ignore_eos": True}
    threading.Thread(target=ask, args=(f"{ring.url}/v1/completions", body), daemon=True).start()
    wait(lambda: metric(ring, "vllm:num_requests_running") == 1, 60)
    os.kill(ring.worker_pid(1 - stage), signal.SIGSTOP)
    os.kill(ring.stages[stage].pid, TERM)
    if stage == 0:  # vLLM ignores what comes before it has begun
        wait(said(ring, 0, "mode=drain"), 60)
    else:  # of two signals that are both on their way the kernel keeps one
        wait(lambda: not is_pending(ring.stages[stage].pid, TERM), 60)


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process has been sent this signal and has not taken it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def ask(url: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(url, json=body, trust_env=False, timeout=600)


def standing_by(ring: Ring, stage: int) -> None:
    serving(ring, stage)
    standby = ring.start_stage(stage, [*ring.command(stage), "--pipeline-standby"])
    ring.wait_for(lambda: f"Stage {stage}: loaded layers" in standby.text(), START_DEADLINE_S)
    ring.stages[stage], ring.stages[-1] = standby, ring.stages[stage]


def wait(is_true: Callable[[], bool], seconds: float) -> None:
    ends_at = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < ends_at, "it did not happen"
        select.select([], [], [], 0.02)


def ready(ring: Ring) -> httpx.Response:
    return httpx.get(f"{ring.url}/ready", trust_env=False, timeout=30)


def metric(ring: Ring, name: str) -> float:
    text = httpx.get(f"{ring.url}/metrics", trust_env=False, timeout=30).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def until_ready(ring: Ring, status: int, seconds: float) -> None:
    wait(lambda: _answers_with(ring, status), seconds)


def _answers_with(ring: Ring, status: int) -> bool:
    """A head that has been started again listens only after its imports."""
    try:
        return ready(ring).status_code == status
    except httpx.ConnectError:
        return False


# ---- told to stop ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """``stage`` is told by ``signals``, one after the other, in ``phase``; it ends with ``code``."""

    stage: int
    phase: Callable[[Ring, int], None]
    signals: Sequence[signal.Signals]
    code: int = 0
    extra: Sequence[str] = ()

    def __str__(self) -> str:
        names = "+".join(number.name for number in self.signals)
        return f"{'head' if self.stage == 0 else 'worker'}-{self.phase.__name__}-{names}{'-ranks' * bool(self.extra)}"


STOPS = [
    *(
        Stop(stage, phase, signals)
        for stage in (0, 1)
        for phase in (importing, loading, loaded, waiting, serving, recovering)
        for signals in ([TERM], [INT], [TERM, TERM])
    ),
    *(Stop(0, lingering, [number], code=1) for number in (TERM, INT)),
    *(Stop(stage, draining, [number]) for stage in (0, 1) for number in (TERM, INT)),
    *(Stop(1, standing_by, [number]) for number in (TERM, INT)),
    *(Stop(stage, phase, [TERM], extra=TWO_RANKS) for stage in (0, 1) for phase in (loading, waiting, serving)),
]
# The rest is of the long run.
SHORT_STOPS = {"head-waiting-SIGTERM"}


def cases(table: Sequence[Any], short: set[str]) -> list[Any]:
    marks = [[] if str(case) in short else [pytest.mark.slow] for case in table]
    return [pytest.param(case, id=str(case), marks=mark) for case, mark in zip(table, marks, strict=True)]


@pytest.mark.parametrize("case", cases(STOPS, SHORT_STOPS))
def test_who_is_told_to_stop_stops(ring: Ring, place: Path, case: Stop) -> None:
    ring.extra = (*ring.extra, *case.extra)
    case.phase(ring, case.stage)
    told = ring.stages[case.stage if len(ring.stages) > 1 else 0]
    tree = [os.pidfd_open(pid) for pid in process_tree(told.pid)]
    text = told.text()
    for number in case.signals:
        told.popen.send_signal(number)
    assert_stops(told, case.code, tree)
    assert "Traceback" not in told.text()[len(text) :], told.text()[-3000:]
    end_all(ring)
    if case.phase is recovering:
        remove_abandoned(str(place))  # what the killed head has left, as its next start would
    assert left_in(place) == []


def assert_stops(told: Process, code: int, tree: Sequence[int]) -> None:
    began = time.monotonic()
    assert told.wait(60) == code, told.text()[-3000:]
    spent_s = time.monotonic() - began
    assert spent_s < limit_s(STOP_LIMIT_S), told.text()[-3000:]
    assert_ended(tree)
    assert re.search(r"Stage \d: .*(told to stop|stopping|EngineCore)", told.text()), told.text()[-3000:]


def assert_ended(tree: Sequence[int]) -> None:
    for descriptor in tree:
        assert select.select([descriptor], [], [], limit_s(NEWS_LIMIT_S))[0], "a process was left behind"
        os.close(descriptor)


def end_all(ring: Ring) -> None:
    """The others, in order too: a stage that waits for the one that is gone is told."""
    for stage in ring.stages:
        for pid in process_tree(stage.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    wait(lambda: all(map(told_again, ring.stages)), 60)


def told_again(process: Process) -> bool:
    """To stop, at last at once, and whether it has."""
    has_ended = process.popen.poll() is not None
    if not has_ended:
        process.popen.terminate()
        select.select([], [], [], 0.2)
    return has_ended


def left_in(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name.startswith("stagewire-"))


# ---- killed ----------------------------------------------------------------------------------------------------------


def api_server(ring: Ring) -> int:
    return ring.stages[0].pid


def engine_core(ring: Ring) -> int:
    return the_one(ring, 0, b"VLLM::EngineCor")


def worker(ring: Ring) -> int:
    return ring.stages[1].pid


def follower(stage: int) -> Callable[[Ring], int]:
    def find(ring: Ring) -> int:
        return the_one(ring, stage, b"_TP1")

    find.__name__ = f"follower_of_{stage}"
    return find


def the_one(ring: Ring, stage: int, title: bytes) -> int:
    """Of a stage's processes, as soon as it has its title."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = [pid for pid in process_tree(ring.stages[stage].pid) if title in cmdline(pid)]
        return bool(found)

    wait(is_there, 60)
    return found[0]


def cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@dataclass(frozen=True)
class Kill:
    """``role`` is killed in ``phase``; stage ``stage`` ends with ``code``, and says why. None: its number is gone."""

    role: Callable[[Ring], int]
    phase: Callable[[Ring, int], None]
    stage: int
    code: int | None
    says: str = ""
    extra: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.role.__name__}-{self.phase.__name__}{'-ranks' * bool(self.extra)}"


ENGINE_KILLED = r"Stage 0: stage 0's EngineCore \(pid \d+\) was killed by SIGKILL"
RANK_KILLED = r"tensor parallel rank 1 \(pid \d+\) was killed by SIGKILL"
KILLS = [
    *(Kill(api_server, phase, 0, -KILL) for phase in (loading, loaded, waiting, serving, recovering)),
    *(Kill(engine_core, phase, 0, 1, ENGINE_KILLED) for phase in (loading, loaded, waiting, serving, recovering)),
    *(Kill(worker, phase, 1, -KILL) for phase in (importing, loading, serving)),
    *(
        Kill(follower(stage), phase, stage, 1, RANK_KILLED, TWO_RANKS)
        for stage in (0, 1)
        for phase in (loaded, serving)
    ),
    *(
        Kill(role, phase, stage, None, "", TWO_RANKS)
        for stage, role in enumerate((engine_core, worker))
        for phase in (loading, serving)
    ),
]
SHORT_KILLS = {"engine_core-serving"}


@pytest.mark.parametrize("case", cases(KILLS, SHORT_KILLS))
def test_who_is_killed_is_missed(ring: Ring, place: Path, case: Kill) -> None:
    ring.extra = (*ring.extra, *case.extra)
    case.phase(ring, case.stage)
    ended = ring.stages[case.stage if len(ring.stages) > 1 else 0]
    killed = case.role(ring)
    tree = [os.pidfd_open(pid) for pid in process_tree(ended.pid)[1:]]
    others = [stage for stage in ring.stages if stage is not ended and stage.popen.poll() is None]
    os.kill(killed, KILL)
    if case.role is engine_core and case.phase is serving:
        until_ready(ring, 503, limit_s(NEWS_LIMIT_S))
        assert "was killed by SIGKILL" in ready(ring).text
        ended.popen.terminate()  # it answers for half a minute
    code = ended.wait(60)
    assert code == case.code or (case.code is None and code), ended.text()[-3000:]
    assert re.search(case.says, ended.text()), ended.text()[-3000:]
    assert_ended(tree)
    assert all(stage.popen.poll() is None for stage in others), "the others wait for its next process"
    if case.phase is serving:
        ring.restart_stage(case.stage)
        until_ready(ring, 200, START_DEADLINE_S)
    end_all(ring)
    remove_abandoned(str(place))  # as the next start would
    assert left_in(place) == []


# ---- a head without an API -------------------------------------------------------------------------------------------

LLM_HEAD = """
import sys
from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError
import stagewire

if __name__ == "__main__":
    model, port, last = sys.argv[1:]
    place = dict(total_stages=2, layer_range="0-2", bind_port=int(port), prev_stage_addr=f"127.0.0.1:{last}")
    llm = LLM(model, **stagewire.head(
        **place, enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=33554432))
    print("GENERATING", flush=True)
    try:
        while True:
            llm.generate(["So"] * 4, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
    except EngineDeadError:
        print("ENGINE DEAD", flush=True)
        sys.exit(5)
"""


@dataclass(frozen=True)
class End:
    """The head or its EngineCore gets a signal; the head ends with ``code`` and says why.

    ``is_bench``: the head is `vllm bench latency` and not a script.
    """

    is_generating: bool
    to: str
    number: signal.Signals
    code: int
    says: str
    is_bench: bool = False

    def __str__(self) -> str:
        phase = "generating" if self.is_generating else "waiting"
        return f"{self.to}-{phase}-{self.number.name}{'-bench' * self.is_bench}"


LLM_ENDS = [
    End(False, "head", INT, -INT, "KeyboardInterrupt"),
    End(False, "head", TERM, -TERM, "its API server is gone|its parent process has ended"),
    End(False, "engine", KILL, 1, "Engine core initialization failed"),
    End(True, "head", INT, -INT, "KeyboardInterrupt"),
    End(True, "head", TERM, -TERM, "its API server is gone"),
    End(True, "engine", KILL, 5, rf"(?s){ENGINE_KILLED}.*ENGINE DEAD"),
    End(False, "head", INT, -INT, "KeyboardInterrupt", is_bench=True),
    End(True, "head", TERM, -TERM, "its API server is gone", is_bench=True),
    End(True, "engine", KILL, 1, rf"(?s){ENGINE_KILLED}.*EngineDeadError", is_bench=True),
]


def bench_command(ring: Ring) -> list[str]:
    vllm, _, model, *flags = ring.command(0)
    at = flags.index("--port")
    del flags[at : at + 2]
    return [
        *(vllm, "bench", "latency", "--model", model, "--enable-prefix-caching"),
        *flags,
        *("--num-iters", "1000", "--output-len", "100"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", LLM_ENDS, ids=str)
def test_a_head_without_an_api_ends(ring: Ring, case: End, tmp_path: Path) -> None:
    """vLLM by itself swallows Ctrl-C while its EngineCore starts, and waits for ever for one that was killed."""
    script = tmp_path / "llm.py"
    script.write_text(LLM_HEAD)
    if case.is_generating:
        ring.start_stage(1)
    by_hand = [sys.executable, str(script), str(ring.model), *map(str, ring.ports)]
    command = bench_command(ring) if case.is_bench else by_hand
    told = start_process("llm", command, tmp_path / "llm.log", ring.env)
    begins = "Warming up" if case.is_bench else "GENERATING"
    try:
        wait(lambda: (begins if case.is_generating else "waiting for") in told.text(), START_DEADLINE_S)
        assert told.popen.poll() is None, told.text()[-3000:]
        tree = process_tree(told.pid)
        engine = next(pid for pid in tree if b"VLLM::EngineCor" in cmdline(pid))
        watched = [os.pidfd_open(pid) for pid in tree[1:]]
        if case.number is INT:  # as a terminal does
            os.killpg(told.pid, INT)
        else:
            os.kill(engine if case.to == "engine" else told.pid, case.number)
        assert told.wait(60) == case.code, told.text()[-3000:]
        assert_ended(watched)
        wait(lambda: re.search(case.says, told.text()) is not None, 5)
    finally:
        told.kill_group()
    if case.is_generating and case.number is INT:
        assert ring.stages[0].wait(30) == 0, "the head has said goodbye, which ends the pipeline"
    elif case.is_generating:
        assert ring.stages[0].popen.poll() is None, "the other stage waits for the next head"
