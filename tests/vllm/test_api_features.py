"""Every feature of vLLM's API over stages, compared with one stock process: whole answers, not only their text.

One ring of three uneven stages and one stock `vllm serve` answer the same requests through the `openai` client.
docs/reference/features.md says which test is for which feature. The reference has the ring's settings, but computes
every prompt in one piece: stock vLLM on CPU dies of a seeded request in chunks (docs/design/vllm-seams.md). What the
ring computes in chunks is compared with what needs none.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from support.api import Api, differences
from support.features import (
    CHAT,
    CHATS,
    COMPLETION,
    COMPLETIONS,
    GRAMMAR,
    ROUTES,
    SCHEMA,
    STREAMED_CHATS,
    STREAMED_COMPLETIONS,
)
from support.stages import VLLM, Ring, SingleProcess, run, together
from support.workload import license_text

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANGES = ("0-7", "7-19", "19-30")
BUDGET = 256
SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "64", "--block-size", "32"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "400M"),
    # The head's; other stages have no API.
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out"),
]
# Of one process: beside a request with this, stock vLLM gives the rest of a batch no `logprobs`
# (docs/design/vllm-seams.md).
ASKED_ALONE = ("logprob_token_ids",)


@dataclass(frozen=True)
class Pair:
    """The same model, over stages and in one process."""

    ring: Api
    single: Api

    def ask(self, question: Callable[[Api], Any]) -> tuple[Any, Any]:
        """Both answers; asked at the same time, so that a slow machine is waited for once."""
        with ThreadPoolExecutor(2) as pool:
            ring, single = pool.map(question, (self.ring, self.single))
        return ring, single

    def same(self, question: Callable[[Api], Any]) -> Any:
        """The answer, which must be the same from both."""
        ring, single = self.ask(question)
        assert differences(ring, single) == []
        return ring


@pytest.fixture(scope="module")
def pair(model_dir: Path) -> Iterator[Pair]:
    # With the reference's own seed for requests without one, two samples would be the same and not alike.
    ring = Ring(model_dir, RANGES, [*SETTINGS, "--max-num-batched-tokens", str(BUDGET), "--seed", "7"])
    single = SingleProcess(model_dir, [*SETTINGS, "--max-num-batched-tokens", "2048", "--no-enable-chunked-prefill"])
    with together(ring, single):
        yield Pair(Api(ring.url, model_dir), Api(single.url, model_dir))


# ---- one request for each feature, all at once ---------------------------------------------------------------------

Key = tuple[str, str]  # how it is asked, and the case's name


def question(kind: str, body: Mapping[str, Any]) -> Callable[[Api], Any]:
    return lambda api: getattr(api, kind)(**body)


def questions() -> dict[Key, Callable[[Api], Any]]:
    asked: dict[Key, Callable[[Api], Any]] = {}
    for kind, common, cases, streamed in (
        ("completion", COMPLETION, COMPLETIONS, STREAMED_COMPLETIONS),
        ("chat", CHAT, CHATS, STREAMED_CHATS),
    ):
        for name, case in cases.items():
            asked[kind, name] = question(kind, {**common, **case.body})
            if name in streamed:
                asked[f"{kind}_stream", name] = question(f"{kind}_stream", {**common, **case.body})
    return asked


def ask_at_once(api: Api, asked: Mapping[Key, Callable[[Api], Any]]) -> dict[Key, Any]:
    """Answers, or the exceptions in their place."""
    with ThreadPoolExecutor(len(asked)) as pool:
        futures = {key: pool.submit(ask, api) for key, ask in asked.items()}
    return {key: future.exception() or future.result() for key, future in futures.items()}


@pytest.fixture(scope="module")
def answers(pair: Pair) -> tuple[dict[Key, Any], dict[Key, Any]]:
    """Of the ring and of the reference, to all cases: features meet in one batch there as they do in production."""

    def ask(api: Api) -> dict[Key, Any]:
        apart = {} if api is pair.ring else {key: asked for key, asked in questions().items() if key[1] in ASKED_ALONE}
        together = {key: asked for key, asked in questions().items() if key not in apart}
        return ask_at_once(api, together) | (ask_at_once(api, apart) if apart else {})

    ring, single = pair.ask(ask)
    return ring, single


def check(answers: tuple[dict[Key, Any], dict[Key, Any]], kind: str, name: str, unlike: str = "") -> None:
    ring, single = answers
    for side, found in (("one process", single[kind, name]), ("the ring", ring[kind, name])):
        assert not isinstance(found, BaseException), f"{side}: {found}"
    assert differences(ring[kind, name], single[kind, name]) == []
    if unlike:
        assert ring[kind, name] != ring[kind, unlike], f"{name} makes no difference to {unlike}"


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completion(answers: tuple[dict[Key, Any], dict[Key, Any]], name: str) -> None:
    check(answers, "completion", name, COMPLETIONS[name].unlike)


@pytest.mark.parametrize("name", STREAMED_COMPLETIONS)
def test_completion_stream(answers: tuple[dict[Key, Any], dict[Key, Any]], name: str) -> None:
    check(answers, "completion_stream", name)
    plain, streamed = (answers[0][kind, name] for kind in ("completion", "completion_stream"))
    assert [choice["text"] for choice in streamed["choices"]] == [choice["text"] for choice in plain["choices"]]


@pytest.mark.parametrize("name", CHATS)
def test_chat(answers: tuple[dict[Key, Any], dict[Key, Any]], name: str) -> None:
    check(answers, "chat", name, CHATS[name].unlike)


@pytest.mark.parametrize("name", STREAMED_CHATS)
def test_chat_stream(answers: tuple[dict[Key, Any], dict[Key, Any]], name: str) -> None:
    check(answers, "chat_stream", name)
    plain, streamed = (answers[0][kind, name] for kind in ("chat", "chat_stream"))
    texts = [choice["delta"]["content"] for choice in streamed["choices"]]
    assert texts == [choice["message"]["content"] for choice in plain["choices"]]


@pytest.mark.parametrize("name", ROUTES)
def test_route(pair: Pair, name: str) -> None:
    path, body = ROUTES[name]
    pair.same(lambda api: api.post(path, **body))


# ---- prompts longer than a step ------------------------------------------------------------------------------------


def long_prompt(first_word: str, num_words: int = 900) -> str:
    """Several batch budgets long, and sharing no block with another first word's."""
    return " ".join([first_word, *license_text().split()[:num_words]])


def test_prompt_in_chunks(pair: Pair) -> None:
    """Chunked prefill of a prompt several times the batch budget; its log-probabilities are collected over chunks."""
    body = {"prompt": long_prompt("Greedy"), "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    found = pair.same(lambda api: api.completion(**body, logprobs=3, prompt_logprobs=1))
    assert found["usage"]["prompt_tokens"] > 4 * BUDGET
    assert len(found["choices"][0]["prompt_logprobs"]) == found["usage"]["prompt_tokens"]


def test_seeded_prompt_in_chunks(pair: Pair) -> None:
    """Tokens thrown away after each chunk do not count: seeded sampling begins where it does without chunks."""
    body = {**COMPLETION, "prompt": long_prompt("Seeded"), "temperature": 1.0, "seed": 3, "max_tokens": 12}

    def several(api: Api) -> list[Any]:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda seed: api.completion(**{**body, "seed": seed}), (3, 4, 5)))

    found = pair.same(several)
    assert found[0]["usage"]["prompt_tokens"] > 4 * BUDGET
    assert len({answer["choices"][0]["text"] for answer in found}) == 3


def test_prefix_caching(pair: Pair) -> None:
    """The second time the same prompt is asked, most of it is in the cache; as much as in one process."""
    body = {**COMPLETION, "prompt": long_prompt("Cached", 300), "max_tokens": 8}

    def hits(api: Api) -> tuple[Any, Any, list[float]]:
        counts = [api.metric("vllm:prefix_cache_hits_total")]
        given = []
        for _ in range(2):
            given.append(api.completion(**body))
            counts.append(api.metric("vllm:prefix_cache_hits_total"))
        return given[0], given[1], [after - before for before, after in pairwise(counts)]

    (first, second, ring_hits), (_, expected, single_hits) = pair.ask(hits)
    assert differences(second, first) == differences(second, expected) == []
    assert ring_hits == single_hits
    assert ring_hits[0] == 0
    assert ring_hits[1] > 0.9 * first["usage"]["prompt_tokens"]


# ---- sampling without a seed ---------------------------------------------------------------------------------------

NUM_SAMPLES = 480
MAX_BINS, MIN_BIN = 24, 12
# Both sides alike, the statistic is larger once in 10,000 times.
QUANTILE = 3.719  # of the normal distribution


def first_tokens(api: Api, temperature: float) -> Counter[str]:
    body = {"prompt": "My favourite", "max_tokens": 1, "temperature": temperature, "n": NUM_SAMPLES // 4}
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda _: api.completion(**body), range(4)))
    return Counter(choice["text"] for answer in given for choice in answer["choices"])


def chi_square(one: Counter[str], other: Counter[str]) -> tuple[float, float]:
    """Of two samples of the same size, and its limit; a bin for each frequent value and one for all the rest."""
    frequent = [name for name, count in (one + other).most_common(MAX_BINS) if count >= MIN_BIN]
    bins = [(one[name], other[name]) for name in frequent]
    bins.append((one.total() - sum(a for a, _ in bins), other.total() - sum(b for _, b in bins)))
    freedom = len(bins) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + QUANTILE * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    return sum((a - b) ** 2 / (a + b) for a, b in bins if a + b), limit


def test_unseeded_sampling_has_the_same_distribution(pair: Pair, say: Callable[[str], None]) -> None:
    """First tokens of the ring and of one process; the same test does tell two temperatures apart."""
    ring, single = pair.ask(lambda api: first_tokens(api, 1.0))
    alike, limit = chi_square(ring, single)
    colder, its_limit = chi_square(first_tokens(pair.ring, 0.7), single)
    say(
        f"chi-square of {NUM_SAMPLES} first tokens, {len(ring)} different: {alike:.1f}, at most {limit:.1f}; "
        f"at another temperature {colder:.1f}, at least {its_limit:.1f}"
    )
    assert alike < limit
    assert colder > its_limit


# ---- structured output ---------------------------------------------------------------------------------------------


def constraint(index: int) -> dict[str, Any]:
    """Four kinds of structured output in turn; every other request is free."""
    if index % 2:
        return {"max_tokens": 16}
    kinds = (
        {"json": SCHEMA, "disable_any_whitespace": True},
        {"regex": "[A-Z][a-z]{3,8} [0-9]{4}"},
        {"choice": [f"first {index}", f"second {index}"]},
        {"grammar": GRAMMAR},
    )
    return {"structured_outputs": kinds[index // 2 % 4], "max_tokens": 24}


def test_structured_output_among_free_requests(pair: Pair) -> None:
    """32 at once, and 32 others: bitmasks meet their rows at the tail, and the rows without one are left alone."""
    bodies = [{"prompt": f"{index}: The answer is", "temperature": 0, **constraint(index)} for index in range(64)]

    def everything(api: Api) -> list[str]:
        with ThreadPoolExecutor(64) as pool:
            given = list(pool.map(lambda body: api.completion(**body), bodies))
        return [answer["choices"][0]["text"] for answer in given]

    found = pair.same(everything)
    for index in range(0, 64, 8):
        as_json, by_regex, by_choice, by_grammar = found[index : index + 8 : 2]
        assert json.loads(as_json).keys() == {"name", "age"}
        assert re.fullmatch("[A-Z][a-z]{3,8} [0-9]{4}", by_regex)
        assert by_choice in (f"first {index + 4}", f"second {index + 4}")
        assert re.fullmatch("select (name|age) from (users|cities)", by_grammar)


# ---- tools and responses -------------------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s", "days": %d}}\n</tool_call>'
# The model has never seen a tool: it is shown how to call one, and copies that.
CONVERSATION = [
    {"role": "user", "content": "Weather in Rome for 3 days?"},
    {"role": "assistant", "content": CALL % ("Rome", 3)},
    {"role": "user", "content": "Weather in Oslo for 2 days?"},
    {"role": "assistant", "content": CALL % ("Oslo", 2)},
    {"role": "user", "content": "Weather in Paris for 4 days?"},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    ("choice", "streamed"),
    [
        pytest.param(NAMED, False, id="named-whole"),
        pytest.param(NAMED, True, id="named-streamed", marks=pytest.mark.slow),
        pytest.param("required", False, id="required-whole", marks=pytest.mark.slow),
        pytest.param("required", True, id="required-streamed", marks=pytest.mark.slow),
        pytest.param("auto", False, id="auto-whole", marks=pytest.mark.slow),
        pytest.param("auto", True, id="auto-streamed"),
    ],
)
def test_tool_call(pair: Pair, choice: Any, streamed: bool) -> None:
    body = {"messages": CONVERSATION, "tools": [TOOL], "tool_choice": choice, "temperature": 0}
    body |= {"max_completion_tokens": 80}
    found = pair.same(lambda api: (api.chat_stream if streamed else api.chat)(**body))
    (answer,) = found["choices"]
    (call,) = answer["delta" if streamed else "message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]).keys() == {"city", "days"}


def test_responses(pair: Pair) -> None:
    body = {"input": "Name three cities in France.", "max_output_tokens": 20, "temperature": 0}
    found = pair.same(lambda api: api.response(**body))
    (message,) = found["output"]
    assert message["content"][0]["text"]
    assert 0 < found["usage"]["output_tokens"] <= 20


# ---- the rest of the API -------------------------------------------------------------------------------------------


def test_models(pair: Pair) -> None:
    def models(api: Api) -> list[Any]:
        listed = json.loads(api.get("/v1/models"))["data"]
        return [{key: value for key, value in each.items() if key not in ("created", "permission")} for each in listed]

    assert pair.same(models)[0]["id"] == pair.ring.model


def test_metrics(pair: Pair) -> None:
    """Whatever one process measures the head measures, and counts a request's tokens as often."""

    def names(api: Api) -> set[str]:
        return set(re.findall(r"^(vllm:\w+?)(?:_created)?\{", api.get("/metrics"), re.MULTILINE))

    ring, single = pair.ask(names)
    assert single - ring == set()

    def counted(api: Api) -> list[float]:
        counters = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
        before = [api.metric(name) for name in counters]
        api.completion(prompt="How many tokens are these?", max_tokens=7, ignore_eos=True)
        return [api.metric(name) - value for name, value in zip(counters, before, strict=True)]

    assert pair.same(counted)[1:] == [7, 1]


@pytest.mark.slow
def test_bench_serve(pair: Pair, tmp_path: Path) -> None:
    """vLLM's own benchmark against the head."""
    command = [
        *(VLLM, "bench", "serve", "--base-url", pair.ring.url, "--model", pair.ring.model),
        *("--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8", "--num-prompts", "24"),
        *("--max-concurrency", "8", "--ignore-eos", "--seed", "1", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    ]
    done = run("bench", command, tmp_path / "bench.log", {"NO_PROXY": "*"})
    assert done.wait() == 0, done.text()[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (24, 0)
    assert result["total_output_tokens"] == 24 * 8
