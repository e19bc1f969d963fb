"""Which image format a file has, by its first bytes: names lie on the web, content types too."""

from __future__ import annotations

import importlib
import re
import struct
from collections.abc import Iterator

from pipelines.pictures.boxes import boxes

_SNIFFED, _SNIFFED_OF_TEXT = 64, 4096  # bytes; an SVG may have much to say before it begins

READABLE = frozenset(
    ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "QOI"]
)
"""Formats that are decoded; of the others we say that they are images of an unsupported kind, unless
`open_more` helps."""

_EXTRAS = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}
"""Formats that packages beside Pillow decode, each with an extra of ours by its name in lower case."""

_FEW_ZEROS, _SMALL_SHARE = 1024, 0.05  # bytes, and of what is packed
_MOST_CHUNKS = 10_000

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
# Declarations, comments and document types, and then the element.
_SVG = re.compile(
    rb"(?>\xef\xbb\xbf|\s+|<\?.*?\?>|<!--.*?-->|<![^\[>]*(?:\[.*?\]\s*)?>)*+<svg\b", re.DOTALL
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"hevc": "HEIF"}
_BRANDS |= {b"mif1": "HEIF", b"msf1": "HEIF", b"heim": "HEIF", b"heis": "HEIF"}


def sniffed(data: bytes | bytearray) -> int:
    """How many of a file's first bytes `image_format` wants to see."""
    is_text = data[:_SNIFFED].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
    return _SNIFFED_OF_TEXT if is_text else _SNIFFED


def ends_in_zeros(kind: str, data: bytes) -> bool:
    """Whether much of what is packed is zeros, up to its end: a download that was never filled.

    Of lossy WebP, AVIF and HEIF, whose decoders make a picture of it: arithmetic coding leaves no such
    run. Of other formats zeros may be pixels, or their decoders find it (docs/decisions.md).
    """
    parts = {"WEBP": _webp_chunks, "AVIF": boxes, "HEIF": boxes}.get(kind)
    if parts is None:
        return False
    for name, begin, end in parts(data):
        if name in (b"VP8 ", b"mdat"):
            packed = data[begin:end]
            zeros = len(packed) - len(packed.rstrip(b"\0"))
            return zeros >= max(_FEW_ZEROS, len(packed) * _SMALL_SHARE)
    return False


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of each chunk's content."""
    place = 12
    for _ in range(_MOST_CHUNKS):
        if place + 8 > len(data):
            return
        name, size = struct.unpack_from("<4sI", data, place)
        yield name, place + 8, place + 8 + size
        place += 8 + size + (size & 1)


def open_more(kind: str) -> str | None:
    """Have Pillow open a format that is not in READABLE; where it cannot, what would help."""
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
    """The format of a file, or None where it begins like no image; the first `sniffed` bytes do."""
    head = bytes(data[: sniffed(data)])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:1] == b"\0" and head[4:8] == b"ftyp":  # the size of a box, and its kind
        # A major brand of mif1 says little; AVIF files then list avif among the compatible ones.
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
