"""A JPEG's markers before its first scan: its kind of coding, and headers that decoders stumble over.

libjpeg reports the first of its warnings alone. A harmless one about a header would hide the one that
says that pixels are lacking, and a broken header of metadata makes Pillow refuse a sound picture. So
what is wrong with headers is mended first; what decoders then warn of is damage to the pixels.
(ITU-T T.81, Annex B; T.871 for JFIF; libjpeg-turbo's jdmarker.c for what is warned of)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_JFIF, _ICC, _ADOBE = 0xE0, 0xE2, 0xEE
_LOSSLESS = 0xC3
_SEQUENTIAL = (0xC0, 0xC1)
_DECODED = (0xC0, 0xC1, 0xC2, _LOSSLESS, 0xC9, 0xCA)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # the last: JPEG-LS
_SHORTEST = {_JFIF: 14, _ADOBE: 12, _ICC: 14}  # bytes of a header that says something
_NAMES = {_JFIF: b"JFIF\0", _ADOBE: b"Adobe", _ICC: b"ICC_PROFILE\0"}
_ADOBE_TRANSFORM = 11  # its place: 0 none, 1 YCbCr, 2 YCCK
_PADDING, _ODD_BYTES = 64, 2  # bytes before the end that are not taken for damage
# Markers of a JPEG; those with a length after them but for SOI, EOI and TEM.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


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
        return self.frame is None or self.frame in _DECODED

    @property
    def is_scalable(self) -> bool:
        """Whether it can be decoded at a fraction of its size. A lossless one comes whole, and
        libjpeg-turbo writes it beyond the end of a buffer for a part."""
        return self.frame != _LOSSLESS


def read_headers(data: bytes) -> Headers:
    """The headers of a file that begins as a JPEG. Damage that it does not mend is left as it is."""
    kept, frame, components, place = [data[:2]], None, 0, 2
    adobe: int | None = None  # its place among `kept`
    while True:
        start = place
        marker, place = _next_marker(data, place)
        if marker in (None, _SOI, _EOI) or place + 2 > len(data):
            kept.append(data[start:])
            break
        if marker == _TEM or 0xD0 <= marker <= 0xD7:  # they have no length, and no meaning here
            continue
        end = place + int.from_bytes(data[place : place + 2], "big")
        if not place + 2 <= end <= len(data):
            kept.append(data[start:])
            break
        segment = data[place + 2 : end]
        place = end
        if marker == _SOS:
            if frame in _SEQUENTIAL:
                segment = _whole_spectrum(segment)
            kept += [_segment(marker, segment), data[end:]]
            break
        if marker in _FRAMES and frame is None:
            frame, components = marker, segment[5] if len(segment) > 5 else 0
        if (mended := _mended(marker, segment)) is not None:
            if marker == _ADOBE and mended.startswith(_NAMES[_ADOBE]):
                adobe = len(kept)
            kept.append(_segment(marker, mended))
    if adobe is not None:
        kept[adobe] = _known_transform(kept[adobe], components)
    sound = b"".join(kept)
    return Headers(frame, data if sound == data else sound)


def without_metadata(data: bytes) -> bytes:
    """The file without headers of applications but JFIF's and Adobe's, which say its colours."""
    kept, place = [data[:2]], 2
    while True:
        start = place
        marker, place = _next_marker(data, place)
        end = place + int.from_bytes(data[place : place + 2], "big")
        if marker in (None, _SOI, _EOI, _SOS) or end > len(data):
            return b"".join([*kept, data[start:]])
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        colours = data[place + 2 : end].startswith((_NAMES[_JFIF], _NAMES[_ADOBE]))
        if not is_metadata or colours:
            kept.append(data[start:end])
        place = end


def has_more_scans(data: bytes, most: int) -> bool:
    """Whether there are more scans than that: a few kilobytes may go over all pixels thousands of times."""
    if data.count(bytes([0xFF, _SOS])) <= most:  # which may be in what is no scan, too
        return False
    place = scans = 0
    while scans <= most and (found := _MARKER.search(data, place)):
        kind, place = found[0][1], found.end()
        scans += kind == _SOS
        if kind == _EOI:
            return False
        if kind not in (_SOI, _TEM):
            place += int.from_bytes(data[place : place + 2], "big")
    return scans > most


def without_padding(data: bytes, count: int) -> bytes | None:
    """The file without `count` bytes before its end, where they are what cameras pad with: a byte or
    two of any kind, some more zeros. None where they are more like lost pixels."""
    place = 2
    while (found := _MARKER.search(data, place)) and found[0][1] != _EOI:
        place = found.end()
        if found[0][1] not in (_SOI, _TEM):
            place += int.from_bytes(data[place : place + 2], "big")
    if not found:
        return None
    padding = data[found.start() - count : found.start()]
    if count > _PADDING or (count > _ODD_BYTES and padding.strip(b"\0")):
        return None
    return data[: found.start() - count] + data[found.start() :]


def _next_marker(data: bytes, place: int) -> tuple[int | None, int]:
    """The next marker's kind, and the place behind it; bytes before it are passed over."""
    while (at := data.find(b"\xff", place)) >= 0:
        while at < len(data) and data[at] == 0xFF:  # which may stand as often as it likes
            at += 1
        if at < len(data) and data[at] != 0:
            return data[at], at + 1
        place = at + 1
    return None, len(data)


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
