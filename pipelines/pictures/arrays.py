"""Pictures that are stored as raw uint8 arrays instead of image files.

    chw   the bytes of an array [3 s s]: the red plane, then the green and the blue one
    hwc   the bytes of an array [s s 3]: the three values of each pixel
    npy   a NumPy file of either shape; height and width may differ

The bytes do not tell the first two apart, so no job guesses: `data.image_encoding` says which it is.
"""

from __future__ import annotations

import io
from math import isqrt
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.pictures.decode import LARGEST_PIXELS, DecodeError
from pipelines.pictures.formats import Encoding, image_format


def side_of(count: int) -> int | None:
    """The side of a square whose array has `count` bytes; None if there is none."""
    side = isqrt(count // 3)
    return side if side and 3 * side * side == count else None


def picture_of(content: bytes, encoding: Encoding) -> np.ndarray:
    """The picture in an array, uint8 `[h w 3]`, perhaps a read-only view of `content`.

    Raises DecodeError, with the expected numbers of bytes or axes, for anything else.
    """
    if encoding == "npy":
        return _from_npy(content)
    side = side_of(len(content))
    if side is None:
        if kind := image_format(content):
            raise DecodeError(
                "not_an_image",
                f"a {kind} file, but data.image_encoding={encoding} expects raw arrays: leave "
                "data.image_encoding out",
            )
        raise DecodeError("not_an_image", f"{len(content):,} bytes {_expected(len(content))}")
    if side * side > LARGEST_PIXELS:
        raise DecodeError("too_large", f"{side:,} x {side:,} pixels, most {LARGEST_PIXELS:,}")
    values = np.frombuffer(content, np.uint8)
    if encoding == "chw":
        return values.reshape(3, side, side).transpose(1, 2, 0)
    return values.reshape(side, side, 3)


def _expected(count: int) -> str:
    """The nearest numbers of bytes that a square has."""
    low = max(1, isqrt(count // 3))
    near = ", ".join(f"{3 * side * side:,} (s = {side:,})" for side in (low, low + 1))
    return f"are no array of 3·s·s: expected for example {near}"


def _from_npy(content: bytes) -> np.ndarray:
    try:
        # Without pickles, which could run any program.
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy raises several types for a damaged header
        kind: Literal["corrupt", "not_an_image"] = (
            "corrupt" if content.startswith(b"\x93NUMPY") else "not_an_image"
        )
        raise DecodeError(kind, f"no .npy file: {str(error)[:120]}") from None
    if not isinstance(array, np.ndarray):
        raise DecodeError("unsupported", "an .npz archive, expected an .npy file")
    shape = " x ".join(map(str, array.shape)) or "no axis"
    if array.dtype != np.uint8:
        raise DecodeError("unsupported", f"an array of {array.dtype}, expected uint8")
    if array.ndim != 3 or (array.shape[0] == 3) == (array.shape[2] == 3) or not array.size:
        raise DecodeError("unsupported", f"an array of {shape}, expected 3 x h x w or h x w x 3")
    if array.size > 3 * LARGEST_PIXELS:
        raise DecodeError("too_large", f"an array of {shape}, most {LARGEST_PIXELS:,} pixels")
    return array.transpose(1, 2, 0) if array.shape[0] == 3 else array


def png_of(content: bytes, encoding: Encoding) -> bytes:
    """The picture in an array as a PNG file. Raises DecodeError as `picture_of` does."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture_of(content, encoding))).save(file, "PNG")
    return file.getvalue()
