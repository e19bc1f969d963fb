"""Pictures as they are meant to be seen: upright, in 8-bit sRGB, by the rules of pictures/decode.py."""

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
# What turns a picture [h w 3] upright, by EXIF orientation; views, without a copy.
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
_HIGHLIGHTS = (
    0.1  # share of floats that may lie above 1, as in pictures of more than a screen's range
)
_BAND = 1 << 20  # values
_UNSEEN = 2  # levels of 255 by which profiles of sRGB differ


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image, of a PNG after it was loaded; 1 where it is unreadable."""
    if image.format == "TIFF":  # which Pillow turns itself, and says its upright size at once
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # EXIF is as wild as the web (rule 6)
        return 1


def upright(picture: np.ndarray, exif: int) -> np.ndarray:
    """A picture [h w 3] of that EXIF orientation, upright: a view, or `picture` itself."""
    return _UPRIGHT[exif](picture) if exif in _UPRIGHT else picture


def to_srgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as 8-bit sRGB: rules 3 to 5 of pictures/decode.py.

    Returns `image` itself where that is what it is.
    """
    profile = image.info.get("icc_profile")
    image = as_meant(image)
    if image.mode.startswith("I") or image.mode == "F":
        values, hidden = _deep(image), image.info.get("transparency")
        grey = to_8_bit(values)
        if isinstance(hidden, int):  # the one grey that a PNG declares transparent
            grey[values == hidden] = 255
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


def as_meant(image: Image.Image) -> Image.Image:
    """What Pillow takes otherwise than its file means it: colours multiplied by their alpha, and in a
    TIFF colour maps of 8 bits and signed bytes. Returns `image` itself where there is none."""
    if image.mode in _PREMULTIPLIED:
        return image.convert(_PREMULTIPLIED[image.mode])
    if image.format != "TIFF":
        return image
    tags = image.tag_v2  # type: ignore[attr-defined]
    if image.mode == "P" and (colours := tags.get(_COLOUR_MAP)) and max(colours) < 256:
        # Of 16 bits by the specification, of which Pillow keeps the high byte: all black.
        image.load()
        image.putpalette(np.array(colours, np.uint8).reshape(3, -1).T.tobytes())
    if image.mode == "L" and tags.get(_SAMPLE_FORMAT) == _SIGNED:
        signed = np.asarray(image).view(np.int8)
        return Image.fromarray(np.maximum(signed, 0).astype(np.uint8))
    return image


def _deep(image: Image.Image) -> np.ndarray:
    """[h w] of a grey image of more than 8 bits, in the range and sense that its file means."""
    values = np.asarray(image)
    if image.format == "PPM":  # which Pillow stretches to 16 bits, and keeps in 32
        return values.astype(np.uint16)
    if image.format == "TIFF" and values.dtype.itemsize == 2:
        tags = image.tag_v2  # type: ignore[attr-defined]
        if (bits := tags.get(_BITS, (16,))[0]) < 16:
            values = values << (16 - bits)
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds of 8 bits alone
            values = np.invert(values)
    return values


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Integers or floats, with rows first, as uint8: rule 3 of pictures/decode.py."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.itemsize == 2 and values.dtype.kind == "u":
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    made, full = np.empty(values.shape, np.uint8), _full_scale(values)
    for rows in _bands(values):
        share = np.clip(_finite(values[rows]) / full, 0, 1)
        made[rows] = share * 255 + 0.5
    return made


def _full_scale(values: np.ndarray) -> float:
    """What becomes white: of floats a few may lie above, which are highlights."""
    needed = (1 - _HIGHLIGHTS if values.dtype.kind == "f" else 1) * values.size
    within, greatest = np.zeros(len(_FULL_SCALES)), 0.0
    for rows in _bands(values):
        band = _finite(values[rows])
        within += [np.count_nonzero(band <= limit) for limit in _FULL_SCALES]
        greatest = max(greatest, float(band.max(initial=0)))
    enough = (limit for limit, count in zip(_FULL_SCALES, within, strict=True) if count >= needed)
    return next(enough, greatest)


def _bands(values: np.ndarray) -> Iterator[slice]:
    """Some rows at a time, as what is calculated takes several times the memory of what is there."""
    rows = max(1, _BAND * len(values) // max(1, values.size))
    return (slice(top, top + rows) for top in range(0, len(values), rows))


def _finite(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)


def from_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The image in sRGB by its ICC profile; None where the profile is unreadable or unfit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and _is_srgb(profile):
            return image
        return ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=16)
def _is_srgb(profile: bytes) -> bool:
    """Whether a profile leaves colours as they are: "sRGB" stands in names of linear ones, too."""
    colours = [(grey,) * 3 for grey in range(0, 256, 15)]
    colours += [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (20, 180, 240)]
    numbers = np.array([colours], np.uint8)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    seen = ImageCms.profileToProfile(Image.fromarray(numbers), source, _srgb(), outputMode="RGB")
    return bool(np.abs(np.asarray(seen, np.int16) - numbers).max() <= _UNSEEN)


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
