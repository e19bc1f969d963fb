"""Squares of image files, as the models take them: in this process, or in one of their own.

Of a table of ours every image was decoded once, in a child of ingest, before it was stored; what
lies elsewhere has been seen by nobody, and is decoded in a child here (pictures.isolation).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

import numpy as np
from PIL import Image

from pipelines.pictures.child_process import Answer, Isolated, given, serve
from pipelines.pictures.decode import LARGEST_PIXELS, DecodeError, Opened
from vlv_model.squares import Square

TIMEOUT = 60.0  # seconds


def square_of(content: bytes, square: Square) -> np.ndarray:
    """The square of a file's picture, as uint8 [3 s s]. Raises DecodeError where it is none."""
    # Images of others hold what ingest never let in: Pillow by itself would start Ghostscript on a
    # PostScript file, and decode half a picture.
    opened = Opened(content)
    as_stored = square.preprocess == "reference"
    return square.cut(Image.fromarray(opened.raw() if as_stored else opened.picture()))


class SquareDecoder(Isolated):
    """`square_of` in a child process. Raises DecodeError, too, where the file kills or holds it."""

    def __init__(self, square: Square, timeout: float = TIMEOUT) -> None:
        """`timeout` are the seconds that one image may take."""
        super().__init__(__name__, asdict(square), timeout)
        self.square = square

    def __call__(self, content: bytes, square: Square) -> np.ndarray:
        assert square == self.square
        said, made = self.ask(content)
        if made is None:
            raise DecodeError(said["kind"], said["message"])
        pixels = np.frombuffer(made, np.uint8).reshape(3, square.size, square.size)
        return pixels.copy()  # that may be written to


@cache
def isolated_squares(square: Square) -> SquareDecoder:
    """The one of this process, as a child takes longer to start than most chunks to decode."""
    return SquareDecoder(square)


def _answer(content: bytes, square: Square) -> Answer:
    try:
        return {}, square_of(content, square).tobytes()
    except DecodeError as error:
        return {"kind": error.kind, "message": str(error)}, None


if __name__ == "__main__":
    wanted = Square(**given())
    serve(lambda content: _answer(content, wanted), LARGEST_PIXELS)
