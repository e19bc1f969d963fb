"""The sequence of boxes in AVIF and HEIF files. (ISO/IEC 14496-12, section 4.2)"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_MAX_BOXES = 10_000  # usual files have tens


def boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, and start and end offset of the content, of each top-level box.

    A box of size 0 extends to the end of the data. Stops at an invalid or truncated size.
    """
    offset = 0
    for _ in range(_MAX_BOXES):
        if offset + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, offset)
        header = 8
        if size == 1:
            if offset + 16 > len(data):
                return
            (size,), header = struct.unpack_from(">Q", data, offset + 8), 16
        end = offset + size if size else len(data)
        if size and size < header:
            return
        yield kind, offset + header, end
        offset = end
