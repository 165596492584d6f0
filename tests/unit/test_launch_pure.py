"""What the launcher decides before and after it starts processes."""

from __future__ import annotations

import argparse
import ast
import asyncio
import inspect
import io
import json
import os
import signal
from pathlib import Path

import pytest

from stagewire.commands import up
from stagewire.commands.launching import describe_serving, read_wanted
from stagewire.commands.screen import PlainScreen
from stagewire.commands.usage import usage
from stagewire.errors import ConfigError
from stagewire.launch import decision
from stagewire.launch.api import Api, Served, chat_template_exists
from stagewire.launch.decision import Wanted
from stagewire.launch.early import read_early
from stagewire.launch.hints import hint, last_error
from stagewire.launch.logs import LogFolder
from stagewire.launch.loop import run_loop, take_signals
from stagewire.launch.resources import assign_cores, assign_resources, preload_libraries
from stagewire.launch.spec import Launch, StageSpec, Timeouts, VllmCommand, place_stages, stage_environment
from stagewire.observe.processes import describe_exit
from stagewire.observe.status_events import HeadApi, Phase, StatusEvent
from stagewire.plan.ranges import LayerRange

# vLLM says so at every start where the limit is low.
ULIMIT_WARNING = (
    "WARNING 12-01 02:50:43 [system_utils.py:256] Found ulimit of 20000 and failed to automatically increase. This can "
    "cause fd limit errors like `OSError: [Errno 24] Too many open files`. Consider increasing with ulimit -n"
)
RANGES = (LayerRange(0, 7), LayerRange(7, 15), LayerRange(15, 30))


@pytest.mark.parametrize(
    ("cores", "num_stages", "expected"),
    [
        ([0, 1], 1, [(0, 1)]),
        ([0, 1], 2, [(0,), (1,)]),
        ([0, 1], 4, [()] * 4),
        ([0, 1, 2, 3], 4, [(0,), (1,), (2,), (3,)]),
        ([4, 5, 6, 7, 8, 9], 4, [(4, 5), (6, 7), (8,), (9,)]),
        (list(range(8)), 3, [(0, 1, 2), (3, 4, 5), (6, 7)]),
    ],
)
def test_cores_are_shared_evenly(cores: list[int], num_stages: int, expected: list[tuple[int, ...]]) -> None:
    assert assign_cores(cores, num_stages) == expected


def test_stages_form_a_ring_of_ports() -> None:
    specs = place_stages(RANGES, 15550)
    assert [(spec.bind_port, spec.prev_port) for spec in specs] == [(15550, 15552), (15551, 15550), (15552, 15551)]
    with pytest.raises(ConfigError, match="ports 65535 to 65537"):
        place_stages(RANGES, 65535)


def test_the_command_lines_are_those_of_the_quick_start() -> None:
    head, worker, _ = place_stages(RANGES, 15550)
    command = VllmCommand("vllm", "/m", "0.0.0.0", 8000, ("--dtype", "float32", "--ssl-keyfile", "k"))
    common = "--pipeline-stage-mode external --pipeline-stage-idx {} --pipeline-total-stages 3"
    assert " ".join(command(head)) == (
        f"vllm serve /m {common.format(0)} --pipeline-layer-range 0-7 --pipeline-local-bind-port 15550"
        " --pipeline-prev-stage-addr 127.0.0.1:15552 --port 8000 --host 0.0.0.0 --dtype float32 --ssl-keyfile k"
    )
    assert " ".join(command(worker)) == (
        f"vllm serve /m {common.format(1)} --pipeline-layer-range 7-15 --pipeline-local-bind-port 15551"
        " --pipeline-prev-stage-service-addr 127.0.0.1:15550 --external-pp-worker --dtype float32 --ssl-keyfile k"
    )
    assert "--port" not in VllmCommand("vllm", "/m", None, None)(head), "vLLM's own rule: a --config file may say"


def test_one_gpu_for_each_stage() -> None:
    resources = assign_resources(2, {"CUDA_VISIBLE_DEVICES": "2,5,7"}, is_cpu=False)
    assert [r.environ for r in resources] == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(
        ConfigError, match=r"4 stages need 4 GPUs, one each: CUDA_VISIBLE_DEVICES=3 shows 1; use --num-stages 1"
    ):
        assign_resources(4, {"CUDA_VISIBLE_DEVICES": "3"}, is_cpu=False)


def test_tensor_parallel_stages_get_a_gpu_for_each_rank() -> None:
    resources = assign_resources(2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}, is_cpu=False, num_ranks=2)
    assert [r.environ for r in resources] == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    with pytest.raises(ConfigError, match=r"2 stages need 4 GPUs, 2 each .* shows 3; use --num-stages 1"):
        assign_resources(2, {"CUDA_VISIBLE_DEVICES": "0,1,2"}, is_cpu=False, num_ranks=2)


def test_ranks_of_a_stage_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    resources = assign_resources(2, {}, is_cpu=True, num_ranks=2)
    assert [(r.cores, r.environ["OMP_NUM_THREADS"]) for r in resources] == [((0, 1, 2, 3), "2"), ((4, 5, 6, 7), "2")]
    crowded = assign_resources(3, {}, is_cpu=True, num_ranks=3)
    assert {(r.cores, r.environ["OMP_NUM_THREADS"]) for r in crowded} == {((), "1")}


def test_cpu_stages_share_the_cores_that_this_process_may_use() -> None:
    cores = os.sched_getaffinity(0)
    (alone,) = assign_resources(1, {}, is_cpu=True)
    assert set(alone.cores) == cores
    assert alone.environ["OMP_NUM_THREADS"] == str(len(cores))
    crowded = assign_resources(len(cores) + 1, {"LD_PRELOAD": "/x/libgomp.so /y/libtcmalloc.so"}, is_cpu=True)
    assert {(r.cores, r.environ["OMP_NUM_THREADS"]) for r in crowded} == {((), "1")}


def test_preload_keeps_what_the_user_chose() -> None:
    assert preload_libraries("/x/libiomp5.so:/y/libtcmalloc.so.4") == "/x/libiomp5.so:/y/libtcmalloc.so.4"


def test_a_split_of_vllm_s_own_is_kept_from_the_stages() -> None:
    (resources,) = assign_resources(1, {}, is_cpu=True)
    assert "VLLM_PP_LAYER_PARTITION" not in stage_environment(resources, "/x", {"VLLM_PP_LAYER_PARTITION": "3,3"})


def test_a_stage_gets_private_files_and_the_user_s_own_choices() -> None:
    (resources,) = assign_resources(1, {}, is_cpu=True)
    environ = stage_environment(resources, "/tmp/x", {"VLLM_NO_USAGE_STATS": "0", "TMPDIR": "/elsewhere"})
    assert environ["TMPDIR"] == environ["VLLM_RPC_BASE_PATH"] == "/tmp/x"
    assert environ["STAGEWIRE_LAUNCHER_PID"].startswith(f"{os.getpid()}:")
    assert (environ["VLLM_NO_USAGE_STATS"], environ["DO_NOT_TRACK"]) == ("0", "1")


@pytest.mark.parametrize(
    ("returncode", "tail", "expected"),
    [
        (-signal.SIGKILL, "", "memory"),
        (137, "", "memory"),
        (-signal.SIGILL, "", "--dtype float32"),
        (1, "OSError: [Errno 98] Address already in use", "--port"),
        (1, "OSError: [Errno 28] No space left on device", "disk is full"),
        (1, "torch._inductor.exc.InvalidCxxCompiler: No working C++ compiler found", "--enforce-eager"),
        (-signal.SIGBUS, "", "torch_compile_cache"),
        (1, "torch._inductor.exc.InductorError: OSError: /x/cafe.main.so: file too short", "torch_compile_cache"),
        (1, "OSError: Can't load the configuration of '/nope'.", "--model"),
        (1, "torch.OutOfMemoryError: CUDA out of memory.", "--max-model-len"),
        (1, "ValueError: Available memory on node 0 (0.1/4.0 GiB) on kv cache allocation is less", "not enough memory"),
        (1, "OSError: [Errno 30] Read-only file system: '/home/x/.cache'", "set HOME and TMPDIR"),
        (1, "PermissionError: [Errno 13] Permission denied: '/.cache/vllm'", "set HOME and TMPDIR"),
        (1, "FileNotFoundError: [Errno 2] No usable temporary directory found in ['/tmp']", "set HOME and TMPDIR"),
        (1, "OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'", "--shm-size"),
        (-signal.SIGBUS, "", "--shm-size"),
        (1, "KeyError: 'getpwuid(): uid not found: 12345'", "set USER"),
        (1, "RuntimeError: can't start new thread", "--pids-limit"),
        (1, "libgomp: Thread creation failed: Resource temporarily unavailable", "--pids-limit"),
        (1, "OSError: [Errno 24] Too many open files", "ulimit -n"),
        (1, f"stage 0's EngineCore (pid 7) was killed by SIGKILL\n{ULIMIT_WARNING}", "memory"),
    ],
)
def test_a_known_cause_has_a_hint(returncode: int, tail: str, expected: str) -> None:
    found = hint(returncode, tail)
    assert found is not None
    assert expected in found


def test_an_unknown_cause_has_none() -> None:
    assert hint(1, "ValueError: something else") is None
    assert hint(1, f"\x1b[0;36m(APIServer pid=1)\x1b[0;0m {ULIMIT_WARNING}\n(APIServer pid=1) {ULIMIT_WARNING}") is None
    assert (describe_exit(-9), describe_exit(3)) == ("was killed by SIGKILL", "ended with exit code 3")


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("x\n(EngineCore pid=12) ERROR 11-23 22:43:01 [core.py:12] ValueError: bad dtype\n", "ValueError: bad dtype"),
        (
            "\x1b[0;36m(EngineCore pid=1)\x1b[0;0m ValueError: the cause\n"
            "(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: the cause",
        ),
        ("vllm serve: error: argument --port: invalid\n", "vllm serve: error: argument --port: invalid"),
        (
            "torch._inductor.exc.InvalidCxxCompiler: No compiler\n",
            "torch._inductor.exc.InvalidCxxCompiler: No compiler",
        ),
        ("a\n\nb\nError handling is fine here\n", "a\nb\nError handling is fine here"),
        ("", ""),
    ],
)
def test_the_reason_is_found_in_a_log(log: str, expected: str) -> None:
    assert last_error(log) == expected


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (None, "http://localhost:8000"),
        ("0.0.0.0", "http://localhost:8000"),
        ("::", "http://[::1]:8000"),
        ("a.b", "http://a.b:8000"),
    ],
)
def test_the_address_to_use(host: str | None, url: str) -> None:
    assert Api(host, 8000).url == url


def test_what_to_copy_names_the_model_and_fits_it(tmp_path: Path) -> None:
    chat = usage(Api(None, 8000), Served("/my model's"), has_chat_template=True)
    assert "http://localhost:8000/v1/chat/completions" in chat
    assert '"/my model\'s"' in chat
    assert len(ast.parse(chat[chat.index("from openai") :]).body) == 4, "to be pasted as it is"
    plain = usage(Api(None, 8000, api_key="secret"), Served("m"), has_chat_template=False)
    assert "/v1/completions" in plain
    assert "secret" not in plain
    assert not chat_template_exists(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert chat_template_exists(tmp_path)


@pytest.mark.parametrize(
    ("task", "route"),
    [
        ("embed", "/v1/embeddings"),
        ("classify", "/classify"),
        ("score", "/score"),
        ("token_classify", "/pooling"),
        ("token_embed", "/pooling"),
    ],
)
def test_what_to_copy_is_what_the_model_is_for(task: str, route: str) -> None:
    text = usage(Api(None, 8000), Served("m", task), has_chat_template=True)
    assert f"http://localhost:8000{route}" in text
    assert "max_tokens" not in text
    assert ("OpenAI(" in text) == (task == "embed"), "the package openai knows embeddings"


def test_of_a_model_that_nobody_knows_how_to_ask_nothing_is_invented() -> None:
    assert (
        usage(Api(None, 8000), Served("m", "plugin"), has_chat_template=True) == "Serving m at http://localhost:8000\n"
    )


@pytest.mark.parametrize("is_in_folder", [False, True])
@pytest.mark.parametrize("is_given", [False, True])
def test_a_chat_template_is_the_folders_or_an_argument(tmp_path: Path, is_in_folder: bool, is_given: bool) -> None:
    logs = LogFolder.claim(tmp_path / "logs")
    unknown = Api(None, 8000)
    launch = Launch([], lambda _: [], [], unknown, tmp_path, logs, is_in_folder, Timeouts(), 0, False)
    text = describe_serving(launch, Api.told(HeadApi(has_chat_template=is_given)), Served("m"))
    logs.close()
    assert ("/v1/chat/completions" in text) == (is_in_folder or is_given)


def test_what_to_copy_for_a_unix_socket() -> None:
    text = usage(Api(None, uds="/run/my api"), Served("m"), has_chat_template=False)
    assert "Serving m at the Unix socket /run/my api" in text
    assert "curl --unix-socket '/run/my api' http://localhost/v1/completions" in text
    assert 'httpx.HTTPTransport(uds="/run/my api")' in text


def test_flags_of_the_launcher_are_refused_among_the_extra_ones() -> None:
    wanted = Wanted("m", port=8000)
    for extra in (["--dtype", "float32", "--pipeline_stage_idx=3"], ["--external-pp"], ["--port", "1"], ["--model=x"]):
        with pytest.raises(ConfigError, match=r"--[a-z-]+ after `--`"):
            decision._check_arguments(wanted, read_early(extra))
    decision._check_arguments(wanted, read_early(["--host", "::1"]))
    decision._check_arguments(Wanted("m"), read_early(["--port", "1"]))


def test_ranges_or_a_number_of_stages() -> None:
    assert [str(r) for r in decision._choose_ranges(None, None, 30)] == ["0-7", "7-15", "15-23", "23-30"]
    for wrong in (0, 31):
        with pytest.raises(ConfigError, match=rf"--num-stages {wrong}: the model has 30 layers.* use 1 to 30 stages"):
            decision._choose_ranges(None, wrong, 30)
    assert decision._choose_ranges(["0-7", "7-15", "15-30"], 3, 30) == RANGES
    with pytest.raises(ConfigError, match="--num-stages 2 but --ranges has 3"):
        decision._choose_ranges(["0-7", "7-15", "15-30"], 2, 30)
    with pytest.raises(ConfigError):
        decision._choose_ranges(["0-7", "8-30"], None, 30)


@pytest.mark.parametrize(
    ("words", "is_cpu", "num_stages"),
    [
        (["--num-stages", "auto"], False, 3),
        (["--num-stages", "auto"], True, 4),
        (["--num-stages", "2"], False, 2),
        (["--num-stages", "auto", "--ranges", "0-4", "4-8"], False, 2),
    ],
)
def test_as_many_stages_as_gpus_when_asked_to(
    words: list[str], is_cpu: bool, num_stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 8}))
    monkeypatch.setattr(decision, "is_cpu_build", lambda: is_cpu)
    monkeypatch.setattr(decision, "find_vllm", lambda: "vllm")
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    args = parser.parse_args(["--model", str(tmp_path), "--log-dir", str(tmp_path / "logs"), *words])
    launch = decision.decide(read_wanted(args, None, None), {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"})
    launch.logs.close()
    assert len(launch.specs) == num_stages


def test_a_number_of_stages_is_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "m", "--num-stages", "many"])
    assert "many: expected a number, or auto" in capsys.readouterr().err


def test_a_split_that_vllm_cannot_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    args = parser.parse_args(["--model", str(tmp_path), "--num-stages", "3"])
    with pytest.raises(
        ConfigError, match=r"stage 0 with layers \[0, 3\): no KV cache layer.*\n.*3 stages are not possible, 2 at most"
    ):
        up.run(args)


def test_a_spec_is_comparable() -> None:
    assert StageSpec(0, 1, LayerRange(0, 1), 1, 1).is_head


def test_plain_lines_of_the_way_through_a_phase_come_by_quarters() -> None:
    out = io.StringIO()
    screen = PlainScreen(out)
    screen.show(StatusEvent(1, Phase.LOADING, "layers 7-14 (4.00 GB)"))
    for percent in range(1, 101):
        screen.show(StatusEvent(1, Phase.LOADING, f"{percent} %", share=percent / 100))
        screen.show(StatusEvent(2, Phase.LOADING, f"{percent} %", share=percent / 1000))
    screen.show(StatusEvent(1, Phase.LOADED))
    lines = out.getvalue().splitlines()
    assert lines == [
        "stage 1  loading layers 7-14 (4.00 GB)",
        *(f"stage 1  loading {percent} %" for percent in (25, 50, 75, 100)),
        "stage 1  loaded",
    ]


@pytest.mark.filterwarnings("error")
def test_a_signal_before_the_loop_runs_is_kept_for_it() -> None:
    """Raised while a loop is made, or before its work has begun, it would leave warnings and tracebacks."""
    told: list[int] = []

    async def work() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        take_signals(told.append)
        await asyncio.sleep(0)
        return 7

    def signalled_loop() -> asyncio.AbstractEventLoop:
        os.kill(os.getpid(), signal.SIGTERM)
        return asyncio.new_event_loop()

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_loop(work(), signalled_loop) == 7
    assert told == [signal.SIGTERM, signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.filterwarnings("error")
def test_work_that_has_not_begun_is_closed() -> None:
    async def work() -> None: ...

    def fail() -> asyncio.AbstractEventLoop:
        raise OSError("no more files")

    begun = work()
    with pytest.raises(OSError, match="no more files"):
        run_loop(begun, fail)
    assert inspect.getcoroutinestate(begun) == inspect.CORO_CLOSED
