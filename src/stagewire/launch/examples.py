"""What to ask a model of each task: a first request that costs little, and one to copy. Pure.

The tasks have vLLM's own names, as the head tells them in /pipeline/status. ``score``: a pooling model that compares
two texts.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Example", "example_for", "first_request"]

_Body = dict[str, object]


@dataclass(frozen=True)
class Example:
    """A request without its model. ``call`` and ``answer``: the same with the package `openai`; empty without one."""

    route: str
    body: _Body
    call: str = ""
    answer: str = ""


_PROMPT = "San Francisco is a"
_QUESTION = "What is a pipeline?"
_ONE_INPUT: _Body = {"input": _QUESTION}
_PAIR: _Body = {"text_1": _QUESTION, "text_2": "A pipeline is a row of stages."}
_GREEDY: _Body = {"max_tokens": 50, "temperature": 0}
_CHAT = Example(
    "/v1/chat/completions",
    {"messages": [{"role": "user", "content": _QUESTION}], **_GREEDY},
    "chat.completions",
    "choices[0].message.content",
)
_FIRST_TOKEN = Example("/v1/completions", {"prompt": _PROMPT, "max_tokens": 1, "temperature": 0})
_POOLING = Example("/pooling", _ONE_INPUT)
_SHOWN = {
    "generate": Example("/v1/completions", {"prompt": _PROMPT, **_GREEDY}, "completions", "choices[0].text"),
    "embed": Example("/v1/embeddings", _ONE_INPUT, "embeddings", "data[0].embedding[:4]"),
    "classify": Example("/classify", _ONE_INPUT),
    "score": Example("/score", _PAIR),
    "token_embed": _POOLING,
    "token_classify": _POOLING,
}


def example_for(task: str, has_chat_template: bool = False) -> Example | None:
    """What to copy. None: there is no example for such a model (``plugin``, speech)."""
    return _CHAT if task == "generate" and has_chat_template else _SHOWN.get(task)


def first_request(task: str) -> Example | None:
    """What shows that a model answers; None as for `example_for`."""
    return _FIRST_TOKEN if task == "generate" else _SHOWN.get(task)
