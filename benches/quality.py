"""A public harness, lm-eval, against a ring and against stock vLLM: the same scores, and every log-probability alike.

lm-eval is a client here, through its `local-completions`; it lives in an environment of its own and is not in the
lock. It needs neither torch nor a model hub: the task is made here from the text of LICENSE.

    python -m venv /tmp/lm && /tmp/lm/bin/pip install 'lm_eval[api]==0.4.13' transformers
    python -m benches.quality --lm-eval /tmp/lm/bin/lm_eval

Two tasks: which of four pieces of text continues a sentence (multiple choice by log-likelihood: accuracy and accuracy
normalised by length), and what comes next, greedily (exact match with stock vLLM is checked, the score itself says
little about a model of this size). Exits with 1 when a score or a log-likelihood differs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches.common import DEFAULT_MODEL, ROOT, PinnedRing, SingleProcess, begin, even_ranges, print_table

CHOICES = "stagewire_choice"
GREEDY = "stagewire_greedy"
# Sums of up to some dozens of log-probabilities, each of which float32 moves by 1e-4 between two batch sizes.
LOGLIKELIHOOD_TOLERANCE = 2e-2

TASKS = {
    CHOICES: """
task: stagewire_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{begin}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""",
    GREEDY: """
task: stagewire_greedy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{begin}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 16, temperature: 0.0}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, required=True, help="its command, in an environment of its own")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--concurrency", type=int, default=8)
    return parser.parse_args()


def documents(count: int) -> list[dict[str, Any]]:
    """Sentences of LICENSE cut in two: the beginning, four ends, and which of them is right."""
    rng = random.Random(0)
    text = " ".join((ROOT / "LICENSE").read_text().split())
    words = [sentence.split() for sentence in re.split(r"(?<=[.;:]) ", text)]
    cut = [(" ".join(each[:8]), " ".join(each[8:18])) for each in words if len(each) >= 12]
    made = []
    for index in range(count):
        begin_text, end = cut[index % len(cut)]
        others = rng.sample([other for _, other in cut if other != end], 3)
        answer = rng.randrange(4)
        made.append({"begin": begin_text, "choices": [*others[:answer], end, *others[answer:]], "answer": answer})
    return made


def write_tasks(folder: Path, made: Sequence[dict[str, Any]]) -> None:
    data = folder / "documents.json"
    data.write_text("\n".join(json.dumps(each) for each in made))
    for name, template in TASKS.items():
        (folder / f"{name}.yaml").write_text(template.format(data=data))


def evaluate(url: str, options: argparse.Namespace, folder: Path, name: str) -> tuple[dict[str, Any], list[Any]]:
    """lm-eval's scores by task, and what each request was answered: log-likelihoods, or text."""
    output = folder / name
    arguments = f"model={options.model},base_url={url}/v1/completions,num_concurrent={options.concurrency}"
    command = [
        *(options.lm_eval, "--model", "local-completions", "--tasks", f"{CHOICES},{GREEDY}"),
        *("--model_args", f"{arguments},max_retries=1,tokenized_requests=True,tokenizer_backend=huggingface"),
        *("--include_path", folder, "--output_path", output, "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}
    done = subprocess.run(
        [str(part) for part in command], env={"PATH": "/usr/bin:/bin", **offline}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"lm-eval against {name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    (results,) = output.rglob("results_*.json")
    answers: list[Any] = []
    for task in (CHOICES, GREEDY):
        (samples,) = output.rglob(f"samples_{task}_*.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        answers += [line["resps"] for line in lines]
    return json.loads(results.read_text())["results"], answers


def count_numbers(answers: Any) -> int:
    if isinstance(answers, list):
        return sum(map(count_numbers, answers))
    return bool(re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", str(answers)))


def furthest(found: Any, expected: Any) -> float:
    """The largest difference between two log-likelihoods; infinite when anything else differs."""
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return max((furthest(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    try:
        return abs(float(found) - float(expected))
    except ValueError:
        return 0.0 if found == expected else float("inf")


def main() -> None:
    options = parse_arguments()
    begin(options.model)
    settings = [
        *("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "512", "--max-num-seqs", "64"),
        *("--enforce-eager", "--kv-cache-memory-bytes", "400M", "--block-size", "32"),
    ]
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        write_tasks(folder, documents(options.documents))
        with SingleProcess(options.model, settings) as single:
            expected, expected_answers = evaluate(single.url, options, folder, "stock")
        with PinnedRing(options.model, even_ranges(options.model, options.stages), settings) as ring:
            found, answers = evaluate(ring.url, options, folder, "ring")
    scores = [
        (f"{task}: {metric.split(',')[0]}", found[task][metric], value)
        for task, metrics in expected.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    ]
    worst = furthest(answers, expected_answers)
    num_loglikelihoods = count_numbers(answers)
    print_table(
        f"{options.documents} documents, {num_loglikelihoods} log-likelihoods within {worst:.1e}, texts equal",
        ["score", f"{options.stages} stages", "stock"],
        [[name, f"{ours:.6f}", f"{theirs:.6f}"] for name, ours, theirs in scores],
    )
    if not num_loglikelihoods or any(a != b for _, a, b in scores) or not worst <= LOGLIKELIHOOD_TOLERANCE:
        sys.exit("the scores differ")


if __name__ == "__main__":
    main()
