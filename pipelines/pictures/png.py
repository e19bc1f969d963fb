"""Parses a PNG's chunks: checks those that the picture needs, and drops damaged metadata.

Pillow does not check the checksums of pixels, nor that all rows are there, and it refuses a picture
for a damaged comment. (PNG specification, 3rd edition: section 5, chunks; 10, compression)
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from PIL import Image

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# The passes of an interlaced file: first column and row, and the steps between them.
_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_PIECE = 1 << 20  # bytes decompressed at a time
_MAX_PROFILE = 1 << 24
_MAX_TEXT = 1 << 20  # bytes of one chunk; Pillow's limit
_NEEDED = frozenset([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"])
_READ = frozenset([b"eXIf", b"acTL", b"fcTL", b"fdAT"])  # orientation and animation
_SIZES = {b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"sRGB": 1}
# Offset of the text, or of compressed text, behind the zero that ends the keyword.
_TEXT_OFFSETS = {b"tEXt": 1, b"zTXt": 2, b"iTXt": 5, b"iCCP": 2}
_MAX_TOTAL_TEXT = 64 << 20  # Pillow's limit
_ORIENTED = (
    b"Raw profile type exif\0",
    b"XML:com.adobe.xmp\0",
)  # texts that may have the orientation
_MAX_CHUNKS = 100_000


@dataclass(frozen=True)
class Chunks:
    """A PNG in which no chunk that the picture needs is damaged.

    `sound` is the file without unneeded chunks; `profile` is its ICC profile, if readable; `is_clean`
    is true if no chunk at all is damaged or refused by other readers; `idat` is the compressed data.
    """

    sound: bytes
    profile: bytes | None
    is_clean: bool
    idat: tuple[memoryview, ...]

    def check_rows(self) -> None:
        """Raise ValueError if the compressed pixels are damaged, or are valid but have too few rows:
        decoders leave missing rows black.
        """
        width, height, depth, colour_type, _, _, is_interlaced = struct.unpack_from(
            ">IIBBBBB", self.sound, 16
        )
        bits, missing = depth * _CHANNELS.get(colour_type, 1), 0
        for left, top, right, down in _PASSES if is_interlaced else ((0, 0, 1, 1),):
            columns, rows = -(-(width - left) // right), -(-(height - top) // down)
            if columns > 0 and rows > 0:
                missing += rows * (1 + (columns * bits + 7) // 8)  # one byte is the row's filter
        decompressor = zlib.decompressobj()
        for piece in self.idat:
            rest: bytes | memoryview = piece
            # Reads a little beyond the last row, for the checksum, but not an endless stream.
            while rest and not decompressor.eof and missing > -_PIECE:
                try:
                    missing -= len(decompressor.decompress(rest, _PIECE))
                except zlib.error as error:
                    raise ValueError(f"its compressed pixels are damaged ({error})") from None
                rest = decompressor.unconsumed_tail
        if missing > 0 and decompressor.eof:
            raise ValueError("its pixels end before the picture does")


def read_chunks(data: bytes) -> Chunks:
    """Parse the chunks. Raises ValueError for a damaged chunk that the picture needs, or too many
    chunks. A truncated chunk is kept, and found by the decoder."""
    view, offset, kept = memoryview(data), 8, [data[:8]]
    idat: list[memoryview] = []
    texts, profiles = _TextLimit(), list[bytes | None]()
    is_clean, kind = True, b""
    for _ in range(_MAX_CHUNKS):
        if offset + 8 > len(data) or kind == b"IEND":
            break
        size, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + size
        content = view[offset + 8 : min(end - 4, len(data))]
        idat += [content] if kind == b"IDAT" else []
        if end > len(data):
            kind = b""
            break
        is_valid = zlib.crc32(view[offset + 4 : end - 4]) == int.from_bytes(view[end - 4 : end])
        if kind in _NEEDED and not is_valid:
            raise ValueError(f"the checksum of a chunk {kind.decode()} is not that of its bytes")
        is_accepted = texts.accepts(kind, content) if is_valid else False
        is_clean = is_clean and is_accepted and len(content) == _SIZES.get(kind, len(content))
        is_read = kind in _READ or (is_accepted and bytes(content[:40]).startswith(_ORIENTED))
        if kind in _NEEDED or (is_valid and is_read):
            kept.append(data[offset:end])
        elif kind == b"iCCP" and is_valid and not profiles:
            profiles.append(_profile(bytes(content)))
        offset = end
    else:
        raise ValueError(f"more than {_MAX_CHUNKS:,} chunks")
    if kind != b"IEND":
        kept.append(data[offset:])
    return Chunks(b"".join(kept), profiles[0] if profiles else None, is_clean, tuple(idat))


def _profile(content: bytes) -> bytes | None:
    """The profile of an iCCP chunk: a name, a zero, the compression method, the compressed profile."""
    decompressor = zlib.decompressobj()
    try:
        profile = decompressor.decompress(content[content.index(b"\0") + 2 :], _MAX_PROFILE)
    except (zlib.error, ValueError):
        return None
    return profile if decompressor.eof else None


class _TextLimit:
    """Limits of text, beyond which other readers refuse a file."""

    def __init__(self) -> None:
        self.left = _MAX_TOTAL_TEXT

    def accepts(self, kind: bytes, content: memoryview) -> bool:
        """Whether other readers accept the next chunk of the file."""
        if kind not in _TEXT_OFFSETS:
            return True
        size = self._size(kind, bytes(content)) if self.left > 0 else _MAX_TEXT + 1
        self.left -= size
        return size <= _MAX_TEXT and self.left >= 0

    def _size(self, kind: bytes, content: bytes) -> int:
        text = content[content.find(b"\0") + _TEXT_OFFSETS[kind] :]
        if kind == b"tEXt":
            return len(text)
        try:
            return len(zlib.decompressobj().decompress(text, _MAX_TEXT + 1))
        except zlib.error:  # an iTXt may be uncompressed
            return len(text) if kind == b"iTXt" else _MAX_TEXT + 1


def scale_transparency(image: Image.Image, depth: int) -> None:
    """Convert an opened PNG's transparent colour from the file's bit depth to that of Pillow's pixels.

    Pillow scales greys of fewer than 8 bits up, and drops the low bytes of 16-bit colours.
    """
    transparent = image.info.get("transparency")
    if image.mode == "L" and depth < 8 and isinstance(transparent, int):
        white = 2**depth - 1
        if transparent <= white:
            image.info["transparency"] = transparent * 255 // white
        else:
            del image.info["transparency"]
    elif image.mode == "RGB" and depth == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
