"""The square that is cut out of an image. Without torch, which a decoder's process need not load."""

from __future__ import annotations

import numpy as np
from PIL import Image


def square(image: Image.Image, image_size: int) -> np.ndarray:
    """`preprocessing.square_image` as an array: uint8 [3 image_size image_size]."""
    width, height = image.size
    scale = image_size / min(width, height)
    # max(): rounding must not leave a side one pixel short of the square.
    resized = (
        max(image_size, round(width * scale)),
        max(image_size, round(height * scale)),
    )
    left, top = (resized[0] - image_size) // 2, (resized[1] - image_size) // 2
    image = image.convert("RGB")
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + image_size, top + image_size))
    # A copy, which may be written to, unlike what Pillow shares.
    return np.array(np.asarray(image).transpose(2, 0, 1), order="C")
