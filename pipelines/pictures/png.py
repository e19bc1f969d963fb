"""What Pillow passes over in a PNG: rows that are lacking, and which of its colours is transparent."""

from __future__ import annotations

import struct
import zlib

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


def check_rows(data: bytes) -> None:
    """Raise ValueError where the compressed data end, though soundly, before the picture does.

    Pillow leaves the rows black that did not come. Damage of other kinds it finds itself.
    """
    width, height, depth, colours, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits, lacking = depth * _CHANNELS.get(colours, 1), 0
    for left, top, right, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            lacking += rows * (1 + (columns * bits + 7) // 8)  # a byte of each row is its filter
    unpacking, place = zlib.decompressobj(), 8
    while lacking > 0 and not unpacking.eof and place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        packed = data[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        while packed and lacking > 0 and not unpacking.eof:
            try:
                lacking -= len(unpacking.decompress(packed, _PIECE))
            except zlib.error:
                return
            packed = unpacking.unconsumed_tail
        place += 12 + size
    if lacking > 0 and unpacking.eof:
        raise ValueError("its pixels end before the picture does")


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
