"""Decodes TIFFs that Pillow misreads or refuses: floats, 32 and 64 bits, planes of 16 bits or of
YCbCr, strips that are image files. Pillow decodes all others.

Pillow's libtiff only decompresses single strips or tiles to bytes here; this module interprets them.
So each strip or tile must be present and complete.
(TIFF 6.0; Adobe's TIFF technical note 3 for floats; BigTIFF; compression numbers of GDAL and libtiff)
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

from vlv_model.colour import to_8_bit, upright

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_SIZES, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 317, 322, 323, 324, 325
_EXTRA, _FORMAT, _SUBSAMPLING, _BLACK_WHITE, _PROFILE = 338, 339, 530, 532, 34675

_RAW, _LZW, _PACKBITS, _LZMA, _ZSTD = 1, 5, 32773, 34925, 50000
_DEFLATE = (8, 32946)
_BYTE_COMPRESSIONS = (_RAW, _LZW, _PACKBITS, _LZMA, _ZSTD, *_DEFLATE)
_CODECS = {34712: "JPEG2000", 50001: "WEBP", 50002: "JXL", 52546: "JXL"}
"""Compressions that make each strip or tile an image file, and its format."""
_WHITE_IS_ZERO, _GREY, _RGB, _CMYK, _YCBCR, _LAB = 0, 1, 2, 5, 6, 8
_COLOURS = {_WHITE_IS_ZERO: 1, _GREY: 1, _RGB: 3, _CMYK: 4, _YCBCR: 3, _LAB: 3}
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}  # NumPy's kind, by SampleFormat
_DIFFERENCES, _BYTES_OF_FLOATS = 2, 3  # predictors
_PREMULTIPLIED = 1
_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_WITH_ALPHA = {1: ("LA", "La"), 3: ("RGBA", "RGBa")}
_MAX_BYTES_PER_PIXEL = 16  # of the largest picture; leaves memory for the conversion
_MAX_SEGMENTS = 100_000
_PIECE = 1 << 20  # bytes
_LZMA_MEMORY = 1 << 28  # of its dictionary, in bytes
_FULL_RANGE = (0, 255, 128, 255, 128, 255)


@dataclass(frozen=True)
class OddTiff:
    """The first page of such a TIFF; only its directory has been read."""

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
        """The format of each strip or tile if it is an image file, or None."""
        return _CODECS.get(self.compression)

    def image(self, max_pixels: int) -> Image.Image:
        """The picture in 8 bits, upright, with its profile.

        Raises ValueError for damage, Image.DecompressionBombError if it takes too much memory.
        """
        max_bytes = _MAX_BYTES_PER_PIXEL * max_pixels
        values = self._ycbcr(max_bytes) if self.photometric == _YCBCR else self._values(max_bytes)
        count = _COLOURS[self.photometric]
        image = self._to_image(values[..., :count], values[..., count:])
        if profile := self.tags.get(_PROFILE):
            image.info["icc_profile"] = profile
        return image

    def _to_image(self, colours: np.ndarray, extra_samples: np.ndarray) -> Image.Image:
        """An image of colours `[h w c]` and extra samples `[h w n]`, the first of which may be alpha."""
        orientation = self.tags.get(_ORIENTATION, 1)
        if self.photometric == _LAB:
            # Also for the signed a and b, the high byte is the 8-bit value.
            lab = (colours.astype(np.uint16) >> 8).astype(np.uint8)
            return _image("LAB", upright(lab, orientation))
        values, count = to_8_bit(colours), colours.shape[-1]
        if self.photometric == _WHITE_IS_ZERO:
            values = 255 - values
        if self.photometric == _YCBCR:
            return _image("YCbCr", upright(values, orientation)).convert("RGB")
        extra = self.tags.get(_EXTRA, (2,) if self.photometric == _RGB else (0,))
        if not extra_samples.shape[-1] or not extra[0] or count not in _WITH_ALPHA:
            return _image(_MODES[count], upright(values, orientation))
        mode = _WITH_ALPHA[count][extra[0] == _PREMULTIPLIED]
        values = np.concatenate([values, to_8_bit(extra_samples[..., :1])], -1)
        return _image(mode, upright(values, orientation))

    def _values(self, max_bytes: int) -> np.ndarray:
        """The values of the file, `[h w c]`."""
        needed = min(self.samples, _COLOURS[self.photometric] + 1)
        if not self._is_planar:
            return self._plane(0, (self.width, self.height), self.samples, max_bytes)[..., :needed]
        size, values = (self.width, self.height), None
        for i in range(needed):
            plane = self._plane(i, size, 1, max_bytes // needed)
            if values is None:
                values = np.empty((*plane.shape[:2], needed), plane.dtype)
            values[..., i : i + 1] = plane
        assert values is not None
        return values

    def _ycbcr(self, max_bytes: int) -> np.ndarray:
        """The values `[h w 3]` of planes, two of which may be subsampled."""
        right, down = self.tags.get(_SUBSAMPLING, (2, 2))
        if not {right, down} <= {1, 2, 4}:
            raise ValueError(f"there is no subsampling by {right} and {down}")
        size = self.width, self.height
        smaller = -(-self.width // right), -(-self.height // down)
        luma = self._plane(0, size, 1, max_bytes // 3)
        chroma = [self._plane(i, smaller, 1, max_bytes // 3, (right, down)) for i in (1, 2)]
        chroma = [
            plane.repeat(down, 0).repeat(right, 1)[: self.height, : self.width] for plane in chroma
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
        max_bytes: int,
        subsampling: tuple[int, int] = (1, 1),
    ) -> np.ndarray:
        """The values `[h w samples]` of a plane of `size` (width, height). Its strips or tiles have the
        size of the tags, divided by `subsampling`."""
        width, height = size
        is_tiled = _TILES in self.tags
        if is_tiled:
            columns = self.tags[_TILE_WIDTH] // subsampling[0]
            segment_rows = self.tags[_TILE_HEIGHT] // subsampling[1]
        else:
            columns = width
            segment_rows = min(-(-self.tags.get(_ROWS, height) // subsampling[1]), height)
        if min(columns, segment_rows) < 1:
            raise ValueError("its strips or tiles have no size")
        pixel_bytes = samples * self.bits // 8
        across, down = -(-width // columns), -(-height // segment_rows)
        largest = max(width * height, columns * segment_rows) * pixel_bytes
        if largest > max_bytes or across * down > _MAX_SEGMENTS:
            raise Image.DecompressionBombError(
                f"{width}x{height} pixels of {pixel_bytes} bytes in {across * down} strips or tiles"
            )
        values = np.empty((height, width, samples), f"{self.kind}{self.bits // 8}")
        for index in range(across * down):
            top, left = index // across * segment_rows, index % across * columns
            rows = segment_rows if is_tiled else min(segment_rows, height - top)
            packed = self._segment(number * across * down + index, rows * columns * pixel_bytes)
            segment = self._decode(packed, (rows, columns, samples))
            values[top : top + rows, left : left + columns] = segment[
                : height - top, : width - left
            ]
        return values

    def _segment(self, index: int, size: int) -> memoryview:
        """The compressed bytes of a strip or tile; `size` is its uncompressed length."""
        offsets_tag, sizes_tag = (
            (_TILES, _TILE_SIZES) if _TILES in self.tags else (_STRIPS, _STRIP_SIZES)
        )
        offsets = self.tags[offsets_tag]
        default = (size,) * len(offsets) if self.compression == _RAW else ()
        lengths = self.tags.get(sizes_tag, default)
        if index >= min(len(offsets), len(lengths)):
            raise ValueError(f"strip or tile {index} is missing")
        begin, length = offsets[index], lengths[index]
        if not 8 <= begin < begin + length <= len(self.data):
            raise ValueError(f"strip or tile {index} lies beyond the end of the file")
        return memoryview(self.data)[begin : begin + length]

    def _decode(self, packed: memoryview, shape: tuple[int, int, int]) -> np.ndarray:
        """The values of a strip or tile, of `shape` (rows, columns, samples)."""
        rows, columns, samples = shape
        if self.codec:
            values = _image_file(packed, self.codec, shape)
            # Pillow's decoders reduce colours to 8 bits.
            return values * np.uint16(257) if self.bits == 16 and values.itemsize == 1 else values
        row_bytes = columns * samples * self.bits // 8
        data = _decompress(packed, self.compression, rows, row_bytes)
        predictor = self.tags.get(_PREDICTOR, 1) if self.compression not in (_RAW, _PACKBITS) else 1
        if predictor == _BYTES_OF_FLOATS:
            # Each row has the high bytes of all values first, as differences between pixels.
            differences = np.frombuffer(data, np.uint8).reshape(rows, -1, samples)
            planes = np.add.accumulate(differences, axis=1, dtype=np.uint8)
            by_value = planes.reshape(rows, self.bits // 8, -1).swapaxes(1, 2)
            big_endian = f">{self.kind}{self.bits // 8}"
            return np.ascontiguousarray(by_value).view(big_endian).reshape(shape)
        values = np.frombuffer(data, f"{self.byte_order}u{self.bits // 8}").reshape(shape)
        if predictor == _DIFFERENCES:
            native = values.dtype.newbyteorder("=")
            values = np.add.accumulate(values, axis=1, dtype=native)
        return values.view(values.dtype.str.replace("u", self.kind))


def read_odd_tiff(data: bytes) -> OddTiff | None:
    """The first page of a TIFF that Pillow misreads; None for any other, and for a damaged one."""
    try:
        return _read(data)
    except Exception:  # tags may have any type and number; Pillow then raises the error
        return None


def _read(data: bytes) -> OddTiff | None:
    is_big = 43 in data[2:4]
    # Pillow detects a BigTIFF by its third byte; in big-endian files it is the fourth.
    head = b"II+\0" + data[4:16] if is_big else data[:8]
    directory = ImageFileDirectory_v2(head, data[:2])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    tags = dict(directory)
    bits, formats = {*tags.get(_BITS, (1,))}, {*tags.get(_FORMAT, (1,))}
    if len(bits) > 1 or len(formats) > 1 or tags.get(_FILL_ORDER, 1) != 1:
        return None
    page = OddTiff(
        data, tags, "<" if data[:1] == b"I" else ">", tags[_WIDTH], tags[_HEIGHT],
        tags.get(_PHOTOMETRIC, _GREY), tags.get(_COMPRESSION, _RAW), bits.pop(),
        _KINDS[formats.pop()], tags.get(_SAMPLES, 1),
    )  # fmt: skip
    is_valid = min(page.width, page.height) > 0 and page.samples >= _COLOURS[page.photometric]
    return page if is_valid and _is_odd(page) else None


def _is_odd(page: OddTiff) -> bool:
    """Whether Pillow misreads or refuses the page, and this module decodes it."""
    if page.codec:
        return page.photometric in (_GREY, _RGB) and page.kind == "u" and page.bits in (8, 16)
    if page.compression not in _BYTE_COMPRESSIONS:
        return False
    if page.photometric == _YCBCR:
        return page._is_planar and page.bits == 8 and page.kind == "u"
    if page.photometric == _LAB:
        return page.kind != "f" and page.bits == 16
    if page.kind == "f" or page.bits > 16:
        return page.bits in (16, 32, 64)
    return page.bits == 16 and (page._is_planar or page.samples == 2)


def _decompress(
    packed: memoryview, compression: int, rows: int, row_bytes: int
) -> bytes | memoryview:
    """`rows` rows of `row_bytes` bytes. Raises ValueError if there are fewer."""
    size = rows * row_bytes
    if compression == _RAW:
        data: bytes | memoryview = packed[:size]
    elif compression in (*_DEFLATE, _LZMA):
        data = _decompress_checked(packed, compression, size)
    else:  # libtiff decompresses it as the single strip of a grey image
        tags = {_WIDTH: row_bytes, _HEIGHT: rows, _BITS: 8, _COMPRESSION: compression}
        tags |= {_PHOTOMETRIC: 1, _STRIPS: 0, _SAMPLES: 1, _ROWS: rows, _STRIP_SIZES: len(packed)}
        tags[_STRIPS] = 8 + 2 + 12 * len(tags) + 4
        fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4)
        data = TiffImageFile(io.BytesIO(head + packed)).tobytes()
    if len(data) < size:
        raise ValueError("a strip or tile ends before its pixels do")
    return data


def _decompress_checked(packed: memoryview, compression: int, size: int) -> bytes:
    """The first `size` bytes, with the checksum verified, which libtiff does not do."""
    try:
        if compression == _LZMA:
            xz = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)
            data = xz.decompress(packed, size)
            more, is_complete = b"" if xz.eof else xz.decompress(b"", _PIECE), xz.eof
        else:
            deflate = zlib.decompressobj()
            data = deflate.decompress(packed, size)
            more = deflate.decompress(deflate.unconsumed_tail, _PIECE)
            is_complete = deflate.eof
    except (zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"a strip or tile is damaged ({error})") from None
    # Data behind the pixels may be endless, so only one piece of it is read.
    if not is_complete and len(more) < _PIECE:
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
