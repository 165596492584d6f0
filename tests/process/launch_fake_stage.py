"""Stands in for `vllm serve`: reports phases like a stage, and as stage 0 answers HTTP. Started by launch_fake_up.py.

usage: launch_fake_stage.py INDEX HTTP_PORT BEHAVIOUR. The behaviour is `serve`, `hang` (never ready), `deaf` (never
ready, and ignores SIGTERM), `stubborn` (serves and ignores SIGTERM), `fail:CODE` (says why, ends), `die:CODE` (ends
with words in its log only), `lost` (serves until SIGUSR1, then ends as a stage does that lost its peer), `breaks`
(a head whose ring is broken for a moment at SIGUSR1), `api:JSON` (a head that tells where and how it answers: `task`,
`key`, `uds`), `slow:S` (reads for S seconds, then serves), `stuck` (reads a fifth, no more), `standby` (loads, is ready
as soon as it has the port). `standby:fail` cannot load, `standby:held` loads until a test has opened and closed the
FIFO `loading`, `standby:S` loads for S seconds. In place of a port there is a lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from stagewire.observe.status_events import HeadApi, Phase, StatusSender

ANSWERS: dict[str, object] = {
    "/v1/models": {"data": [{"id": "fake-model"}]},
    "/pipeline/status": {"is_ready": True, "state": "serving", "reason": "", "steps": None, "stages": []},
}
ROUTES = {"generate": "/v1/completions", "embed": "/v1/embeddings", "score": "/score", "token_classify": "/pooling"}


class Handler(BaseHTTPRequestHandler):
    """Has the routes of its task and no others; keeps /v1 to those who know the key."""

    task = "generate"
    key = ""

    def do_GET(self) -> None:
        answer = ANSWERS.get(self.path, {})
        if self.path == "/pipeline/status":
            answer = {**dict(ANSWERS[self.path]), "api_server": {"pid": os.getpid(), "task": self.task}}  # type: ignore[call-overload]
        self._answer(answer, self._status())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_right = self.path == ROUTES.get(self.task) and asked["model"] == "fake-model"
        if self.task == "generate":
            assert asked == {**asked, "max_tokens": 1, "temperature": 0}
        self._answer({"choices": [{"text": "city"}]}, self._status() if is_right else 404)

    def _status(self) -> int:
        is_known = not self.key or self.headers["Authorization"] == f"Bearer {self.key}"
        return 200 if is_known or not self.path.startswith("/v1") else 401

    def address_string(self) -> str:
        return "a Unix socket has none"

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body: object, status: int) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def stand_by(sender: StatusSender, lock: int, how: str) -> None:
    is_loaded = threading.Event()

    def take_over() -> None:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as soon as it is free, also while this stage loads
        is_loaded.wait()
        sender.send(Phase.READY)

    threading.Thread(target=take_over, daemon=True).start()
    if how == "fail":
        sender.send(Phase.FAILED, "no memory for a second one", 1)
        sys.exit(1)
    if how == "held":
        with open(os.path.join(os.environ["FAKE_DIR"], "loading")) as held:
            held.read()
    elif how:
        time.sleep(float(how))
    sender.send(Phase.LOADED)
    sender.note("it stands by")  # as every ten seconds
    is_loaded.set()


def read(sender: StatusSender, seconds: float) -> None:
    """A disk that is slow, or that stops."""
    sender.advance(Phase.LOADING, "a fifth", 800_000_000, 4_200_000_000)
    for step in range(int(seconds * 10)):
        time.sleep(0.1)
        sender.advance(Phase.LOADING, "more", 800_000_000 + step, 4_200_000_000)


class UnixServer(ThreadingHTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)


def serve(sender: StatusSender, port: int, api: dict[str, str]) -> None:
    """``api``: told to the launcher, if anything is."""
    Handler.task, Handler.key = api.get("task", "generate"), api.get("key", "")
    uds = api.get("uds", "")
    server = UnixServer(uds, Handler) if uds else ThreadingHTTPServer(("127.0.0.1", port), Handler)  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if api:
        sender.tell_api(HeadApi("127.0.0.1", port, uds, api_key=Handler.key))


def main() -> None:
    stage, port = int(sys.argv[1]), int(sys.argv[2])
    behaviour, _, code = sys.argv[3].partition(":")
    # Taken by sigwait below, also when they come early.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    sender = StatusSender(stage)
    sender.send(Phase.LOADING, f"pid {os.getpid()}")
    lock = os.open(os.path.join(os.environ["FAKE_DIR"], f"port_{stage}"), os.O_RDWR | os.O_CREAT)
    if behaviour == "standby":
        stand_by(sender, lock, code)
    else:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sender.send(Phase.FAILED, f"there is already a stage {stage}", 2)
            sys.exit(2)
    if stage == 1 and behaviour == "serve":  # the ring links before a stage has loaded
        sender.send(Phase.LINKED, "early")
        sender.advance(Phase.LOADING, "half", 1, 2)
        sender.send(Phase.LOADED)
    if behaviour in ("slow", "stuck"):
        read(sender, float(code or 0))
    if behaviour == "fail":
        sender.send(Phase.FAILED, "layers 3-5 are already taken", int(code))
        sys.exit(int(code))
    if behaviour == "die":
        sys.stderr.write("INFO all is well\nValueError: no such dtype: float3\n")
        sys.exit(int(code))
    if stage == 0:
        # Like EngineCore: in the head's process group, and deaf to its end.
        engine = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        sender.send(Phase.LOADED, f"engine {engine.pid}")
        serve(sender, port, json.loads(code) if behaviour == "api" else {})
    if behaviour not in ("hang", "deaf", "stuck", "standby"):
        sender.send(Phase.LINKED)
        sender.send(Phase.READY)
    if behaviour == "breaks":
        signal.sigwait({signal.SIGUSR1})
        sender.send(Phase.RECOVERING, "stage 1 is lost")
        sender.note("Stage 0: waiting for stage 1, 10 s")
        sender.send(Phase.READY)
    if behaviour == "lost":
        signal.sigwait({signal.SIGTERM, signal.SIGUSR1})
        sender.send(Phase.FAILED, "lost stage 1", 3)
        sys.exit(3)
    while True:
        signal.sigwait({signal.SIGTERM})
        sys.stderr.write(f"SIGTERM {stage}\n")
        with open(os.path.join(os.environ["FAKE_DIR"], "order"), "a") as order:
            order.write(f"{stage}\n")
        if behaviour not in ("deaf", "stubborn"):
            sys.exit(0)


if __name__ == "__main__":
    main()
