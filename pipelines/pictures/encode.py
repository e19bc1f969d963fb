"""How a decoded picture is stored: its size, its encoding, and a hash of what is seen."""

from __future__ import annotations

import io
import math
from functools import cache
from typing import Literal, Self

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from pydantic import Field, model_validator

from vlv_model.config import Config

cv2.setNumThreads(1)  # there is a process for each CPU

ResizeMode = Literal["center_crop", "keep_ratio", "keep_ratio_largest", "border", "no"]

# Times smaller: up to the first by a half-band filter, up to the second behind a Gauss of 3x3.
_HALF_BAND_TO, _GAUSS_TO = 2.0, 3.0
# This filter leaves slow changes as they are and removes what alternates from pixel to pixel, which a
# smaller picture cannot show. Its share grows with the factor by which the picture is made smaller.
_HALF_BAND = np.array([-1, 4, 10, 4, -1], np.float32) / 16
_UNFILTERED = np.array([0, 0, 1, 0, 0], np.float32)
_ALL_OF_IT = 1.35  # times smaller
_BLUR = 0.4
MAX_SIDE = {"jpeg": 65_535, "webp": 16_383, "png": 2**31 - 1}
"""Longest side that a format can hold, in pixels."""


class ImageConfig(Config):
    """What is stored of an image."""

    size: int = Field(512, ge=1, description="side in pixels that `resize` speaks of")
    resize: ResizeMode = Field(
        "center_crop",
        description="center_crop: shorter side to size, then the middle square; keep_ratio: shorter "
        "side to size; keep_ratio_largest: longer side to size; border: longer side to size, white "
        "borders to a square; no: as it came",
    )
    enlarge: bool = Field(False, description="enlarge images that are smaller than size")
    format: Literal["jpeg", "webp", "png"] = Field("jpeg", description="encoding of what is stored")
    quality: int = Field(95, ge=1, le=100, description="quality of jpeg and webp")
    reencode: Literal["never", "when_needed", "always"] = Field(
        "when_needed",
        description="when_needed: a file that is already what would be stored is kept byte for byte, "
        "its metadata (EXIF, XMP) with it; always: encoded anew, without metadata; never: all files "
        "as they came, whatever their format, orientation and colours, with resize=no (our jobs "
        "read them upright and in sRGB all the same; other readers may not)",
    )
    max_pixels: int = Field(
        64_000_000, ge=1, description="largest image that is decoded, in pixels by its header"
    )
    decode_timeout: float = Field(
        60.0, gt=0, description="seconds that one file may take to be decoded and stored"
    )

    @model_validator(mode="after")
    def _never_resized(self) -> Self:
        if self.reencode == "never" and self.resize != "no":
            raise ValueError(
                f"reencode=never keeps files as they came, resize={self.resize} changes them: "
                "add resize=no, or use reencode=when_needed"
            )
        return self


def resize(picture: np.ndarray, full: tuple[int, int], config: ImageConfig) -> np.ndarray:
    """A picture [h w 3] at its stored size, by `image.resize`; smaller ones grow only if asked.

    `full` is its own size (width, height), of which it may have been decoded at a fraction. The
    border is another step. The result may be a view of `picture`, and is `picture` itself where
    nothing has to change.
    """
    if config.resize == "no":
        return picture
    scale = scale_of(full, config)
    if config.resize == "center_crop" and full[0] != full[1]:  # before, not behind the resampling
        height, width = picture.shape[:2]
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        picture = picture[top : top + side, left : left + side]
        full = min(full), min(full)
    size = scaled(full, scale) if scale < 1 or config.enlarge else full
    return picture if picture.shape[1::-1] == size else _resampled(picture, size)


def bordered(picture: np.ndarray, config: ImageConfig) -> np.ndarray:
    """The picture [h w 3] in the middle of a white square, where `image.resize` is border."""
    height, width = picture.shape[:2]
    if config.resize != "border" or (width, height) == (config.size, config.size):
        return picture
    square = np.full((config.size, config.size, 3), 255, np.uint8)
    top, left = (config.size - height) // 2, (config.size - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def _resampled(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at another size (width, height), without aliases.

    Smaller by three and more: means over areas. By less, as after a JPEG's own scaling, what the new
    size cannot show is filtered away before: nearer to Lanczos than areas are, in a third of the
    time (docs/experiments.md).
    """
    if picture.strides[0] < 0 or picture.strides[1:] != (3, 1):  # a turned view
        picture = np.ascontiguousarray(picture)
    height, width = picture.shape[:2]
    factor = max(width / size[0], height / size[1])
    if factor < 1:
        return cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    if factor >= _GAUSS_TO:
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    if factor >= _HALF_BAND_TO:
        sigma = _BLUR * math.sqrt(factor**2 - 1)
        picture = cv2.GaussianBlur(picture, (3, 3), sigma, borderType=cv2.BORDER_REPLICATE)
        return cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
    share = min(1.0, (factor - 1) / (_ALL_OF_IT - 1))
    kernel = share * _HALF_BAND + (1 - share) * _UNFILTERED
    picture = cv2.sepFilter2D(picture, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)


def scale_of(size: tuple[int, int], config: ImageConfig) -> float:
    """Factor that brings the side which `image.resize` speaks of to `image.size`."""
    shorter = config.resize in ("center_crop", "keep_ratio")
    return config.size / (min(size) if shorter else max(size))


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def encode(picture: np.ndarray, config: ImageConfig) -> bytes:
    """The picture [h w 3] as a file of `image.format`, without metadata."""
    if config.format == "jpeg":
        contiguous = np.ascontiguousarray(picture)
        return simplejpeg.encode_jpeg(contiguous, config.quality, colorsubsampling="420")
    file = io.BytesIO()
    options = {} if config.format == "png" else {"quality": config.quality}
    Image.fromarray(picture).save(file, config.format.upper(), **options)
    return file.getvalue()


def phash(picture: np.ndarray) -> str:
    """Perceptual hash of [h w 3], 16 hexadecimal digits: the signs of 8x8 low frequencies.

    The picture in grey at 32x32, its cosine transform, the lowest 8x8 frequencies, each against
    their median. Copies of a picture differ in few of the 64 bits.
    """
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    low = np.round(_cosines() @ small @ _cosines().T, 3)  # [8 8]; of flat ones, no rounding errors
    low[0, 0] = 0.0  # the mean grey: says how bright it is, not what is seen
    bits = low.flatten() > np.median(low)
    return np.packbits(bits).tobytes().hex()


@cache
def _cosines() -> np.ndarray:
    """First 8 rows of the 32-point DCT-II, [8 32]."""
    k, n = np.ogrid[:8, :32]
    return np.cos(np.pi / 32 * (n + 0.5) * k)
