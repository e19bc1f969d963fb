"""What Pillow lacks of AVIF: the clean aperture, and files of other encoders that are open to others.

The clean aperture is the part of the pixels that is meant to be seen.
(ISO/IEC 14496-12: boxes, 8.11.4 primary item, 8.11.6 items, 8.11.14 item properties, 12.1.4 clean
aperture; ISO/IEC 23008-12: 6.5.8 auxiliary images; libavif's read.c for what is refused)
"""

from __future__ import annotations

import struct
from fractions import Fraction

from pipelines.pictures.boxes import boxes

Box = tuple[int, int, int, int]
Associations = list[tuple[int, list[int]]]
"""Of each item the properties, counted from 1, with a bit that says whether they have to be heeded."""

_OPENED = (b"avif", b"avis", b"mif1", b"msf1")
"""Major brands that Pillow opens."""
_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0", b"urn:mpeg:hevc:2015:auxid:1\0")


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
    parts = dict(_contents(meta[b"iprp"]))
    properties, associations = _contents(parts[b"ipco"]), _associations(parts[b"ipma"])
    for index in dict(reversed(associations)).get(_primary(meta[b"pitm"]), []):
        number = index & _number(parts[b"ipma"])
        if not number:  # none
            continue
        kind, content = properties[number - 1]
        if kind == b"clap":
            return _inside(struct.unpack_from(">IIIIiIiI", content), size)
    return None


def mended(data: bytes) -> bytes:
    """A copy of what Pillow refuses and browsers or `avifdec --no-strict` open, as Pillow opens it.

    An alpha plane without a size gets that of the picture. Major brands that Pillow does not know,
    Exif, XMP, gain maps and groups of items are left out: a picture in 8 bits has no use for them.
    Raises LookupError, ValueError or struct.error for damaged boxes.
    """
    made, last, meta = bytearray(data), 0, b""
    for kind, begin, end in boxes(data):
        if end > len(data):
            raise ValueError(f"its box {kind!r} is cut off")
        if kind == b"ftyp":
            _mend_brands(made, begin, end)
        elif kind == b"meta" and not meta:
            meta = data[begin:end]
            made[begin - 4 : begin] = b"free"
        if data[begin - 8 : begin - 4] == bytes(4):  # to the end of the file, which will be another
            struct.pack_into(">I", made, begin - 8, end - begin + 8)
        last = end
    # Behind all others: where items lie is counted from the file's begin.
    return bytes(made[:last]) + _box(b"meta", meta[:4] + _mended_items(meta[4:]))


def _mend_brands(made: bytearray, begin: int, end: int) -> None:
    known = b"avif" if b"avif" in made[begin:end] else b"avis"
    if made[begin : begin + 4] not in _OPENED:
        made[begin : begin + 4] = known
    for place in range(begin + 8, end - 3, 4):
        if made[place : place + 4] == b"tmap":  # without it a gain map is not looked at
            made[place : place + 4] = known


def _mended_items(meta: bytes) -> bytes:
    made = []
    for kind, content in _contents(meta):
        if kind == b"iinf":
            content = _without_metadata(content)
        elif kind == b"iprp":
            primary = _primary(dict(_contents(meta))[b"pitm"])
            parts = _contents(content)
            properties = _contents(dict(parts)[b"ipco"])
            content = b"".join(
                _box(name, _sized(part, properties, primary) if name == b"ipma" else part)
                for name, part in parts
            )
        if kind != b"grpl":
            made.append(_box(kind, content))
    return b"".join(made)


def _without_metadata(items: bytes) -> bytes:
    """The list of items, with types that are not read in the place of Exif's and XMP's."""
    made = bytearray(items)
    head = 8 if items[0] else 6
    for kind, begin, _ in boxes(items[head:]):
        place = head + begin + (10 if items[head + begin] == 3 else 8)
        if kind == b"infe" and items[place : place + 4] in (b"Exif", b"mime"):
            made[place : place + 4] = b"skip"
    return bytes(made)


def _sized(content: bytes, properties: list[tuple[bytes, bytes]], primary: int) -> bytes:
    """Associations in which alpha planes have the size of the primary item, if they had none."""
    associations, number = _associations(content), _number(content)
    kinds = {
        item: [properties[(index & number) - 1] for index in indices if index & number]
        for item, indices in associations
    }
    sizes = [
        index & number
        for index in dict(associations)[primary]
        if properties[(index & number) - 1][0] == b"ispe"
    ]
    version, flags = content[0], content[3]
    made = [content[:8]]
    for item, indices in associations:
        names = {name for name, _ in kinds[item]}
        is_alpha = any(
            name == b"auxC" and part[4:].startswith(_ALPHA) for name, part in kinds[item]
        )
        if is_alpha and b"ispe" not in names:
            indices = sizes + indices
        made.append(struct.pack(">IB" if version else ">HB", item, len(indices)))
        made.append(struct.pack(f">{len(indices)}{'H' if flags & 1 else 'B'}", *indices))
    return b"".join(made)


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _contents(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each box."""
    return [(kind, data[begin:end]) for kind, begin, end in boxes(data)]


def _primary(content: bytes) -> int:
    (item,) = struct.unpack_from(">I" if content[0] else ">H", content, 4)
    return int(item)


def _number(associations: bytes) -> int:
    """The bits of an association that are the number of its property."""
    return 0x7FFF if associations[3] & 1 else 0x7F


def _associations(content: bytes) -> Associations:
    version, width = content[0], 2 if content[3] & 1 else 1
    (count,) = struct.unpack_from(">I", content, 4)
    place, found = 8, Associations()
    for _ in range(count):
        (item,) = struct.unpack_from(">I" if version else ">H", content, place)
        place += 4 if version else 2
        many = content[place]
        indices = struct.unpack_from(f">{many}{'H' if width == 2 else 'B'}", content, place + 1)
        found.append((item, list(indices)))
        place += 1 + many * width
    return found


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
