"""Parses a JPEG's markers before its first scan, and repairs headers that disturb decoders.

libjpeg reports only its first warning. A harmless one about a header would hide a warning about
missing pixels, and Pillow refuses a good picture with a damaged metadata header. So headers are
repaired first; the warnings that remain are about the pixels.
(ITU-T T.81, Annex B; T.871 for JFIF; libjpeg-turbo's jdmarker.c for the warnings)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SOI, _EOI, _SOS, _COM, _TEM = 0xD8, 0xD9, 0xDA, 0xFE, 0x01
_JFIF, _ICC, _ADOBE = 0xE0, 0xE2, 0xEE
_LOSSLESS = 0xC3
_SEQUENTIAL = (0xC0, 0xC1)
_SCALABLE = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # the last: JPEG-LS
_MIN_LENGTH = {_JFIF: 14, _ADOBE: 12, _ICC: 14}  # bytes of a complete header
_NAMES = {_JFIF: b"JFIF\0", _ADOBE: b"Adobe", _ICC: b"ICC_PROFILE\0"}
_ADOBE_TRANSFORM = 11  # offset of the transform: 0 none, 1 YCbCr, 2 YCCK
_MAX_PADDING, _MAX_STRAY_BYTES = 64, 2  # zeros, and any bytes, before the end that are no damage
# A marker after any number of 0xFF; not the escaped 0xFF 0x00 of a scan, and no restart marker.
_MARKER = re.compile(rb"\xff++[\x01-\xcf\xd8-\xfe]")
_LATER_MARKER = re.compile(rb"(?<!\xff)" + _MARKER.pattern)  # matches each run of 0xFF once
_MAX_SEGMENTS = 100_000


@dataclass(frozen=True)
class _Segment:
    """A marker and its body, data[body:end]."""

    marker: int
    body: int
    end: int


@dataclass(frozen=True)
class Headers:
    """The headers before the first scan.

    `frame` is the frame's marker, or None. `sound` is the file with repaired headers; it is the same
    object as the input if nothing was repaired.
    """

    frame: int | None
    sound: bytes

    @property
    def is_decoded(self) -> bool:
        """Whether decoders support this coding: not hierarchical JPEG or JPEG-LS."""
        return self.frame is None or self.frame in (*_SCALABLE, _LOSSLESS)

    @property
    def is_scalable(self) -> bool:
        """Whether it can be decoded at a fraction of its size. libjpeg-turbo decodes a lossless JPEG at
        full size, beyond the end of a smaller buffer."""
        return self.frame in _SCALABLE


def read_headers(data: bytes) -> Headers:
    """Parse and repair the headers of a JPEG. Other damage is left as it is.

    Raises ValueError for too many segments.
    """
    kept, frame, components, offset = [data[:2]], None, 0, 2
    adobe: int | None = None  # its index in `kept`
    for segment in _segments(data):
        marker, body = segment.marker, data[segment.body : segment.end]
        if marker in (_SOI, _EOI):
            break
        offset = segment.end
        if marker == _TEM:  # has no meaning here
            continue
        if marker == _SOS:
            kept.append(_segment(marker, _full_spectrum(body) if frame in _SEQUENTIAL else body))
            break
        if marker in _FRAMES and frame is None:
            frame, components = marker, body[5] if len(body) > 5 else 0
        if (repaired := _repair(marker, body)) is not None:
            if marker == _ADOBE and repaired.startswith(_NAMES[_ADOBE]):
                adobe = len(kept)
            kept.append(_segment(marker, repaired))
    kept.append(data[offset:])
    if adobe is not None:
        kept[adobe] = _fix_transform(kept[adobe], components)
    sound = b"".join(kept)
    return Headers(frame, data if sound == data else sound)


def without_metadata(data: bytes, drop_all: bool) -> bytes:
    """The file without application headers and comments. Those that determine colours (JFIF, Adobe)
    stay, and unless `drop_all` also EXIF, which has the orientation, and the ICC profile."""
    needed = [_NAMES[_JFIF], _NAMES[_ADOBE]] + ([] if drop_all else [b"Exif\0\0", _NAMES[_ICC]])
    kept, offset = [data[:2]], 2
    for segment in _segments(data):
        marker, body = segment.marker, data[segment.body : segment.end]
        if marker in (_SOI, _EOI, _SOS):
            break
        is_metadata = 0xE0 <= marker <= 0xEF or marker == _COM
        if not is_metadata or body.startswith(tuple(needed)):
            kept.append(data[offset : segment.end])
        offset = segment.end
    return b"".join([*kept, data[offset:]])


def has_more_scans(data: bytes, limit: int) -> bool:
    """Whether there are more than `limit` scans: a few kilobytes may rewrite all pixels thousands of times."""
    if data.count(bytes([0xFF, _SOS])) <= limit:  # counts at least all scans
        return False
    scans = 0
    for segment in _segments(data):
        scans += segment.marker == _SOS
        if segment.marker == _EOI or scans > limit:
            break
    return scans > limit


def without_padding(data: bytes, count: int) -> bytes | None:
    """The file without `count` bytes before its end, if they are a camera's padding: one or two bytes
    of any value, or more zeros. None if they may be damaged pixels."""
    ends = (segment.body - 2 for segment in _segments(data) if segment.marker == _EOI)
    if (end := next(ends, None)) is None:
        return None
    padding = data[end - count : end]
    if count > _MAX_PADDING or (count > _MAX_STRAY_BYTES and padding.strip(b"\0")):
        return None
    return data[: end - count] + data[end:]


def _segments(data: bytes) -> Iterator[_Segment]:
    """All segments in order, as libjpeg finds them: one with a too small length is empty.

    Bytes between segments, such as pixels, are skipped. Stops at a truncated segment.
    """
    offset = 2
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.match(data, offset) or _LATER_MARKER.search(data, offset)
        if not match:
            return
        marker, body, end = data[match.end() - 1], match.end(), match.end()
        if marker not in (_SOI, _EOI, _TEM):
            length = int.from_bytes(data[body : body + 2], "big")
            body, end = body + 2, body + max(2, length)
            if end > len(data):
                return
        yield _Segment(marker, body, end)
        offset = end
    raise ValueError(f"more than {_MAX_SEGMENTS:,} segments")


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def _repair(marker: int, segment: bytes) -> bytes | None:
    """A metadata header as decoders accept it; None for an incomplete one, which is dropped."""
    name = _NAMES.get(marker)
    if name is None or not segment.startswith(name.rstrip(b"\0")):
        return segment
    if len(segment) < _MIN_LENGTH[marker] or not segment.startswith(name):
        return None
    if marker == _JFIF and segment[5] != 1:  # only major version 1 exists
        return segment[:5] + b"\1" + segment[6:]
    return segment


def _fix_transform(header: bytes, components: int) -> bytes:
    """Adobe's header with a transform that fits the number of components; libjpeg warns of others."""
    offset = 4 + _ADOBE_TRANSFORM
    valid = {3: (0, 1), 4: (0, 2)}.get(components)
    if valid is None or header[offset] in valid:
        return header
    return header[:offset] + bytes([valid[1]]) + header[offset + 1 :]


def _full_spectrum(scan: bytes) -> bytes:
    """A sequential scan's header with the only valid values in its last three bytes."""
    return scan[:-3] + b"\0\x3f\0" if len(scan) >= 6 else scan
