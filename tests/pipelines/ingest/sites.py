"""A server on loopback whose answers a test writes, and fetching from it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipelines.ingest.web.download import Downloader, Fetched
from pipelines.ingest.web.failures import FAILURE_CLASSES

JPEG = b"\xff\xd8\xff\xe0" + bytes(200)
HEADERS_ALONE = ("x_robots_tag",)
"""Rules that add no request, for tests that count them."""
QUICK: dict[str, Any] = {
    "allow_private": True,
    "retry_delay": 0.01,
    "read_timeout": 0.3,
    "respect_optout": HEADERS_ALONE,
}
FIXED = ("connect_timeout", "read_timeout", "retry_delay", "max_redirects")  # which are no settings
Answer = Callable[[BaseHTTPRequestHandler], None]


class Site:
    """A server whose answers a test writes; counts requests by path, and those not answered yet."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            waits = False  # whether a request has come that is not answered yet

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.waits = True
                with site.lock:
                    site.requests[self.path] += 1
                    site.in_flight += 1
                    site.most_in_flight = max(site.most_in_flight, site.in_flight)
                try:
                    site.answers[self.path.partition("?")[0]](self)
                except OSError:
                    self.close_connection = True
                finally:
                    self.answered()

            def send_response(self, code: int, message: str | None = None) -> None:
                # Not behind the body: who has read it may send the next request before we count.
                self.answered()
                super().send_response(code, message)

            def answered(self) -> None:
                with site.lock:
                    site.in_flight -= self.waits
                    self.waits = False

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # with the default of 5 some connect a second later

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


def reply(status: int = 200, body: bytes = JPEG, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def fetch_all(downloader: Downloader, *urls: str) -> list[Fetched]:
    async def itself(fetched: Fetched) -> Fetched:
        return fetched

    return downloader.map_urls(urls, itself)


def statuses(downloader: Downloader, *urls: str) -> list[str]:
    found = [fetched.status for fetched in fetch_all(downloader, *urls)]
    kinds = {f"download:{kind}" for kind in FAILURE_CLASSES} | {"ok"}
    assert set(found) <= kinds
    return found
