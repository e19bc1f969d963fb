"""Decodes an image file to an upright picture in sRGB, and to what ingest stores.

Rules (plain RGB pixels are resized first, then converted and turned):

1.  A format is detected by the first bytes of the file. Formats of `formats.READABLE` are decoded,
    and those for which an extra is installed (HEIF, JPEG XL). The size in the header is checked
    against `image.max_pixels` before any pixel is decoded. TIFFs that Pillow refuses or misreads are
    decoded by pictures/tiff.py; such AVIFs are repaired by pictures/avif.py.
2.  The first frame of an animation and the first page of a document are decoded.
3.  16-bit values lose their low byte. Values with more bits or a sign are divided by the smallest of
    1, 255, 65535 and their maximum that is no less than all of them; for floats, than nine tenths of
    them, and larger ones become white. All channels have one divisor, alpha its own. Negative, NaN
    and infinite values become black. A TIFF with 9 to 15 bits has the full range of its bits.
4.  Alpha is composited on white, and so is a palette's transparent entry.
5.  An embedded ICC profile is converted to sRGB (for CMYK too); an unreadable profile is ignored, as
    in browsers.
6.  EXIF orientation is applied; unreadable EXIF counts as upright.
7.  A truncated or damaged file is `decode:corrupt`, never half a picture. So is a file that is valid
    but ends before its pixels do (JPEG, PNG), and a PNG with a wrong checksum.
8.  A PNG's gamma and chromaticities are ignored unless it has a profile.
9.  A file that already is what would be stored (format, size, RGB, sRGB, upright, one frame) is kept
    byte for byte; any other is encoded again, without metadata. See `image.reencode`. If only its
    metadata are damaged, the file is kept without them.
10. Damaged metadata never cost a picture: headers and chunks that pixels do not need are skipped.

`sha256` is of the downloaded bytes, so it is equal for two URLs of one file, whatever size is stored.
`phash` is 64 bits of the stored picture.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipelines.pictures.avif import clean_aperture, repair
from pipelines.pictures.encode import (
    MAX_SIDE,
    ImageConfig,
    add_border,
    encode,
    phash,
    resize,
    scale_of,
    scaled,
)
from pipelines.pictures.formats import READABLE, ends_in_zeros, image_format, register_extra
from pipelines.pictures.jpeg import (
    has_more_scans,
    read_headers,
    without_metadata,
    without_padding,
)
from pipelines.pictures.png import read_chunks, scale_transparency
from pipelines.pictures.tiff import read_odd_tiff
from vlv_model.colour import (
    SIDEWAYS,
    fix_mode,
    from_profile,
    orientation,
    to_srgb,
    upright,
)

FailureClass = Literal["not_an_image", "unsupported", "too_large", "corrupt", "crashed", "timeout"]
FAILURE_CLASSES: tuple[str, ...] = get_args(FailureClass)
"""All classes that follow `decode:` in a row's status."""

_PNG_DEPTH = 24  # offset of the bits per channel in a PNG
# libjpeg's warnings about pixels that it had to invent. (Valid files may cause other warnings.)
_INVENTED_PIXELS = re.compile(
    "premature end|bad Huffman|bad arithmetic|instead of RST|extraneous", re.IGNORECASE
)
_BEFORE_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MAX_SCANS = 100  # ten are usual; optimisers write some more
# A JPEG may be decoded at a smaller scale, but at no less than this times the target size: at 1.2
# the result differs from a full decode no more than resampling filters do (docs/experiments.md).
_JPEG_MARGIN = 1.2
_JPEG_COLOURS = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # by Pillow's mode
_FULL_SIZE = ImageConfig(resize="no", reencode="always")

LARGEST_PIXELS = 178_956_970
"""Maximum pixels of images that are not being ingested: Pillow's own limit."""


class DecodeError(Exception):
    """A file that cannot be decoded, with its class (`kind`)."""

    def __init__(self, kind: FailureClass, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Stored:
    """An encoded picture: its bytes, size in pixels, and perceptual hash (16 hexadecimal digits)."""

    data: bytes
    width: int
    height: int
    phash: str


class ImageFile:
    """An image file. Its header is checked at once; `picture`, `raw` and `store` decode the pixels.

    `width` and `height` are those of the upright picture. All methods raise DecodeError.
    """

    def __init__(
        self, data: bytes, max_pixels: int = LARGEST_PIXELS, quick_jpeg: bool = True
    ) -> None:
        """Without `quick_jpeg` Pillow decodes every JPEG, not only those that simplejpeg refuses."""
        kind = image_format(data)
        if kind is None:
            raise DecodeError("not_an_image", f"begins with {data[:16]!r}")
        if kind not in READABLE and (problem := register_extra(kind)):
            raise DecodeError("unsupported", problem)
        self.data = data
        self.kind = kind
        self.quick_jpeg = quick_jpeg
        self._is_scalable = True
        self._sound = data
        """The file without damaged metadata."""
        # This also limits images inside an icon or a TIFF. Pillow raises an error beyond twice it.
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)
        self._is_clean = True
        if ends_in_zeros(kind, data):
            raise DecodeError("corrupt", "much of it is zeros, to its end")
        with _decode_errors():
            chunks = None
            if kind == "JPEG":
                self._read_headers()
            elif kind == "PNG":
                chunks = read_chunks(data)
                self._sound, self._is_clean = chunks.sound, chunks.is_clean
            self.image = self._odd_tiff(max_pixels) or self._open()
            _check_size(self.image.size, max_pixels)
            if chunks:
                chunks.check_rows()
                scale_transparency(self.image, chunks.sound[_PNG_DEPTH])
                if chunks.profile:
                    self.image.info["icc_profile"] = chunks.profile
            if kind == "AVIF" and (aperture := clean_aperture(data, self.image.size)):
                self.image = self.image.crop(aperture)
            if kind in ("PNG", "ICO"):  # EXIF, or the size, may come after the pixels
                self.image.load()
            self.orientation = orientation(self.image)
        width, height = self.image.size
        sideways = self.orientation in SIDEWAYS
        self.width, self.height = (height, width) if sideways else (width, height)

    @property
    def is_animated(self) -> bool:
        """Whether there is more than one frame or page."""
        with _decode_errors():  # some formats read all frames to count them
            return getattr(self.image, "n_frames", 1) > 1

    def store(self, config: ImageConfig) -> Stored:
        """Decode, resize and encode."""
        with _decode_errors():
            self._check_enlarged(config)
            picture, is_unchanged = self._stored_picture(config)
            height, width = picture.shape[:2]
            if not is_unchanged:
                _check_side(width, height, config)
            original = self.data if self._is_clean or config.reencode == "never" else self._sound
            data = original if is_unchanged else encode(picture, config)
            return Stored(data, width, height, phash(picture))

    def picture(self) -> np.ndarray:
        """The full-size picture, upright and in sRGB, uint8 `[h w 3]`."""
        with _decode_errors():
            return self._stored_picture(_FULL_SIZE)[0]

    def raw(self) -> np.ndarray:
        """The full-size picture as Pillow's `convert("RGB")` makes it, uint8 `[h w 3]`: without
        orientation and profile applied, alpha dropped.
        """
        with _decode_errors():
            if self.kind == "JPEG":
                self._decode_jpeg(_FULL_SIZE)  # raises for a truncated file, which Pillow does not
            return np.asarray(fix_mode(self.image).convert("RGB"))

    def _read_headers(self) -> None:
        """Check a JPEG's headers, and repair their harmless faults."""
        if has_more_scans(self.data, _MAX_SCANS):
            raise DecodeError("too_large", f"more than {_MAX_SCANS} scans")
        headers = read_headers(self.data)
        if not headers.is_decoded:
            raise DecodeError("unsupported", f"a JPEG of kind 0x{headers.frame:02x} is not decoded")
        self._sound, self._is_scalable = headers.sound, headers.is_scalable
        self._is_clean = headers.sound is self.data

    def _odd_tiff(self, max_pixels: int) -> Image.Image | None:
        """The picture of a TIFF that Pillow misreads; None for other files."""
        page = read_odd_tiff(self.data) if self.kind == "TIFF" else None
        if page is None:
            return None
        if page.codec and page.codec not in READABLE and (problem := register_extra(page.codec)):
            raise DecodeError("unsupported", f"its strips are {page.codec}: {problem}")
        _check_size((page.width, page.height), max_pixels)
        return page.image(max_pixels)

    def _open(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._sound), formats=[self.kind])
        except (UnidentifiedImageError, RuntimeError, ValueError) as error:
            for repaired in self._repaired():
                with suppress(UnidentifiedImageError, RuntimeError, ValueError):
                    image = Image.open(io.BytesIO(repaired), formats=[self.kind])
                    self._sound, self._is_clean = repaired, False
                    return image
            if not isinstance(error, UnidentifiedImageError):
                raise
            # Pillow's message has the address of an object, which is different each time.
            raise DecodeError(
                "corrupt", f"its header is damaged, or of a kind of {self.kind} that is not decoded"
            ) from None

    def _repaired(self) -> Iterator[bytes]:
        """Versions of a file that Pillow refused, which it may open."""
        if self.kind == "JPEG":
            yield from (without_metadata(self._sound, drop_all) for drop_all in (False, True))
        elif self.kind == "AVIF":
            with suppress(LookupError, ValueError, struct.error):
                yield repair(self.data)

    def _check_enlarged(self, config: ImageConfig) -> None:
        """Raise for an image of one pixel by thousands, which would become huge when enlarged."""
        if config.enlarge and config.resize != "no":
            scale = max(1.0, scale_of((self.width, self.height), config))
            if self.width * self.height * scale**2 > max(config.max_pixels, config.size**2):
                raise DecodeError(
                    "too_large", f"{self.width}x{self.height} grows {scale:.0f} times"
                )

    def _stored_picture(self, config: ImageConfig) -> tuple[np.ndarray, bool]:
        """The picture to be stored, uint8 `[h w 3]`, and whether the file can be kept unchanged."""
        image = self.image
        is_plain = image.mode == "RGB" and not image.has_transparency_data
        pixels = self._decode_jpeg(config) if self.kind == "JPEG" and self.quick_jpeg else None
        if pixels is None:
            if self.kind == "JPEG" and self._is_scalable and config.resize != "no":  # grey, CMYK
                scale = _JPEG_MARGIN * scale_of(image.size, config)
                if scale < 1:
                    image.draft(image.mode, scaled(image.size, scale))
            image.load()
            pixels = np.asarray(image if is_plain else to_srgb(image))
        full = self.width, self.height
        picture = resized = resize(upright(pixels, self.orientation), full, config)
        if is_plain and (profile := image.info.get("icc_profile")):
            # After the resize there are fewer pixels to convert.
            unconverted = Image.fromarray(np.ascontiguousarray(resized))
            converted = from_profile(unconverted, profile)
            if converted is not None and converted is not unconverted:
                picture = np.asarray(converted)
        picture = np.ascontiguousarray(add_border(picture, config))
        is_same = (
            self.kind == config.format.upper()
            and is_plain
            and picture is pixels
            and pixels.shape[:2] == (self.height, self.width)
            and (self.kind != "PNG" or self.data[_PNG_DEPTH] == 8)
            and not self.is_animated
        )
        is_unchanged = config.reencode == "never" or (is_same and config.reencode == "when_needed")
        return picture, is_unchanged

    def _decode_jpeg(self, config: ImageConfig) -> np.ndarray | None:
        """The pixels of an RGB JPEG `[h w 3]`, maybe at half, quarter or eighth size.

        None for other colours, and after a warning that does not mean missing pixels: Pillow, which is
        more lenient, then decides. Raises DecodeError for missing pixels, which Pillow would fill.
        """
        colours = _JPEG_COLOURS.get(self.image.mode)
        if colours is None:
            return None
        width, height = self.image.size
        needed = _JPEG_MARGIN * scale_of((width, height), config) if config.resize != "no" else 1.0
        if colours != "RGB":
            needed = 0  # only checks that the file is complete, at the smallest scale
        scales = (1, 2, 4, 8) if self._is_scalable else (1,)
        shrink = max((by for by in scales if by * needed <= 1), default=1)
        sizes = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
        try:
            if simplejpeg.decode_jpeg_header(self._sound)[:2] != (height, width):
                return None
            try:
                pixels = simplejpeg.decode_jpeg(self._sound, colours, **sizes)
            except ValueError as error:  # simplejpeg raises for libjpeg's first warning
                padding = _BEFORE_END.search(str(error))
                if not padding or not (cut := without_padding(self._sound, int(padding[1]))):
                    raise
                pixels = simplejpeg.decode_jpeg(cut, colours, **sizes)
        except ValueError as error:
            if _INVENTED_PIXELS.search(str(error)):
                raise DecodeError("corrupt", str(error)) from None
            return None
        return pixels if colours == "RGB" else None


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _decode_errors() -> Iterator[None]:
    """Turn any exception of a decoder into a DecodeError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our rules decide on these cases
            yield
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("too_large", str(error)) from None
    except MemoryError:
        raise DecodeError("too_large", "not enough memory to decode it") from None
    except Exception as error:  # decoders raise any type
        raise DecodeError("corrupt", f"{type(error).__name__}: {error}") from None


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DecodeError("too_large", f"{width}x{height} pixels, at most {max_pixels} are decoded")


def _check_side(width: int, height: int, config: ImageConfig) -> None:
    if max(width, height) > MAX_SIDE[config.format]:
        raise DecodeError("too_large", f"{width}x{height} does not fit into {config.format}")
