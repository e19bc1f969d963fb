"""The clean aperture of an AVIF: the part of its pixels that is meant to be seen, which Pillow ignores.

(ISO/IEC 14496-12: boxes, 8.11.4 primary item, 8.11.14 item properties, 12.1.4 clean aperture)
"""

from __future__ import annotations

import struct
from fractions import Fraction

from pipelines.pictures.boxes import boxes

Box = tuple[int, int, int, int]


def clean_aperture(data: bytes, size: tuple[int, int]) -> Box | None:
    """Left, upper, right and lower edge of the picture's part, before it is turned; None for all of it.

    One that is damaged, or lies beyond the picture, is none.
    """
    try:
        return _clean_aperture(data, size)
    except (struct.error, IndexError, KeyError, ZeroDivisionError):
        return None


def _clean_aperture(data: bytes, size: tuple[int, int]) -> Box | None:
    meta = dict(_contents(dict(_contents(data))[b"meta"][4:]))
    version = meta[b"pitm"][0]
    (primary,) = struct.unpack_from(">I" if version else ">H", meta[b"pitm"], 4)
    parts = dict(_contents(meta[b"iprp"]))
    properties = _contents(parts[b"ipco"])
    for index in _properties_of(primary, parts[b"ipma"]):
        if not index:  # none
            continue
        kind, content = properties[index - 1]
        if kind == b"clap":
            return _inside(struct.unpack_from(">IIIIiIiI", content), size)
    return None


def _contents(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each box."""
    return [(kind, data[begin:end]) for kind, begin, end in boxes(data)]


def _properties_of(item: int, associations: bytes) -> list[int]:
    """Numbers of an item's properties, counted from 1."""
    version, flags = associations[0], associations[3]
    (count,) = struct.unpack_from(">I", associations, 4)
    place = 8
    for _ in range(count):
        (found,) = struct.unpack_from(">I" if version else ">H", associations, place)
        place += 4 if version else 2
        many, width = associations[place], 2 if flags & 1 else 1
        entries = associations[place + 1 : place + 1 + many * width]
        place += 1 + many * width
        if found == item:
            if width == 2:
                return [value & 0x7FFF for (value,) in struct.iter_unpack(">H", entries)]
            return [value & 0x7F for value in entries]
    return []


def _inside(aperture: tuple[int, ...], size: tuple[int, int]) -> Box | None:
    """Width, height and the distances of the centre from the picture's, each as a fraction."""
    width, height, right, down = (
        Fraction(aperture[i], aperture[i + 1]) for i in range(0, len(aperture), 2)
    )
    left, top = right + (size[0] - width) / 2, down + (size[1] - height) / 2
    edges = (left, top, left + width, top + height)
    if any(edge.denominator != 1 for edge in edges) or min(width, height) < 1:
        return None
    box = (int(edges[0]), int(edges[1]), int(edges[2]), int(edges[3]))
    within = box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]
    return box if within and box != (0, 0, *size) else None
