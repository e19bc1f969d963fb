"""How a decoded picture is stored: its size, its encoding, and a hash of what is seen."""

from __future__ import annotations

import io
from functools import cache
from typing import Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from vlv_model.config import Config

ResizeMode = Literal["center_crop", "keep_ratio", "keep_ratio_largest", "border", "no"]

WHITE = (255, 255, 255)
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
        "as they came, whatever their format, with resize=no",
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


def resize(picture: Image.Image, config: ImageConfig) -> Image.Image:
    """An RGB picture at its stored size, by `image.resize`; smaller ones grow only if asked.

    Without `image.enlarge` a picture below the size is cropped (center_crop) or bordered (border)
    to a square all the same, at its own scale.
    """
    mode, size = config.resize, config.size
    if mode == "no":
        return picture
    scale = scale_of(picture.size, config)
    if scale > 1 and not config.enlarge:
        scale = 1.0
    box = (0, 0, *picture.size)
    if mode == "center_crop":  # what is cut off is not resampled first
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        box = (left, top, left + side, top + side)
    if scale == 1:
        picture = picture.crop(box) if mode == "center_crop" else picture
    else:
        resampling = Image.Resampling.HAMMING if scale < 1 else Image.Resampling.BICUBIC
        target = scaled((box[2] - box[0], box[3] - box[1]), scale)
        picture = picture.resize(target, resampling, box=box, reducing_gap=2.0)
    if mode == "border":
        square = Image.new("RGB", (size, size), WHITE)
        square.info = picture.info
        square.paste(picture, tuple((size - length) // 2 for length in picture.size))
        return square
    return picture


def scale_of(size: tuple[int, int], config: ImageConfig) -> float:
    """Factor that brings the side which `image.resize` speaks of to `image.size`."""
    shorter = config.resize in ("center_crop", "keep_ratio")
    return config.size / (min(size) if shorter else max(size))


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def encode(picture: Image.Image, config: ImageConfig) -> bytes:
    """The picture as a file of `image.format`, without metadata."""
    file = io.BytesIO()
    options = {} if config.format == "png" else {"quality": config.quality}
    picture.save(file, config.format.upper(), **options)
    return file.getvalue()


def phash(picture: Image.Image) -> str:
    """Perceptual hash, 16 hexadecimal digits: the signs of an 8x8 block of low frequencies.

    The picture in grey at 32x32, its cosine transform, the lowest 8x8 frequencies, each against
    their median. Copies of a picture differ in few of the 64 bits.
    """
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
    low = np.round(_cosines() @ grey @ _cosines().T, 3)  # [8 8]; of flat ones, no rounding errors
    low[0, 0] = 0.0  # the mean grey: says how bright it is, not what is seen
    bits = low.flatten() > np.median(low)
    return np.packbits(bits).tobytes().hex()


@cache
def _cosines() -> np.ndarray:
    """First 8 rows of the 32-point DCT-II, [8 32]."""
    k, n = np.ogrid[:8, :32]
    return np.cos(np.pi / 32 * (n + 0.5) * k)
