"""Every command of the documentation can be typed as it stands there.

Some are run by other tests (the four launches of docs/guide/by-hand.md in tests/vllm/test_quickstart.py, what
docs/guide/plan.md shows in tests/unit/test_plan_command.py, scripts/demo in tests/process/test_demo_script.py). Of all
of them the words are read here by the parsers that would read them, and files and names are looked up.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

import stagewire
from stagewire import cli
from stagewire.config import StageConfig, parse_stage
from stagewire.launch.early import read_early
from stagewire.vllm_plugin.entry.flags import add_flags
from support.documents import PAGES, ROOT, Typed, typed_commands

COMMANDS = typed_commands()
# Tools that are a subcommand of the same options.
TOOLS = {"validate_layer_ranges.py": "plan", "serve_pipeline.py": "export", "http_index.py": "front"}
# Routes of the head: vLLM's, and ours.
ROUTES = ("/v1/completions", "/v1/chat/completions", "/ready", "/health", "/live", "/pipeline/status")
# What vLLM takes besides; tests/vllm/test_launch_arguments.py reads all of it with vLLM's own parser.
OF_VLLM = {"--tensor-parallel-size", "--port", "--dtype", "--max-model-len", "--enforce-eager"}


def check_subcommand(words: tuple[str, ...]) -> None:
    """`stagewire ...`, as far as it can be known without a model."""
    own, _, extra = " ".join(words).partition(" -- ")
    cli._make_parser().parse_args(own.split())
    if extra:
        assert words[0] in ("up", "front")
        assert set(read_early(extra.split()).typed) <= OF_VLLM


def check_stage(words: tuple[str, ...]) -> StageConfig:
    assert words[0] == "serve"
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("model")
    add_flags(parser)
    args, others = parser.parse_known_args(words[1:])
    assert {word for word in others if word.startswith("--")} <= OF_VLLM
    given = vars(args)
    if given["pipeline_layer_range"] is None:  # a pre-split stage's folder has it
        assert "stage_" in args.model
        given["pipeline_layer_range"] = "0-1"
    return parse_stage(given)


def check_script(path: Path, words: tuple[str, ...]) -> None:
    assert os.access(path, os.X_OK), path
    if path.name == "demo" and words:
        check_subcommand(("up", *words))
    elif path.name == "test":
        check_pytest(tuple(word for word in words if word != "--all"))


def check_pytest(words: tuple[str, ...]) -> None:
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    for option, word in zip(("", *words), words, strict=False):
        if option == "-m":
            assert word in {mark.partition(":")[0] for mark in marks}
        elif not word.startswith("-"):
            file, _, test = word.partition("::")
            assert (ROOT / file).exists(), word
            assert not test or f"def {test}(" in (ROOT / file).read_text(), word


def check_module(words: tuple[str, ...]) -> None:
    """`python -m benches.hop --rounds 4`, or a script of the repository: it is there, and knows the options."""
    if words[0] == "-m":
        path = next(path for path in (ROOT, ROOT / "tests") if (path / f"{words[1].replace('.', '/')}.py").is_file())
        path, options = path / f"{words[1].replace('.', '/')}.py", words[2:]
    else:
        path, options = ROOT / words[0], words[1:]
    if path.name in TOOLS:
        check_subcommand((TOOLS[path.name], *options))
        return
    source = path.read_text()
    assert [word for word in options if word.startswith("--") and f'"{word}"' not in source] == []


def check_pip(words: tuple[str, ...]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if found := re.fullmatch(r"\.\[(\w+)\]", word):
            assert found[1] in extras


def check_curl(words: tuple[str, ...]) -> None:
    [url] = [word for word in words if word.startswith("http://localhost:")]
    assert url.partition("localhost:")[2].partition("/")[2] in {route[1:] for route in ROUTES}
    for option, word in pairwise(words):
        if option == "-d":
            json.loads(word)


def check_nothing(words: tuple[str, ...]) -> None:
    """Somebody else's program."""


CHECKS: Mapping[str, Callable[[tuple[str, ...]], object]] = {
    "stagewire": check_subcommand,
    "vllm": check_stage,
    ".venv/bin/pytest": check_pytest,
    ".venv/bin/python": check_module,
    "../.venv/bin/python": check_module,
    "python": check_module,
    "pip": check_pip,
    "curl": check_curl,
    ".venv/bin/mkdocs": check_nothing,
    "scp": check_nothing,
}


def test_there_are_commands_of_every_kind() -> None:
    assert len(COMMANDS) >= 50
    assert {typed.words[0] for typed in COMMANDS if not typed.words[0].startswith("scripts/")} == set(CHECKS)


@pytest.mark.parametrize("typed", COMMANDS, ids=str)
def test_a_command_can_be_typed(typed: Typed) -> None:
    program, *words = typed.words
    if program.startswith("scripts/"):
        check_script(ROOT / program, tuple(words))
    else:
        CHECKS[program](tuple(words))


def of_a_ring(page: str) -> list[StageConfig]:
    return [check_stage(typed.words[1:]) for typed in COMMANDS if typed.page == page and typed.words[0] == "vllm"]


@pytest.mark.parametrize("page", ["README.md", "docs/guide/by-hand.md"])
def test_the_stages_of_a_page_are_a_ring(page: str) -> None:
    """In order, without a gap, each at its successor's predecessor's address."""
    stages = of_a_ring(page)
    assert [stage.stage for stage in stages] == list(range(stages[0].num_stages))
    for stage, successor in zip(stages, [*stages[1:], stages[0]], strict=True):
        assert successor.predecessor.port == stage.bind_port
        assert successor.layers.start == (stage.layers.end if successor.stage else 0)


def test_the_addresses_of_several_machines_are_a_ring() -> None:
    text = (ROOT / "docs" / "guide" / "several-machines.md").read_text()
    row = r"^machine \w, (\S+) +stage (\d) +--pipeline-local-bind-port (\d+) +--pipeline-prev-stage\S*addr (\S+)$"
    rows = re.findall(row, text, re.MULTILINE)
    assert [int(stage) for _, stage, _, _ in rows] == [0, 1, 2, 3]
    listening = [f"{host}:{port}" for host, _, port, _ in rows]
    assert [predecessor for *_, predecessor in rows] == [listening[-1], *listening[:-1]]


def test_options_between_backticks_are_the_subcommand_s() -> None:
    """Of code that begins with the program and has an option; what else is needed the sentence may leave out."""
    for page in PAGES:
        for code in re.findall(r"`(stagewire [a-z-]+ -[^`]*)`", page.read_text()):
            _, name, *words = code.partition(" -- ")[0].split()
            parser = next(each for each in cli._make_parser()._actions if isinstance(each, argparse._SubParsersAction))
            options = [word for word in words if word.startswith("--")]
            assert set(options) <= set(parser.choices[name]._option_string_actions), (page, code)


def test_benchmarks_between_backticks_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`(?:\S+/)?python -m (benches[\w.]+)", page.read_text()):
            assert (ROOT / f"{name.replace('.', '/')}.py").exists(), (page, name)


def test_python_of_the_guide_names_what_there_is() -> None:
    [source] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide" / "python.md").read_text(), re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    [call] = [call for call in calls if ast.unparse(call.func) == "stagewire.head"]
    names = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    inspect.signature(stagewire.head).bind(**names)
