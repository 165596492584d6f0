"""Stages of several tensor parallel ranks, and of different numbers of them: the tokens of one process.

A rank that dies or hangs is its stage's failure: named, with the right exit codes, and nothing is left behind. Each
ring's last test ends it.
"""

from __future__ import annotations

import os
import re
import select
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.cpu import needs_fp8_kv_cache
from support.inside import states, until_idle
from support.models import make_llama
from support.stages import START_DEADLINE_S, Ring, SingleProcess, process_tree
from support.workload import LOGPROB_TOLERANCE, Answer, Lazily, compare, counter, license_text, requests, run, runs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "128", "--max-num-seqs", "16"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "60M", "--block-size", "32"),
]
# On two cores the processes of a ring wait for each other's turns; losses here come from signals, not from silence.
ENV = {"STAGEWIRE_PEER_PATIENCE_S": "30", "VLLM_SERVER_DEV_MODE": "1"}
WORK = requests(16, seed=5, text=license_text(), longest_words=240)
CHOICES = ["permissive", "copyleft"]


@dataclass
class UnevenRing(Ring):
    """``sizes``: tensor parallel ranks of each stage."""

    sizes: list[int] = field(default_factory=list)
    recovery_s: float = 6

    def command(self, stage: int) -> list[str]:
        own = ("--tensor-parallel-size", str(self.sizes[stage]), "--pipeline-recovery-timeout", str(self.recovery_s))
        return [*super().command(stage), *own]

    def follower(self, stage: int, rank: int = 1) -> int:
        title = f"VLLM::Stage{stage}_TP{rank}"
        for pid in process_tree(self.stages[stage].pid):
            if Path(f"/proc/{pid}/cmdline").read_text().startswith(title):
                return pid
        raise AssertionError(f"no process {title} below stage {stage}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama6"), model_dir, num_layers=6)


def ask(url: str, model: Path, **options: Any) -> dict[str, Any]:
    body = {"model": str(model), "prompt": "The licence says", "max_tokens": 16, "return_token_ids": True, **options}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def sampled(url: str, model: Path) -> list[list[int]]:
    """Seeded requests, which draw from generators of their own on every rank of the tail."""
    answers = [ask(url, model, temperature=0.9, top_p=0.9, seed=seed, ignore_eos=True) for seed in range(4)]
    return [answer["choices"][0]["token_ids"] for answer in answers]


@pytest.fixture(scope="module")
def reference(model: Path) -> Iterator[tuple[Lazily, list[list[int]]]]:
    with SingleProcess(model, SETTINGS) as single:
        yield runs(single.url, model, WORK, (8, 1)), sampled(single.url, model)


def assert_same(ring: Ring, reference: Lazily) -> None:
    result = compare(run(ring.url, ring.model, WORK, 8), reference)
    assert not result.wrong, "\n".join(result.wrong)
    assert result.worst_logprob <= LOGPROB_TOLERANCE


def wait_gone(pids: Sequence[int], limit_s: float) -> None:
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([descriptor], [], [], limit_s)[0], f"{pid} is still there"
        os.close(descriptor)


def lose(ring: UnevenRing, stage: int, number: signal.Signals) -> tuple[list[int], httpx.Response]:
    """One more request after ``number`` hit a follower of ``stage``: the pids of its ranks, and the answer."""
    tree = process_tree(ring.worker_pid(stage))
    os.kill(ring.follower(stage), number)
    body = {"model": str(ring.model), "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    return tree, httpx.post(f"{ring.url}/v1/completions", json=body, timeout=60, trust_env=False)


def last_lines(ring: Ring, stage: int) -> str:
    return "\n".join(ring.stages[stage].text().splitlines()[-12:])


# ---- 2, 1, 2 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ring(model: Path) -> Iterator[UnevenRing]:
    with UnevenRing(model, ("0-2", "2-4", "4-6"), SETTINGS, ENV, sizes=[2, 1, 2]) as running:
        yield running


def test_greedy_tokens_equal_one_process(ring: UnevenRing, reference: Any) -> None:
    assert_same(ring, reference[0])


def test_seeded_tokens_equal_one_process(ring: UnevenRing, reference: Any) -> None:
    assert sampled(ring.url, ring.model) == reference[1]


def test_ranks_of_the_tail_stay_together_without_a_seed(ring: UnevenRing) -> None:
    """They draw from generators of their own; if they drew differently the ring would end."""
    answer = ask(ring.url, ring.model, temperature=1.0, n=8)
    assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) > 1


def test_a_grammar_reaches_every_rank_of_the_tail(ring: UnevenRing) -> None:
    answer = ask(ring.url, ring.model, temperature=0, structured_outputs={"choice": CHOICES})
    assert answer["choices"][0]["text"] in CHOICES


def test_every_rank_of_every_stage_answers_calls(ring: UnevenRing) -> None:
    """Ranks of an idle ring. The stages learn of a request's end with the next step, so some milliseconds after it."""
    found = until_idle(ring)
    assert [(state["stage"], state["rank"]) for state in found] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert len({state["num_kv_blocks"] for state in found}) == 1


def test_only_rank_0_says_what_was_loaded(ring: UnevenRing) -> None:
    for stage in ring.stages:
        assert stage.text().count("loaded layers") == 1


def test_shared_memory_of_the_ranks_has_no_name_any_more(ring: UnevenRing) -> None:
    """So that it goes with the last process, however that ends. vLLM's kernels for AVX2 have none: gloo has it all."""
    import torch
    from vllm.platforms import current_platform

    lines = [line for line in Path(f"/proc/{ring.follower(2)}/maps").read_text().splitlines() if "cpushm" in line]
    current_platform.import_kernels()
    assert bool(lines) is hasattr(torch.ops._C, "init_shm_manager")
    assert all(line.endswith("(deleted)") for line in lines), lines


def test_a_killed_rank_is_its_stages_failure_and_the_stage_can_come_back(ring: UnevenRing, reference: Any) -> None:
    tree, response = lose(ring, 2, signal.SIGKILL)
    reason = r"tensor parallel rank 1 \(pid \d+\) was killed by SIGKILL"
    assert response.status_code == 503
    assert re.search(f"stage 2 failed: {reason}", response.json()["error"]["message"])
    assert ring.stages[2].wait(20) == 1
    assert re.search(f"Stage 2: {reason}", last_lines(ring, 2))
    assert re.search(f"stage 2 failed: {reason}", ring.stages[1].text())
    wait_gone(tree, 10)
    again = ring.restart_stage(2)
    ring.wait_for(lambda: "catching up: compile_or_warm_up_model" in again.text(), START_DEADLINE_S)
    ring.wait_for(lambda: httpx.get(f"{ring.url}/ready", trust_env=False).status_code == 200, 60)
    assert_same(ring, reference[0])


def replace(ring: UnevenRing, stage: int, size: int) -> None:
    """By a process with another number of ranks."""
    ring.sizes[stage] = size
    ring.stages[stage].popen.terminate()
    again = ring.restart_stage(stage)
    ring.wait_for(lambda: "catching up: compile_or_warm_up_model" in again.text(), START_DEADLINE_S)
    ring.wait_for(lambda: httpx.get(f"{ring.url}/ready", trust_env=False).status_code == 200, 60)


@pytest.mark.slow
def test_a_stage_is_replaced_by_one_of_another_size(ring: UnevenRing, reference: Any) -> None:
    """2, 1, 2 becomes 2, 2, 2: the KV cache of a rank is another one, its blocks are not."""
    replace(ring, 1, 2)
    assert_same(ring, reference[0])
    found = states(ring)
    assert [(state["stage"], state["rank"]) for state in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({state["num_kv_blocks"] for state in found}) == 1


# ---- 2, 1: the head's own rank -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_head_of_two_ranks(model: Path, reference: Any) -> None:
    with UnevenRing(model, ("0-3", "3-6"), SETTINGS, ENV, sizes=[2, 1]) as ring:
        assert_same(ring, reference[0])
        tree, response = lose(ring, 0, signal.SIGKILL)
        assert response.status_code == 503
        assert "tensor parallel rank 1" in response.json()["error"]["message"]
        assert ring.stages[1].wait(20) == 3
        assert "stage 0 failed: tensor parallel rank 1" in ring.stages[1].text()
        wait_gone(tree, 10)
        ring.stages[0].popen.terminate()
        assert ring.stages[0].wait(20) == 1


# ---- stages of other settings while requests are open ----------------------------------------------------------------


@pytest.mark.slow
def test_stages_are_replaced_by_ones_of_other_sizes_under_load(model: Path, reference: Any) -> None:
    """1, 2, 1 becomes 1, 1, 2, and no request notices."""
    with UnevenRing(model, ("0-2", "2-4", "4-6"), SETTINGS, ENV, sizes=[1, 2, 1], recovery_s=300) as ring:
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(run, ring.url, model, WORK, 8)
            ends_at = time.monotonic() + 60
            while counter(ring.url, "generation_tokens") < 20:
                assert time.monotonic() < ends_at
            replace(ring, 1, 1)
            replace(ring, 2, 2)
            result = compare(answers.result(240), reference[0])
        assert "all stages know the live requests again: 8" in ring.stages[0].text()
        assert not result.wrong, "\n".join(result.wrong)
        assert_same(ring, reference[0])


@pytest.mark.slow
@needs_fp8_kv_cache
def test_a_stage_is_replaced_by_one_with_another_kind_of_kv_cache(model: Path) -> None:
    """It answers as if it had been so from the beginning, which is not as it was."""
    kind = ("--kv-cache-dtype", "fp8_e5m2")

    def answers(ring: UnevenRing) -> list[Answer]:
        return run(ring.url, model, WORK, 1)

    with UnevenRing(model, ("0-2", "2-4", "4-6"), SETTINGS, ENV, {1: kind}, sizes=[1, 1, 1]) as ring:
        expected = answers(ring)
    with UnevenRing(model, ("0-2", "2-4", "4-6"), SETTINGS, ENV, sizes=[1, 1, 1]) as ring:
        before = answers(ring)
        ring.own = {1: kind}
        replace(ring, 1, 1)
        same = compare(answers(ring), [expected])
    assert not same.wrong, same.wrong
    assert same.worst_logprob < 1e-4
    other = compare(before, [expected])
    assert other.wrong or other.worst_logprob > 1e-3


# ---- 2, 2: drafts --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_rank_knows_drafts_and_what_was_accepted(model: Path, reference: Any) -> None:
    """All ranks of the tail draft and check drafts, all ranks of the head embed them; they would end the ring if they
    disagreed.
    """
    ngram = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 4}'
    settings = [*SETTINGS, "--speculative-config", ngram]
    with UnevenRing(model, ("0-3", "3-6"), settings, ENV, sizes=[2, 2]) as ring:
        assert_same(ring, reference[0])
        drafted, accepted = (counter(ring.url, f"spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
        assert 0 < accepted < drafted
        answer = ask(ring.url, model, temperature=0.5, n=8, repetition_penalty=0.8)
        assert len(answer["choices"]) == 8


# ---- 1, 2: a rank that hangs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tail_of_two_ranks_of_which_one_hangs(model: Path, reference: Any) -> None:
    settings = [*SETTINGS, "--pipeline-step-timeout", "20"]
    with UnevenRing(model, ("0-3", "3-6"), settings, ENV, sizes=[1, 2]) as ring:
        assert_same(ring, reference[0])
        tree, response = lose(ring, 1, signal.SIGSTOP)
        assert response.status_code == 503
        assert "stage 1 failed: a step did not end within 18 s: a tensor parallel rank hangs" in response.text
        assert ring.stages[1].wait(20) == 1
        wait_gone(tree, 10)
        ring.stages[0].popen.terminate()
        assert ring.stages[0].wait(20) == 0
