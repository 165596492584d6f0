"""What children run: stock vLLM in one process, and each stage of a ring; and the comparison of the two."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep.recipes import VOCAB_SIZE, Recipe

__all__ = ["PROMPTS", "Comparison", "compare", "engine_settings", "run_head", "run_reference", "run_stage"]

NUM_TOKENS = 10
MAX_MODEL_LEN = 128
# Below the longest prompt, so that it is chunked (not where vLLM's CPU backend forbids that, as with MLA).
MAX_BATCHED_TOKENS = 48
PROMPT_LENGTHS = (5, 17, 33, 60)
PROMPTS = [
    [3 + (index * 37 + at * 11) % (VOCAB_SIZE - 3) for at in range(size)] for index, size in enumerate(PROMPT_LENGTHS)
]


def engine_settings(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Keyword arguments of `LLM` and, by `_as_flags`, flags of `vllm serve`: the same for all sides."""
    settings = {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 48 << 20,
        "block_size": 32,
        "trust_remote_code": True,
        **recipe.engine,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _as_flags(settings: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, str(value)]
    return flags


def _generate(llm: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _generate_alone(llm: Any) -> list[list[int]]:
    """One request after the other, so that every batch is the same on all sides. No hits in the prefix cache."""
    llm.reset_prefix_cache()
    return [_generate(llm, [prompt])[0] for prompt in PROMPTS]


def _generate_after_another(llm: Any, size: int) -> list[list[int]]:
    """Each request with one of ``size`` tokens before it: another batch, and another place to cut a long prompt."""
    llm.reset_prefix_cache()
    other = list(range(3, 3 + size))
    return [_generate(llm, [other, prompt])[1] for prompt in PROMPTS]


def run_reference(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Stock vLLM: all requests together, twice, then one after the other, then each in other batches.

    A ring's micro-batches are of any size, and cut long prompts where stock does not: in the step after the first, the
    requests of the first are still under way, so that the 60 tokens are 41 and 19.
    """
    from vllm import LLM

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = LLM(**engine_settings(recipe, folder))
    together = _generate(llm, PROMPTS)
    again = _generate(llm, PROMPTS)  # with hits in the prefix cache, where the model has one
    alone = _generate_alone(llm)
    return {
        "together": together,
        "again": again,
        "alone": alone,
        **{f"after {size}": _generate_after_another(llm, size) for size in (7, 20)},
    }


def run_head(recipe: Recipe, folder: Path, ports: Sequence[int]) -> dict[str, Any]:
    import stagewire
    from vllm import LLM

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    settings = engine_settings(recipe, folder)
    model = settings.pop("model")
    place = stagewire.head(
        total_stages=len(recipe.ranges),
        layer_range=recipe.ranges[0],
        bind_port=ports[0],
        prev_stage_addr=f"127.0.0.1:{ports[-1]}",
        **settings,
    )
    llm = LLM(model, **place)
    try:
        answers = {"together": _generate(llm, PROMPTS), "again": _generate(llm, PROMPTS), "alone": _generate_alone(llm)}
        states = llm.collective_rpc("get_stage_state")
        return {**answers, "between": states[0]["activations"]}
    finally:
        llm.llm_engine.engine_core.shutdown()


def run_stage(recipe: Recipe, folder: Path, ports: Sequence[int], stage: int) -> None:
    """As `vllm serve` on a command line. Ends the process."""
    from vllm.entrypoints.cli.main import main

    settings = engine_settings(recipe, folder)
    model = settings.pop("model")
    place = {
        "pipeline_stage_mode": "external",
        "pipeline_stage_idx": stage,
        "pipeline_total_stages": len(recipe.ranges),
        "pipeline_layer_range": recipe.ranges[stage],
        "pipeline_local_bind_port": ports[stage],
        "pipeline_prev_stage_service_addr": f"127.0.0.1:{ports[stage - 1]}",
        "external_pp_worker": True,
    }
    sys.argv = ["vllm", "serve", model, *_as_flags(place), *_as_flags(settings)]
    main()


@dataclass(frozen=True)
class Comparison:
    """``ties``: requests that differ where stock vLLM itself differs between two batch sizes."""

    wrong: list[str]
    ties: int


def compare(answers: Sequence[Sequence[int]], references: Sequence[Sequence[Sequence[int]]]) -> Comparison:
    """An id may differ from the first reference only where another one does too, or has before it."""
    wrong, ties = [], 0
    for index, answer in enumerate(answers):
        expected, *others = [list(reference[index]) for reference in references]
        at = next((i for i, pair in enumerate(zip(answer, expected, strict=True)) if pair[0] != pair[1]), None)
        if at is None:
            continue
        if all(other[: at + 1] == expected[: at + 1] for other in others):
            wrong.append(f"request {index} token {at}: {answer[at]}, expected {expected[at]}")
        else:
            ties += 1
    return Comparison(wrong, ties)
