"""N stages give the tokens that one process gives: real model, float32, greedy, log-probabilities too.

The reference is stock vLLM in one process, without our flags, at the same and at other batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.stages import Ring, SingleProcess
from support.workload import LOGPROB_TOLERANCE, Lazily, Request, compare, license_text, requests, run, runs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

# Small budgets, so that prompts are chunked and batches are full at this size of model.
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "256", "--max-num-seqs", "64"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "300M", "--block-size", "32"),
]
CONCURRENCIES = (1, 8, 32)
RINGS = [
    ("0-12", "12-13", "13-20", "20-30"),
]
# Cut otherwise, a minute each.
MORE_RINGS = [
    ("0-29", "29-30"),
    ("0-10", "10-20", "20-30"),
    ("0-15", "15-30"),
    ("0-1", "1-24", "24-30"),
    ("0-7", "7-15", "15-23", "23-30"),
]


def work_for(concurrency: int) -> list[Request]:
    return requests({1: 4, 8: 16, 32: 32}[concurrency], seed=concurrency, text=license_text())


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Iterator[dict[int, Lazily]]:
    """Per workload, its answers at its own concurrency first, then at the others."""
    with SingleProcess(model_dir, SETTINGS) as single:
        answers = {
            size: runs(
                single.url,
                model_dir,
                work_for(size),
                [
                    concurrency
                    for concurrency in sorted(CONCURRENCIES, key=lambda c: c != size)
                    if concurrency == size or size <= 16 or concurrency == 8
                ],
            )
            for size in CONCURRENCIES
        }
        for each in answers.values():  # before a ring wants the cores
            assert next(iter(each))
        yield answers


@pytest.mark.parametrize(
    "ranges",
    [
        *(pytest.param(ranges, id=" ".join(ranges)) for ranges in RINGS),
        *(pytest.param(ranges, id=" ".join(ranges), marks=pytest.mark.slow) for ranges in MORE_RINGS),
    ],
)
def test_tokens_equal_one_process(
    ranges: tuple[str, ...],
    model_dir: Path,
    reference: dict[int, Lazily],
    say: Callable[[str], None],
) -> None:
    with ExitStack() as stack:
        ring = stack.enter_context(Ring(model_dir, ranges, SETTINGS))
        before = ring.cpu_seconds()
        for concurrency in CONCURRENCIES:
            answers = run(ring.url, model_dir, work_for(concurrency), concurrency)
            result = compare(answers, reference[concurrency])
            say(
                f"{len(ranges)} stages, {concurrency} concurrent: {result.num_tokens} tokens equal but for "
                f"{len(result.ties)} ties, log-probabilities within {result.worst_logprob:.1e}"
            )
            for tie in result.ties:
                say(tie)
            assert not result.wrong, "\n".join(result.wrong)
            assert result.worst_logprob <= LOGPROB_TOLERANCE
        used = [after - start for after, start in zip(ring.cpu_seconds(), before, strict=True)]
        shares = [each / sum(used) for each in used]
        each_used = " ".join(f"{s:.1f} ({share:.0%})" for s, share in zip(used, shares, strict=True))
        say(f"CPU seconds of each stage: {each_used}")
        assert min(shares) >= 0.05, f"a stage did not take part: {shares}"
