"""A stage is lost and no request is: one ring of three stages, killed and frozen again and again."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from support.disturbed import Clients, Stream, differences, mixed_bodies
from support.inside import states, until_idle
from support.memory import can_limit, out_of_memory
from support.stages import Ring, process_tree

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANGES = ("0-2", "2-4", "4-6")
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "128", "--max-num-seqs", "16"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "60M", "--block-size", "32", "--shutdown-timeout", "90"),
]
POISON = ("--logits-processors", "support.poison:Poison")
TESTS = str(Path(__file__).parents[1])
BODIES = mixed_bodies(12, seed=5)
CONCURRENCY = 8
SLOW = {"prompt": "Once", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def shared_ring(small_model: Path) -> Iterator[Ring]:
    env = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(filter(None, (TESTS, os.getenv("PYTHONPATH"))))}
    with Ring(small_model, RANGES, [*SETTINGS, *POISON], env) as running:
        yield running


@pytest.fixture
def ring(shared_ring: Ring) -> Ring:
    """Whole, whatever the test before has left of it: a failure stays one test's."""
    dead = [stage for stage, process in enumerate(shared_ring.stages) if process.popen.poll() is not None]
    for stage in dead:
        shared_ring.restart_stage(stage)
    shared_ring.wait_for(lambda: "Application startup complete" in shared_ring.stages[0].text(), 120)
    until(shared_ring, "/ready", 200)
    return shared_ring


def clients(ring: Ring) -> Clients:
    return Clients(ring.url, str(ring.model), BODIES, CONCURRENCY)


@pytest.fixture(scope="module")
def undisturbed(shared_ring: Ring) -> list[Stream]:
    streams = clients(shared_ring).finish()
    assert not [stream.error for stream in streams if stream.error]
    assert differences(clients(shared_ring).finish(), streams) == []  # what follows can tell something
    return streams


def status(ring: Ring, path: str) -> int:
    return httpx.get(ring.url + path, trust_env=False, timeout=10).status_code


def until_draining(ring: Ring, stage: int, deadline_s: float = 60) -> None:
    """The head has heard that a stage is to leave, and lets nobody in."""
    ends_at = time.monotonic() + deadline_s
    while httpx.get(f"{ring.url}/pipeline/status", trust_env=False).json()["stages"][stage]["state"] != "draining":
        assert time.monotonic() < ends_at, f"stage {stage} does not drain"


def until(ring: Ring, path: str, code: int, deadline_s: float = 60) -> None:
    """Each question is a request, which is what makes the time pass."""
    ends_at = time.monotonic() + deadline_s
    while status(ring, path) != code:
        assert time.monotonic() < ends_at, f"{path} is not {code}"


@pytest.mark.parametrize(("stage", "num_tokens"), [(1, 1), (2, 200)])
def test_a_killed_stage_loses_no_request(
    ring: Ring, undisturbed: list[Stream], say: Callable[[str], None], stage: int, num_tokens: int
) -> None:
    running = clients(ring)
    running.wait_for_tokens(num_tokens)
    os.kill(ring.worker_pid(stage), signal.SIGKILL)
    killed_at = time.monotonic()
    until(ring, "/ready", 503)
    noticed_s = time.monotonic() - killed_at
    assert noticed_s < 2
    assert status(ring, "/health") == status(ring, "/live") == 200
    again = ring.restart_stage(stage)
    ring.wait_for(lambda: f"Stage {stage}: loaded layers" in again.text(), 120)
    loaded_s = time.monotonic() - killed_at
    running.wait_for_tokens(1)
    back_s = time.monotonic() - killed_at
    assert differences(running.finish(), undisturbed) == []
    until(ring, "/ready", 200)
    say(
        f"stage {stage} killed after {num_tokens} tokens: noticed {noticed_s:.2f} s later, loaded again {loaded_s:.1f} "
        f"s, next token {back_s:.1f} s: {back_s - loaded_s:.1f} s after it had loaded"
    )


def test_a_killed_tail_loses_no_grammar(ring: Ring, undisturbed: list[Stream]) -> None:
    """All requests that run are constrained: bitmasks are on their way, and one grammar more is being compiled."""
    constrained = [index for index, body in enumerate(BODIES) if "structured_outputs" in body]
    bodies = [BODIES[index] for index in constrained] * 4
    running = Clients(ring.url, str(ring.model), bodies, len(bodies))
    running.wait_for_tokens(len(bodies))
    os.kill(ring.worker_pid(2), signal.SIGKILL)
    late = Clients(ring.url, str(ring.model), [{**bodies[0], "structured_outputs": {"regex": r"[a-z ]{40,81}"}}], 1)
    ring.restart_stage(2)
    assert differences(running.finish(), [undisturbed[index] for index in constrained] * 4) == []
    (answer,) = late.finish()
    assert not answer.error
    assert re.fullmatch(r"[a-z ]{40,81}", answer.text)


@pytest.mark.skipif(not can_limit(), reason="needs the right to make a memory cgroup: root, or a delegated one")
def test_a_stage_that_the_kernel_ends_for_its_memory(ring: Ring, undisturbed: list[Stream]) -> None:
    running = clients(ring)
    running.wait_for_tokens(60)
    with out_of_memory(ring.worker_pid(1)):
        assert ring.stages[1].wait(60) == -signal.SIGKILL
    ring.restart_stage(1)
    assert differences(running.finish(), undisturbed) == []


def test_a_loss_while_idle_leaves_no_cached_prefix_behind(ring: Ring, undisturbed: list[Stream]) -> None:
    """The head's prefix cache knows blocks that the new stage has never computed."""
    assert differences(clients(ring).finish(), undisturbed) == []
    os.kill(ring.worker_pid(2), signal.SIGKILL)
    until(ring, "/ready", 503)
    ring.restart_stage(2)
    until(ring, "/ready", 200)
    assert differences(clients(ring).finish(), undisturbed) == []


def test_two_stages_at_once(ring: Ring, undisturbed: list[Stream]) -> None:
    running = clients(ring)
    running.wait_for_tokens(60)
    for stage in (1, 2):
        os.kill(ring.worker_pid(stage), signal.SIGKILL)
    for stage in (2, 1):
        ring.restart_stage(stage)
    assert differences(running.finish(), undisturbed) == []


def test_a_second_loss_in_the_middle_of_the_recovery(ring: Ring, undisturbed: list[Stream]) -> None:
    """Of the stage that starts, while it loads; then of another one, while the first catches up."""
    running = clients(ring)
    running.wait_for_tokens(60)
    os.kill(ring.worker_pid(1), signal.SIGKILL)
    until(ring, "/ready", 503)
    again = ring.restart_stage(1)
    ring.wait_for(lambda: "Stage 1: Loading layers" in again.text(), 60)
    os.kill(ring.worker_pid(1), signal.SIGKILL)
    again = ring.restart_stage(1)
    ring.wait_for(lambda: "catching up: initialize_from_config" in again.text(), 60)
    os.kill(ring.worker_pid(2), signal.SIGKILL)
    ring.restart_stage(2)
    assert differences(running.finish(), undisturbed) == []


def test_a_frozen_stage_takes_part_again(ring: Ring, undisturbed: list[Stream]) -> None:
    running = clients(ring)
    running.wait_for_tokens(60)
    os.kill(ring.worker_pid(1), signal.SIGSTOP)
    until(ring, "/ready", 503)
    os.kill(ring.worker_pid(1), signal.SIGCONT)
    assert differences(running.finish(), undisturbed) == []


@pytest.mark.slow
def test_a_stage_that_is_frozen_for_a_minute(ring: Ring, undisturbed: list[Stream]) -> None:
    running = clients(ring)
    running.wait_for_tokens(60)
    os.kill(ring.worker_pid(2), signal.SIGSTOP)
    time.sleep(60)
    os.kill(ring.worker_pid(2), signal.SIGCONT)
    assert differences(running.finish(), undisturbed) == []


@pytest.mark.slow
def test_a_stage_that_is_busy_for_a_minute_is_not_lost(ring: Ring, undisturbed: list[Stream]) -> None:
    """One step of the tail takes a minute; steps like it took milliseconds before."""
    epoch = httpx.get(f"{ring.url}/pipeline/status", trust_env=False).json()["epoch"]
    running = clients(ring)
    slow = {"prompt": "Once", "max_tokens": 1, "temperature": 0, "vllm_xargs": {"poison": "60"}}
    began = time.monotonic()
    (answer,) = Clients(ring.url, str(ring.model), [slow], 1).finish()
    assert time.monotonic() - began > 60
    assert answer.finish_reason == "length", answer
    assert differences(running.finish(), undisturbed) == []
    assert httpx.get(f"{ring.url}/pipeline/status", trust_env=False).json()["epoch"] == epoch


def test_a_request_that_fails_its_step_twice_is_failed_alone(ring: Ring, undisturbed: list[Stream]) -> None:
    poisoned = {"prompt": "Once", "max_tokens": 5, "temperature": 0, "vllm_xargs": {"poison": "yes"}}
    running = clients(ring)
    running.wait_for_tokens(60)
    (answer,) = Clients(ring.url, str(ring.model), [poisoned], 1).finish()
    assert answer.error
    assert answer.token_ids == []
    found = running.finish()
    assert differences(found, undisturbed) == []
    assert [stage.popen.poll() for stage in ring.stages] == [None] * 3
    assert "stage 2 failed step" in ring.stages[2].text()
    assert re.search(
        r"Stage 0: request cmpl-\S+ is given up, stages fail of it: stage 2 failed step \d+: ", ring.stages[0].text()
    )


def test_a_stage_that_is_told_to_stop_drains(ring: Ring, undisturbed: list[Stream], say: Callable[[str], None]) -> None:
    """Who runs on it ends there; who waits is answered by the one after it; nobody is computed again."""
    model = str(ring.model)
    expected = Clients(ring.url, model, [SLOW], 1).finish()
    running = clients(ring)
    running.wait_for_tokens(60)
    longer = Clients(ring.url, model, [{**SLOW, "vllm_xargs": {"poison": "0.1"}}], 1)  # 6 s
    longer.wait_for_tokens(2)
    leaving = ring.stages[1]
    os.kill(ring.worker_pid(1), signal.SIGTERM)
    told_at = time.monotonic()
    until_draining(ring, 1)
    late = Clients(ring.url, model, [SLOW], 1)
    assert leaving.popen.wait(90) == 0
    drained_s = time.monotonic() - told_at
    assert "requests wait for the next one" not in leaving.text()
    assert longer.finish()[0].finish_reason == "length"
    assert late.num_open == 1, "it was let in: this shows nothing"
    ring.restart_stage(1)
    assert differences(running.finish(), undisturbed) == []
    assert differences(late.finish(), expected) == []
    assert "all stages know the live requests again: 0" in ring.stages[0].text()
    say(f"told to stop it left after {drained_s:.1f} s, without a request; the late one waited for the next one")


def test_a_drain_that_runs_out_loses_no_request(ring: Ring, undisturbed: list[Stream]) -> None:
    """Who has not ended by then is computed again by the next one."""
    ring.own = {1: ("--shutdown-timeout", "1")}
    ring.stages[1].popen.kill()
    ring.restart_stage(1)
    until(ring, "/ready", 503)
    until(ring, "/ready", 200)
    expected = Clients(ring.url, str(ring.model), [SLOW], 1).finish()
    running = clients(ring)
    running.wait_for_tokens(60)
    longer = Clients(ring.url, str(ring.model), [{**SLOW, "vllm_xargs": {"poison": "0.1"}}], 1)  # 6 s
    longer.wait_for_tokens(2)
    leaving = ring.stages[1]
    os.kill(ring.worker_pid(1), signal.SIGTERM)
    assert leaving.wait() == 0
    assert re.search(r"[1-9]\d* requests wait for the next one", leaving.text())
    ring.own = {}
    ring.restart_stage(1)
    assert differences(running.finish(), undisturbed) == []
    assert differences(longer.finish(), expected) == []


def test_a_standby_takes_over(ring: Ring, undisturbed: list[Stream], say: Callable[[str], None]) -> None:
    standby = ring.start_stage(2, [*ring.command(2), "--pipeline-standby"])
    ring.wait_for(lambda: "Stage 2: loaded layers" in standby.text(), 120)
    ring.stages.remove(standby)
    running = clients(ring)
    running.wait_for_tokens(60)
    ring.stages[2].popen.kill()
    killed_at = time.monotonic()
    until(ring, "/ready", 503)
    until(ring, "/ready", 200)
    whole_s = time.monotonic() - killed_at
    running.wait_for_tokens(1)
    say(f"its standby takes over: whole after {whole_s:.1f} s, next token {time.monotonic() - killed_at:.1f} s later")
    ring.stages[2].wait()
    ring.stages[2] = standby
    assert differences(running.finish(), undisturbed) == []


def test_nothing_is_left_behind(ring: Ring) -> None:
    until(ring, "/ready", 200)
    until_idle(ring)
    assert len({state["num_kv_blocks"] for state in states(ring)}) == 1


def test_a_new_head_finds_its_stages_waiting(ring: Ring, undisturbed: list[Stream]) -> None:
    """They have answered its start-up calls before, for another head."""
    running = clients(ring)
    running.wait_for_tokens(60)
    workers = [ring.stages[stage].pid for stage in (1, 2)]
    for pid in process_tree(ring.stages[0].pid):
        os.kill(pid, signal.SIGKILL)
    assert all(stream.error or stream.finish_reason for stream in running.finish())
    ring.own = {0: ("--shutdown-timeout", "0")}
    ring.restart_stage(0)
    ring.wait_for(lambda: "Application startup complete" in ring.stages[0].text(), 120)
    assert [ring.stages[stage].pid for stage in (1, 2)] == workers
    assert all(ring.stages[stage].popen.poll() is None for stage in (1, 2))
    assert differences(clients(ring).finish(), undisturbed) == []


def test_a_head_that_is_told_to_stop_while_a_stage_is_lost_takes_the_others_along(ring: Ring) -> None:
    """Last in this file: the ring is gone afterwards."""
    running = clients(ring)
    running.wait_for_tokens(60)
    ring.stages[2].popen.kill()
    until(ring, "/ready", 503)
    os.kill(ring.stages[0].pid, signal.SIGTERM)
    assert ring.stages[0].wait() == 0
    assert ring.stages[1].wait() == 0
    assert all(stream.error or stream.finish_reason for stream in running.finish())
