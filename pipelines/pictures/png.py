"""A PNG's chunks: those that its picture needs, checked, and apart from metadata, which cost no picture.

Pillow checks neither the pixels' checksums nor that all rows came, and refuses a whole picture for a
damaged comment. (PNG specification, 3rd edition: section 5, chunks; 10, compression)
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from PIL import Image

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Of an interlaced file's passes: first column and row, and the steps from there.
_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_PIECE = 1 << 20  # bytes that are unpacked at a time
_LARGEST_PROFILE = 1 << 24
_LARGEST_TEXT = 1 << 20  # of one chunk, which is what Pillow unpacks of it
_NEEDED = frozenset([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"])
_READ = frozenset([b"eXIf", b"acTL", b"fcTL", b"fdAT"])  # orientation; whether it is animated
_SIZES = {b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"sRGB": 1}
# How far behind the keyword's zero text begins, or packed text may.
_TEXTS = {b"tEXt": 1, b"zTXt": 2, b"iTXt": 5, b"iCCP": 2}
_MOST_TEXT = 64 << 20  # of all of them, again as Pillow
_ORIENTED = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may say what is up
_MOST_CHUNKS = 100_000


@dataclass(frozen=True)
class Chunks:
    """A PNG's chunks, of which none that its picture needs is damaged.

    `sound` is the file with those that a picture is made of, `profile` its ICC profile, where it can
    be read; `is_clean` says that no chunk at all is damaged or beyond what others open.
    """

    sound: bytes
    profile: bytes | None
    is_clean: bool
    packed: tuple[memoryview, ...]

    def check_rows(self) -> None:
        """Raise ValueError where the compressed pixels are damaged, or end, though soundly, before
        the picture does: decoders leave the rows black that did not come.
        """
        width, height, depth, colours, _, _, interlaced = struct.unpack_from(
            ">IIBBBBB", self.sound, 16
        )
        bits, lacking = depth * _CHANNELS.get(colours, 1), 0
        for left, top, right, down in _PASSES if interlaced else ((0, 0, 1, 1),):
            columns, rows = -(-(width - left) // right), -(-(height - top) // down)
            if columns > 0 and rows > 0:
                lacking += rows * (
                    1 + (columns * bits + 7) // 8
                )  # a byte of each row is its filter
        unpacking = zlib.decompressobj()
        for piece in self.packed:
            left_over: bytes | memoryview = piece
            # A little beyond the last row, to the checksum: what is packed may have no end.
            while left_over and not unpacking.eof and lacking > -_PIECE:
                try:
                    lacking -= len(unpacking.decompress(left_over, _PIECE))
                except zlib.error as error:
                    raise ValueError(f"its compressed pixels are damaged ({error})") from None
                left_over = unpacking.unconsumed_tail
        if lacking > 0 and unpacking.eof:
            raise ValueError("its pixels end before the picture does")


def read_chunks(data: bytes) -> Chunks:
    """Raises ValueError where a chunk of the picture is damaged, or there is no end of chunks. What is
    cut off is judged later."""
    seen, place, kept = memoryview(data), 8, [data[:8]]
    packed: list[memoryview] = []
    texts, profiles = _Texts(), list[bytes | None]()
    is_clean, kind = True, b""
    for _ in range(_MOST_CHUNKS):
        if place + 8 > len(data) or kind == b"IEND":
            break
        size, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + size
        content = seen[place + 8 : min(end - 4, len(data))]
        packed += [content] if kind == b"IDAT" else []
        if end > len(data):
            kind = b""
            break
        is_whole = zlib.crc32(seen[place + 4 : end - 4]) == int.from_bytes(seen[end - 4 : end])
        if kind in _NEEDED and not is_whole:
            raise ValueError(f"the checksum of a chunk {kind.decode()} is not that of its bytes")
        is_modest = texts.take(kind, content) if is_whole else False
        is_clean = is_clean and is_modest and len(content) == _SIZES.get(kind, len(content))
        is_read = kind in _READ or (is_modest and bytes(content[:40]).startswith(_ORIENTED))
        if kind in _NEEDED or (is_whole and is_read):
            kept.append(data[place:end])
        elif kind == b"iCCP" and is_whole and not profiles:
            profiles.append(_profile(bytes(content)))
        place = end
    else:
        raise ValueError(f"more than {_MOST_CHUNKS:,} chunks")
    if kind != b"IEND":
        kept.append(data[place:])
    return Chunks(b"".join(kept), profiles[0] if profiles else None, is_clean, tuple(packed))


def _profile(content: bytes) -> bytes | None:
    """The profile of a chunk iCCP: a name, a zero, how it is packed, and itself."""
    unpacking = zlib.decompressobj()
    try:
        profile = unpacking.decompress(content[content.index(b"\0") + 2 :], _LARGEST_PROFILE)
    except (zlib.error, ValueError):
        return None
    return profile if unpacking.eof else None


class _Texts:
    """How much text there is, of which other readers refuse a file with too much."""

    def __init__(self) -> None:
        self.left = _MOST_TEXT

    def take(self, kind: bytes, content: memoryview) -> bool:
        """Whether other readers open a chunk, behind those before it."""
        if kind not in _TEXTS:
            return True
        size = self._size(kind, bytes(content)) if self.left > 0 else _LARGEST_TEXT + 1
        self.left -= size
        return size <= _LARGEST_TEXT and self.left >= 0

    def _size(self, kind: bytes, content: bytes) -> int:
        text = content[content.find(b"\0") + _TEXTS[kind] :]
        if kind == b"tEXt":
            return len(text)
        try:
            return len(zlib.decompressobj().decompress(text, _LARGEST_TEXT + 1))
        except zlib.error:  # not packed, as an iTXt may be
            return len(text) if kind == b"iTXt" else _LARGEST_TEXT + 1


def settle_transparency(image: Image.Image, depth: int) -> None:
    """Have an opened PNG's transparent colour in the bits of the pixels that Pillow makes.

    It is told in those of the file: of fewer than 8, Pillow stretches the greys, of 16 in colour it
    drops the low bytes.
    """
    hidden = image.info.get("transparency")
    if image.mode == "L" and depth < 8 and isinstance(hidden, int):
        most = 2**depth - 1
        if hidden <= most:
            image.info["transparency"] = hidden * 255 // most
        else:
            del image.info["transparency"]
    elif image.mode == "RGB" and depth == 16 and isinstance(hidden, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in hidden)
