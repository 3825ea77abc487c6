"""A Hugging Face hub of a few data sets over HTTP: as much of its interface as the package `datasets` asks for."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "a" * 40
_FILE = re.compile(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)")
_TREE = re.compile(r"/api/datasets/(?P<name>[^/]+/[^/]+)/tree/[^/?]+/?(?P<path>[^?]*)")
_ABOUT = re.compile(r"/api/datasets/(?P<name>[^/]+/[^/?]+)")

Repositories = Mapping[str, Mapping[str, bytes]]
"""Files by path, by the name of their data set."""


@contextmanager
def hub_server(repositories: Repositories) -> Iterator[str]:
    """The address of a hub with these data sets."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, format: str, *args: object) -> None:
            """Keep still."""

        def _answer(self, *, body: bool) -> None:
            status, headers, data = _found(repositories, self.path, self.headers.get("Range"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _found(repositories: Repositories, target: str, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body for a request of `target`, `wanted` its range of bytes."""
    match = _FILE.match(target) or _TREE.match(target) or _ABOUT.match(target)
    if match is None or match["name"] not in repositories:
        return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
    files = repositories[match["name"]]
    if match.re is _FILE:
        data = files.get(match["path"])
        return (404, {"X-Error-Code": "EntryNotFound"}, b"{}") if data is None else _part(data, wanted)
    about = _listing(files, match["path"]) if match.re is _TREE else _about(match["name"], files)
    return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()


def _about(name: str, files: Mapping[str, bytes]) -> dict[str, object]:
    return {
        "id": name,
        "sha": COMMIT,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in files],
    }


def _listing(files: Mapping[str, bytes], folder: str) -> list[dict[str, object]]:
    """The files right inside `folder`."""
    inside = f"{folder}/" if folder else ""
    return [
        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for path, data in files.items()
        if path.startswith(inside) and "/" not in path[len(inside) :]
    ]


def _part(data: bytes, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
    headers = {
        "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
        "X-Repo-Commit": COMMIT,
        "Accept-Ranges": "bytes",
    }
    if wanted is None:
        return 200, headers, data
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
    return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]
