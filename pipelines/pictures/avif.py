"""AVIF features that Pillow lacks: the clean aperture, and files that only other readers open.

The clean aperture is the part of the pixels that is displayed.
(ISO/IEC 14496-12: boxes, 8.11.4 primary item, 8.11.6 items, 8.11.14 item properties, 12.1.4 clean
aperture; ISO/IEC 23008-12: 6.5.8 auxiliary images; libavif's read.c for what Pillow refuses)
"""

from __future__ import annotations

import struct
from fractions import Fraction

from pipelines.pictures.boxes import boxes

Box = tuple[int, int, int, int]
Associations = list[tuple[int, list[int]]]
"""Each item with the indices of its properties, from 1; a bit of each says whether it is essential."""

_PILLOW_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
"""Major brands that Pillow opens."""
_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0", b"urn:mpeg:hevc:2015:auxid:1\0")


def clean_aperture(data: bytes, size: tuple[int, int]) -> Box | None:
    """Left, upper, right and lower edge of the clean aperture, before rotation; None for the full
    picture, and for an invalid aperture. `size` is (width, height).
    """
    try:
        return _clean_aperture(data, size)
    except (struct.error, IndexError, KeyError, ZeroDivisionError):
        return None


def _clean_aperture(data: bytes, size: tuple[int, int]) -> Box | None:
    meta = dict(_contents(dict(_contents(data))[b"meta"][4:]))
    parts = dict(_contents(meta[b"iprp"]))
    properties, associations = _contents(parts[b"ipco"]), _associations(parts[b"ipma"])
    for index in dict(reversed(associations)).get(_primary(meta[b"pitm"]), []):
        number = index & _index_mask(parts[b"ipma"])
        if not number:  # no property
            continue
        kind, content = properties[number - 1]
        if kind == b"clap":
            return _aperture_box(struct.unpack_from(">IIIIiIiI", content), size)
    return None


def repair(data: bytes) -> bytes:
    """A copy that Pillow opens, of a file that only browsers or `avifdec --no-strict` open.

    An alpha plane without a size gets that of the picture. Major brands unknown to Pillow, Exif, XMP,
    gain maps and item groups are removed, as the 8-bit picture does not need them. Raises LookupError,
    ValueError or struct.error for damaged boxes.
    """
    result, last, meta = bytearray(data), 0, b""
    for kind, begin, end in boxes(data):
        if end > len(data):
            raise ValueError(f"its box {kind!r} is cut off")
        if kind == b"ftyp":
            _repair_brands(result, begin, end)
        elif kind == b"meta" and not meta:
            meta = data[begin:end]
            result[begin - 4 : begin] = b"free"
        if data[begin - 8 : begin - 4] == bytes(4):  # up to the end of the file, which moves
            struct.pack_into(">I", result, begin - 8, end - begin + 8)
        last = end
    # At the end, because offsets of items count from the start of the file.
    return bytes(result[:last]) + _box(b"meta", meta[:4] + _repair_items(meta[4:]))


def _repair_brands(file: bytearray, begin: int, end: int) -> None:
    brand = b"avif" if b"avif" in file[begin:end] else b"avis"
    if file[begin : begin + 4] not in _PILLOW_BRANDS:
        file[begin : begin + 4] = brand
    for offset in range(begin + 8, end - 3, 4):
        if file[offset : offset + 4] == b"tmap":  # without it gain maps are ignored
            file[offset : offset + 4] = brand


def _repair_items(meta: bytes) -> bytes:
    repaired = []
    for kind, content in _contents(meta):
        if kind == b"iinf":
            content = _without_metadata(content)
        elif kind == b"iprp":
            primary = _primary(dict(_contents(meta))[b"pitm"])
            parts = _contents(content)
            properties = _contents(dict(parts)[b"ipco"])
            content = b"".join(
                _box(
                    name, _with_alpha_sizes(part, properties, primary) if name == b"ipma" else part
                )
                for name, part in parts
            )
        if kind != b"grpl":
            repaired.append(_box(kind, content))
    return b"".join(repaired)


def _without_metadata(items: bytes) -> bytes:
    """The list of items, in which Exif and XMP have a type that no reader knows."""
    result = bytearray(items)
    header = 8 if items[0] else 6
    for kind, begin, _ in boxes(items[header:]):
        offset = header + begin + (10 if items[header + begin] == 3 else 8)
        if kind == b"infe" and items[offset : offset + 4] in (b"Exif", b"mime"):
            result[offset : offset + 4] = b"skip"
    return bytes(result)


def _with_alpha_sizes(content: bytes, properties: list[tuple[bytes, bytes]], primary: int) -> bytes:
    """The associations, in which alpha planes without a size get that of the primary item."""
    associations, mask = _associations(content), _index_mask(content)
    properties_of = {
        item: [properties[(index & mask) - 1] for index in indices if index & mask]
        for item, indices in associations
    }
    sizes = [
        index & mask
        for index in dict(associations)[primary]
        if properties[(index & mask) - 1][0] == b"ispe"
    ]
    version, flags = content[0], content[3]
    result = [content[:8]]
    for item, indices in associations:
        names = {name for name, _ in properties_of[item]}
        is_alpha = any(
            name == b"auxC" and part[4:].startswith(_ALPHA) for name, part in properties_of[item]
        )
        if is_alpha and b"ispe" not in names:
            indices = sizes + indices
        result.append(struct.pack(">IB" if version else ">HB", item, len(indices)))
        result.append(struct.pack(f">{len(indices)}{'H' if flags & 1 else 'B'}", *indices))
    return b"".join(result)


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _contents(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each box."""
    return [(kind, data[begin:end]) for kind, begin, end in boxes(data)]


def _primary(content: bytes) -> int:
    (item,) = struct.unpack_from(">I" if content[0] else ">H", content, 4)
    return int(item)


def _index_mask(associations: bytes) -> int:
    """The bits of an association that are the index of its property."""
    return 0x7FFF if associations[3] & 1 else 0x7F


def _associations(content: bytes) -> Associations:
    version, width = content[0], 2 if content[3] & 1 else 1
    (count,) = struct.unpack_from(">I", content, 4)
    offset, associations = 8, Associations()
    for _ in range(count):
        (item,) = struct.unpack_from(">I" if version else ">H", content, offset)
        offset += 4 if version else 2
        number = content[offset]
        indices = struct.unpack_from(f">{number}{'H' if width == 2 else 'B'}", content, offset + 1)
        associations.append((item, list(indices)))
        offset += 1 + number * width
    return associations


def _aperture_box(aperture: tuple[int, ...], size: tuple[int, int]) -> Box | None:
    """The box of an aperture: width, height, and offsets between the centres, each as a fraction."""
    width, height, right, down = (
        Fraction(aperture[i], aperture[i + 1]) for i in range(0, len(aperture), 2)
    )
    left, top = right + (size[0] - width) / 2, down + (size[1] - height) / 2
    edges = (left, top, left + width, top + height)
    if any(edge.denominator != 1 for edge in edges) or min(width, height) < 1:
        return None
    box = (int(edges[0]), int(edges[1]), int(edges[2]), int(edges[3]))
    is_inside = box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]
    return box if is_inside and box != (0, 0, *size) else None
