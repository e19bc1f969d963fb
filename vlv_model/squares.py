"""The square cut out of an image. Imports no torch: image decoding processes do without it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlv_model.config import ModelConfig, Preprocess


@dataclass(frozen=True)
class Square:
    """How a model cuts a square out of an image: its side in pixels, and the preprocessing."""

    size: int
    preprocess: Preprocess = "default"

    @classmethod
    def of(cls, model: ModelConfig) -> Square:
        """The square of a model's settings."""
        return cls(model.image_size, model.preprocess)

    def cut(self, image: Image.Image) -> np.ndarray:
        """Resize the shorter side to `size` and crop the centre: uint8 `[3 size size]`.

        `default` uses Pillow's bicubic filter. `reference` does as torchvision's `Resize` and
        `CenterCrop` on a Pillow image: bilinear, longer side truncated, crop offset rounded. An
        image that is not RGB is converted.
        """
        image = image.convert("RGB")
        resized, (left, top), resampling = (
            self._reference(image.size)
            if self.preprocess == "reference"
            else self._default(image.size)
        )
        if resized != image.size:
            image = image.resize(resized, resampling)
        image = image.crop((left, top, left + self.size, top + self.size))
        # A copy: Pillow's own memory is read-only.
        return np.array(np.asarray(image).transpose(2, 0, 1), order="C")

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


_Cut = tuple[tuple[int, int], tuple[int, int], Image.Resampling]
"""Size after resizing, upper left corner of the crop, and the filter."""
