"""A local web server with photograph-like images, for the ingest benchmarks.

    python benchmarks/ingest/web.py FOLDER [--latency SECONDS] [--dead FRACTION]

Serves http://127.x.y.z:PORT/N.jpg for any N and any loopback address, with the images in FOLDER in
turn, and prints the port. Each address is a host of its own to a downloader, and its robots.txt
allows all. A fraction of the URLs never answers; another fraction answers like broken links. /requests
is the number of requests so far.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image


def is_dead(number: int, share: float) -> bool:
    """Whether the N-th URL never answers; always the same for a number."""
    return (number * 2_654_435_761) % 2**32 < share * 2**32


def write_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` photograph-like JPEGs with sides of 500 to 3,000 px, unless they exist.

    They are noise of all octaves, stronger when coarser, like the spectrum of photographs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{number:04d}.jpg").exists() for number in range(count)):
        return  # drawing them takes minutes
    rng = np.random.default_rng(seed)
    for number in range(count):
        longer = int(rng.integers(700, 3_001))
        shorter = max(500, int(longer * rng.uniform(0.55, 1.0)))
        width, height = (longer, shorter) if rng.random() < 0.6 else (shorter, longer)
        picture = np.zeros((height, width, 3), np.float32)
        for octave in range(1, 11):
            cells = rng.normal(size=(2**octave, 2**octave, 3)).astype(np.float32)
            planes = [
                Image.fromarray(cells[..., c]).resize((width, height), Image.Resampling.BICUBIC)
                for c in range(3)
            ]
            picture += np.stack([np.asarray(plane) for plane in planes], -1) * 60 / 1.6**octave
        file = folder / f"{number:04d}.jpg"
        if not file.exists():
            buffer = io.BytesIO()
            pixels = (picture + 128).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(80, 96)))
            file.write_bytes(buffer.getvalue())


def loopback_socket() -> socket.socket:
    """A socket at a free port of all loopback addresses (127.0.0.0/8), and of no others; Linux alone."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
    listening.bind(("0.0.0.0", 0))
    return listening


ROBOTS = "".join(
    f"User-agent: {agent}\n" + "".join(f"Disallow: /{path}\n" for path in paths) + "\n"
    for agent, paths in (
        ("*", [f"{name}{tail}" for name in "abcdefgh" for tail in ("/", "*?sort=", "/*.php$")]),
        *((f"bot-{number}", [""]) for number in range(10)),
    )
)
"""Rules as long as an average shop's; they allow all images."""

BROKEN = ("404", "410", "500", "truncated", "html", "noai")
"""Answers of broken URLs, in turn."""


class Site:
    """The server's answers. `rate` (answers per second; 0: no limit) may change while it runs.

    With `copies`, each group of that many consecutive numbers has a file of its own, perhaps with
    the picture of another file.
    """

    def __init__(
        self, folder: Path, latency: float = 0, dead: float = 0, broken: float = 0, copies: int = 0
    ) -> None:
        self.bodies = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
        self.latency, self.dead, self.broken, self.copies = latency, dead, broken, copies
        self.rate = 0.0
        self.next_answer = 0.0  # time at which the rate allows the next answer
        self.requests = 0

    async def start(self) -> int:
        """Serve on loopback in the running event loop; returns the port."""
        app = web.Application(middlewares=[self._count])
        app.router.add_get("/{number:[0-9]+}.jpg", self.answer)
        app.router.add_get("/requests", self._requests)
        app.router.add_get("/robots.txt", self._robots)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.SockSite(runner, loopback_socket(), backlog=1024).start()
        return int(runner.addresses[0][1])

    @web.middleware
    async def _count(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != "/requests":
            self.requests += 1
            if self.latency:
                await asyncio.sleep(self.latency)
        return await handler(request)

    async def _robots(self, request: web.Request) -> web.Response:
        return web.Response(text=ROBOTS)

    async def _requests(self, request: web.Request) -> web.Response:
        return web.Response(text=str(self.requests))

    async def answer(self, request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        if is_dead(number, self.dead):
            await asyncio.sleep(3600)
        if self.rate:
            now = time.monotonic()
            self.next_answer = max(now, self.next_answer + 1 / self.rate)
            await asyncio.sleep(self.next_answer - now)
        body, kind = self._body(number), "image/jpeg"
        if not is_dead(number + 1_000_000_007, self.broken):
            return web.Response(body=body, content_type=kind)
        how = BROKEN[number % len(BROKEN)]
        if how.isdigit():
            return web.Response(status=int(how))
        if how == "html":
            return web.Response(text="<!doctype html>", content_type="text/html")
        if how == "truncated":
            return web.Response(body=body[: len(body) // 2], content_type=kind)
        return web.Response(body=body, content_type=kind, headers={"X-Robots-Tag": "noai"})

    def _body(self, number: int) -> bytes:
        if not self.copies:
            return self.bodies[number % len(self.bodies)]
        number //= self.copies
        comment = b"\xff\xfe\x00\x06" + number.to_bytes(4, "big")
        body = self.bodies[number % len(self.bodies)]
        return body[:2] + comment + body[2:]


async def serve(site: Site) -> None:
    print(await site.start(), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument(
        "--dead", type=float, default=0.0, help="fraction of URLs that never answer"
    )
    given = parser.parse_args()
    asyncio.run(serve(Site(given.folder, given.latency, given.dead)))


if __name__ == "__main__":
    main()
