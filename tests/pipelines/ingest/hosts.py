"""Many hosts on loopback, one address each, with a log of their requests."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

from aiohttp import web
from PIL import Image

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
ROBOTS, TDM = "/robots.txt", "/.well-known/tdmrep.json"


def image_file() -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


class Hosts:
    """Hosts 127.0.1.1, 127.0.1.2, … at one port: what `answers` has of a host and path, 404 for another
    file of rules, and a picture for any other path.
    """

    def __init__(self, count: int) -> None:
        self.names = [f"127.0.1.{number + 1}" for number in range(count)]
        self.answers: dict[tuple[str, str], Answer] = {}
        self.log: list[tuple[str, str]] = []
        self.closing = asyncio.Event()
        self.picture = image_file()
        self.port = 0

    def url(self, host: int, path: str = "/a.png") -> str:
        return f"http://{self.names[host]}:{self.port}{path}"

    def put(self, host: int, path: str, answer: Answer) -> None:
        self.answers[self.names[host], path] = answer

    def requests(self, path: str) -> Counter[int]:
        """How often each host was asked for a path."""
        return Counter(self.names.index(name) for name, asked in self.log if asked == path)

    def others(self) -> list[tuple[int, str]]:
        """The requests for other files than those with rules."""
        return [
            (self.names.index(name), path) for name, path in self.log if path not in (ROBOTS, TDM)
        ]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.host.partition(":")[0]
        self.log.append((name, request.path))
        if answer := self.answers.get((name, request.path)):
            return await answer(request)
        if request.path in (ROBOTS, TDM):
            return web.Response(status=404)
        return web.Response(body=self.picture, content_type="image/png")


@contextmanager
def serve_hosts(count: int) -> Iterator[Hosts]:
    hosts = Hosts(count)
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("GET", "/{path:.*}", hosts.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        for name in hosts.names:
            listening = socket.create_server((name, hosts.port), backlog=64)
            hosts.port = listening.getsockname()[1]
            await web.SockSite(runner, listening).start()
        return runner

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield hosts
    finally:
        loop.call_soon_threadsafe(hosts.closing.set)
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def text(body: str | bytes, status: int = 200, **headers: str) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        content = body if isinstance(body, bytes) else body.encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=content, status=status, headers=named)

    return answer


def redirect(location: str) -> Answer:
    return text("", 302, Location=location)


def silent(hosts: Hosts) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        await hosts.closing.wait()
        return web.Response()

    return answer


def endless(size: int, sent: list[int]) -> Answer:
    """A file of `size` bytes whose first rule refuses /no/; `sent` gets how many bytes were written."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response: Any = web.StreamResponse()
        response.content_length = size
        await response.prepare(request)
        left = size
        with suppress(ConnectionError):
            piece = b"User-agent: *\nDisallow: /no/\n"
            while left:
                await response.write(piece[:left])
                left -= len(piece[:left])
                piece = b"#" * 65536
        sent.append(size - left)
        return response

    return answer
