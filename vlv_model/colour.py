"""Converts images to upright 8-bit sRGB, by the rules of pipelines/pictures/decode.py."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageCms

WHITE = (255, 255, 255)
_ORIENTATION_TAG = 0x0112
_BITS, _PHOTOMETRIC, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 262, 320, 339  # tags of TIFF
_SIGNED = (2,)
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
# Turns a picture [h w 3] upright, by EXIF orientation; the results are views.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda picture: np.rot90(picture, 2),
    4: np.flipud,
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: np.rot90(picture, -1),
    7: lambda picture: np.rot90(picture, 2).swapaxes(0, 1),
    8: np.rot90,
}
SIDEWAYS = (5, 6, 7, 8)
_FULL_SCALES = (1, 255, 65_535)
_MAX_HIGHLIGHTS = 0.1  # fraction of floats that may exceed the full scale, as in HDR images
_BAND_VALUES = 1 << 20
_SRGB_TOLERANCE = 2  # levels of 255 by which sRGB profiles differ


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image; 1 if it is unreadable. A PNG must be loaded first."""
    if image.format == "TIFF":  # Pillow turns it, and its size is already the upright one
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF causes errors of any type (rule 6)
        return 1


def upright(picture: np.ndarray, exif: int) -> np.ndarray:
    """A picture `[h w 3]` of that EXIF orientation, turned upright: a view, or `picture` itself."""
    return _UPRIGHT[exif](picture) if exif in _UPRIGHT else picture


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to 8-bit sRGB: rules 3 to 5 of pipelines/pictures/decode.py.

    Returns `image` itself if it already is.
    """
    profile = image.info.get("icc_profile")
    image = fix_mode(image)
    if image.mode.startswith("I") or image.mode == "F":
        values, transparent = _deep_values(image), image.info.get("transparency")
        grey = to_8_bit(values)
        if isinstance(transparent, int):  # a grey level of a PNG
            grey[values == transparent] = 255
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        image = Image.new("RGB", image.size, WHITE)
        image.paste(with_alpha, mask=with_alpha.getchannel("A"))
    elif image.mode in ("1", "P"):
        image = image.convert("RGB")
    if profile and (converted := from_profile(image, profile)):
        return converted
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, lab, _srgb(), outputMode="RGB")  # type: ignore[return-value]
    return image if image.mode == "RGB" else image.convert("RGB")


def fix_mode(image: Image.Image) -> Image.Image:
    """Fix modes that Pillow misreads: premultiplied alpha, and in a TIFF 8-bit colour maps and signed
    bytes. Returns `image` itself if there is nothing to fix."""
    if image.mode in _PREMULTIPLIED:
        return image.convert(_PREMULTIPLIED[image.mode])
    if image.format != "TIFF":
        return image
    tags = image.tag_v2  # type: ignore[attr-defined]
    if image.mode == "P" and (colours := tags.get(_COLOUR_MAP)) and max(colours) < 256:
        # The specification has 16 bits, of which Pillow keeps the high byte: all would be black.
        image.load()
        image.putpalette(np.array(colours, np.uint8).reshape(3, -1).T.tobytes())
    if image.mode == "L" and tags.get(_SAMPLE_FORMAT) == _SIGNED:
        signed = np.asarray(image).view(np.int8)
        return Image.fromarray(np.maximum(signed, 0).astype(np.uint8))
    return image


def _deep_values(image: Image.Image) -> np.ndarray:
    """The values `[h w]` of a grey image of more than 8 bits, scaled to its full range; white is high."""
    values = np.asarray(image)
    if image.format == "PPM":  # Pillow scales it to 16 bits, in 32-bit integers
        return values.astype(np.uint16)
    if image.format == "TIFF" and values.dtype.itemsize == 2:
        tags = image.tag_v2  # type: ignore[attr-defined]
        if (bits := tags.get(_BITS, (16,))[0]) < 16:
            values = values << (16 - bits)
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow inverts 8-bit images only
            values = np.invert(values)
    return values


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Integers or floats `[h …]` as uint8 of the same shape: rule 3 of pipelines/pictures/decode.py."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.itemsize == 2 and values.dtype.kind == "u":
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    result, white = np.empty(values.shape, np.uint8), _full_scale(values)
    for rows in _bands(values):
        level = np.clip(_finite(values[rows]) / white, 0, 1)
        result[rows] = level * 255 + 0.5
    return result


def _full_scale(values: np.ndarray) -> float:
    """The value that becomes white; a few floats, the highlights, may exceed it."""
    needed = (1 - _MAX_HIGHLIGHTS if values.dtype.kind == "f" else 1) * values.size
    within, maximum = np.zeros(len(_FULL_SCALES)), 0.0
    for rows in _bands(values):
        band = _finite(values[rows])
        within += [np.count_nonzero(band <= limit) for limit in _FULL_SCALES]
        maximum = max(maximum, float(band.max(initial=0)))
    enough = (limit for limit, count in zip(_FULL_SCALES, within, strict=True) if count >= needed)
    return next(enough, maximum)


def _bands(values: np.ndarray) -> Iterator[slice]:
    """Bands of rows, because calculations take several times the memory of the values."""
    rows = max(1, _BAND_VALUES * len(values) // max(1, values.size))
    return (slice(top, top + rows) for top in range(0, len(values), rows))


def _finite(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)


def from_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The image converted from its ICC profile to sRGB; None if the profile is unreadable or does not
    fit the mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and _is_srgb(profile):
            return image
        return ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=16)
def _is_srgb(profile: bytes) -> bool:
    """Whether a profile does not change colours; its name does not show it, as linear ones may contain "sRGB"."""
    colours = [(grey,) * 3 for grey in range(0, 256, 15)]
    colours += [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (20, 180, 240)]
    before = np.array([colours], np.uint8)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    after = ImageCms.profileToProfile(Image.fromarray(before), source, _srgb(), outputMode="RGB")
    return bool(np.abs(np.asarray(after, np.int16) - before).max() <= _SRGB_TOLERANCE)


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
