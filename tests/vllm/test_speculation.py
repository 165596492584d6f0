"""n-gram speculation over stages: the tokens of one process, with and without it; what else drafts is refused.

One ring of three stages, with a KV cache that is too small for the largest load. In the short run of random layers,
which repeat themselves as well as a real model does and compute a tenth; in the long run of the real model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.stages import Ring, SingleProcess, together
from support.workload import LOGPROB_TOLERANCE, Lazily, Request, compare, counter, license_text, run_each

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SMALL, REAL = ("0-1", "1-4", "4-6"), ("0-8", "8-21", "21-30")
CONTEXT = 512
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-batched-tokens", "256", "--max-num-seqs", "32"),
    *("--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "72", "--kv-cache-memory-bytes", "300M"),
]
NGRAM = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 4}'
CONCURRENCIES = {1: 3, 8: 10, 32: 44}  # and how many requests
COUNTERS = ("num_draft_tokens", "num_accepted_tokens")
# A third of the requests; the grammar of some ends early, that of others allows anything for a while.
GRAMMARS: Sequence[dict[str, Any]] = (
    {"structured_outputs": {"regex": r"(a|b|c| ){10,30}"}, "ignore_eos": False},
    {"structured_outputs": {"choice": ["the License", "the Work and Derivative Works"]}, "ignore_eos": False},
    {"structured_outputs": {"regex": r"[A-Za-z ,.\n]{40,60}"}, "ignore_eos": False},
)

Work = list[tuple[Request, dict[str, Any]]]


def work_for(concurrency: int) -> Work:
    """Texts that begin again, so that there is something to look up; every third with a grammar. Two fill the context
    to its end, where drafts no longer fit.
    """
    rng = random.Random(concurrency)
    words = license_text().split()
    made: Work = []
    for index in range(CONCURRENCIES[concurrency]):
        begin, length = rng.randrange(len(words) - 100), rng.randrange(20, 90)
        passage = words[begin : begin + length]
        prompt = " ".join([*passage, *passage[: length // 3]])
        options = dict(GRAMMARS[index // 3 % 3]) if index % 3 == 2 else {}
        made.append((Request(prompt, rng.randrange(16, 49)), options))
    counting = ("one two three four " * CONTEXT).split()
    for room in (3, 14):  # each of the words is a token
        made.insert(len(made) // 2, (Request(" ".join(counting[: CONTEXT - room]), room), {}))
    return made


@dataclass
class Servers:
    """The ring, and one process without and with speculation."""

    model: Path
    ring: Ring
    without: SingleProcess
    speculating: SingleProcess


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest, model_dir: Path, small_model: Path) -> Iterator[Servers]:
    """``param``: the ranges of one of the two models."""
    model = small_model if request.param == SMALL else model_dir
    speculate = [*SETTINGS, "--speculative-config", NGRAM]
    ring = Ring(model, request.param, speculate)
    without, speculating = (SingleProcess(model, each) for each in (SETTINGS, speculate))
    with together(ring, without, speculating):
        yield Servers(model, ring, without, speculating)


@pytest.mark.parametrize(
    ("servers", "concurrency"),
    [
        pytest.param(SMALL, 8, id="small 8"),
        *(pytest.param(REAL, size, id=f"real {size}", marks=pytest.mark.slow) for size in CONCURRENCIES),
    ],
    indirect=["servers"],
)
def test_tokens_equal_one_process_with_and_without_speculation(
    servers: Servers, concurrency: int, say: Callable[[str], None]
) -> None:
    ring, model = servers.ring, servers.model
    work = work_for(concurrency)
    without, another, speculating = (
        partial(run_each, server.url, model, work, size)
        for server, size in ((servers.without, concurrency), (servers.without, 4), (servers.speculating, concurrency))
    )
    known = {"without": Lazily([without, another, speculating]), "with": Lazily([speculating, without, another])}
    for references in known.values():  # before the ring wants the cores
        assert next(iter(references))
    before = {name: counter(ring.url, f"spec_decode_{name}") for name in COUNTERS}
    preempted = counter(ring.url, "num_preemptions")
    answers = run_each(ring.url, model, work, concurrency)
    drafted, accepted = (counter(ring.url, f"spec_decode_{name}") - before[name] for name in COUNTERS)
    preemptions = counter(ring.url, "num_preemptions") - preempted
    for name, references in known.items():
        result = compare(answers, references)
        say(
            f"{concurrency} concurrent, one process {name}: {result.num_tokens} tokens equal but for "
            f"{len(result.ties)} ties, log-probabilities within {result.worst_logprob:.1e}"
        )
        assert not result.wrong, "\n".join(result.wrong)
        assert result.worst_logprob <= LOGPROB_TOLERANCE
    say(f"{drafted:.0f} tokens drafted, {accepted:.0f} accepted, {preemptions:.0f} preemptions")
    assert drafted > 20
    assert 0 < accepted < drafted, "both outcomes of a draft are seen"
    if concurrency == 32:
        assert preemptions, "the KV cache is meant to be too small for this load"
