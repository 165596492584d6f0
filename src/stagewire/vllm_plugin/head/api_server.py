"""The head's API server process: connects vLLM's server with the ring's health, and ends with our exit codes.

EngineCore, a child of this process, owns the ring. It reports over Unix sockets (observe/status_events.py). From these
reports this process knows whether to answer 503, with which reason and exit code, and how each stage is.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stagewire.config import StageConfig
from stagewire.folders import fits_sockets, private_folder, remove_abandoned
from stagewire.observe.processes import Guard, find_launcher, take_launcher
from stagewire.observe.signals import SignalWatch
from stagewire.observe.status_events import (
    HEAD_SOCKET_ENV,
    LAUNCHER_SOCKET_ENV,
    NEWS_SOCKET_ENV,
    DatagramReceiver,
    Phase,
    StatusReceiver,
    StatusSender,
)
from stagewire.vllm_plugin.head.health import HEALTH
from stagewire.vllm_plugin.head.pipeline_status import PipelineStatus
from stagewire.vllm_plugin.head.stopping import HeadEnd
from stagewire.vllm_plugin.member.probes import EarlyServer
from stagewire.vllm_plugin.seams import early_answers, engine_stop_grace, engine_watch, interfaces, stop_deadline

__all__ = ["linger", "serve_head"]

# How long a head that has failed goes on answering 503 with the reason before it exits.
LINGER_S = 30.0
# Under a launcher, which prints the reason and restarts the head. Long enough to send the reason to open requests.
LINGER_WITH_LAUNCHER_S = 0.5
MIDDLEWARE = "stagewire.vllm_plugin.head.api_app.RingMiddleware"


def serve_head(
    original: Callable[..., Any], args: argparse.Namespace, config: StageConfig, signals: SignalWatch
) -> None:
    """Runs vLLM's own API server with our health, and ends the process with our exit codes.

    Args:
        original: vLLM's `serve`, called with ``args``.
        args: the parsed command line; a middleware is added.
        config: the head's place.
        signals: directed to the head's own ways to end.

    Raises:
        BaseException: what vLLM raised, if the ring reports no failure of its own.
    """
    os.environ["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] = "1"
    args.middleware = [*args.middleware, MIDDLEWARE]
    HEALTH.pipeline = PipelineStatus(config)
    with private_folder() as folder:
        receiver = StatusReceiver(str(Path(folder) / "head.sock"))
        os.environ[HEAD_SOCKET_ENV] = receiver.path
        # vLLM leaves the sockets between its processes behind in the temporary folder.
        chosen = os.environ.get("VLLM_RPC_BASE_PATH")
        if not chosen or not fits_sockets(chosen):
            os.environ["VLLM_RPC_BASE_PATH"] = folder
        news = DatagramReceiver(str(Path(folder) / "news.sock"))
        os.environ[NEWS_SOCKET_ENV] = news.path
        end = HeadEnd(HEALTH, partial(_clean_up, folder))
        signals.direct(lambda _: 0.0, end.end_now, end.end_now)
        launcher = take_launcher()
        if launcher is not None:
            Guard(launcher, end.launcher_ended)
        _start(_listen, receiver, end)
        _start(_hear, news, HEALTH.pipeline)
        _start(_mind_failure, end)
        _patch_server(end)
        _run(original, args, end)
    end.leave()


def _clean_up(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    remove_abandoned()  # the folder of a killed EngineCore


def _start(work: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=work, args=args, name=f"stagewire{work.__name__}", daemon=True).start()


def _run(original: Callable[..., Any], args: argparse.Namespace, end: HeadEnd) -> None:
    try:
        original(args)
    except BaseException:  # the top of this process; the ring's reason is better than vLLM's, if there is one
        if HEALTH.wait_for_failure(1.0) is None:
            raise
        sys.stderr.write(f"Stage 0: {HEALTH.failure}\n")
    finally:
        end.take_signals()


def _patch_server(end: HeadEnd) -> None:
    """vLLM binds its socket before the engine starts, and listens after that. `EarlyServer` answers in between."""
    early: list[EarlyServer] = []

    def setup(original: Callable[..., Any]) -> Callable[..., Any]:
        def setup_server(args: argparse.Namespace, **kwargs: Any) -> Any:
            end.take_signals()
            address, sock = original(args, **kwargs)
            if not args.uds and not args.ssl_keyfile:
                early.append(EarlyServer(sock, HEALTH))
            return address, sock

        return setup_server

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        async def build_and_serve(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
            end.serve_in(asyncio.get_running_loop())
            for server in early:
                server.close()
            if HEALTH.pipeline is not None:
                tasks = await engine_client.get_supported_tasks()
                HEALTH.pipeline.task = interfaces.main_task(tasks, engine_client.model_config)
            return await original(engine_client, *args, **kwargs)

        return build_and_serve

    engine_stop_grace.give_engine_time_to_stop()
    engine_watch.watch_engine(end.meet_engine)
    stop_deadline.on_engine_shutdown(end.begin_stop)
    early_answers.answer_early(setup, build)


def _listen(receiver: StatusReceiver, end: HeadEnd) -> None:
    while True:
        select.select([receiver], [], [])
        for event in receiver.receive():
            HEALTH.update(event)
            if event.phase is Phase.STOPPED:
                end.ring_stopped()
                return


def _hear(news: DatagramReceiver, pipeline: PipelineStatus) -> None:
    while True:
        select.select([news], [], [])
        for data in news.receive_all():
            pipeline.update(data)


def _mind_failure(end: HeadEnd) -> None:
    """After a failure: ends the process. A head that serves goes on answering 503 for a while first."""
    reason = HEALTH.wait_for_failure() or ""
    launcher = os.environ.get(LAUNCHER_SOCKET_ENV)
    if launcher is not None:
        StatusSender(0, [launcher]).send(Phase.FAILED, reason, HEALTH.exit_code)
    if not HEALTH.is_serving:
        end.give_up_start()
    sys.stderr.write(f"Stage 0: {reason}\n")
    sys.stderr.flush()
    linger(LINGER_S if launcher is None else LINGER_WITH_LAUNCHER_S)
    os.kill(os.getpid(), signal.SIGTERM)


def linger(seconds: float) -> None:
    """Waits ``seconds``, or until the launcher has ended.

    When a launcher ends, its stages stop. One that stops before this head has noticed the end looks lost here.
    """
    launcher = find_launcher()
    if launcher is None:
        threading.Event().wait(seconds)
    else:
        launcher.wait(seconds)
