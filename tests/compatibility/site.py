"""The web server behind the kept ingests: their URLs are in the tables, so its address never changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HOST, PORT = "127.31.24.1", 18724  # of the loopback network, where nothing else listens
BASE_URL = f"http://{HOST}:{PORT}"


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, asked: list[str], delay: float, **more: Any) -> None:
        self.asked, self.delay = asked, delay
        super().__init__(*args, **more)

    def do_GET(self) -> None:
        self.asked.append(self.path.lstrip("/"))
        time.sleep(self.delay)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are listed, not printed."""


@contextmanager
def serve(folder: Path, delay: float = 0.0) -> Iterator[list[str]]:
    """Serve `folder` at BASE_URL, `delay` seconds late; the names that were asked for."""
    asked: list[str] = []
    handler = partial(_Handler, directory=str(folder), asked=asked, delay=delay)
    with ThreadingHTTPServer((HOST, PORT), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield asked
        server.shutdown()
        thread.join()
