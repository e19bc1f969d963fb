"""Writes TIFFs that Pillow does not write: floats, planes, tiles, predictors, image files as strips."""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from tests.pipelines.pictures.files import encoded

_TYPES = {"B": 7, "H": 3, "I": 4}
_ASCENDING = np.linspace(0, 1, 53), np.linspace(0, 1, 37)


def colours(channels: int) -> np.ndarray:
    """[37 53 c] from 0 to 1: red grows to the right, green downwards, blue is a quarter, alpha grows."""
    x, y = np.meshgrid(*_ASCENDING)
    planes = [x, y, np.full_like(x, 0.25), 0.5 + x / 2]
    return np.stack(planes[:channels] if channels != 2 else [x, planes[3]], -1)


def as_type(shares: np.ndarray, dtype: str) -> np.ndarray:
    """Shares of 1 as numbers of a type, of integers as shares of their greatest."""
    kind = np.dtype(dtype)
    greatest = 1 if kind.kind == "f" else float(np.iinfo(kind).max)
    return (shares * (np.nextafter(greatest, 0) if greatest > 2**53 else greatest)).astype(kind)


@dataclass
class Tiff:
    """How [h w c] is written. `tags` are added, or put in the place of those that it would have."""

    compression: int = 1
    predictor: int = 1
    planar: bool = False
    tile: tuple[int, int] | None = None
    rows: int = 10
    order: str = "<"
    big: bool = False
    photometric: int | None = None
    tags: dict[int, tuple[int, ...] | bytes] = field(default_factory=dict)

    def write(self, values: np.ndarray, share: float = 1) -> bytes:
        """The file. Each strip or tile lies behind the one before, the directory behind them all.

        Of the last one there is that share of its bytes.
        """
        height, width, channels = values.shape
        if self.planar:
            planes = [values[..., i : i + 1] for i in range(channels)]
            segments = [part for plane in planes for part in self.segments(plane)]
        else:
            segments = [*self.segments(values)]
        segments[-1] = segments[-1][: int(share * len(segments[-1]))]
        kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
        grey_or_rgb = 2 if channels > 2 else 1
        tags = {
            256: (width,), 257: (height,), 258: (values.dtype.itemsize * 8,) * channels,
            259: (self.compression,),
            262: (grey_or_rgb if self.photometric is None else self.photometric,),
            277: (channels,), 284: (2 if self.planar else 1,), 317: (self.predictor,),
            339: (kind,) * channels,
        }  # fmt: skip
        if channels in (2, 4) and tags[262] in ((1,), (2,)):
            tags[338] = (2,)
        return self.written(segments, tags | self.tags)

    def written(self, segments: list[bytes], tags: dict[int, tuple[int, ...] | bytes]) -> bytes:
        """A file of these strips or tiles and tags."""
        begin = 16 if self.big else 8
        offsets = [begin + sum(map(len, segments[:i])) for i in range(len(segments))]
        sizes = tuple(map(len, segments))
        if self.tile:
            tags = {
                322: (self.tile[0],),
                323: (self.tile[1],),
                324: tuple(offsets),
                325: sizes,
            } | tags
        else:
            tags = {273: tuple(offsets), 278: (self.rows,), 279: sizes} | tags
        body = b"".join(segments)
        return self._head(begin + len(body)) + body + self._directory(tags, begin + len(body))

    def segments(self, values: np.ndarray) -> Iterator[bytes]:
        height, width = values.shape[:2]
        wide, high = self.tile or (width, self.rows)
        for top in range(0, height, high):
            for left in range(0, width, wide):
                part = values[top : top + high, left : left + wide]
                if self.tile:
                    lacking = ((0, high - len(part)), (0, wide - part.shape[1]), (0, 0))
                    part = np.pad(part, lacking, mode="edge")
                yield self._packed(part)

    def _packed(self, part: np.ndarray) -> bytes:
        if self.compression in CODECS:
            return CODECS[self.compression](part)
        rows, columns, channels = part.shape
        part = np.ascontiguousarray(part).astype(part.dtype.newbyteorder(self.order))
        data = part
        if self.predictor == 2:
            whole = part.view(part.dtype.str.replace("f", "u").replace("i", "u"))
            data = whole.copy()
            data[:, 1:] -= whole[:, :-1]
        elif self.predictor == 3:
            weights = part.astype(part.dtype.newbyteorder(">")).view(np.uint8)
            whole = weights.reshape(rows, columns * channels, -1).swapaxes(1, 2)
            whole = np.ascontiguousarray(whole).reshape(rows, -1, channels)
            data = whole.copy()
            data[:, 1:] -= whole[:, :-1]
        return PACKINGS[self.compression](data.tobytes(), rows)

    def _head(self, directory: int) -> bytes:
        mark = b"II" if self.order == "<" else b"MM"
        if self.big:
            return mark + struct.pack(self.order + "HHHQ", 43, 8, 0, directory)
        return mark + struct.pack(self.order + "HI", 42, directory)

    def _directory(self, tags: dict[int, tuple[int, ...] | bytes], place: int) -> bytes:
        number, count, room = ("Q", "Q", 8) if self.big else ("I", "H", 4)
        entry = 4 + 2 * room
        behind = place + struct.calcsize("=" + count) + entry * len(tags) + room
        entries, more = [], b""
        for tag, values in sorted(tags.items()):
            kind = "B" if isinstance(values, bytes) else "H" if max(values) < 65_536 else "I"
            content = struct.pack(f"{self.order}{len(values)}{kind}", *values)
            if len(content) > room:
                more += content
                content = struct.pack(self.order + number, behind + len(more) - len(content))
            head = struct.pack(f"{self.order}HH{number}", tag, _TYPES[kind], len(values))
            entries.append(head + content.ljust(room, b"\0"))
        return struct.pack(self.order + count, len(tags)) + b"".join(entries) + bytes(room) + more


def _by_libtiff(name: str) -> Callable[[bytes, int], bytes]:
    """Compressed as the single strip of a grey image."""

    def packed(data: bytes, rows: int) -> bytes:
        grey = Image.frombytes("L", (len(data) // rows, rows), data)
        file = encoded(grey, "TIFF", compression=name, tiffinfo={278: rows})
        with Image.open(io.BytesIO(file)) as image:
            tags = image.tag_v2  # type: ignore[attr-defined]
        (begin,), (length,) = tags[273], tags[279]
        return file[begin : begin + length]

    return packed


PACKINGS: dict[int, Callable[[bytes, int], bytes]] = {
    1: lambda data, _: data,
    5: _by_libtiff("tiff_lzw"),
    8: lambda data, _: zlib.compress(data),
    32773: _by_libtiff("packbits"),
    32946: lambda data, _: zlib.compress(data),
    34925: lambda data, _: lzma.compress(data),
    50000: _by_libtiff("zstd"),
}


def _as_file(kind: str) -> Callable[[np.ndarray], bytes]:
    def packed(part: np.ndarray) -> bytes:
        return encoded(Image.fromarray(part.squeeze()), kind, lossless=True)

    return packed


CODECS: dict[int, Callable[[np.ndarray], bytes]] = {
    34712: lambda part: encoded(Image.fromarray(part.squeeze()), "JPEG2000"),
    50001: _as_file("WEBP"),
    50002: _as_file("JXL"),
}
