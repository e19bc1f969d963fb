"""Generated pictures, encoded and stored, for the tests of decoding and encoding."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from pipelines.pictures.decode import ImageFile, Stored
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
    """Noise of all octaves, the coarser the stronger, like the spectrum of photographs."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 128.0)
    for octave in range(1, max(width, height).bit_length()):  # to cells of about a pixel
        cells = rng.normal(128, 60 / 1.6**octave, (2**octave, 2**octave, 3)).clip(0, 255)
        plane = Image.fromarray(cells.astype(np.uint8))
        picture += np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) - 128.0
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def store(data: bytes, config: ImageConfig = LOSSLESS, **how: Any) -> Stored:
    return ImageFile(data, config.max_pixels, **how).store(config)


def pixels(data: bytes, config: ImageConfig = LOSSLESS, **how: Any) -> np.ndarray:
    """The stored picture as [h w 3]; fails if it is not RGB of the stored size."""
    stored = store(data, config, **how)
    image = Image.open(io.BytesIO(stored.data))
    assert image.mode == "RGB"
    assert image.size == (stored.width, stored.height)
    assert not image.getexif()
    return np.asarray(image)


def lossless_jpeg(grey: np.ndarray) -> bytes:
    """[h w] uint8 as a lossless JPEG (SOF3, each pixel after its left neighbour), which Pillow does
    not write. (ITU-T T.81, Annex H)"""
    height, width = grey.shape
    values = grey.astype(int)
    before = np.empty_like(values)
    before[:, 1:], before[1:, 0], before[0, 0] = values[:, :-1], values[:-1, 0], 128
    bits = []
    for change in (values - before).flatten().tolist():
        category = abs(change).bit_length()
        code = format(category, "04b")  # all of four bits: 0000 to 1001
        low = change if change > 0 else change + (1 << category) - 1
        bits.append(code + (format(low, f"0{category}b") if category else ""))
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    scan = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = b"\x08" + struct.pack(">HH", height, width) + b"\1\1\x11\0"
    table = b"\0" + bytes([0, 0, 0, 10, *[0] * 12]) + bytes(range(10))
    parts = ((0xC3, frame), (0xC4, table), (0xDA, b"\1\1\0\1\0\0"))
    headers = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(part) + 2) + part for marker, part in parts
    )
    return b"\xff\xd8" + headers + scan + b"\xff\xd9"


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
