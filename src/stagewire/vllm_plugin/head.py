"""The head's API server process: what it answers before the ring has answered, and how it ends with it.

EngineCore (a child of this process) owns the ring; it reports over Unix sockets (observe/status.py). From that this
process knows whether to answer 503, with which reason, which exit code is right, and what to say of every stage.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagewire.config import StageConfig
from stagewire.folders import fits_sockets, private_folder
from stagewire.observe.status import (
    HEAD_SOCKET_ENV,
    LAUNCHER_PID_ENV,
    NEWS_SOCKET_ENV,
    DatagramReceiver,
    Phase,
    StatusReceiver,
)
from stagewire.vllm_plugin import compat
from stagewire.vllm_plugin.http import EarlyServer, HeadHealth
from stagewire.vllm_plugin.pipeline_status import PipelineStatus

__all__ = ["HEALTH", "linger", "serve_head"]

# How long the head of a broken ring goes on answering 503 with the reason before it exits.
LINGER_S = 30.0
MIDDLEWARE = "stagewire.vllm_plugin.http.RingMiddleware"

HEALTH = HeadHealth()


def serve_head(original: Callable[..., Any], args: argparse.Namespace, config: StageConfig) -> None:
    """Runs vLLM's own API server, with our health and exit codes. Raises SystemExit with the ring's reason."""
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
        threading.Thread(target=_listen, args=(receiver,), name="stagewire-status", daemon=True).start()
        threading.Thread(target=_hear, args=(news, HEALTH.pipeline), name="stagewire-news", daemon=True).start()
        _patch_server()
        _run(original, args)
    if HEALTH.failure is not None:
        sys.exit(HEALTH.exit_code)


def _run(original: Callable[..., Any], args: argparse.Namespace) -> None:
    try:
        original(args)
    except (RuntimeError, KeyboardInterrupt, SystemExit):
        if HEALTH.wait_for_failure(1.0) is None:
            raise
        sys.stderr.write(f"Stage 0: {HEALTH.failure}\n")


def _patch_server() -> None:
    """vLLM binds its socket before the engine starts and listens after: in between we answer."""
    from vllm.entrypoints.launchers.api_server import entry

    early: list[EarlyServer] = []

    def setup(original: Callable[..., Any]) -> Callable[..., Any]:
        def setup_server(args: argparse.Namespace, **kwargs: Any) -> Any:
            address, sock = original(args, **kwargs)
            if not args.uds and not args.ssl_keyfile:
                early.append(EarlyServer(sock, HEALTH))
            return address, sock

        return setup_server

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        async def build_and_serve(*args: Any, **kwargs: Any) -> Any:
            for server in early:
                server.close()
            return await original(*args, **kwargs)

        return build_and_serve

    compat.let_engine_say_goodbye()
    compat.wrap(entry, "setup_server", setup)
    compat.wrap(entry, "build_and_serve", build)


def _listen(receiver: StatusReceiver) -> None:
    while True:
        select.select([receiver], [], [])
        for event in receiver.receive():
            HEALTH.update(event)
            if event.phase is Phase.FAILED:
                _end_after_linger()
                return
            if event.phase is Phase.STOPPED:
                # EngineCore stopped the ring: because we told it to, or because the launcher is gone.
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _hear(news: DatagramReceiver, pipeline: PipelineStatus) -> None:
    while True:
        select.select([news], [], [])
        for data in news.receive_all():
            pipeline.update(data)


def _end_after_linger() -> None:
    """While serving: answers 503 for a while, then ends. While starting the main thread ends by itself."""
    if not HEALTH.is_serving:
        return
    linger(LINGER_S)
    os.kill(os.getpid(), signal.SIGTERM)


def linger(seconds: float) -> None:
    """Waits ``seconds``, or until the launcher is gone: a stage that saw it go first looks like a lost one here."""
    launcher = int(os.environ.get(LAUNCHER_PID_ENV, "0"))
    if not launcher:
        select.select([], [], [], seconds)
        return
    try:
        process = os.pidfd_open(launcher)
    except ProcessLookupError:
        return
    try:
        select.select([process], [], [], seconds)
    finally:
        os.close(process)
