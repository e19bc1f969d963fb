"""From downloaded bytes to a stored image: decoded, upright, sRGB; then as encode.py stores it.

Rules (of plain RGB pixels the resized ones alone are converted and turned):

1.  Only formats of `formats.READABLE` are opened, found by their first bytes. The header's size is
    checked against `image.max_pixels` before a pixel is decoded.
2.  Of an animation or a document of several pages the first is taken.
3.  16-bit pixels lose their low byte; 32-bit ones and floats are divided by the smallest of
    1, 255, 65535 and their own greatest value that holds them all, below zero is black.
4.  Alpha is laid on white, a palette's transparent entry too.
5.  An embedded ICC profile is converted to sRGB (CMYK by its profile where it has one); a profile
    that cannot be read is ignored, as browsers do.
6.  EXIF orientation is applied; unreadable EXIF counts as upright.
7.  The file has to be whole: a truncated or damaged one is `decode:corrupt`, never half a picture.
8.  A file that is what would be stored already (format, size, RGB, sRGB, upright, one frame) is
    kept byte for byte; any other is encoded anew, without metadata. See `image.reencode`.

`sha256` is that of the bytes as downloaded: two URLs of one file agree in it, whatever the size
that is stored. `phash` is 64 bits of the stored picture.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from pipelines.ingest.encode import (
    MAX_SIDE,
    WHITE,
    ImageConfig,
    encode,
    phash,
    resize,
    scale_of,
    scaled,
)
from pipelines.ingest.formats import READABLE, SNIFF_BYTES, image_format

FailureClass = Literal["not_an_image", "unsupported", "too_large", "corrupt", "crashed", "timeout"]
FAILURE_CLASSES: tuple[str, ...] = get_args(FailureClass)
"""The closed list behind `decode:` in a row's status."""

_ORIENTATION_TAG = 0x0112
_PNG_DEPTH = 24  # the byte of a PNG's header that has its bits per channel
# What turns the stored picture upright, by EXIF orientation.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda picture: np.rot90(picture, 2),
    4: np.flipud,
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: np.rot90(picture, -1),
    7: lambda picture: np.rot90(picture, 2).swapaxes(0, 1),
    8: np.rot90,
}
_SIDEWAYS = (5, 6, 7, 8)
# A JPEG is decoded at no less than this times the size that is needed: at 1.2 the picture is as
# near to one decoded whole as resampling filters are to one another (docs/log.md).
_JPEG_MARGIN = 1.2


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
    """An image file whose header is sound: its upright size is known, pixels come with `store`."""

    def __init__(self, data: bytes, max_pixels: int) -> None:
        kind = image_format(data[:SNIFF_BYTES])
        if kind is None:
            raise DecodeError("not_an_image", f"begins with {data[:16]!r}")
        if kind not in READABLE:
            raise DecodeError("unsupported", f"{kind} is not decoded")
        self.data = data
        self.kind = kind
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes that are judged right below
                self.image = Image.open(io.BytesIO(data), formats=_openers(kind))
                _check_size(self.image, max_pixels)
                if self.image.format == "PNG":  # whose EXIF may lie behind the pixels
                    self.image.load()
                # Pillow turns a TIFF itself, and says its upright size at once.
                self.orientation = 1 if kind == "TIFF" else _orientation(self.image)
        except DecodeError:
            raise
        except Image.DecompressionBombError as error:
            raise DecodeError("too_large", str(error)) from None
        except Exception as error:  # decoders raise of every type
            raise DecodeError("corrupt", _words(error)) from None
        width, height = self.image.size
        sideways = self.orientation in _SIDEWAYS
        self.width, self.height = (height, width) if sideways else (width, height)

    def store(self, config: ImageConfig) -> Stored:
        """Decode, resize and encode. Raises DecodeError for a damaged file."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # EXIF and palette oddities, settled by our rules
                self._check_enlarged(config)
                picture, untouched = self._made(config)
                height, width = picture.shape[:2]
                if not untouched:
                    _check_side(width, height, config)
                data = self.data if untouched else encode(picture, config)
                return Stored(data, width, height, phash(picture))
        except DecodeError:
            raise
        except MemoryError:
            raise DecodeError("too_large", "not enough memory to decode it") from None
        except Exception as error:  # decoders raise of every type
            raise DecodeError("corrupt", _words(error)) from None

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
        pixels = self._jpeg(config) if plain and self.kind == "JPEG" else None
        if pixels is None:
            if image.format == "JPEG" and config.resize != "no":  # grey, or CMYK
                scale = _JPEG_MARGIN * scale_of(image.size, config)
                if scale < 1:
                    image.draft(image.mode, scaled(image.size, scale))
            image.load()
            pixels = np.asarray(image if plain else to_srgb(image))
        picture = resized = resize(pixels, config)
        if plain and (profile := image.info.get("icc_profile")):
            # Of plain pixels the few that stay are given their colours.
            numbers = Image.fromarray(resized)
            converted = _from_profile(numbers, profile)
            if converted is not None and converted is not numbers:
                picture = np.asarray(converted)
        if self.orientation in _UPRIGHT:
            picture = np.ascontiguousarray(_UPRIGHT[self.orientation](picture))
        same = (
            plain
            and picture is pixels
            and pixels.shape[:2] == (self.height, self.width)
            and getattr(image, "n_frames", 1) == 1
            and self.kind == config.format.upper()
            and (self.kind != "PNG" or self.data[_PNG_DEPTH] == 8)
        )
        untouched = config.reencode == "never" or (same and config.reencode == "when_needed")
        return picture, untouched

    def _jpeg(self, config: ImageConfig) -> np.ndarray | None:
        """The pixels of a sound JPEG, perhaps at half, quarter or eighth size.

        None where the decoder has any doubt: the other one is more lenient, and judges.
        """
        width, height = self.image.size
        needed = _JPEG_MARGIN * scale_of((width, height), config) if config.resize != "no" else 1.0
        shrink = max((by for by in (1, 2, 4, 8) if by * needed <= 1), default=1)
        try:
            if simplejpeg.decode_jpeg_header(self.data)[:2] != (height, width):
                return None
            return simplejpeg.decode_jpeg(
                self.data, min_height=-(-height // shrink), min_width=-(-width // shrink)
            )
        except ValueError:
            return None


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of the bytes as downloaded."""
    return hashlib.sha256(data).hexdigest()


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError("too_large", f"{width}x{height} pixels, at most {max_pixels} are decoded")


def _check_side(width: int, height: int, config: ImageConfig) -> None:
    if max(width, height) > MAX_SIDE[config.format]:
        raise DecodeError("too_large", f"{width}x{height} does not fit into {config.format}")


def _openers(kind: str) -> list[str]:
    return ["JPEG", "MPO"] if kind == "JPEG" else [kind]


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # EXIF is as wild as the web: unreadable counts as upright (rule 6)
        return 1


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# --------------------------------------------------------------------------------------- colour


def to_srgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as 8-bit sRGB: rules 3 to 5 of the module's text.

    Returns `image` itself where that is what it is.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        image = Image.new("RGB", image.size, WHITE)
        image.paste(with_alpha, mask=with_alpha.getchannel("A"))
    elif image.mode in ("1", "P"):
        image = image.convert("RGB")
    if profile and (converted := _from_profile(image, profile)):
        return converted
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, lab, _srgb(), outputMode="RGB")  # type: ignore[return-value]
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """[h w] of 16- or 32-bit integers or floats as uint8, by the range that they use."""
    if values.dtype.itemsize == 2:
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    values = np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)
    greatest = float(values.max(initial=0))
    full = next((limit for limit in (1, 255, 65_535) if greatest <= limit), greatest)
    return (np.clip(values / full, 0, 1) * 255 + 0.5).astype(np.uint8)


def _from_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The image in sRGB by its ICC profile; None where the profile is unreadable or unfit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return image
        return ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
