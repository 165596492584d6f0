"""What the launcher reads by itself, and what a head tells it, beside vLLM's own parser. Starts no process."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError
from stagewire.launch.early import CONFIG_FLAG, OPTIONS, read_early
from stagewire.observe.status_events import LAUNCHER_SOCKET_ENV, HeadApi
from stagewire.plan.ranges import LayerRange
from stagewire.vllm_plugin.entry import serve
from stagewire.vllm_plugin.entry.external_mode import set_process_environment
from stagewire.vllm_plugin.seams import interfaces
from support.arguments import SPELLINGS, Spelling
from support.documents import Typed, typed_commands

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

KEY = "VLLM_API_KEY"


@functools.cache
def serve_parser() -> Any:
    """`vllm serve`'s own, with our flags, as vllm/entrypoints/cli/main.py builds it."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from stagewire.vllm_plugin import register

    register()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(required=False, dest="subparser"))
    return parser


def parse(*words: str) -> argparse.Namespace:
    found: argparse.Namespace = serve_parser().parse_args(["serve", "a-model", *words])
    return found


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_the_launcher_reads_what_vllm_s_parser_reads(spelling: Spelling, tmp_path: Path) -> None:
    words = spelling.words(tmp_path)
    args, plain = parse(*words), parse()
    dests = {flag: flag.strip("-").replace("-", "_") for flag in OPTIONS if flag != "--model"}
    found = read_early(words)
    assert {flag for flag, dest in dests.items() if getattr(args, dest) != getattr(plain, dest)} == found.given
    assert args.tensor_parallel_size == found.num_ranks
    load = found.load
    theirs = (args.load_format, args.config_format, args.hf_config_path, args.hf_overrides)
    assert theirs == (load.load_format, load.config_format, load.hf_config_path, load.hf_overrides)


def test_no_option_of_vllm_is_a_beginning_of_one_that_the_launcher_reads() -> None:
    """Or the launcher would take it for the longer one."""
    (serve,) = serve_parser()._subparsers._group_actions[0].choices.values()
    names = set(serve._option_string_actions) - {*OPTIONS, CONFIG_FLAG}
    assert [(name, flag) for name in names for flag in OPTIONS if flag.startswith(name) and name.startswith("--")] == []


@pytest.mark.parametrize(
    ("words", "environ", "content", "expected"),
    [
        ("", {}, "", HeadApi()),
        ("--port 9000 --host ::1", {}, "", HeadApi(host="::1", port=9000)),
        ("--config FILE", {}, "port: 9000\nuds: /tmp/x\n", HeadApi(port=9000, uds="/tmp/x")),
        ("--config FILE --port 1024", {}, "port: 9000\n", HeadApi(port=1024)),
        ("--config FILE", {}, "api-key: s3cret\n", HeadApi(api_key="s3cret")),
        ("--config FILE", {}, "api-key: [a, b]\n", HeadApi(api_key="a")),
        ("--api_key=a", {KEY: "b"}, "", HeadApi(api_key="a")),
        ("", {KEY: "b"}, "", HeadApi(api_key="b")),
        ("--ssl_keyfile k --ssl-certf c", {}, "", HeadApi(is_tls=True)),
        ("--ssl-certfile c --ssl-cert-reqs 2", {}, "", HeadApi(is_tls=True, needs_client_certificate=True)),
        ("--config FILE", {}, "shutdown-timeout: 7\nchat-template: x\n", HeadApi(has_chat_template=True, drain_s=7)),
        ("--shutdown_timeout 3 --no-enable-log-requests", {}, "", HeadApi(drain_s=3)),
    ],
)
def test_a_head_tells_what_vllm_s_parser_has_read(
    words: str,
    environ: dict[str, str],
    content: str,
    expected: HeadApi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert serve._api_of(parse(*Spelling(words, content=content).words(tmp_path))) == expected


@pytest.mark.parametrize(
    ("words", "is_launched", "refused"),
    [
        ("--ssl_keyfile k --ssl-certfile c", False, "--ssl-keyfile, --ssl-certfile on stage 1"),
        ("--ssl_keyfile k --ssl-certfile c", True, ""),
        ("--port 9000 --uds x", True, ""),
        ("--config=FILE", False, "vLLM does not read --config="),
        ("--config=FILE", True, "vLLM does not read --config="),
    ],
)
def test_a_worker_under_a_launcher_passes_over_what_is_of_the_api(
    words: str, is_launched: bool, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["vllm", "serve", "a-model", *words.split()])
    monkeypatch.delenv(LAUNCHER_SOCKET_ENV, raising=False)
    if is_launched:
        monkeypatch.setenv(LAUNCHER_SOCKET_ENV, "/nowhere")
    worker = StageConfig(1, 2, LayerRange(4, 8), 15551, Address("127.0.0.1", 15550))
    with pytest.raises(ConfigError, match=refused) if refused else contextlib.nullcontext():
        serve._check_entry_point(worker, parse(*words.split()))


def test_a_config_file_that_vllm_does_not_read_is_noticed(tmp_path: Path) -> None:
    """It takes the two words from its command line once it has read the file; written otherwise it reads nothing."""
    path = tmp_path / "c.yaml"
    path.write_text("port: 9000\n")
    read, unread = parse("--config", str(path)), parse(f"--config={path}")
    assert (read.config, read.port) == (None, 9000)
    assert (unread.config, unread.port) == (str(path), 8000)


@pytest.mark.parametrize(
    ("supported", "pooling", "num_labels", "expected"),
    [
        (("generate",), None, 2, "generate"),
        (("generate", "transcription"), None, 2, "generate"),
        (("token_embed", "embed"), None, 2, "embed"),
        (("token_embed", "embed"), "token_embed", 2, "token_embed"),
        (("token_classify", "classify"), None, 2, "classify"),
        (("token_classify", "classify"), None, 1, "score"),
        (("token_classify",), None, 1, "token_classify"),
        (("transcription",), None, 2, "transcription"),
        ((), None, 2, ""),
    ],
)
def test_what_a_model_is_for(supported: tuple[str, ...], pooling: str | None, num_labels: int, expected: str) -> None:
    """By vLLM's own choice of a pooling task."""
    from vllm.config import ModelConfig, PoolerConfig

    is_pooling = not {"generate", "transcription"}.intersection(supported)
    model = SimpleNamespace(
        pooler_config=PoolerConfig(task=pooling) if is_pooling else None,
        architectures=["LlamaModel"],
        hf_config=SimpleNamespace(num_labels=num_labels),
    )
    model.get_pooling_task = functools.partial(ModelConfig.get_pooling_task, model)
    assert interfaces.main_task(supported, model) == expected


def test_a_split_of_vllm_s_own_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,3")
    set_process_environment()
    assert "VLLM_PP_LAYER_PARTITION=3,3 in the environment is not used" in capsys.readouterr().err
    assert "VLLM_PP_LAYER_PARTITION" not in os.environ


@pytest.mark.parametrize("typed", [typed for typed in typed_commands() if typed.words[0] == "vllm"], ids=str)
def test_vllm_s_parser_reads_the_commands_of_the_documentation(typed: Typed) -> None:
    program, subcommand, model, *words = typed.words
    args = serve_parser().parse_args([subcommand, model, *words])
    assert (program, args.model_tag) == ("vllm", model)
    assert args.pipeline_stage_mode == "external"


@pytest.mark.parametrize("typed", [typed for typed in typed_commands() if " -- " in " ".join(typed.words)], ids=str)
def test_vllm_s_parser_reads_what_the_documentation_gives_to_every_stage(typed: Typed) -> None:
    parse(*typed.words[typed.words.index("--") + 1 :])
