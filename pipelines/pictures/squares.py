"""Squares of image files, as the models take them: decoded in this process or in a child.

Ingest decodes every image in a child before it stores it. Other images have not been decoded yet, so
they get a child here (pipelines.pictures.child_process).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

import numpy as np
from PIL import Image

from pipelines.pictures.child_process import ChildProcess, Result, child_settings, serve
from pipelines.pictures.decode import LARGEST_PIXELS, DecodeError, ImageFile
from vlv_model.squares import Square

TIMEOUT = 60.0  # seconds


def square_of(content: bytes, square: Square) -> np.ndarray:
    """The square of an image file, uint8 `[3 s s]`. Raises DecodeError if it cannot be decoded."""
    # Not Image.open: on files that ingest would refuse, Pillow starts Ghostscript (PostScript), or
    # decodes half a picture.
    file = ImageFile(content)
    is_raw = square.preprocess == "reference"
    return square.cut(Image.fromarray(file.raw() if is_raw else file.picture()))


class SquareDecoder(ChildProcess):
    """`square_of` in a child process. Also raises DecodeError if the file crashes or hangs it."""

    def __init__(self, square: Square, timeout: float = TIMEOUT) -> None:
        """`timeout` is in seconds per image."""
        super().__init__(__name__, asdict(square), timeout)
        self.square = square

    def __call__(self, content: bytes, square: Square) -> np.ndarray:
        assert square == self.square
        error, pixels = self.request(content)
        if pixels is None:
            raise DecodeError(error["kind"], error["message"])
        values = np.frombuffer(pixels, np.uint8).reshape(3, square.size, square.size)
        return values.copy()  # writable


@cache
def isolated_squares(square: Square) -> SquareDecoder:
    """One decoder per process, as its child takes longer to start than most chunks to decode."""
    return SquareDecoder(square)


def _result(content: bytes, square: Square) -> Result:
    try:
        return {}, square_of(content, square).tobytes()
    except DecodeError as error:
        return {"kind": error.kind, "message": str(error)}, None


if __name__ == "__main__":
    wanted = Square(**child_settings())
    serve(lambda content: _result(content, wanted), LARGEST_PIXELS)
