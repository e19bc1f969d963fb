"""Files of the web: unusual but complete ones, damaged ones, bombs, and files that are no images."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.pipelines.pictures.files import encoded, photo, png, png_chunk

BROKEN_METADATA = frozenset(
    ["long_text.png", "libpng__empty_ancillary_chunks.png", "pillow__png_decompression_dos.png"]
)
"""Complete pictures that Pillow refuses for chunks that no picture needs."""
ODD_TIFFS = frozenset(
    [
        "image-rs__old-rle.hdr.tiff",
        "image-rs__rgb32f_color.tiff",
        "image-rs__rgbr4x4.hdr.tiff",
        "sharp__cielab-dagams.tiff",
        "twelvemonkeys__planar-yuv410-jpeg-uncompressed.tif",
    ]
)
ODD_AVIFS = frozenset(
    [
        "libavif__alpha_noispe.avif",
        "libavif__pyramid_pymd.avif",
        "libavif__seine_sdr_gainmap_gammazero.avif",
        "libavif__supported_gainmap_writer_version_with_extra_bytes.avif",
    ]
)
"""Valid pictures of kinds that Pillow does not open, some in the folders of damaged ones."""
OPENED = BROKEN_METADATA | ODD_TIFFS | ODD_AVIFS
FILLED_IN = frozenset(
    [
        "pillow__hopper_bad_exif.jpg",
        "go-fuzz-corpus__d0ba7dd33c58eed1d6f9c6a393354f4313f58d17-3",
        "go-fuzz-corpus__d85efb1c1e0913a8c592c69028732a049670563b-2",
    ]
)
"""Visibly incomplete pictures that Pillow accepts."""


def make_nasty(folder: Path) -> dict[Path, str | None]:
    """Write generated files into the folder: {file: "ok" or its failure class}."""
    found: dict[Path, str | None] = {}
    for outcome, files in MADE.items():
        for name, content in files().items():
            file = folder / outcome / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            found[file] = outcome
    return found


def real_nasty(folder: Path) -> dict[Path, str | None]:
    """Files of decoders' test suites: {file: its failure class, if its folder gives one}."""
    entries = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert len(entries) == 319
    found: dict[Path, str | None] = {}
    for entry in entries:
        file = folder / entry["file"]
        is_broken = entry["category"].startswith("broken_") or file.name in FILLED_IN
        outcome = "corrupt" if is_broken else None
        found[file] = "ok" if file.name in OPENED else outcome
    return found


def _three_frames(kind: str) -> bytes:
    # New ones each time: an image remembers the options that it was last saved with.
    first, *others = (Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue"))
    return encoded(first, kind, save_all=True, append_images=others)


def _whole() -> dict[str, bytes]:
    red = Image.new("RGB", (30, 20), "red")
    turned = Image.Exif()
    turned[0x0112] = 6
    wrong_exif = b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20)
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    palette = Image.new("P", (30, 20))
    palette.putpalette([0, 0, 255, 10, 20, 30])
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    text = b"Comment\0\0" + zlib.compress(bytes(8 << 20))  # 8 kB that become 8 MB
    return {
        "cmyk.jpg": encoded(photo().convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(photo().convert("L"), "JPEG"),
        "progressive.jpg": encoded(photo(), "JPEG", progressive=True),
        "turned.jpg": encoded(photo(), "JPEG", exif=turned),
        "wrong_exif.jpg": encoded(photo(), "JPEG", exif=wrong_exif),
        "more_behind_its_end.jpg": encoded(photo(), "JPEG") + b"<html>",
        "three_pictures.mpo": _three_frames("MPO"),
        "16_bits.png": encoded(deep),
        "1_bit.png": encoded(red.convert("1")),
        "clear.png": encoded(clear),
        "clear_colour_of_a_palette.png": encoded(palette, transparency=0),
        "animated.png": _three_frames("PNG"),
        # 2 kB that are 20 million pixels: within the limits, so it is decoded whole.
        "a_few_bytes_of_many_pixels.png": encoded(Image.new("1", (4_400, 4_400), 1)),
        "one_row.png": encoded(Image.new("RGB", (10_000, 1), "red")),
        "one_pixel.png": encoded(Image.new("RGB", (1, 1), "red")),
        "animated.gif": _three_frames("GIF"),
        "animated.webp": _three_frames("WEBP"),
        "1_bit.tiff": encoded(red.convert("1"), "TIFF", compression="group4"),
        "floats.tiff": encoded(Image.new("F", (30, 20), 0.5), "TIFF"),
        "pages.tiff": _three_frames("TIFF"),
        "long_text.png": png((4, 1, 8, 0), bytes(5), png_chunk(b"zTXt", text)),
        "named_wrong.jpg": encoded(red, "BMP"),
    }


def _damaged() -> dict[str, bytes]:
    jpeg, plain = encoded(photo(), "JPEG"), encoded(photo())
    flipped = bytearray(encoded(photo(200, 200)))
    flipped[len(flipped) // 2] ^= 0xFF
    gif = encoded(Image.new("P", (30, 20)), "GIF")
    return {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:20],
        "half.png": plain[: len(plain) // 2],
        "flipped.png": bytes(flipped),
        "no_rows.png": png((300, 200, 8, 2), b""),
        "half.gif": gif[: len(gif) // 2],
        "no_frame.gif": gif[:10] + b"\0\0\0;",
        "half.webp": encoded(photo(), "WEBP")[:200],
        "half.bmp": encoded(photo(), "BMP")[:2_000],
        "half.tiff": encoded(photo(), "TIFF")[:2_000],
        "directory_beyond_its_end.tiff": b"II*\0" + struct.pack("<I", 1 << 30),
    }


def _too_large() -> dict[str, bytes]:
    """Headers that announce more than fits into memory."""
    gif = bytearray(encoded(Image.new("P", (30, 20)), "GIF"))
    gif[6:10] = struct.pack("<2H", 65_535, 65_535)
    bmp = bytearray(encoded(photo(), "BMP"))
    bmp[18:26] = struct.pack("<2i", 100_000, 100_000)
    return {
        "bomb.png": png((60_000, 60_000, 8, 2), b""),
        "white.png": encoded(Image.new("1", (9_000, 9_000), 1)),
        "bomb.gif": bytes(gif),
        "bomb.bmp": bytes(bmp),
        "bomb.ppm": b"P6 50000 50000 255\n",
    }


def _unsupported() -> dict[str, bytes]:
    return {
        "drawing.svg": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
        "layers.psd": b"8BPS\0\1" + bytes(100),
    }


def _no_image() -> dict[str, bytes]:
    return {
        "empty.jpg": b"",
        "zeros.png": bytes(1_000),
        "page.jpg": b"<!doctype html><title>Not found</title>",
        "text.gif": b"GIF is what this text begins with.",
        "drawing.tga": encoded(photo(), "TGA"),  # begins like nothing in particular
    }


MADE: dict[str, Callable[[], dict[str, bytes]]] = {
    "ok": _whole,
    "corrupt": _damaged,
    "too_large": _too_large,
    "unsupported": _unsupported,
    "not_an_image": _no_image,
}
