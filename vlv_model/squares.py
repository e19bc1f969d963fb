"""The square that is cut out of an image. Without torch, which a decoder's process need not load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlv_model.config import ModelConfig, Preprocess


@dataclass(frozen=True)
class Square:
    """Which square a model takes of an image: its side in pixels, and the rule it is cut by."""

    size: int
    preprocess: Preprocess = "default"

    @classmethod
    def of(cls, model: ModelConfig) -> Square:
        return cls(model.image_size, model.preprocess)

    def cut(self, image: Image.Image) -> np.ndarray:
        """Resize the shorter side to `size` and crop the centre: uint8 [3 size size].

        By default with Pillow's bicubic filter; `reference` as torchvision's `Resize` and
        `CenterCrop` do with a Pillow image: bilinear, the longer side's fraction cut off, the
        crop's rounded. An image that is not RGB is converted.
        """
        image = image.convert("RGB")
        resized, (left, top), resampling = (
            self._reference(image.size)
            if self.preprocess == "reference"
            else self._ours(image.size)
        )
        if resized != image.size:
            image = image.resize(resized, resampling)
        image = image.crop((left, top, left + self.size, top + self.size))
        # A copy, which may be written to, unlike what Pillow shares.
        return np.array(np.asarray(image).transpose(2, 0, 1), order="C")

    def _ours(self, size: tuple[int, int]) -> _Cut:
        scale = self.size / min(size)
        # max(): rounding must not leave a side one pixel short of the square.
        width, height = (max(self.size, round(side * scale)) for side in size)
        corner = (width - self.size) // 2, (height - self.size) // 2
        return (width, height), corner, Image.Resampling.BICUBIC

    def _reference(self, size: tuple[int, int]) -> _Cut:
        width, height = (int(self.size * side / min(size)) for side in size)
        corner = round((width - self.size) / 2), round((height - self.size) / 2)  # halves to even
        return (width, height), corner, Image.Resampling.BILINEAR


_Cut = tuple[tuple[int, int], tuple[int, int], Image.Resampling]
"""Size after resizing, the square's left upper corner in that, and the filter."""
