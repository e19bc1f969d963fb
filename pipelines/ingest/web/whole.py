"""Whether a file is whole by its own end, for a body whose transfer was not properly ended.

A guess by the last bytes alone: a file that is damaged in its middle is found by its decoder.
"""

from __future__ import annotations

from pipelines.pictures.formats import image_format

_PADDING = b"\0\r\n "  # what cameras and servers put behind a file
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b"\0;"}


def is_whole(data: bytes | bytearray) -> bool:
    """True for an image file that ends where its format says that it does.

    Source: the end markers of JPEG (ITU T.81 B.2.1), PNG (11.2.5) and GIF89a (27), the file sizes
    of WebP and BMP, the boxes of ISO 14496-12 (AVIF). Always False for formats without an end.
    """
    kind = image_format(data)
    if kind in _ENDS:
        return bytes(data[-512:]).rstrip(_PADDING).endswith(_ENDS[kind])
    if kind == "WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    if kind == "BMP":
        return len(data) >= int.from_bytes(data[2:6], "little") > 0
    if kind in ("AVIF", "HEIF"):
        return _ends_with_a_box(data)
    return False


def _ends_with_a_box(data: bytes | bytearray) -> bool:
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: to the end of the file, wherever that is
            return False
        at += size
    return at == len(data)
