"""A web of photograph-like images on loopback for the benchmark of ingest, in a process of its own.

    python benchmarks/web.py FOLDER [--latency SECONDS] [--dead SHARE]

Serves http://127.0.0.1:PORT/N.jpg for any N, from the images in FOLDER in turn, and prints the port.
A share of the numbers never answers.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from pathlib import Path

import numpy as np
from aiohttp import web
from PIL import Image


def is_dead(number: int, share: float) -> bool:
    """Whether the N-th address never answers; the same for all who ask."""
    return (number * 2_654_435_761) % 2**32 < share * 2**32


def write_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` photograph-like JPEGs with sides of 500 to 3,000 px, unless they are there.

    Noise of all octaves, the coarser the stronger, as the spectrum of photographs has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
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


async def serve(folder: Path, latency: float, dead: float) -> None:
    bodies = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]

    async def answer(request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        if is_dead(number, dead):
            await asyncio.sleep(3600)
        if latency:
            await asyncio.sleep(latency)
        return web.Response(body=bodies[number % len(bodies)], content_type="image/jpeg")

    app = web.Application()
    app.router.add_get("/{number:[0-9]+}.jpg", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--dead", type=float, default=0.0, help="share that never answers")
    given = parser.parse_args()
    asyncio.run(serve(given.folder, given.latency, given.dead))


if __name__ == "__main__":
    main()
