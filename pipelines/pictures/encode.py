"""Resizes, encodes and hashes a decoded picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import cache
from typing import ClassVar, Literal, Self

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from pydantic import Field, model_validator

from vlv_model.config import Config

cv2.setNumThreads(1)  # each CPU has its own process

ResizeMode = Literal["center_crop", "keep_ratio", "keep_ratio_largest", "border", "no"]

# Largest reduction factors for which a half-band filter, and a Gaussian blur of 3x3, come first.
_MAX_HALF_BAND, _MAX_GAUSSIAN = 2.0, 3.0
# This low-pass filter removes frequencies that the smaller picture cannot show. It is blended in with
# the reduction factor.
_HALF_BAND = np.array([-1, 4, 10, 4, -1], np.float32) / 16
_IDENTITY = np.array([0, 0, 1, 0, 0], np.float32)
_FULL_FILTER = 1.35  # reduction factor from which the filter applies in full
_SIGMA = 0.4
MAX_SIDE = {"jpeg": 65_535, "webp": 16_383, "png": 2**31 - 1}
"""Longest side of a format, in pixels."""


class ImageConfig(Config):
    """How images are stored."""

    size: int = Field(512, ge=1, description="side in pixels that `resize` refers to")
    resize: ResizeMode = Field(
        "center_crop",
        description="center_crop: shorter side to size, then the middle square; keep_ratio: shorter "
        "side to size; keep_ratio_largest: longer side to size; border: longer side to size, white "
        "borders to a square; no: original size",
    )
    enlarge: bool = Field(False, description="enlarge images that are smaller than size")
    format: Literal["jpeg", "webp", "png"] = Field("jpeg", description="format of stored images")
    quality: int = Field(95, ge=1, le=100, description="quality of jpeg and webp")
    reencode: Literal["never", "when_needed", "always"] = Field(
        "when_needed",
        description="when_needed: a file that already is what would be stored is kept byte for byte, "
        "with its metadata (EXIF, XMP); always: encode all, without metadata; never: keep all files "
        "unchanged, with their format, orientation and colours; requires resize=no (the jobs here still "
        "read them upright and in sRGB; other readers may not)",
    )
    max_pixels: int = Field(
        64_000_000, ge=1, description="largest image to decode, in pixels of its header"
    )

    removed: ClassVar[Mapping[str, str]] = {"decode_timeout": "a file has 60 seconds"}

    @model_validator(mode="after")
    def _never_resized(self) -> Self:
        if self.reencode == "never" and self.resize != "no":
            raise ValueError(
                "image.reencode=never keeps files unchanged, image.resize="
                f"{self.resize} changes them: add image.resize=no, or use image.reencode=when_needed"
            )
        return self


def resize(picture: np.ndarray, full: tuple[int, int], config: ImageConfig) -> np.ndarray:
    """Resize a picture uint8 `[h w 3]` by `image.resize`; enlarge only with `image.enlarge`.

    `full` is the original size (width, height), as `picture` may have been decoded at a smaller scale.
    Does not add the border. The result may be a view of `picture`, or `picture` itself if its size
    does not change.
    """
    if config.resize == "no":
        return picture
    scale = scale_of(full, config)
    if config.resize == "center_crop" and full[0] != full[1]:  # crop before resampling
        height, width = picture.shape[:2]
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        picture = picture[top : top + side, left : left + side]
        full = min(full), min(full)
    size = scaled(full, scale) if scale < 1 or config.enlarge else full
    return picture if picture.shape[1::-1] == size else _resampled(picture, size)


def add_border(picture: np.ndarray, config: ImageConfig) -> np.ndarray:
    """The picture `[h w 3]` in the middle of a white square, if `image.resize` is border."""
    height, width = picture.shape[:2]
    if config.resize != "border" or (width, height) == (config.size, config.size):
        return picture
    square = np.full((config.size, config.size, 3), 255, np.uint8)
    top, left = (config.size - height) // 2, (config.size - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def _resampled(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at another size (width, height), without aliasing.

    By a factor of three and more: area averages. By less, as after a JPEG's own scaling: a low-pass
    filter, then interpolation, which is closer to Lanczos than averages, in a third of the time
    (docs/experiments.md).
    """
    if picture.strides[0] < 0 or picture.strides[1:] != (3, 1):  # a rotated view
        picture = np.ascontiguousarray(picture)
    height, width = picture.shape[:2]
    factor = max(width / size[0], height / size[1])
    if factor < 1:
        return cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    if factor >= _MAX_GAUSSIAN:
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    if factor >= _MAX_HALF_BAND:
        sigma = _SIGMA * math.sqrt(factor**2 - 1)
        picture = cv2.GaussianBlur(picture, (3, 3), sigma, borderType=cv2.BORDER_REPLICATE)
        return cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
    weight = min(1.0, (factor - 1) / (_FULL_FILTER - 1))
    kernel = weight * _HALF_BAND + (1 - weight) * _IDENTITY
    picture = cv2.sepFilter2D(picture, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)


def scale_of(size: tuple[int, int], config: ImageConfig) -> float:
    """The factor that scales the side of `image.resize` to `image.size`; `size` is (width, height)."""
    shorter = config.resize in ("center_crop", "keep_ratio")
    return config.size / (min(size) if shorter else max(size))


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """`size` times `scale`, rounded, at least 1."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def encode(picture: np.ndarray, config: ImageConfig) -> bytes:
    """The picture `[h w 3]` as a file in `image.format`, without metadata."""
    if config.format == "jpeg":
        contiguous = np.ascontiguousarray(picture)
        return simplejpeg.encode_jpeg(contiguous, config.quality, colorsubsampling="420")
    file = io.BytesIO()
    options = {} if config.format == "png" else {"quality": config.quality}
    Image.fromarray(picture).save(file, config.format.upper(), **options)
    return file.getvalue()


def phash(picture: np.ndarray) -> str:
    """Perceptual hash of a picture `[h w 3]`: 64 bits as 16 hexadecimal digits.

    The picture is converted to grey at 32x32 and cosine-transformed; each bit compares one of the
    lowest 8x8 frequencies with their median. Copies of a picture differ in few bits.
    """
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    low = np.round(_cosines() @ small @ _cosines().T, 3)  # [8 8]; rounded for images of one colour
    low[0, 0] = 0.0  # the mean: brightness, not content
    bits = low.flatten() > np.median(low)
    return np.packbits(bits).tobytes().hex()


@cache
def _cosines() -> np.ndarray:
    """The first 8 rows of the 32-point DCT-II, `[8 32]`."""
    k, n = np.ogrid[:8, :32]
    return np.cos(np.pi / 32 * (n + 0.5) * k)
