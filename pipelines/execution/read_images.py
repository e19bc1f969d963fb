"""The first step of a chunk of images: reads and decodes them. A failure is a row with a status."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipelines.execution.quarantine import FOLDER as ATTEMPTS
from pipelines.execution.quarantine import Attempts
from pipelines.execution.steps import Chunk
from pipelines.images.plans import plan_index, read_plan
from pipelines.images.random_access import RowReader, UndecodableImage
from pipelines.images.rows import OK, status
from pipelines.pictures.formats import Encoding
from pipelines.storage.files import as_path
from pipelines.storage.tables import Table
from vlv_model.squares import Square


class ReadImages:
    """First step of a chunk: its rows' keys and decoded squares.

    Takes a chunk's number. Its rows have `key`, `name` (of a file, or a URL), `pixels` (uint8 3·s·s,
    null if the image cannot be decoded), `status`, `error`; with `keep_images` also `image`, the bytes as read, null if they are no image; a raw array
    becomes a PNG file. Images outside our own tables are decoded in a child process
    (pipelines.pictures.squares).
    """

    def __init__(
        self,
        table: Table,
        square: Square,
        keep_images: bool = False,
        decode: Callable[[bytes, Square], np.ndarray] | None = None,
    ) -> None:
        """`decode` in place of the decoder that this process has in a child."""
        self.keep_images, self.decode = keep_images, decode
        self.folder = table.folder
        about = table.describe()
        self.files = [as_path(file) for file in about["files"]]
        self.isolated: bool = about.get("isolated", True)  # of earlier versions nothing is known
        self.encoding: Encoding = about.get("encoding", "file")
        self.square = square

    def __call__(self, chunk: Chunk) -> Chunk:
        from pipelines.pictures.squares import Decoding, isolated_squares

        plan = read_plan(self.folder, chunk.number)
        decode: Callable[[bytes, Square], np.ndarray] | None = None
        if self.encoding != "file":
            decode = Decoding(self.encoding)
        elif self.isolated:
            decode = self.decode or isolated_squares(self.square)
        reader = RowReader(plan_index(self.files, plan), named=True, decode=decode)
        names = reader.names()
        read: dict[int, _Read] = {}
        attempts = Attempts(self.folder / ATTEMPTS / f"read-{chunk.number:06d}.json")
        for position in attempts.order(plan.num_rows):
            if attempts.is_quarantined(position):
                why = f"the process died {attempts.alone[position]} times while it read this image"
                read[position] = _Read(status("decode", "crashed"), why)
                continue
            with attempts.suspecting(position) if attempts.row_by_row else nullcontext():
                read[position] = self._read(reader, position)
        attempts.end()
        rows = [read[position] for position in range(plan.num_rows)]
        images = {"image": pa.array([row.image for row in rows], pa.binary())}
        table = pa.table(
            {
                "key": plan["key"],
                "name": pa.array(names, pa.string()),
                "pixels": pa.array([row.pixels for row in rows], pa.binary()),
                **(images if self.keep_images else {}),
                "status": pa.array([row.status for row in rows], pa.string()),
                "error": pa.array([row.error for row in rows], pa.string()),
            }
        )
        return replace(chunk, rows=table)

    def _read(self, reader: RowReader, position: int) -> _Read:
        try:
            content = reader.row(position)["image"]
            pixels = reader.square(position, self.square, content)
        except UndecodableImage as error:
            return _Read(status("decode", error.kind), str(error)[:200])
        kept = self._kept(content) if self.keep_images else None
        return _Read(OK, None, pixels.tobytes(), kept)

    def _kept(self, content: bytes) -> bytes:
        """The image as other jobs read it: a file."""
        if self.encoding == "file":
            return content
        from pipelines.pictures.arrays import png_of

        return png_of(content, self.encoding)


@dataclass(frozen=True)
class _Read:
    """What became of an image: its square, and its bytes where they are kept, or why it has none."""

    status: str
    error: str | None = None
    pixels: bytes | None = None
    image: bytes | None = None


def squares(pixels: pa.ChunkedArray, image_size: int) -> np.ndarray:
    """The `pixels` column, without nulls, as uint8 `[n 3 s s]`."""
    rows = [np.frombuffer(value, np.uint8) for value in pixels.to_pylist()]
    return np.stack(rows).reshape(-1, 3, image_size, image_size)
