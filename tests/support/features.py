"""One request for each feature of vLLM's API, by name; docs/reference/features.md names them.

Each is asked over stages and of one process. `Case.unlike` names the case whose answer it must not give: a feature that
changes nothing would be compared with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CHATS", "COMPLETIONS", "ROUTES", "STREAMED_CHATS", "STREAMED_COMPLETIONS", "Case"]


@dataclass(frozen=True)
class Case:
    """``body``: beside what all requests of its kind have; ``unlike``: a case with another answer."""

    body: Mapping[str, Any] = field(default_factory=dict)
    unlike: str = ""


PROMPT = "The history of the city of Paris begins with"
THE, COMMA, FULL_STOP = 260, 28, 30  # token ids of " the", "," and "." in the demo model's vocabulary
SAMPLED = {"temperature": 1.0, "seed": 11}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Paris", "Rome", "Oslo"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "select " column " from " table\ncolumn ::= "name" | "age"\ntable ::= "users" | "cities"'

COMPLETION = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "logprobs": 3, "return_token_ids": True}

COMPLETIONS: dict[str, Case] = {
    "plain": Case(),
    "several prompts": Case({"prompt": [PROMPT, "Once upon a time", "def main():"]}, "plain"),
    "prompt of token ids": Case({"prompt": [504, 1463, 282, 260, 2240]}, "plain"),
    "max_tokens": Case({"max_tokens": 3}, "plain"),
    "n": Case({**SAMPLED, "n": 3}, "seed"),
    "beam search": Case({"use_beam_search": True, "n": 3, "logprobs": None}, "plain"),
    "length_penalty": Case({"use_beam_search": True, "n": 3, "logprobs": None, "length_penalty": 0.2}, "plain"),
    "echo": Case({"echo": True}, "plain"),
    "echo without new tokens": Case({"echo": True, "max_tokens": 0}, "echo"),
    "stop": Case({"stop": [" city", " king"]}, "plain"),
    "include_stop_str_in_output": Case({"stop": [" city", " king"], "include_stop_str_in_output": True}, "stop"),
    "stop_token_ids": Case({"stop_token_ids": [THE, COMMA]}, "plain"),
    "min_tokens": Case({"stop_token_ids": [THE, COMMA], "min_tokens": 12}, "stop_token_ids"),
    "logit_bias": Case({"logit_bias": {str(FULL_STOP): 100}}, "plain"),
    "end of text": Case({"prompt": "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n", "max_tokens": 40}),
    "ignore_eos": Case(
        {
            "prompt": "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n",
            "max_tokens": 40,
            "ignore_eos": True,
        },
        "end of text",
    ),
    "presence_penalty": Case({"presence_penalty": 2.0, "max_tokens": 32}, "plain"),
    "frequency_penalty": Case({"frequency_penalty": 2.0, "max_tokens": 32}, "plain"),
    "repetition_penalty": Case({"repetition_penalty": 1.6}, "plain"),
    "repetition_detection": Case(
        {
            "prompt": "a b a b a b a b a b a b",
            "max_tokens": 32,
            "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
        },
        "plain",
    ),
    "bad_words": Case({"bad_words": [" the", " construction"]}, "plain"),
    "allowed_token_ids": Case({"allowed_token_ids": [THE, COMMA, FULL_STOP, 2240, 282]}, "plain"),
    "seed": Case(SAMPLED, "plain"),
    "another seed": Case({**SAMPLED, "seed": 12}, "seed"),
    "top_k": Case({**SAMPLED, "top_k": 3}, "seed"),
    "top_p": Case({**SAMPLED, "top_p": 0.4}, "seed"),
    "min_p": Case({**SAMPLED, "min_p": 0.3}, "seed"),
    "logprobs": Case({"logprobs": 5, "return_tokens_as_token_ids": True}, "plain"),
    "logprob_token_ids": Case({"logprobs": 2, "logprob_token_ids": [THE, COMMA]}, "plain"),
    "prompt_logprobs": Case({"prompt_logprobs": 2}, "plain"),
    "truncate_prompt_tokens": Case({"truncate_prompt_tokens": 4}, "plain"),
    "skip_special_tokens": Case(
        {
            "prompt": "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n",
            "max_tokens": 40,
            "ignore_eos": True,
            "skip_special_tokens": False,
        },
        "ignore_eos",
    ),
    "json schema": Case({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, "plain"),
    "regex": Case({"structured_outputs": {"regex": "[A-Z][a-z]{3,8} [0-9]{4}"}}, "plain"),
    "choice": Case({"structured_outputs": {"choice": ["a marsh", "the Romans", "nobody"]}}, "plain"),
    "grammar": Case({"structured_outputs": {"grammar": GRAMMAR}}, "plain"),
}

STREAMED_COMPLETIONS = ("plain", "n", "echo", "stop", "logprobs", "seed", "regex", "end of text")

CHAT = {
    "messages": [{"role": "user", "content": "Name three cities in France."}],
    "max_completion_tokens": 20,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 2,
    "return_token_ids": True,
}

CHATS: dict[str, Case] = {
    "plain": Case(),
    "system message": Case(
        {"messages": [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who are you?"}]},
        "plain",
    ),
    "several turns": Case(
        {
            "messages": [
                {"role": "user", "content": "My name is Ada."},
                {"role": "assistant", "content": "Hello Ada!"},
                {"role": "user", "content": "What is my name?"},
            ]
        },
        "plain",
    ),
    "continue_final_message": Case(
        {
            "messages": [
                {"role": "user", "content": "Name three cities in France."},
                {"role": "assistant", "content": "Three cities, from north to south:"},
            ],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        "plain",
    ),
    "n": Case({**SAMPLED, "n": 2}, "seed"),
    "beam search": Case({"use_beam_search": True, "n": 2, "logprobs": None, "top_logprobs": None}, "plain"),
    "stop": Case({"stop": [","]}, "plain"),
    "seed": Case(SAMPLED, "plain"),
    "top_logprobs": Case({"top_logprobs": 5}, "plain"),
    "prompt_logprobs": Case({"prompt_logprobs": 1}, "plain"),
    "min_tokens": Case({"stop_token_ids": [COMMA], "min_tokens": 12}, "plain"),
    "ignore_eos": Case({"ignore_eos": True, "max_completion_tokens": 48}, "plain"),
    "penalties": Case({"presence_penalty": 1.5, "frequency_penalty": 1.5, "repetition_penalty": 1.2}, "plain"),
    "logit_bias": Case({"logit_bias": {str(FULL_STOP): 100}}, "plain"),
    "bad_words": Case({"bad_words": [" Paris", "Paris"]}, "plain"),
    "response_format json_schema": Case(
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}}, "plain"
    ),
    "response_format json_object": Case({"response_format": {"type": "json_object"}}, "plain"),
}

STREAMED_CHATS = ("plain", "n", "stop", "top_logprobs", "response_format json_schema")

# Routes that the `openai` client has no method for.
ROUTES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "/tokenize": ("/tokenize", {"prompt": PROMPT, "return_token_strs": True}),
    "/tokenize of a chat": ("/tokenize", {"messages": CHAT["messages"]}),
    "/detokenize": ("/detokenize", {"tokens": [504, 1463, 282, THE, 2240]}),
    "/v1/messages": (
        "/v1/messages",
        {"messages": CHAT["messages"], "max_tokens": 12, "temperature": 0, "system": "Answer in one word."},
    ),
    "/v1/chat/completions/batch": (
        "/v1/chat/completions/batch",
        {"messages": [CHAT["messages"], [{"role": "user", "content": "Hello"}]], "max_tokens": 12, "temperature": 0},
    ),
    "/v1/completions/render": ("/v1/completions/render", {"prompt": PROMPT}),
    "/inference/v1/generate": (
        "/inference/v1/generate",
        {"token_ids": [504, 1463, 282, THE, 2240], "sampling_params": {"max_tokens": 12, "temperature": 0}},
    ),
    "/generative_scoring": (
        "/generative_scoring",
        {"query": "Is Paris in France? ", "items": ["Yes", "No"], "label_token_ids": [10539, 9230]},
    ),
}
