"""`stagewire front`, and tools/offline_pipelining/http_index.py: one public HTTP port before a pipeline."""

from __future__ import annotations

import argparse
import os
import urllib.parse
from collections.abc import Sequence
from contextlib import closing

from stagewire.errors import ConfigError
from stagewire.folders import private_folder
from stagewire.launch import up
from stagewire.launch.api import Api
from stagewire.launch.early import ADDRESS_FLAGS, TLS_FLAGS, read_early
from stagewire.launch.spec import is_cpu_build

__all__ = ["EPILOG", "USAGE", "add_arguments", "run"]

DEFAULT_API_PORT = 8001
HEAD_HOST = "127.0.0.1"
NOT_OF_A_LAUNCH = ("head", "host", "port")

USAGE = "%(prog)s (--model PATH | --pipeline-dir PATH | --head URL) [options] [-- VLLM_ARGUMENTS]"
EPILOG = """\
The head's own API listens on loopback only. Everything after `--` goes to every stage's `vllm serve`.

On the public port /health is this process, /ready the whole ring, /pipeline/status every stage; the rest is the
head's. Stopping and exit codes are those of `stagewire up`; with --head nothing but the front starts or stops."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = up.add_launch_arguments(parser)
    source.add_argument("--head", metavar="URL", help="front a ring that was started by hand; starts no stage")
    parser.add_argument("--host", help="address that the public port binds; default: every IPv4 interface")
    parser.add_argument("--port", type=int, default=8000, help="the public port (default: %(default)s)")
    parser.add_argument(
        "--api-port", type=int, default=DEFAULT_API_PORT, help="the head's own, on loopback (default: %(default)s)"
    )
    parser.add_argument("--gpu-ids", metavar="ID,ID", help="one GPU for each stage; default: the first ones")


def run(args: argparse.Namespace, extra: Sequence[str]) -> int:
    """Serves until it is stopped; returns the exit code.

    Raises:
        StagewireError: a wrong setting, a stage that failed, a ring that is not ready in time.
    """
    return _front_head(args, extra) if args.head is not None else _front_launch(args, extra)


def _front_launch(args: argparse.Namespace, extra: Sequence[str]) -> int:
    _check_ports(args)
    _check_api(extra)
    of_head = argparse.Namespace(**vars(args))
    of_head.host, of_head.port = HEAD_HOST, args.api_port
    environ = {**os.environ, **_choose_gpus(of_head)}

    from stagewire.launch.front import listen, run_in_loop, serve_launch

    with listen(args.host, args.port) as sock, private_folder() as folder:
        launch = up.decide(of_head, extra, environ)
        public = Api(args.host, args.port)
        with closing(launch.logs):
            return run_in_loop(serve_launch(launch, public, sock, folder))


def _front_head(args: argparse.Namespace, extra: Sequence[str]) -> int:
    url = _head_url(args.head)
    if given := _given_of_a_launch(args, extra):
        raise ConfigError(f"{', '.join(given)} with --head: that ring was started already; leave it out, or --head")

    from stagewire.launch.front import listen, run_in_loop, serve_head

    with listen(args.host, args.port) as sock:
        public = Api(args.host, args.port)
        return run_in_loop(serve_head(url, os.environ.get("VLLM_API_KEY"), public, sock))


def _given_of_a_launch(args: argparse.Namespace, extra: Sequence[str]) -> list[str]:
    """What was asked for, beside its default, that only a launch of stages can do."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args(["--head", args.head]))
    names = [name for name in defaults if name not in NOT_OF_A_LAUNCH]
    given = [name for name in names if getattr(args, name) != defaults[name]]
    return [f"--{name.replace('_', '-')}" for name in given] + ["arguments after `--`"] * bool(extra)


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


def _choose_gpus(args: argparse.Namespace) -> dict[str, str]:
    """The part of the environment that names the GPUs; sets the number of stages if nothing else does."""
    if args.gpu_ids is None:
        return {}
    gpus = [each.strip() for each in args.gpu_ids.split(",")]
    if not all(gpus) or len(set(gpus)) < len(gpus):
        raise ConfigError(f"--gpu-ids {args.gpu_ids!r}: expected different ids with commas between, for instance 0,2,3")
    if is_cpu_build():
        raise ConfigError(f"--gpu-ids {args.gpu_ids}: this is vLLM's CPU build, which uses no GPU: leave it out")
    asked = None if args.num_stages == up.AUTO else args.num_stages
    num_stages = asked or (len(args.ranges) if args.ranges else None)
    if num_stages is None and args.pipeline_dir is None:
        args.num_stages = len(gpus)
    elif num_stages is not None and num_stages != len(gpus):
        raise ConfigError(f"--gpu-ids {args.gpu_ids} for {num_stages} stages: give one id for each stage")
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
