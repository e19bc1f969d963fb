"""Squares of image files, as the models take them: decoded in this process or in a child.

Ingest decodes every image in a child before it stores it. Other images have not been decoded yet, so
they get a child here (pipelines.pictures.child_process).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from PIL import Image

from pipelines.pictures.arrays import picture_of, side_of
from pipelines.pictures.child_process import ChildProcess, Result, child_settings, serve
from pipelines.pictures.decode import LARGEST_PIXELS, DecodeError, ImageFile
from pipelines.pictures.formats import Encoding
from vlv_model.squares import Square

TIMEOUT = 60.0  # seconds


def square_of(content: bytes, square: Square) -> np.ndarray:
    """The square of an image file, uint8 `[3 s s]`. Raises DecodeError if it cannot be decoded."""
    # Not Image.open: on files that ingest would refuse, Pillow starts Ghostscript (PostScript), or
    # decodes half a picture.
    try:
        file = ImageFile(content)
    except DecodeError as error:
        if error.kind == "not_an_image" and (side := side_of(len(content))):
            raise DecodeError(
                error.kind,
                f"{error}; its {len(content):,} bytes may be a raw array of 3·{side}·{side}: then say "
                "which by data.image_encoding",
            ) from None
        raise
    is_raw = square.preprocess == "reference"
    return square.cut(Image.fromarray(file.raw() if is_raw else file.picture()))


def square_of_array(content: bytes, square: Square, encoding: Encoding) -> np.ndarray:
    """The square of a raw array, uint8 `[3 s s]`: as it is if it has the square's size.

    Raises DecodeError if it is no such array.
    """
    picture = picture_of(content, encoding)
    if picture.shape[:2] == (square.size, square.size):
        return np.array(picture.transpose(2, 0, 1), order="C")
    return square.cut(Image.fromarray(np.ascontiguousarray(picture)))


@dataclass(frozen=True)
class Decoding:
    """How a job makes squares of the bytes of its images. Thread-safe, and may be pickled."""

    encoding: Encoding = "file"
    isolated: bool = False  # files are decoded in a child process

    def __call__(self, content: bytes, square: Square) -> np.ndarray:
        """The square of an image, uint8 `[3 s s]`. Raises DecodeError if it cannot be decoded."""
        if self.encoding != "file":  # arrays are copied, not decoded: no child is needed
            return square_of_array(content, square, self.encoding)
        if self.isolated:
            return _in_a_child(content, square)
        return square_of(content, square)


_idle: defaultdict[Square, list[SquareDecoder]] = defaultdict(list)
_idle_lock = threading.Lock()


def _in_a_child(content: bytes, square: Square) -> np.ndarray:
    """`square_of` in an idle child process, or a new one: there are as many as threads that decode."""
    with _idle_lock:
        decoder = _idle[square].pop() if _idle[square] else SquareDecoder(square)
    try:
        return decoder(content, square)
    finally:
        with _idle_lock:
            _idle[square].append(decoder)


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
def isolated_squares(square: Square, thread: int | None = None) -> SquareDecoder:
    """One decoder per process, or per `thread` of it, since a decoder is not thread-safe.

    It is kept, as its child takes longer to start than most chunks to decode.
    """
    return SquareDecoder(square)


def _result(content: bytes, square: Square) -> Result:
    try:
        return {}, square_of(content, square).tobytes()
    except DecodeError as error:
        return {"kind": error.kind, "message": str(error)}, None


if __name__ == "__main__":
    wanted = Square(**child_settings())
    serve(lambda content: _result(content, wanted), LARGEST_PIXELS)
