"""Made pictures, encoded and stored, for the tests of decoding and encoding."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from pipelines.pictures.decode import Opened, Stored
from pipelines.pictures.encode import ImageConfig

LOSSLESS = ImageConfig(resize="no", format="png", reencode="always")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width: int = 120, height: int = 80) -> Image.Image:
    """A smooth picture whose corners differ: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], -1).astype(np.uint8))


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of all octaves, the coarser the stronger, as the spectrum of photographs has it."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 128.0)
    for octave in range(1, max(width, height).bit_length()):  # to cells of about a pixel
        cells = rng.normal(128, 60 / 1.6**octave, (2**octave, 2**octave, 3)).clip(0, 255)
        plane = Image.fromarray(cells.astype(np.uint8))
        picture += np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) - 128.0
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def store(data: bytes, config: ImageConfig = LOSSLESS, **how: Any) -> Stored:
    return Opened(data, config.max_pixels, **how).store(config)


def pixels(data: bytes, config: ImageConfig = LOSSLESS, **how: Any) -> np.ndarray:
    """The stored picture as [h w 3]; fails where it is not the sound RGB it says it is."""
    stored = store(data, config, **how)
    image = Image.open(io.BytesIO(stored.data))
    assert image.mode == "RGB"
    assert image.size == (stored.width, stored.height)
    assert not image.getexif()
    return np.asarray(image)


def png(
    header: tuple[int, int, int, int], rows: bytes, *chunks: bytes, interlaced: int = 0
) -> bytes:
    """A PNG of width, height, depth and colour type, with its rows as they are before compression."""
    body = struct.pack(">IIBBBBB", *header, 0, 0, interlaced)
    parts = [png_chunk(b"IHDR", body), *chunks, png_chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checked = kind + body
    return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))
