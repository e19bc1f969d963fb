"""The square cut out of an image. Imports no torch: image decoding processes do without it."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from vlv_model.colour import fix_mode, orientation, to_srgb, upright
from vlv_model.config import ModelConfig, Preprocess
from vlv_model.errors import DataError, one_line

Picture = str | os.PathLike[str] | Image.Image
"""An image: the path of its file, or a Pillow image."""

# Pillow would open others by programs of the machine: PostScript by Ghostscript.
_FORMATS = (
    "JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "QOI", "HEIF", "JXL",
)  # fmt: skip


Framing = Literal["crop", "stretch"]
"""crop: the centre square of the image; stretch: all of it, its aspect ratio lost."""

Resampling = Literal["bicubic", "bilinear"]
"""Filters of Pillow, which average over the pixels that become one."""


@dataclass(frozen=True)
class Square:
    """How a model cuts a square out of an image: its side in pixels, and the preprocessing."""

    size: int
    preprocess: Preprocess = "default"
    framing: Framing = "crop"
    resampling: Resampling | None = None  # that of `preprocess`
    shorter: int | None = None
    """Side in pixels to which the shorter side is resized before the crop, and the rounding of
    transformers' image processors; None: `size`, and the rounding of `preprocess`."""

    @classmethod
    def of(cls, model: ModelConfig) -> Square:
        """The square of a model's settings."""
        return cls(model.image_size, model.preprocess)

    def open(self, picture: Picture) -> np.ndarray:
        """The square of an image file or of a Pillow image, uint8 `[3 size size]`.

        `default` turns the image upright by its EXIF orientation, converts it to sRGB by its colour
        profile and puts alpha on white; `reference` does none of it. Raises DataError, one line, for
        what is not a complete image.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = picture if isinstance(picture, Image.Image) else _open(picture)
                image.load()  # the EXIF of a PNG may come after the pixels
                if self.preprocess == "reference":
                    return self.cut(fix_mode(image).convert("RGB"))
                pixels = upright(np.asarray(to_srgb(image)), orientation(image))
                return self.cut(Image.fromarray(np.ascontiguousarray(pixels)))
        except Exception as error:  # decoders raise any type
            name = (
                f"an image of mode {picture.mode}" if isinstance(picture, Image.Image) else picture
            )
            reason = getattr(error, "strerror", None) or one_line(error)
            raise DataError(f"{name} cannot be read as an image: {reason}") from error

    def cut(self, image: Image.Image) -> np.ndarray:
        """Resize the shorter side to `size` and crop the centre: uint8 `[3 size size]`.

        `default` uses Pillow's bicubic filter. `reference` does as torchvision's `Resize` and
        `CenterCrop` on a Pillow image: bilinear, longer side truncated, crop offset rounded. An
        image that is not RGB is converted.
        """
        image = image.convert("RGB")
        resized, (left, top), resampling = self._geometry(image.size)
        if self.resampling is not None:
            resampling = _FILTERS[self.resampling]
        if resized != image.size:
            image = image.resize(resized, resampling)
        image = image.crop((left, top, left + self.size, top + self.size))
        # A copy: Pillow's own memory is read-only.
        return np.array(np.asarray(image).transpose(2, 0, 1), order="C")

    def _geometry(self, size: tuple[int, int]) -> _Cut:
        if self.framing == "stretch":
            return (self.size, self.size), (0, 0), Image.Resampling.BICUBIC
        if self.shorter is not None:
            return self._processor(size, self.shorter)
        return self._reference(size) if self.preprocess == "reference" else self._default(size)

    def _default(self, size: tuple[int, int]) -> _Cut:
        scale = self.size / min(size)
        # max(): rounding must not make a side one pixel shorter than the square.
        width, height = (max(self.size, round(side * scale)) for side in size)
        corner = (width - self.size) // 2, (height - self.size) // 2
        return (width, height), corner, Image.Resampling.BICUBIC

    def _reference(self, size: tuple[int, int]) -> _Cut:
        width, height = (int(self.size * side / min(size)) for side in size)
        corner = round((width - self.size) / 2), round((height - self.size) / 2)  # halves to even
        return (width, height), corner, Image.Resampling.BILINEAR

    def _processor(self, size: tuple[int, int], shorter: int) -> _Cut:
        width, height = (int(shorter * side / min(size)) for side in size)
        corner = (width - self.size) // 2, (height - self.size) // 2
        return (width, height), corner, Image.Resampling.BICUBIC


def _open(path: str | os.PathLike[str]) -> Image.Image:
    Image.init()  # finds the formats, also those of other packages that were imported
    try:
        return Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError:
        raise DataError("it is none of the formats that are decoded") from None


_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_Cut = tuple[tuple[int, int], tuple[int, int], Image.Resampling]
"""Size after resizing, upper left corner of the crop, and the filter."""
