"""A JPEG's markers before its first scan: its kind of coding, and headers that decoders stumble over.

libjpeg reports the first of its warnings alone. A harmless one about a header would hide the one that
says that pixels are lacking, and a broken header of metadata makes Pillow refuse a sound picture. So
what is wrong with headers is mended first; what decoders then warn of is damage to the pixels.
(ITU-T T.81, Annex B; T.871 for JFIF; libjpeg-turbo's jdmarker.c for what is warned of)
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
_SHORTEST = {_JFIF: 14, _ADOBE: 12, _ICC: 14}  # bytes of a header that says something
_NAMES = {_JFIF: b"JFIF\0", _ADOBE: b"Adobe", _ICC: b"ICC_PROFILE\0"}
_ADOBE_TRANSFORM = 11  # its place: 0 none, 1 YCbCr, 2 YCCK
_PADDING, _ODD_BYTES = 64, 2  # bytes before the end that are not taken for damage
# A marker, after any number of 0xFF; not the zero that 0xFF has behind it within a scan, nor restarts.
_MARKER = re.compile(rb"\xff++[\x01-\xcf\xd8-\xfe]")
_LATER_MARKER = re.compile(rb"(?<!\xff)" + _MARKER.pattern)  # each run of 0xFF is looked at once
_MOST_SEGMENTS = 100_000


@dataclass(frozen=True)
class _Segment:
    """A marker and what belongs to it: data[body:end]."""

    marker: int
    body: int
    end: int


@dataclass(frozen=True)
class Headers:
    """What stands before the first scan.

    `frame` is the frame's marker, None where there is none; `sound` is the file with headers that
    decoders take without a warning: the very bytes where they do.
    """

    frame: int | None
    sound: bytes

    @property
    def is_decoded(self) -> bool:
        """Whether decoders know this coding: neither hierarchical JPEG nor JPEG-LS."""
        return self.frame is None or self.frame in (*_SCALABLE, _LOSSLESS)

    @property
    def is_scalable(self) -> bool:
        """Whether it can be decoded at a fraction of its size. A lossless one comes whole, and
        libjpeg-turbo writes it beyond the end of a buffer for a part."""
        return self.frame in _SCALABLE


def read_headers(data: bytes) -> Headers:
    """The headers of a file that begins as a JPEG. Damage that it does not mend is left as it is.

    Raises ValueError for one with segments without end.
    """
    kept, frame, components, place = [data[:2]], None, 0, 2
    adobe: int | None = None  # its place among `kept`
    for segment in _segments(data):
        marker, body = segment.marker, data[segment.body : segment.end]
        if marker in (_SOI, _EOI):
            break
        place = segment.end
        if marker == _TEM:  # it has no meaning here
            continue
        if marker == _SOS:
            kept.append(_segment(marker, _whole_spectrum(body) if frame in _SEQUENTIAL else body))
            break
        if marker in _FRAMES and frame is None:
            frame, components = marker, body[5] if len(body) > 5 else 0
        if (mended := _mended(marker, body)) is not None:
            if marker == _ADOBE and mended.startswith(_NAMES[_ADOBE]):
                adobe = len(kept)
            kept.append(_segment(marker, mended))
    kept.append(data[place:])
    if adobe is not None:
        kept[adobe] = _known_transform(kept[adobe], components)
    sound = b"".join(kept)
    return Headers(frame, data if sound == data else sound)


def without_metadata(data: bytes, most: bool) -> bytes:
    """The file without headers of applications but those that say its colours (JFIF's and Adobe's)
    and, unless `most` of them go, its orientation and its profile."""
    needed = [_NAMES[_JFIF], _NAMES[_ADOBE]] + ([] if most else [b"Exif\0\0", _NAMES[_ICC]])
    kept, place = [data[:2]], 2
    for segment in _segments(data):
        marker, body = segment.marker, data[segment.body : segment.end]
        if marker in (_SOI, _EOI, _SOS):
            break
        is_metadata = 0xE0 <= marker <= 0xEF or marker == _COM
        if not is_metadata or body.startswith(tuple(needed)):
            kept.append(data[place : segment.end])
        place = segment.end
    return b"".join([*kept, data[place:]])


def has_more_scans(data: bytes, most: int) -> bool:
    """Whether there are more scans than that: a few kilobytes may go over all pixels thousands of times."""
    if data.count(bytes([0xFF, _SOS])) <= most:  # which may be in what is no scan, too
        return False
    scans = 0
    for segment in _segments(data):
        scans += segment.marker == _SOS
        if segment.marker == _EOI or scans > most:
            break
    return scans > most


def without_padding(data: bytes, count: int) -> bytes | None:
    """The file without `count` bytes before its end, where they are what cameras pad with: a byte or
    two of any kind, some more zeros. None where they are more like lost pixels."""
    ends = (segment.body - 2 for segment in _segments(data) if segment.marker == _EOI)
    if (end := next(ends, None)) is None:
        return None
    padding = data[end - count : end]
    if count > _PADDING or (count > _ODD_BYTES and padding.strip(b"\0")):
        return None
    return data[: end - count] + data[end:]


def _segments(data: bytes) -> Iterator[_Segment]:
    """All segments, in order, as libjpeg finds them: one whose length is too small is an empty one.

    Bytes between them are passed over, pixels too. Ends before one that is cut off.
    """
    place = 2
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.match(data, place) or _LATER_MARKER.search(data, place)
        if not found:
            return
        marker, body, end = data[found.end() - 1], found.end(), found.end()
        if marker not in (_SOI, _EOI, _TEM):
            length = int.from_bytes(data[body : body + 2], "big")
            body, end = body + 2, body + max(2, length)
            if end > len(data):
                return
        yield _Segment(marker, body, end)
        place = end
    raise ValueError(f"more than {_MOST_SEGMENTS:,} segments")


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def _mended(marker: int, segment: bytes) -> bytes | None:
    """A header of metadata as decoders take it; None where it says nothing that they read."""
    name = _NAMES.get(marker)
    if name is None or not segment.startswith(name.rstrip(b"\0")):
        return segment
    if len(segment) < _SHORTEST[marker] or not segment.startswith(name):
        return None
    if marker == _JFIF and segment[5] != 1:  # of later versions, of which there are none
        return segment[:5] + b"\1" + segment[6:]
    return segment


def _known_transform(header: bytes, components: int) -> bytes:
    """Adobe's header, of whose transform libjpeg warns where it does not fit the colours."""
    place = 4 + _ADOBE_TRANSFORM
    known = {3: (0, 1), 4: (0, 2)}.get(components)
    if known is None or header[place] in known:
        return header
    return header[:place] + bytes([known[1]]) + header[place + 1 :]


def _whole_spectrum(scan: bytes) -> bytes:
    """A sequential scan's header, whose last three bytes can have one value alone."""
    return scan[:-3] + b"\0\x3f\0" if len(scan) >= 6 else scan
