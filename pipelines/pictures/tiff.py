"""TIFFs that Pillow opens wrongly or not at all: floats, 32 and 64 bits, planes of 16 bits or of YCbCr,
strips that are packed as image files. Pillow reads all others.

Of these Pillow's libtiff is used for one strip or tile at a time, as bytes; what they mean is settled
here. So each of them has to be there, and whole.
(TIFF 6.0; Adobe's TIFF technical note 3 for floats; BigTIFF; GDAL's and libtiff's numbers of compressions)
"""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from pipelines.pictures.colour import to_8_bit, upright

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_SIZES, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 317, 322, 323, 324, 325
_EXTRA, _FORMAT, _SUBSAMPLING, _BLACK_WHITE, _PROFILE = 338, 339, 530, 532, 34675

_RAW, _LZW, _PACKBITS, _LZMA, _ZSTD = 1, 5, 32773, 34925, 50000
_DEFLATE = (8, 32946)
_PACKED = (_RAW, _LZW, _PACKBITS, _LZMA, _ZSTD, *_DEFLATE)
_CODECS = {34712: "JPEG2000", 50001: "WEBP", 50002: "JXL", 52546: "JXL"}
"""Compressions that make an image file of each strip or tile: the format of that."""
_WHITE_IS_ZERO, _GREY, _RGB, _CMYK, _YCBCR, _LAB = 0, 1, 2, 5, 6, 8
_COLOURS = {_WHITE_IS_ZERO: 1, _GREY: 1, _RGB: 3, _CMYK: 4, _YCBCR: 3, _LAB: 3}
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}  # of numbers, by SampleFormat
_DIFFERENCES, _BYTES_OF_FLOATS = 2, 3  # predictors
_PREMULTIPLIED = 1
_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_WITH_ALPHA = {1: ("LA", "La"), 3: ("RGBA", "RGBa")}
_MOST_BYTES = 16  # per pixel of the largest picture, which leaves room for what is made of them
_MOST_SEGMENTS = 100_000
_PIECE = 1 << 20  # bytes
_LZMA_MEMORY = 1 << 28  # of its dictionary, in bytes
_FULL_RANGE = (0, 255, 128, 255, 128, 255)


@dataclass(frozen=True)
class OddTiff:
    """The first page of a TIFF of these kinds, of which the directory alone was read."""

    data: bytes = field(repr=False)
    tags: dict[int, Any] = field(repr=False)
    byte_order: str
    width: int
    height: int
    photometric: int
    compression: int
    bits: int
    kind: str
    samples: int

    @property
    def codec(self) -> str | None:
        """The format of image file that each strip or tile is, if it is one."""
        return _CODECS.get(self.compression)

    def image(self, max_pixels: int) -> Image.Image:
        """The picture in 8 bits, upright, with its profile.

        Raises ValueError for damage, Image.DecompressionBombError where it takes too much memory.
        """
        most = _MOST_BYTES * max_pixels
        values = self._ycbcr(most) if self.photometric == _YCBCR else self._values(most)
        count = _COLOURS[self.photometric]
        image = self._coloured(values[..., :count], values[..., count:])
        if profile := self.tags.get(_PROFILE):
            image.info["icc_profile"] = profile
        return image

    def _coloured(self, colours: np.ndarray, more: np.ndarray) -> Image.Image:
        """An image of samples [h w c] and of those behind them, of which the first may be alpha."""
        turn = self.tags.get(_ORIENTATION, 1)
        if self.photometric == _LAB:
            # Of a and b, which are signed, the high byte is what 8 bits would say, too.
            lab = (colours.astype(np.uint16) >> 8).astype(np.uint8)
            return _image("LAB", upright(lab, turn))
        made, count = to_8_bit(colours), colours.shape[-1]
        if self.photometric == _WHITE_IS_ZERO:
            made = 255 - made
        if self.photometric == _YCBCR:
            return _image("YCbCr", upright(made, turn)).convert("RGB")
        extra = self.tags.get(_EXTRA, (2,) if self.photometric == _RGB else (0,))
        if not more.shape[-1] or not extra[0] or count not in _WITH_ALPHA:
            return _image(_MODES[count], upright(made, turn))
        mode = _WITH_ALPHA[count][extra[0] == _PREMULTIPLIED]
        return _image(mode, upright(np.concatenate([made, to_8_bit(more[..., :1])], -1), turn))

    def _values(self, most: int) -> np.ndarray:
        """[h w c] of the file's own numbers."""
        needed = min(self.samples, _COLOURS[self.photometric] + 1)
        if not self._is_planar:
            return self._plane(0, (self.width, self.height), self.samples, most)[..., :needed]
        size, made = (self.width, self.height), None
        for i in range(needed):
            plane = self._plane(i, size, 1, most // needed)
            made = np.empty((*plane.shape[:2], needed), plane.dtype) if made is None else made
            made[..., i : i + 1] = plane
        assert made is not None
        return made

    def _ycbcr(self, most: int) -> np.ndarray:
        """[h w 3] of planes of which two may have fewer columns and rows."""
        right, down = self.tags.get(_SUBSAMPLING, (2, 2))
        if not {right, down} <= {1, 2, 4}:
            raise ValueError(f"there is no subsampling by {right} and {down}")
        size = self.width, self.height
        smaller = -(-self.width // right), -(-self.height // down)
        luma = self._plane(0, size, 1, most // 3)
        chroma = [self._plane(i, smaller, 1, most // 3, (right, down)) for i in (1, 2)]
        chroma = [
            part.repeat(down, 0).repeat(right, 1)[: self.height, : self.width] for part in chroma
        ]
        values = np.concatenate([luma, *chroma], -1)
        levels = tuple(float(level) for level in self.tags.get(_BLACK_WHITE, _FULL_RANGE))
        if levels == _FULL_RANGE or len(levels) != 6 or 0 in (step := np.diff(levels)[::2]):
            return values
        full = (values - np.array(levels[::2])) * (np.array([255, 127, 127]) / step) + [0, 128, 128]
        return full.round().clip(0, 255).astype(np.uint8)

    @property
    def _is_planar(self) -> bool:
        return self.samples > 1 and self.tags.get(_PLANAR) == 2

    def _plane(
        self,
        number: int,
        size: tuple[int, int],
        samples: int,
        most: int,
        by: tuple[int, int] = (1, 1),
    ) -> np.ndarray:
        """[h w samples] of a plane of (width, height), whose segments are by `by` smaller than the tags
        say."""
        width, height = size
        is_tiled = _TILES in self.tags
        if is_tiled:
            wide, high = self.tags[_TILE_WIDTH] // by[0], self.tags[_TILE_HEIGHT] // by[1]
        else:
            wide, high = width, min(-(-self.tags.get(_ROWS, height) // by[1]), height)
        if min(wide, high) < 1:
            raise ValueError("its strips or tiles have no size")
        pixel = samples * self.bits // 8
        across, down = -(-width // wide), -(-height // high)
        if max(width * height, wide * high) * pixel > most or across * down > _MOST_SEGMENTS:
            raise Image.DecompressionBombError(
                f"{width}x{height} pixels of {pixel} bytes in {across * down} strips or tiles"
            )
        values = np.empty((height, width, samples), f"{self.kind}{self.bits // 8}")
        for index in range(across * down):
            top, left = index // across * high, index % across * wide
            rows = high if is_tiled else min(high, height - top)
            packed = self._segment(number * across * down + index, rows * wide * pixel)
            segment = self._decoded(packed, (rows, wide, samples))
            values[top : top + rows, left : left + wide] = segment[: height - top, : width - left]
        return values

    def _segment(self, index: int, size: int) -> memoryview:
        """A strip or tile, as it is packed; `size` are its bytes where it is not."""
        places, sizes = (_TILES, _TILE_SIZES) if _TILES in self.tags else (_STRIPS, _STRIP_SIZES)
        offsets = self.tags[places]
        lengths = self.tags.get(sizes, (size,) * len(offsets) if self.compression == _RAW else ())
        if index >= min(len(offsets), len(lengths)):
            raise ValueError(f"strip or tile {index} is lacking")
        begin, length = offsets[index], lengths[index]
        if not 8 <= begin < begin + length <= len(self.data):
            raise ValueError(f"strip or tile {index} lies beyond the end of the file")
        return memoryview(self.data)[begin : begin + length]

    def _decoded(self, packed: memoryview, shape: tuple[int, int, int]) -> np.ndarray:
        """[rows columns samples] of a strip or tile."""
        rows, columns, samples = shape
        if self.codec:
            values = _image_file(packed, self.codec, shape)
            # Of colours Pillow's decoders keep 8 bits.
            return values * np.uint16(257) if self.bits == 16 and values.itemsize == 1 else values
        row = columns * samples * self.bits // 8
        data = _unpacked(packed, self.compression, rows, row)
        predictor = self.tags.get(_PREDICTOR, 1) if self.compression not in (_RAW, _PACKBITS) else 1
        if predictor == _BYTES_OF_FLOATS:
            # Bytes of one weight stand together, the highest first, as differences from pixel to pixel.
            by_pixel = np.frombuffer(data, np.uint8).reshape(rows, -1, samples)
            summed = np.add.accumulate(by_pixel, axis=1, dtype=np.uint8)
            apart = summed.reshape(rows, self.bits // 8, -1).swapaxes(1, 2)
            return np.ascontiguousarray(apart).view(f">{self.kind}{self.bits // 8}").reshape(shape)
        values = np.frombuffer(data, f"{self.byte_order}u{self.bits // 8}").reshape(shape)
        if predictor == _DIFFERENCES:
            native = values.dtype.newbyteorder("=")
            values = np.add.accumulate(values, axis=1, dtype=native)
        return values.view(values.dtype.str.replace("u", self.kind))


def read_odd_tiff(data: bytes) -> OddTiff | None:
    """The directory of a TIFF that Pillow does not read rightly; None of any other, and of a damaged one."""
    try:
        return _read(data)
    except Exception:  # tags of any type and number: Pillow says what is wrong with them
        return None


def _read(data: bytes) -> OddTiff | None:
    is_big = 43 in data[2:4]
    # By its third byte Pillow tells a BigTIFF, which in big-endian ones is the fourth.
    head = b"II+\0" + data[4:16] if is_big else data[:8]
    directory = ImageFileDirectory_v2(head, data[:2])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    tags = dict(directory)
    bits, formats = {*tags.get(_BITS, (1,))}, {*tags.get(_FORMAT, (1,))}
    if len(bits) > 1 or len(formats) > 1 or tags.get(_FILL_ORDER, 1) != 1:
        return None
    found = OddTiff(
        data, tags, "<" if data[:1] == b"I" else ">", tags[_WIDTH], tags[_HEIGHT],
        tags.get(_PHOTOMETRIC, _GREY), tags.get(_COMPRESSION, _RAW), bits.pop(),
        _KINDS[formats.pop()], tags.get(_SAMPLES, 1),
    )  # fmt: skip
    is_sized = min(found.width, found.height) > 0 and found.samples >= _COLOURS[found.photometric]
    return found if is_sized and _is_odd(found) else None


def _is_odd(page: OddTiff) -> bool:
    """Whether Pillow opens it wrongly or not at all, and we do."""
    if page.codec:
        return page.photometric in (_GREY, _RGB) and page.kind == "u" and page.bits in (8, 16)
    if page.compression not in _PACKED:
        return False
    if page.photometric == _YCBCR:
        return page._is_planar and page.bits == 8 and page.kind == "u"
    if page.photometric == _LAB:
        return page.kind != "f" and page.bits == 16
    if page.kind == "f" or page.bits > 16:
        return page.bits in (16, 32, 64)
    return page.bits == 16 and (page._is_planar or page.samples == 2)


def _unpacked(packed: memoryview, compression: int, rows: int, row: int) -> bytes | memoryview:
    """Rows of `row` bytes. Raises ValueError where there are fewer."""
    size = rows * row
    if compression == _RAW:
        data: bytes | memoryview = packed[:size]
    elif compression in (*_DEFLATE, _LZMA):
        data = _checked(packed, compression, size)
    else:  # one of libtiff's: a picture of one strip, whose pixels are those bytes
        strip = {_WIDTH: row, _HEIGHT: rows, _BITS: 8, _COMPRESSION: compression, _PHOTOMETRIC: 1}
        strip |= {_STRIPS: 0, _SAMPLES: 1, _ROWS: rows, _STRIP_SIZES: len(packed)}
        strip[_STRIPS] = 8 + 2 + 12 * len(strip) + 4
        fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in strip.items())
        head = b"II*\0" + struct.pack("<IH", 8, len(strip)) + fields + bytes(4)
        data = TiffImageFile(io.BytesIO(head + packed)).tobytes()
    if len(data) < size:
        raise ValueError("a strip or tile ends before its pixels do")
    return data


def _checked(packed: memoryview, compression: int, size: int) -> bytes:
    """The first `size` bytes of what has a checksum behind it, which libtiff does not look at."""
    try:
        if compression == _LZMA:
            xz = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)
            data = xz.decompress(packed, size)
            more, is_whole = b"" if xz.eof else xz.decompress(b"", _PIECE), xz.eof
        else:
            deflated = zlib.decompressobj()
            data = deflated.decompress(packed, size)
            more = deflated.decompress(deflated.unconsumed_tail, _PIECE)
            is_whole = deflated.eof
    except (zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"a strip or tile is damaged ({error})") from None
    # What is behind the pixels may have no end.
    if not is_whole and len(more) < _PIECE:
        raise ValueError("a strip or tile is cut off")
    return data


def _image_file(packed: memoryview, codec: str, shape: tuple[int, int, int]) -> np.ndarray:
    rows, columns, samples = shape
    with Image.open(io.BytesIO(packed), formats=[codec]) as image:
        if image.size != (columns, rows):
            raise ValueError(f"a strip or tile of {columns}x{rows} holds {image.size}")
        values = np.asarray(image)
    values = values.reshape(rows, columns, -1)
    if values.shape[-1] < samples:
        raise ValueError(f"a strip or tile has {values.shape[-1]} samples of {samples}")
    return values[..., :samples]


def _image(mode: str, values: np.ndarray) -> Image.Image:
    """An image of uint8 [h w c]."""
    height, width = values.shape[:2]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(values).tobytes())
