"""Every wrong setting that a stage can know alone: one clear line, exit code 2, before anything is loaded.

Runs vLLM's real parser and our serve command in this process. What stages only find out together is in
tests/unit/test_ring_*.py (all of it, in memory) and tests/vllm/test_bad_rings.py (real processes).
"""

from __future__ import annotations

import argparse
import enum
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from stagewire.checkpoint.export_plan import plan_export
from stagewire.checkpoint.export_writer import run_export
from stagewire.checkpoint.manifest import MANIFEST_NAME, encode_unfinished, stage_folder
from stagewire.plan.ranges import split_evenly
from support.models import copy_tokenizer, make_blip2, make_llama

pytestmark = pytest.mark.vllm

HEAD: dict[str, object] = {
    "--pipeline-stage-mode": "external",
    "--pipeline-stage-idx": "0",
    "--pipeline-total-stages": "4",
    "--pipeline-layer-range": "0-8",
    "--pipeline-local-bind-port": "15550",
    "--pipeline-prev-stage-addr": "127.0.0.1:15554",
}
WORKER: dict[str, object] = {
    "--pipeline-stage-mode": "external",
    "--pipeline-stage-idx": "1",
    "--pipeline-total-stages": "4",
    "--pipeline-layer-range": "8-16",
    "--pipeline-local-bind-port": "15550",
    "--pipeline-prev-stage-service-addr": "127.0.0.1:15550",
    "--external-pp-worker": None,
}
TAIL = WORKER | {"--pipeline-stage-idx": "3", "--pipeline-layer-range": "24-32"}


class Drop(enum.Enum):
    """In place of a flag's value: the flag is left out. Its name in a test's id is the same in every process."""

    FLAG = enum.auto()


DROP = Drop.FLAG


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama32"), model_dir)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for its own process must not reach the other tests."""
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_WORKER_MULTIPROC_METHOD", "OMP_NUM_THREADS", "LD_PRELOAD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


class StartedError(Exception):
    """Nothing was refused: the stage would have started now."""


def serve(monkeypatch: pytest.MonkeyPatch, model: object, flags: dict[str, object]) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from stagewire.vllm_plugin.entry.install import install_flag_patches
    from stagewire.vllm_plugin.head import api_server
    from stagewire.vllm_plugin.host import stage_host
    from stagewire.vllm_plugin.worker import cpu

    def started(*args: object) -> None:
        raise StartedError(*args)

    monkeypatch.setattr(api_server, "serve_head", started)
    monkeypatch.setattr(stage_host, "serve_stage", started)
    monkeypatch.setattr(cpu, "reexec_with_libraries", lambda: None)
    given = {name: value for name, value in flags.items() if value is not DROP}
    argv = ["serve", str(model)]
    argv += [word for name, value in given.items() for word in ([name] if value is None else [name, str(value)])]
    monkeypatch.setattr(sys, "argv", ["vllm", *argv])
    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(dest="subparser")
    command = ServeSubcommand()
    command.subparser_init(subparsers)
    install_flag_patches()
    args = parser.parse_args(argv)
    command.cmd(args)


CASES: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "index outside the total": (WORKER, {"--pipeline-stage-idx": "4"}, "--pipeline-stage-idx 4"),
    "negative index": (WORKER, {"--pipeline-stage-idx": "-1"}, "--pipeline-stage-idx -1"),
    "no index": (WORKER, {"--pipeline-stage-idx": DROP}, "--pipeline-stage-idx"),
    "no total": (WORKER, {"--pipeline-total-stages": DROP}, "--pipeline-total-stages"),
    "one stage": (HEAD, {"--pipeline-total-stages": "1"}, "at least 2 stages"),
    "no range": (WORKER, {"--pipeline-layer-range": DROP}, "no --pipeline-layer-range"),
    "reversed range": (WORKER, {"--pipeline-layer-range": "16-8"}, "16-8"),
    "empty range": (WORKER, {"--pipeline-layer-range": "8-8"}, "8-8"),
    "malformed range": (WORKER, {"--pipeline-layer-range": "8:16"}, "8:16"),
    "range beyond the model": (TAIL, {"--pipeline-layer-range": "24-33"}, "32"),
    "head not at 0": (HEAD, {"--pipeline-layer-range": "1-8"}, "must start at layer 0"),
    "tail not at the end": (TAIL, {"--pipeline-layer-range": "24-31"}, "32"),
    "worker flag on the head": (HEAD, {"--external-pp-worker": None}, "--external-pp-worker on stage 0"),
    "worker flag missing": (WORKER, {"--external-pp-worker": DROP}, "needs --external-pp-worker"),
    "port on a worker": (WORKER, {"--port": "8001"}, "--port on stage 1"),
    "host on a worker": (WORKER, {"--host": "0.0.0.0"}, "--host on stage 1"),
    "uds on a worker": (WORKER, {"--uds": "x.sock"}, "--uds on stage 1"),
    "ssl on a worker": (WORKER, {"--ssl-keyfile": "key.pem"}, "--ssl-keyfile on stage 1"),
    "no predecessor": (WORKER, {"--pipeline-prev-stage-service-addr": DROP}, "no predecessor's address"),
    "no predecessor of the head": (HEAD, {"--pipeline-prev-stage-addr": DROP}, "--pipeline-prev-stage-addr"),
    "address without port": (WORKER, {"--pipeline-prev-stage-service-addr": "127.0.0.1"}, "HOST:PORT"),
    "address with a scheme": (WORKER, {"--pipeline-prev-stage-service-addr": "tcp://h:1"}, "HOST:PORT"),
    "bare IPv6": (WORKER, {"--pipeline-prev-stage-service-addr": "::1:15550"}, "brackets"),
    "port 0": (WORKER, {"--pipeline-prev-stage-service-addr": "127.0.0.1:0"}, "1 to 65535"),
    "two predecessors": (WORKER, {"--pipeline-prev-stage-addr": "127.0.0.1:9"}, "one predecessor"),
    "no bind port": (WORKER, {"--pipeline-local-bind-port": DROP}, "--pipeline-local-bind-port"),
    "bind port out of range": (WORKER, {"--pipeline-local-bind-port": "70000"}, "1 to 65535"),
    "zero start timeout": (WORKER, {"--pipeline-start-timeout": "0"}, "--pipeline-start-timeout"),
    "flags without the mode": (HEAD, {"--pipeline-stage-mode": DROP}, "without --pipeline-stage-mode external"),
    "data parallel": (HEAD, {"--data-parallel-size": "2"}, "--data-parallel-size"),
    "async scheduling": (HEAD, {"--async-scheduling": None}, "--async-scheduling"),
    "heads that do not divide": (WORKER, {"--tensor-parallel-size": "3"}, "attention heads"),
    "more ranks than a stage has": (WORKER, {"--tensor-parallel-size": "65"}, "at most 64 ranks"),
    "pipeline parallel": (HEAD, {"--pipeline-parallel-size": "4"}, "--pipeline-parallel-size"),
    "nnodes": (HEAD, {"--nnodes": "2"}, "--nnodes"),
    "headless": (HEAD, {"--headless": None}, "--headless"),
    "executor backend": (HEAD, {"--distributed-executor-backend": "mp"}, "--distributed-executor-backend"),
    "kv transfer": (
        HEAD,
        {"--kv-transfer-config": '{"kv_connector":"ExampleConnector","kv_role":"kv_both"}'},
        "--kv-transfer-config",
    ),
    "expert parallel": (HEAD, {"--enable-expert-parallel": None}, "--enable-expert-parallel"),
    "speculation on the GPU": (
        HEAD,
        {"--speculative-config": '{"method":"ngram_gpu","num_speculative_tokens":2}'},
        "speculative decoding by 'ngram_gpu'",
    ),
    "speculation by suffixes": (
        HEAD,
        {"--spec-method": "suffix", "--spec-tokens": "2"},
        "speculative decoding by 'suffix'",
    ),
    "a draft model": (
        WORKER,
        {"--spec-method": "draft_model", "--spec-tokens": "2"},
        "speculative decoding by 'draft_model'",
    ),
    "prompt embeddings on a head of two ranks": (
        HEAD,
        {"--enable-prompt-embeds": None, "--tensor-parallel-size": "2"},
        "--enable-prompt-embeds with --tensor-parallel-size 2 on stage 0",
    ),
    "images in shared memory": (HEAD, {"--mm-processor-cache-type": "shm"}, "--mm-processor-cache-type"),
    "sleep mode on a CPU": (HEAD, {"--enable-sleep-mode": None}, "Sleep mode is not supported"),
    "adapters over several ranks": (
        WORKER,
        {"--enable-lora": None, "--tensor-parallel-size": "2"},
        "--enable-lora with --tensor-parallel-size 2",
    ),
    "adapters with drafts": (
        WORKER,
        {"--enable-lora": None, "--speculative-config": '{"method":"ngram","num_speculative_tokens":2}'},
        "--enable-lora with --speculative-config",
    ),
    "adapters of a pooling model": (
        HEAD,
        {"--enable-lora": None, "--runner": "pooling", "--convert": "embed"},
        "--enable-lora: adapters of pooling models",
    ),
    "no such root": (WORKER, {"--pipeline-lora-root": "/nonexistent"}, "--pipeline-lora-root /nonexistent"),
    "root without the mode": (
        dict.fromkeys(HEAD, DROP),
        {"--pipeline-lora-root": "/"},
        "--pipeline-lora-root given without --pipeline-stage-mode external",
    ),
    "grpc": (HEAD, {"--grpc": None}, "--grpc"),
    "two API servers": (HEAD, {"--api-server-count": "2"}, "--api-server-count"),
    "too long for the model": (HEAD, {"--max-model-len": "999999"}, "max_model_len"),
}


@pytest.mark.parametrize(("base", "change", "expected"), CASES.values(), ids=CASES)
def test_refused(
    base: dict[str, object],
    change: dict[str, object],
    expected: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        serve(monkeypatch, model, base | change)
    assert exit_info.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert expected in line, line
    assert line.startswith(("Stage ", "Stagewire: ")), line


def test_a_model_without_pipeline_support(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Mamba2Config

    config = Mamba2Config(num_hidden_layers=32, hidden_size=64, num_heads=4, head_dim=32, vocab_size=49152)
    config.architectures = ["Mamba2ForCausalLM"]
    config.save_pretrained(tmp_path)
    copy_tokenizer(model_dir, tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        serve(monkeypatch, tmp_path, HEAD)
    assert exit_info.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Pipeline parallelism is not supported for this model" in line, line


def test_on_a_gpu_it_is_said_what_is_off(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm.platforms import current_platform

    from stagewire.vllm_plugin.entry import serve as start_up

    resolve = start_up._resolve

    def resolve_as_on_a_gpu(args: argparse.Namespace) -> object:
        resolved = resolve(args)
        monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
        return resolved

    monkeypatch.setattr(start_up, "_resolve", resolve_as_on_a_gpu)
    for index, flag_set in enumerate((HEAD, WORKER)):
        with pytest.raises(StartedError):
            serve(monkeypatch, model, flag_set)
        text = f"Stage {index}: async scheduling and the V2 model runner are off in external mode"
        assert capsys.readouterr().out.count(text) == 1


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_blip2(tmp_path_factory.mktemp("blip2"), model_dir, num_layers=32)


TWO_RANKS: dict[str, object] = {"--tensor-parallel-size": "2"}


def test_images_on_a_head_of_two_ranks(
    image_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        serve(monkeypatch, image_model, HEAD | TWO_RANKS)
    assert exit_info.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "takes images or other items, with --tensor-parallel-size 2 on stage 0" in line, line


WITHOUT_IMAGES: dict[str, dict[str, object]] = {
    "language model only": {"--language-model-only": None},
    "no images": {"--limit-mm-per-prompt": '{"image": 0}'},
}


@pytest.mark.parametrize(
    "flags",
    [
        HEAD,
        *(HEAD | TWO_RANKS | change for change in WITHOUT_IMAGES.values()),
        WORKER | TWO_RANKS,
        TAIL | TWO_RANKS | {"--enable-prompt-embeds": None},
    ],
    ids=["head of one rank", *WITHOUT_IMAGES, "worker", "tail"],
)
def test_images_and_ranks_that_start(
    flags: dict[str, object], image_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartedError):
        serve(monkeypatch, image_model, flags)


def test_stages_must_agree_whether_images_come(image_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM builds another attention without them, so it is compared between the stages."""
    from stagewire.vllm_plugin.member.identity import make_identity

    found = []
    for change in ({}, *WITHOUT_IMAGES.values()):
        with pytest.raises(StartedError) as started:
            serve(monkeypatch, image_model, WORKER | change)
        config, vllm_config, *_ = started.value.args
        found.append(make_identity(config, vllm_config).shared["--language-model-only"])
    assert found == ["False", "True", "True"]


@pytest.mark.parametrize("flags", [HEAD, WORKER, TAIL], ids=["head", "worker", "tail"])
def test_right_settings_start(flags: dict[str, object], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartedError):
        serve(monkeypatch, model, flags)


def test_ranks_of_a_stage_share_its_threads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    with pytest.raises(StartedError) as started:
        serve(monkeypatch, model, WORKER | {"--tensor-parallel-size": "2"})
    assert started.value.args[1].parallel_config.tensor_parallel_size == 2
    assert os.environ["OMP_NUM_THREADS"] == "4", "32 cores, 4 stages on this host, 2 ranks"


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    run_export(plan_export(model, lambda num_layers: split_evenly(num_layers, 4)), folder, lambda _: None)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_pre_split_stage_needs_no_range(
    stage: int, model: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {0: HEAD, 1: WORKER, 3: TAIL}[stage]
    without = {name: value for name, value in flags.items() if name != "--pipeline-layer-range"}
    own = stage_folder(exported, stage)
    lines = []
    for folder, given in ((model, flags), (own, without), (own, flags)):
        with pytest.raises(StartedError):
            serve(monkeypatch, folder, given)
        lines += [line for line in capsys.readouterr().out.splitlines() if f"Stage {stage}: Loading" in line]
    assert lines == [lines[0]] * 3, "the same layers and bytes as from the full checkpoint"
    assert f"layers {8 * stage}-{8 * stage + 7}" in lines[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--pipeline-layer-range": "8-17"}, "--pipeline-layer-range 8-17 contradicts .* with layers 8-16"),
        ({"--pipeline-stage-idx": "2"}, "--pipeline-stage-idx 2 contradicts .* as stage 1 of 4"),
        ({"--pipeline-total-stages": "5"}, "--pipeline-total-stages 5 contradicts .* as stage 1 of 4"),
        (dict.fromkeys(WORKER, DROP), "is one stage of a pre-split model .* add --pipeline-stage-mode external"),
    ],
    ids=str,
)
def test_flags_that_contradict_a_pre_split_stage(
    change: dict[str, object],
    expected: str,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        serve(monkeypatch, stage_folder(exported, 1), WORKER | change)
    assert exit_info.value.code == 2
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [(encode_unfinished(1, 4), "is an unfinished export"), (b'{"format_version": 1}', "is damaged")],
)
def test_a_manifest_that_does_not_do(
    manifest: bytes,
    expected: str,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(stage_folder(exported, 1), tmp_path / "stage_1")
    (folder / MANIFEST_NAME).write_bytes(manifest)
    with pytest.raises(SystemExit) as exit_info:
        serve(monkeypatch, folder, WORKER)
    assert exit_info.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--pipeline-prev-stage-addr", "--pipeline-prev-stage-service-addr"])
def test_either_predecessor_flag_works(flag: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = {name: value for name, value in WORKER.items() if "prev-stage" not in name}
    with pytest.raises(StartedError):
        serve(monkeypatch, model, worker | {flag: "127.0.0.1:15550"})


def test_missing_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_info:
        serve(monkeypatch, tmp_path / "nothing", HEAD)
    assert exit_info.value.code == 2
    assert "no model folder" in capsys.readouterr().err


def test_other_api_flags_on_a_worker_are_mentioned_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StartedError):
        serve(monkeypatch, model, WORKER | {"--api-key": "secret", "--disable-fastapi-docs": None})
    lines = [line for line in capsys.readouterr().out.splitlines() if "ignored" in line]
    assert len(lines) == 1
    assert "--api-key" in lines[0]
    assert "--disable-fastapi-docs" in lines[0]
    assert "secret" not in lines[0]


def test_load_line_has_the_bytes_of_the_index(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StartedError):
        serve(monkeypatch, model, WORKER)
    assert "Stage 1: Loading layers 8-15... (0." in capsys.readouterr().out


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_a_stage_runs_eagerly(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartedError) as started:
        serve(monkeypatch, model, WORKER)
    assert started.value.args[1].model_config.enforce_eager


@pytest.mark.usefixtures("without_compiler")
def test_compilation_asked_for_without_a_compiler(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        serve(monkeypatch, model, WORKER | {"--optimization-level": "3"})
    assert exit_info.value.code == 2
    assert "no C++ compiler" in capsys.readouterr().err


def test_libraries_are_preloaded_by_running_again_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from stagewire.vllm_plugin.worker import cpu

    library = tmp_path / "libtcmalloc.so"
    library.touch()
    runs: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: runs.append((path, argv)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "vllm", "serve", "model"])
    monkeypatch.setenv("STAGEWIRE_REEXECUTED", "")
    cpu.reexec_with_libraries()
    assert not runs, "nothing to preload"
    monkeypatch.setenv("LD_PRELOAD", str(library))
    cpu.reexec_with_libraries()
    cpu.reexec_with_libraries()
    assert runs == [(sys.executable, [sys.executable, "vllm", "serve", "model"])]


def test_unsupported_version_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import vllm.version

    monkeypatch.setattr(vllm.version, "__version__", "0.28.1")
    monkeypatch.setattr(vllm.version, "__version_tuple__", (0, 28, 1))
    with pytest.raises(SystemExit) as exit_info:
        serve(monkeypatch, model, HEAD)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "0.28.1" in error
    assert "vllm>=0.30,<0.33" in error


def test_yaml_config_gives_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All flags from a --config file; API flags in it do not stop a worker."""
    lines = [f"{name[2:]}: {'true' if value is None else value}" for name, value in WORKER.items()]
    config = tmp_path / "stage.yaml"
    config.write_text("\n".join([*lines, "port: 8123"]) + "\n")
    with pytest.raises(StartedError):
        serve(monkeypatch, model, {"--config": str(config)})
    assert "--port" in capsys.readouterr().out
