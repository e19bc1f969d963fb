"""Detects the format of an image file by its first bytes; names and content types are unreliable.

Raw arrays have no such bytes: their encoding has to be given.
"""

from __future__ import annotations

import importlib
import re
import struct
from collections.abc import Iterator
from typing import Literal

from pipelines.pictures.boxes import boxes

Encoding = Literal["file", "chw", "hwc", "npy"]
"""How an image is stored: as a file (JPEG, PNG, …), or a raw array (pipelines.pictures.arrays)."""

SUFFIXES: dict[Encoding, frozenset[str]] = {
    "npy": frozenset([".npy"]),
    "chw": frozenset([".chw", ".raw", ".bin", ".bytes", ".rgb"]),
    "hwc": frozenset([".hwc", ".raw", ".bin", ".bytes", ".rgb"]),
}
"""Suffixes of the files and members of shards that hold such arrays."""

_SNIFF_BYTES, _SNIFF_TEXT_BYTES = 64, 4096  # an SVG may begin with long comments

READABLE = frozenset(
    ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "QOI"]
)
"""Formats that are decoded; others are unsupported, unless `register_extra` adds them."""

_EXTRAS = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}
"""Formats that other packages decode; the extra to install has the format's name in lower case."""

_MIN_ZEROS, _MIN_ZERO_FRACTION = 1024, 0.05  # bytes, and of the compressed data
_MAX_CHUNKS = 10_000

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\1\0", "ICO"),
    (b"qoif", "QOI"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (b"\xff\x0a", "JXL"),
    (b"8BPS", "PSD"),
)
# Declarations, comments and document types, then the root element.
_SVG = re.compile(
    rb"(?>\xef\xbb\xbf|\s+|<\?.*?\?>|<!--.*?-->|<![^\[>]*(?:\[.*?\]\s*)?>)*+<svg\b", re.DOTALL
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"hevc": "HEIF"}
_BRANDS |= {b"mif1": "HEIF", b"msf1": "HEIF", b"heim": "HEIF", b"heis": "HEIF"}


def sniff_length(data: bytes | bytearray) -> int:
    """How many of a file's first bytes `image_format` needs."""
    is_text = data[:_SNIFF_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
    return _SNIFF_TEXT_BYTES if is_text else _SNIFF_BYTES


def ends_in_zeros(kind: str, data: bytes) -> bool:
    """Whether a large part of the compressed data is zeros, up to the end: an incomplete download.

    For lossy WebP, AVIF and HEIF, whose decoders accept it: arithmetic coding does not produce such a
    run. In other formats zeros may be pixels, or the decoder fails (docs/decisions.md).
    """
    parts = {"WEBP": _webp_chunks, "AVIF": boxes, "HEIF": boxes}.get(kind)
    if parts is None:
        return False
    for name, begin, end in parts(data):
        if name in (b"VP8 ", b"mdat"):
            compressed = data[begin:end]
            zeros = len(compressed) - len(compressed.rstrip(b"\0"))
            return zeros >= max(_MIN_ZEROS, len(compressed) * _MIN_ZERO_FRACTION)
    return False


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end offset of the content of each chunk."""
    offset = 12
    for _ in range(_MAX_CHUNKS):
        if offset + 8 > len(data):
            return
        name, size = struct.unpack_from("<4sI", data, offset)
        yield name, offset + 8, offset + 8 + size
        offset += 8 + size + (size & 1)


def register_extra(kind: str) -> str | None:
    """Make Pillow open a format that is not in READABLE. Returns None, or why it cannot be decoded."""
    if kind not in _EXTRAS:
        return f"{kind} is not decoded"
    try:
        module = importlib.import_module(_EXTRAS[kind])
    except ImportError:
        return f"{kind} is decoded with the extra: pip install 'vlv-ray[{kind.lower()}]'"
    if kind == "HEIF":
        module.register_heif_opener(thumbnails=False)
    return None


def image_format(data: bytes | bytearray) -> str | None:
    """The format of a file, or None if it is not an image; the first `sniff_length` bytes are enough."""
    head = bytes(data[: sniff_length(data)])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:1] == b"\0" and head[4:8] == b"ftyp":  # the size and kind of a box
        # The major brand mif1 is generic; AVIF files then list avif as a compatible brand.
        brands = [head[i : i + 4] for i in (8, *range(16, len(head) - 3, 4))]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        return _BRANDS.get(head[8:12])
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    return "SVG" if _SVG.match(head) else None
