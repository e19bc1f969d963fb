"""Whether an image file is complete by its own end marker, when its transfer ended early.

Only the end is checked: damage in the middle is found by the decoder.
"""

from __future__ import annotations

from pipelines.pictures.formats import image_format

_PADDING = b"\0\r\n "  # bytes that cameras and servers append to a file
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b"\0;"}


def is_complete(data: bytes | bytearray) -> bool:
    """True for an image file that ends where its format says; False for formats without an end.

    Source: the end markers of JPEG (ITU T.81 B.2.1), PNG (11.2.5) and GIF89a (27), the file sizes
    of WebP and BMP, the boxes of ISO 14496-12 (AVIF).
    """
    kind = image_format(data)
    if kind in _END_MARKERS:
        return bytes(data[-512:]).rstrip(_PADDING).endswith(_END_MARKERS[kind])
    if kind == "WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    if kind == "BMP":
        return len(data) >= int.from_bytes(data[2:6], "little") > 0
    if kind in ("AVIF", "HEIF"):
        return _ends_with_box(data)
    return False


def _ends_with_box(data: bytes | bytearray) -> bool:
    offset = 0
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        if size == 1:
            size = int.from_bytes(data[offset + 8 : offset + 16], "big")
        if size < 8:  # 0: the box extends to the end of the file, which is unknown
            return False
        offset += size
    return offset == len(data)
