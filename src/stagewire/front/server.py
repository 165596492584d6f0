"""The front's server: the public port, and the front served for as long as there is a head to look after.

Knows uvicorn and signals. Local stages are the supervisor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import uvicorn

from stagewire.errors import ConfigError
from stagewire.front.app import Front
from stagewire.launch.api import Api, Served
from stagewire.launch.loop import run_loop, take_signals
from stagewire.launch.spec import Launch
from stagewire.launch.supervisor import Screen, Supervisor

__all__ = ["listen", "run_in_loop", "serve", "serve_head", "serve_launch"]

# At the end open answers have this long to finish; the head has ended by then, or goes on without us.
GRACE_S = 1


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: whoever runs the front takes the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str | None, port: int) -> socket.socket:
    """The public port, taken before anything is started.

    Raises:
        ConfigError: it is taken, or not an address of this machine.
    """
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    try:
        return socket.create_server((host or "", port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host or 'every interface'} port {port} ({error}): choose another --port or --host"
        ) from error


def _make_server(front: Front) -> _Server:
    config = uvicorn.Config(
        front,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    return _Server(config)


async def serve(front: Front, sock: socket.socket, work: Awaitable[int], hurry: asyncio.Event | None = None) -> int:
    """Serves until ``work`` is done and returns its result. Open requests have a moment more, unless ``hurry``."""
    # Requests that a client breaks off or that ask for a WebSocket are no news for the terminal.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = _make_server(front)
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not working.done():  # the server ended by itself, or we are cancelled
            working.cancel()
            await asyncio.wait({working})
        # Answers that are cut now are cut by us: uvicorn would print a traceback for each.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.should_exit = True
        hurrying = asyncio.ensure_future((hurry or asyncio.Event()).wait())
        await asyncio.wait({serving, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        server.force_exit = not hurrying.cancel()
        await serving
    return working.result()


async def serve_launch(
    launch: Launch, sock: socket.socket, private_dir: str, screen: Screen, serving: Callable[[Api, Served], str]
) -> int:
    """Starts the stages and serves before them until they are stopped, as `stagewire up` does.

    Args:
        private_dir, screen, serving: as for `Supervisor`.

    Raises:
        StagewireError: as `Supervisor.run`.
    """

    def proven(api: Api, served: Served) -> str:
        front.is_proven = True
        return serving(api, served)

    supervisor = Supervisor(launch, screen, private_dir, proven)
    url = f"http://{launch.api.client_host}:{launch.api.port}"
    front = Front(url, lambda: supervisor.api.api_key, supervisor.progress)
    return await serve(front, sock, supervisor.run())


async def serve_head(head: str, api_key: str | None, public: Api, sock: socket.socket, screen: Screen) -> int:
    """Serves before a head that others look after, until Ctrl-C, SIGTERM or the end of the terminal. Returns 0."""
    asked, hurry = asyncio.Event(), asyncio.Event()

    def on_signal(signum: int) -> None:
        if asked.is_set() and signum != signal.SIGHUP:
            hurry.set()
        asked.set()

    async def until_asked() -> int:
        await asked.wait()
        screen.say("stopping")
        return 0

    take_signals(on_signal)
    screen.say(f"{public.url} is the front of {head}. Ctrl-C stops it, and nothing else.")
    return await serve(Front(head, lambda: api_key), sock, until_asked(), hurry)


def run_in_loop(work: Coroutine[Any, Any, int]) -> int:
    """On uvloop where it is installed, as vLLM does: it takes two thirds of the processor time per streamed event."""
    try:
        import uvloop
    except ImportError:
        return run_loop(work)
    return run_loop(work, uvloop.new_event_loop)
