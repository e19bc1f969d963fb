"""From the bytes of an image file to its picture: upright, in sRGB; and to what ingest stores of it.

Rules (of plain RGB pixels the resized ones alone are converted and turned):

1.  Only formats of `formats.READABLE` are opened, found by their first bytes, and those for which an
    extra is installed (HEIF, JPEG XL). The header's size is checked against `image.max_pixels` before a pixel is decoded.
    TIFFs that Pillow refuses or misreads are read by pictures/tiff.py, such AVIFs mended by pictures/avif.py.
2.  Of an animation or a document of several pages the first is taken.
3.  16-bit pixels lose their low byte. Those of more bits, or with a sign, are divided by the smallest of 1, 255,
    65535 and their own greatest value that holds them all, floats by that which holds nine tenths of
    them, and what is above is white: of all channels together, of alpha by itself. Below zero, and of
    what is no number or infinite, is black. Of a TIFF with 9 to 15 bits these are the whole range.
4.  Alpha is laid on white, a palette's transparent entry too.
5.  An embedded ICC profile is converted to sRGB (CMYK by its profile where it has one); a profile
    that cannot be read is ignored, as browsers do.
6.  EXIF orientation is applied; unreadable EXIF counts as upright.
7.  The file has to be whole: a truncated or damaged one is `decode:corrupt`, never half a picture.
    So is one that ends soundly, but before its pixels do (JPEG, PNG), and a PNG whose checksums
    are not those of its bytes.
8.  A PNG's gamma and chromaticities without a profile are ignored.
9.  A file that is what would be stored already (format, size, RGB, sRGB, upright, one frame) is
    kept byte for byte; any other is encoded anew, without metadata. See `image.reencode`. Of a file
    whose metadata alone is damaged, all but that is kept.
10. Metadata never cost a picture: a damaged header or chunk that pixels do not need is passed over.

`sha256` is that of the bytes as downloaded: two URLs of one file agree in it, whatever the size
that is stored. `phash` is 64 bits of the stored picture.
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

from pipelines.pictures.avif import clean_aperture, mended
from pipelines.pictures.colour import (
    SIDEWAYS,
    as_meant,
    from_profile,
    orientation,
    to_srgb,
    upright,
)
from pipelines.pictures.encode import (
    MAX_SIDE,
    ImageConfig,
    bordered,
    encode,
    phash,
    resize,
    scale_of,
    scaled,
)
from pipelines.pictures.formats import READABLE, ends_in_zeros, image_format, open_more
from pipelines.pictures.jpeg import (
    has_more_scans,
    read_headers,
    without_metadata,
    without_padding,
)
from pipelines.pictures.png import read_chunks, settle_transparency
from pipelines.pictures.tiff import read_odd_tiff

FailureClass = Literal["not_an_image", "unsupported", "too_large", "corrupt", "crashed", "timeout"]
FAILURE_CLASSES: tuple[str, ...] = get_args(FailureClass)
"""The closed list behind `decode:` in a row's status."""

_PNG_DEPTH = 24  # the byte of a PNG's header that has its bits per channel
# What libjpeg warns of where pixels are made up. (It warns of less, too, in sound files.)
_MADE_UP = re.compile(
    "premature end|bad Huffman|bad arithmetic|instead of RST|extraneous", re.IGNORECASE
)
_BEFORE_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MAX_SCANS = 100  # ten are usual, optimisers make some more
# A JPEG is decoded at no less than this times the size that is needed: at 1.2 the picture is as
# near to one decoded whole as resampling filters are to one another (docs/experiments.md).
_JPEG_MARGIN = 1.2
_JPEG_COLOURS = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # by Pillow's mode
_AS_IT_IS = ImageConfig(resize="no", reencode="always")

LARGEST_PIXELS = 178_956_970
"""Largest image that is decoded of those that are stored already: Pillow's own bound."""


class DecodeError(Exception):
    """Why bytes gave no picture, by class."""

    def __init__(self, kind: FailureClass, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Stored:
    """An encoded picture: its bytes, its size, and 16 hexadecimal digits of perceptual hash."""

    data: bytes
    width: int
    height: int
    phash: str


class Opened:
    """An image file whose header is sound: its upright size is known.

    Pixels come with `picture` or `store`. Raises DecodeError.
    """

    def __init__(
        self, data: bytes, max_pixels: int = LARGEST_PIXELS, quick_jpeg: bool = True
    ) -> None:
        """Without `quick_jpeg` the more lenient decoder gets every JPEG, not the doubtful alone."""
        kind = image_format(data)
        if kind is None:
            raise DecodeError("not_an_image", f"begins with {data[:16]!r}")
        if kind not in READABLE and (lacking := open_more(kind)):
            raise DecodeError("unsupported", lacking)
        self.data = data
        self.kind = kind
        self.quick_jpeg = quick_jpeg
        self._is_scalable = True
        self._sound = data
        """The file without what decoders stumble over beside its pixels."""
        # An icon's or a TIFF's inner images, too, are opened within that.
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # an error is raised beyond twice this
        self._is_clean = True
        if ends_in_zeros(kind, data):
            raise DecodeError("corrupt", "much of it is zeros, to its end")
        with _failures():
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
                settle_transparency(self.image, chunks.sound[_PNG_DEPTH])
                if chunks.profile:
                    self.image.info["icc_profile"] = chunks.profile
            if kind == "AVIF" and (aperture := clean_aperture(data, self.image.size)):
                self.image = self.image.crop(aperture)
            if kind in ("PNG", "ICO"):  # EXIF may lie behind the pixels, and a size too
                self.image.load()
            self.orientation = orientation(self.image)
        width, height = self.image.size
        sideways = self.orientation in SIDEWAYS
        self.width, self.height = (height, width) if sideways else (width, height)

    @property
    def is_animated(self) -> bool:
        """Whether frames or pages follow the first. Raises DecodeError where one is damaged."""
        with _failures():  # some formats walk through all of them
            return getattr(self.image, "n_frames", 1) > 1

    def store(self, config: ImageConfig) -> Stored:
        """Decode, resize and encode. Raises DecodeError for a damaged file."""
        with _failures():
            self._check_enlarged(config)
            picture, untouched = self._made(config)
            height, width = picture.shape[:2]
            if not untouched:
                _check_side(width, height, config)
            kept = self.data if self._is_clean or config.reencode == "never" else self._sound
            data = kept if untouched else encode(picture, config)
            return Stored(data, width, height, phash(picture))

    def picture(self) -> np.ndarray:
        """The whole picture, upright and in sRGB: [h w 3]. Raises DecodeError for a damaged file."""
        with _failures():
            return self._made(_AS_IT_IS)[0]

    def raw(self) -> np.ndarray:
        """The whole picture as Pillow's `convert("RGB")` makes it: [h w 3], not upright, its colours
        the file's own numbers, alpha dropped. Raises DecodeError for a damaged file.
        """
        with _failures():
            if self.kind == "JPEG":
                self._jpeg(_AS_IT_IS)  # whether it is whole, which Pillow does not ask
            return np.asarray(as_meant(self.image).convert("RGB"))

    def _read_headers(self) -> None:
        """What a JPEG's headers say, without what is wrong with them."""
        if has_more_scans(self.data, _MAX_SCANS):
            raise DecodeError("too_large", f"more than {_MAX_SCANS} scans")
        headers = read_headers(self.data)
        if not headers.is_decoded:
            raise DecodeError("unsupported", f"a JPEG of kind 0x{headers.frame:02x} is not decoded")
        self._sound, self._is_scalable = headers.sound, headers.is_scalable
        self._is_clean = headers.sound is self.data

    def _odd_tiff(self, max_pixels: int) -> Image.Image | None:
        """The picture of a TIFF that Pillow does not read rightly; None of other files."""
        page = read_odd_tiff(self.data) if self.kind == "TIFF" else None
        if page is None:
            return None
        if page.codec and page.codec not in READABLE and (lacking := open_more(page.codec)):
            raise DecodeError("unsupported", f"its strips are {page.codec}: {lacking}")
        _check_size((page.width, page.height), max_pixels)
        return page.image(max_pixels)

    def _open(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._sound), formats=[self.kind])
        except (UnidentifiedImageError, RuntimeError, ValueError) as error:
            for other in self._without_oddities():
                with suppress(UnidentifiedImageError, RuntimeError, ValueError):
                    image = Image.open(io.BytesIO(other), formats=[self.kind])
                    self._sound, self._is_clean = other, False
                    return image
            if not isinstance(error, UnidentifiedImageError):
                raise
            # Which names the object in memory, another one each time.
            raise DecodeError(
                "corrupt", f"its header is damaged, or of a kind of {self.kind} that is not decoded"
            ) from None

    def _without_oddities(self) -> Iterator[bytes]:
        """What Pillow may open of a file that it refused."""
        if self.kind == "JPEG":
            yield from (without_metadata(self._sound, most) for most in (False, True))
        elif self.kind == "AVIF":
            with suppress(LookupError, ValueError, struct.error):
                yield mended(self.data)

    def _check_enlarged(self, config: ImageConfig) -> None:
        """A line of one pixel by thousands must not grow into a picture beyond all bounds."""
        if config.enlarge and config.resize != "no":
            scale = max(1.0, scale_of((self.width, self.height), config))
            if self.width * self.height * scale**2 > max(config.max_pixels, config.size**2):
                raise DecodeError(
                    "too_large", f"{self.width}x{self.height} grows {scale:.0f} times"
                )

    def _made(self, config: ImageConfig) -> tuple[np.ndarray, bool]:
        """The picture to be stored, RGB [h w 3], and whether the file shows just that already."""
        image = self.image
        plain = image.mode == "RGB" and not image.has_transparency_data
        pixels = self._jpeg(config) if self.kind == "JPEG" and self.quick_jpeg else None
        if pixels is None:
            if self.kind == "JPEG" and self._is_scalable and config.resize != "no":  # grey, CMYK
                scale = _JPEG_MARGIN * scale_of(image.size, config)
                if scale < 1:
                    image.draft(image.mode, scaled(image.size, scale))
            image.load()
            pixels = np.asarray(image if plain else to_srgb(image))
        full = self.width, self.height
        picture = resized = resize(upright(pixels, self.orientation), full, config)
        if plain and (profile := image.info.get("icc_profile")):
            # Of plain pixels the few that stay are given their colours.
            numbers = Image.fromarray(np.ascontiguousarray(resized))
            converted = from_profile(numbers, profile)
            if converted is not None and converted is not numbers:
                picture = np.asarray(converted)
        picture = np.ascontiguousarray(bordered(picture, config))
        same = (
            self.kind == config.format.upper()
            and plain
            and picture is pixels
            and pixels.shape[:2] == (self.height, self.width)
            and (self.kind != "PNG" or self.data[_PNG_DEPTH] == 8)
            and not self.is_animated
        )
        untouched = config.reencode == "never" or (same and config.reencode == "when_needed")
        return picture, untouched

    def _jpeg(self, config: ImageConfig) -> np.ndarray | None:
        """The pixels of a plain JPEG, perhaps at half, quarter or eighth size.

        None of other colours, and where the decoder has a doubt that says little: the other one is
        more lenient, and judges. Raises DecodeError where pixels are lacking, which that one fills.
        """
        colours = _JPEG_COLOURS.get(self.image.mode)
        if colours is None:
            return None
        width, height = self.image.size
        needed = _JPEG_MARGIN * scale_of((width, height), config) if config.resize != "no" else 1.0
        if colours != "RGB":
            needed = 0  # of these it is only asked whether they are whole
        scales = (1, 2, 4, 8) if self._is_scalable else (1,)
        shrink = max((by for by in scales if by * needed <= 1), default=1)
        sizes = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
        try:
            if simplejpeg.decode_jpeg_header(self._sound)[:2] != (height, width):
                return None
            try:
                pixels = simplejpeg.decode_jpeg(self._sound, colours, **sizes)
            except ValueError as error:  # of the first warning
                padding = _BEFORE_END.search(str(error))
                if not padding or not (cut := without_padding(self._sound, int(padding[1]))):
                    raise
                pixels = simplejpeg.decode_jpeg(cut, colours, **sizes)
        except ValueError as error:
            if _MADE_UP.search(str(error)):
                raise DecodeError("corrupt", str(error)) from None
            return None
        return pixels if colours == "RGB" else None


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of the bytes as downloaded."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _failures() -> Iterator[None]:
    """Whatever decoders raise of a file, as a DecodeError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is settled by our rules
            yield
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("too_large", str(error)) from None
    except MemoryError:
        raise DecodeError("too_large", "not enough memory to decode it") from None
    except Exception as error:  # of every type
        raise DecodeError("corrupt", _words(error)) from None


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DecodeError("too_large", f"{width}x{height} pixels, at most {max_pixels} are decoded")


def _check_side(width: int, height: int, config: ImageConfig) -> None:
    if max(width, height) > MAX_SIDE[config.format]:
        raise DecodeError("too_large", f"{width}x{height} does not fit into {config.format}")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
