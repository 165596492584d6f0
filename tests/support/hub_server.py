"""A model hub on this machine: as much of its HTTP interface as transformers, huggingface_hub and vLLM ask for."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["COMMIT", "HubServer"]

COMMIT = hashlib.sha1(b"a commit").hexdigest()


class HubServer:
    """Serves one folder as ``repo``; a context manager. ``downloads`` are the files that were sent, in order."""

    def __init__(self, repo: str, folder: Path) -> None:
        self.repo = repo
        self.folder = folder
        self.downloads: list[str] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._make_handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in self.files()]
        return {"id": self.repo, "modelId": self.repo, "sha": COMMIT, "private": False, "siblings": siblings}

    def entries(self, names: list[str]) -> list[dict[str, Any]]:
        found = [(name, self.folder / name) for name in names if (self.folder / name).is_file()]
        return [{"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)} for name, path in found]

    def _make_handler(hub) -> type[http.server.BaseHTTPRequestHandler]:  # noqa: N805  "self" is the handler's
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                if path.startswith(f"/{hub.repo}/resolve/"):
                    self.send_file(path.removeprefix(f"/{hub.repo}/resolve/").partition("/")[2])
                elif path.startswith(f"/api/models/{hub.repo}/tree/"):
                    self.send_json(hub.entries(hub.files()))
                elif path == f"/api/models/{hub.repo}" or path.startswith(f"/api/models/{hub.repo}/revision/"):
                    self.send_json(hub.info())
                else:
                    self.send_missing("RepoNotFound")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = unquote(urlsplit(self.path).path)
                if path.startswith(f"/api/models/{hub.repo}/paths-info/"):
                    self.send_json(hub.entries(json.loads(body)["paths"]))
                else:
                    self.send_missing("RepoNotFound")

            def send_file(self, name: str) -> None:
                path = hub.folder / name
                if not path.is_file():
                    self.send_missing("EntryNotFound")
                    return
                content = path.read_bytes()
                begin, end = self.wanted_range(len(content))
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("ETag", f'"{etag(path)}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
                self.send_header("Content-Length", str(end - begin))
                self.end_headers()
                if self.command == "GET":
                    hub.downloads.append(name)
                    self.wfile.write(content[begin:end])

            def wanted_range(self, size: int) -> tuple[int, int]:
                text = self.headers.get("Range", "").removeprefix("bytes=")
                first, _, last = text.partition("-")
                return int(first or 0), min(size, int(last) + 1) if last else size

            def send_json(self, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def send_missing(self, code: str) -> None:
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        return Handler


def etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
