"""`stagewire front`, and tools/offline_pipelining/http_index.py: one public HTTP port before a pipeline.

Decides what the front is asked to do. How it passes requests on is the room front/, whose libraries are imported when
it runs.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from stagewire.commands.launching import add_launch_arguments, announce, describe_serving, read_wanted
from stagewire.commands.screen import PlainScreen, open_screen
from stagewire.errors import ConfigError
from stagewire.folders import private_folder
from stagewire.launch.api import Api, Served
from stagewire.launch.decision import AUTO, Wanted, decide
from stagewire.launch.early import ADDRESS_FLAGS, TLS_FLAGS, read_early
from stagewire.launch.resources import is_cpu_build
from stagewire.launch.spec import Launch

__all__ = ["add_arguments", "run", "serve_stages"]

DEFAULT_API_PORT = 8001
HEAD_HOST = "127.0.0.1"
# What means something with --head too.
_OF_THE_FRONT = ("head", "host", "port", "vllm_arguments")

USAGE = "%(prog)s (--model PATH | --pipeline-dir PATH | --head URL) [options] [-- VLLM_ARGUMENTS]"
EPILOG = """\
The head's own API listens on loopback only. Everything after `--` goes to every stage's `vllm serve`.

On the public port /health is this process, /ready the whole ring, /pipeline/status every stage; the rest is the
head's. Stopping and exit codes are those of `stagewire up`; with --head nothing but the front starts or stops."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    source = add_launch_arguments(parser)
    source.add_argument("--head", metavar="URL", help="front a ring that was started by hand; starts no stage")
    parser.add_argument("--host", help="address that the public port binds; default: every IPv4 interface")
    parser.add_argument("--port", type=int, default=8000, help="the public port (default: %(default)s)")
    parser.add_argument(
        "--api-port", type=int, default=DEFAULT_API_PORT, help="the head's own, on loopback (default: %(default)s)"
    )
    parser.add_argument("--gpu-ids", metavar="ID,ID", help="one GPU for each stage; default: the first ones")


def run(args: argparse.Namespace) -> int:
    """Serves until it is stopped; returns the exit code.

    Raises:
        StagewireError: a wrong setting, a stage that failed, a ring that is not ready in time.
    """
    public = Api(args.host, args.port)
    return _front_head(args, public) if args.head is not None else _front_launch(args, public)


def _front_launch(args: argparse.Namespace, public: Api) -> int:
    _check_ports(args)
    _check_api(args.vllm_arguments)
    wanted, environ = _choose_gpus(read_wanted(args, HEAD_HOST, args.api_port), args.gpu_ids)

    from stagewire.front.server import listen

    with listen(public.host, public.port) as sock, private_folder() as folder:
        launch = decide(wanted, {**os.environ, **environ})
        with closing(launch.logs):
            return serve_stages(launch, public, sock, folder)


def serve_stages(launch: Launch, public: Api, sock: socket.socket, private_dir: str) -> int:
    """Starts the stages of ``launch`` and serves before them, as `stagewire up` does.

    Args:
        public: where clients ask, which is where ``sock`` listens.
        private_dir: as for `Supervisor`.

    Raises:
        StagewireError: as `Supervisor.run`.
    """
    from stagewire.front.server import run_in_loop, serve_launch

    def serving(api: Api, served: Served) -> str:
        asked = replace(public, api_key=api.api_key, has_chat_template=api.has_chat_template)
        return describe_serving(launch, asked, served)

    async def work() -> int:
        screen = open_screen(launch.specs)
        announce(launch, screen)
        return await serve_launch(launch, sock, private_dir, screen, serving)

    return run_in_loop(work())


def _front_head(args: argparse.Namespace, public: Api) -> int:
    url = _head_url(args.head)
    if given := _given_of_a_launch(args):
        raise ConfigError(f"{', '.join(given)} with --head: that ring was started already; leave it out, or --head")

    from stagewire.front.server import listen, run_in_loop, serve_head

    with listen(public.host, public.port) as sock:
        return run_in_loop(serve_head(url, os.environ.get("VLLM_API_KEY"), public, sock, PlainScreen(sys.stdout)))


def _given_of_a_launch(args: argparse.Namespace) -> list[str]:
    """What was asked for, beside its default, that only a launch of stages can do."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args(["--head", args.head]))
    given = [name for name in defaults if name not in _OF_THE_FRONT and getattr(args, name) != defaults[name]]
    after = ["arguments after `--`"] if args.vllm_arguments else []
    return [f"--{name.replace('_', '-')}" for name in given] + after


def _head_url(text: str) -> str:
    """Without a slash at its end."""
    expected = f"--head {text!r} is not the head's address: expected http://HOST:PORT, for instance"
    try:
        parts = urllib.parse.urlsplit(text)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise ConfigError(f"{expected} http://localhost:{DEFAULT_API_PORT}")
    return f"{parts.scheme}://{parts.netloc}"


def _check_ports(args: argparse.Namespace) -> None:
    if args.port == args.api_port:
        raise ConfigError(f"--port and --api-port are both {args.port}: the public port and the head's must differ")


def _check_api(extra: Sequence[str]) -> None:
    """The head's API is the front's alone."""
    early = read_early(extra)
    if tls := early.describe(TLS_FLAGS):
        raise ConfigError(
            f"{tls}: the head listens on loopback, and the front speaks plain HTTP: "
            "put a TLS proxy before the public port, or use `stagewire up`, whose head is public"
        )
    if address := early.describe(ADDRESS_FLAGS):
        raise ConfigError(
            f"{address}: the head listens on loopback, at --api-port; --host and --port before `--` say where clients "
            "ask"
        )


def _choose_gpus(wanted: Wanted, ids: str | None) -> tuple[Wanted, Mapping[str, str]]:
    """The number of stages, if nothing else says it, and the part of the environment that names the GPUs."""
    if ids is None:
        return wanted, {}
    gpus = [each.strip() for each in ids.split(",")]
    if not all(gpus) or len(set(gpus)) < len(gpus):
        raise ConfigError(f"--gpu-ids {ids!r}: expected different ids with commas between, for instance 0,2,3")
    if is_cpu_build():
        raise ConfigError(f"--gpu-ids {ids}: this is vLLM's CPU build, which uses no GPU: leave it out")
    asked = None if wanted.num_stages == AUTO else wanted.num_stages
    num_stages = asked or (len(wanted.ranges) if wanted.ranges else None)
    if num_stages is None and wanted.pipeline_dir is None:
        wanted = replace(wanted, num_stages=len(gpus))
    elif num_stages is not None and num_stages != len(gpus):
        raise ConfigError(f"--gpu-ids {ids} for {num_stages} stages: give one id for each stage")
    return wanted, {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
