"""The boxes of AVIF and HEIF files, one behind the other. (ISO/IEC 14496-12, section 4.2)"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_MOST_BOXES = 10_000  # a file has some tens


def boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, and where its content begins and ends, of each box; those within a box are its content.

    A size of 0 reaches to the end of the data. Stops at a size that no box can have, or that is cut off.
    """
    place = 0
    for _ in range(_MOST_BOXES):
        if place + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, place)
        head = 8
        if size == 1:
            if place + 16 > len(data):
                return
            (size,), head = struct.unpack_from(">Q", data, place + 8), 16
        end = place + size if size else len(data)
        if size and size < head:
            return
        yield kind, place + head, end
        place = end
