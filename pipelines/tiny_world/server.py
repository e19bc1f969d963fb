"""A web server on loopback for the demo and the tests: a folder of images, and typical web errors.

with serve(folder) as web:
    web.url("images/scene-000000.png")
    web.hostile("slow")
"""

from __future__ import annotations

import mimetypes
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pipelines.tiny_world import scenes
from vlv_model.errors import RunError

HOST = "127.0.0.1"
DEFAULT_PORT = 38471
PORT_FILE = ".port"  # in the served folder: the last port
STALL_SECONDS = 60.0  # delay of /hostile/slow, unless the server is closed before
LARGE_BYTES = 4 << 30  # Content-Length of /hostile/large


class Web:
    """A running server; `requests` counts requests by path."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder.resolve()
        self.requests: Counter[str] = Counter()
        self.closing = threading.Event()
        web = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                self.answer(web)

        self.server = ThreadingHTTPServer((HOST, port), Handler)
        self.server.daemon_threads = True
        self.base_url = f"http://{HOST}:{self.server.server_address[1]}"

    def url(self, path: str) -> str:
        """URL of a file, by its path in the folder."""
        return f"{self.base_url}/{quote_path(path)}"

    def hostile(self, name: str) -> str:
        """URL of one of the `HOSTILE` answers."""
        if name not in HOSTILE:
            raise KeyError(f"no hostile answer {name!r}: there are {', '.join(HOSTILE)}")
        return f"{self.base_url}/hostile/{name}"


def quote_path(path: str) -> str:
    """Quote a path for a URL; names that are not UTF-8 keep their bytes."""
    return quote(path, errors="surrogateescape")


@contextmanager
def serve(folder: str | Path, port: int | None = None, keep_port: bool = False) -> Iterator[Web]:
    """Serve `folder` on 127.0.0.1 from threads of this process for the duration of the block.

    Without `port`, uses the folder's last port, so that earlier URLs stay valid; else the default port;
    else a free one. `port=0` takes a free port. With `keep_port`, raises RunError if the last port is
    unknown or taken.
    """
    folder = Path(folder)
    web = _open(folder, port, keep_port)
    (folder / PORT_FILE).write_text(str(web.server.server_address[1]))
    thread = threading.Thread(target=web.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.closing.set()
        web.server.shutdown()
        web.server.server_close()
        thread.join()


def _open(folder: Path, port: int | None, keep_port: bool) -> Web:
    if port is not None:
        return Web(folder, port)
    last = _last_port(folder)
    if keep_port and not last:
        raise RunError(f"{folder / PORT_FILE} has no valid port: remove {folder}")
    try:
        return Web(folder, last or DEFAULT_PORT)
    except OSError:
        if keep_port:
            raise RunError(
                f"port {last} of the earlier attempt is in use by another program: "
                f"free it, or remove {folder}"
            ) from None
        return Web(folder, 0)


def _last_port(folder: Path) -> int:
    """The folder's last port; 0 if unknown."""
    try:
        port = int((folder / PORT_FILE).read_text())
    except (OSError, ValueError):
        return 0
    return port if 0 < port < 2**16 else 0


# -------------------------------------------------------------------------------------- answers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each response waits 40 ms for an acknowledgement

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, so as not to clutter the job's output."""

    def answer(self, web: Web) -> None:
        path = unquote(urlsplit(self.path).path, errors="surrogateescape")
        web.requests[path] += 1
        try:
            if path.startswith("/hostile/") and (answer := HOSTILE.get(path[9:])):
                answer(self, web)
            else:
                self.send_file(web.folder, path)
        except (BrokenPipeError, ConnectionResetError):  # the client closed the connection
            self.close_connection = True

    def send_file(self, folder: Path, path: str) -> None:
        file = (folder / path.lstrip("/")).resolve()
        if not file.is_file() or not file.is_relative_to(folder):
            return self.send(404)
        self.send(200, file.read_bytes(), mimetypes.guess_type(file.name)[0] or "text/plain")

    def send(
        self, status: int, body: bytes = b"", content_type: str = "text/plain", **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


@cache
def _jpeg() -> bytes:
    """A valid image, for responses with other errors."""
    file = BytesIO()
    (scene,) = scenes.sample(0, 1)
    scenes.draw(scene, 0).save(file, "JPEG", quality=95)
    return file.getvalue()


def _missing(handler: _Handler, web: Web) -> None:
    handler.send(404)


def _gone(handler: _Handler, web: Web) -> None:
    handler.send(410)


def _error(handler: _Handler, web: Web) -> None:
    handler.send(500)


def _truncated(handler: _Handler, web: Web) -> None:
    handler.send(200, _jpeg()[: len(_jpeg()) // 2], "image/jpeg")


def _html(handler: _Handler, web: Web) -> None:
    handler.send(200, b"<!doctype html><title>This photo has moved</title>", "text/html")


def _noai(handler: _Handler, web: Web) -> None:
    handler.send(200, _jpeg(), "image/jpeg", X_Robots_Tag="noai, noimageai")


def _large(handler: _Handler, web: Web) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "image/jpeg")
    handler.send_header("Content-Length", str(LARGE_BYTES))
    handler.end_headers()
    while not web.closing.is_set():
        handler.wfile.write(b"\xff" * 65536)


def _slow(handler: _Handler, web: Web) -> None:
    web.closing.wait(STALL_SECONDS)
    handler.close_connection = True


HOSTILE: dict[str, Callable[[_Handler, Web], None]] = {
    "missing": _missing,
    "gone": _gone,
    "truncated": _truncated,
    "html": _html,
    "noai": _noai,
    "error": _error,
    "large": _large,
    "slow": _slow,
}
"""Responses under /hostile/, by name: what the web sends instead of an image."""
