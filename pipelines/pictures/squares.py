"""Squares of image files, as the models take them: in this process, or in one of their own.

Of a table of ours every image was decoded once, in a child of ingest, before it was stored; what
lies elsewhere has been seen by nobody, and is decoded in a child here (pictures.isolation).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from pipelines.pictures.decode import LARGEST_PIXELS, DecodeError, Opened
from pipelines.pictures.isolation import Answer, Isolated, given, serve
from vlv_model.squares import square

TIMEOUT = 60.0  # seconds


def square_of(content: bytes, image_size: int) -> np.ndarray:
    """A file's picture, upright and in sRGB, as uint8 [3 image_size image_size].

    Raises DecodeError where it is none.
    """
    # Images of others hold what ingest never let in: Pillow by itself would start Ghostscript on a
    # PostScript file, and decode half a picture.
    return square(Image.fromarray(Opened(content).picture()), image_size)


class SquareDecoder(Isolated):
    """`square_of` in a child process. Raises DecodeError, too, where the file kills or holds it."""

    def __init__(self, image_size: int, timeout: float = TIMEOUT) -> None:
        """`timeout` are the seconds that one image may take."""
        super().__init__(__name__, {"image_size": image_size}, timeout)
        self.image_size = image_size

    def __call__(self, content: bytes, image_size: int) -> np.ndarray:
        assert image_size == self.image_size
        said, made = self.ask(content)
        if made is None:
            raise DecodeError(said["kind"], said["message"])
        square = np.frombuffer(made, np.uint8).reshape(3, image_size, image_size)
        return square.copy()  # one that may be written to


@cache
def isolated_squares(image_size: int) -> SquareDecoder:
    """The one of this process, as a child takes longer to start than most chunks to decode."""
    return SquareDecoder(image_size)


def _answer(content: bytes, image_size: int) -> Answer:
    try:
        return {}, square_of(content, image_size).tobytes()
    except DecodeError as error:
        return {"kind": error.kind, "message": str(error)}, None


if __name__ == "__main__":
    settings: dict[str, Any] = given()
    serve(lambda content: _answer(content, settings["image_size"]), LARGEST_PIXELS)
