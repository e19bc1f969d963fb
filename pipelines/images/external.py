"""Images stored outside the table that lists them: files, members of tar shards, Parquet rows.

A listing is a table whose `image` has a path and no bytes, as Hugging Face's struct allows. Further
columns locate the image in that file (`LISTED_ROW`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.images.rows import IMAGE_STRUCT, OK, key_of
from pipelines.storage.files import as_path, is_url, read_bytes
from pipelines.storage.folders import is_folder
from pipelines.storage.parquet import open_parquet, parquet_errors, read_schema
from vlv_model.errors import DataError

LISTED_ROW = pa.schema(
    [
        ("key", pa.int64()),
        ("name", pa.string()),
        ("image", IMAGE_STRUCT),  # path of the file that contains the image; no bytes
        ("offset", pa.int64()),  # in a tar shard; else null
        ("size", pa.int64()),  # bytes; null in Parquet
        ("group", pa.int32()),  # row group of a Parquet file; else null
        ("row", pa.int64()),  # row in that group; else null
        ("status", pa.string()),
    ]
)
"""A row of a listing. The schema's metadata name the image column of Parquet (COLUMN)."""

LOCATION_COLUMNS = ["offset", "size", "group", "row"]
COLUMN = b"image_column"

DAMAGED, INVALID_NAME, BROKEN_LINK = -1, -2, -3
"""Values of `size` for images that cannot be read: the damaged rest of a shard, a file whose name is
not UTF-8, a link whose target is not in its shard."""

MAX_IMAGE_BYTES = 512 << 20  # a larger "image" is not read into memory
_WHOLE_BYTES = 64 << 20  # a row group with at most this many bytes of images is read at once
_BATCH_ROWS = 16  # rows read at a time from a larger one


def listed_row(
    name: str, path: str, offset: int | None, size: int | None, key: int | None = None
) -> dict[str, Any]:
    """A LISTED_ROW for an image in a file or a shard; the key defaults to the hash of the name."""
    return {
        "key": key_of(name) if key is None else key,
        "name": name,
        "image": {"bytes": None, "path": path},
        "offset": offset,
        "size": size,
        "group": None,
        "row": None,
        "status": OK,
    }


def as_utf8(name: str) -> str:
    """The name with everything that is not UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_listing(file: Path) -> bool:
    """Whether a Parquet file locates images elsewhere."""
    return set(LOCATION_COLUMNS) <= set(read_schema(file).names)


class UndecodableImage(DataError):
    """A row's image cannot be read or decoded; `kind` is the second part of its status."""

    def __init__(self, message: str, kind: str = "corrupt") -> None:
        super().__init__(message)
        self.kind = kind


class ExternalImages:
    """Reads the images of a listing. Thread-safe."""

    def __init__(self, column: str | None, whole: int = _WHOLE_BYTES) -> None:
        """`column` is the image column of Parquet; row groups of up to `whole` bytes are read at once."""
        self.column, self.whole = column, whole
        self._current: tuple[str, int] | None = None  # file and row group being read
        self._rows: Iterator[pa.Array] = iter(())
        self._batch: pa.Array = pa.nulls(0)
        self._start = 0  # position of `_batch` in its row group
        self._lock = threading.Lock()  # for these four

    def read(self, row: dict[str, Any]) -> bytes | None:
        """The image bytes of a LISTED_ROW; None if a Parquet row has no image.

        Raises UndecodableImage for a file that is missing, unreadable or too large, and DataError if a
        shard, a Parquet file or the whole folder is missing.
        """
        path = row["image"]["path"]
        if row["group"] is not None:
            with self._lock:
                return self._parquet(path, row["group"], row["row"])
        if row["size"] == DAMAGED:
            raise UndecodableImage(
                f"{path} is damaged from byte {row['offset']} on, truncated, or followed by more data",
                "shard",
            )
        if row["size"] == BROKEN_LINK:
            raise UndecodableImage(f"a link to a file that is not in {path}", "unreadable")
        if row["size"] == INVALID_NAME:
            raise UndecodableImage(f"{path}: its name is not UTF-8: rename it", "unreadable")
        if row["size"] is not None and row["size"] > MAX_IMAGE_BYTES:
            raise UndecodableImage(f"{path} is too large: {row['size']:,} bytes", "too_large")
        file = as_path(path)
        try:
            return read_bytes(file, row["offset"] or 0, row["size"], MAX_IMAGE_BYTES)
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            if row["offset"] is not None or not is_folder(file.parent):
                raise DataError(f"{path} cannot be read: {reason}") from None
            raise UndecodableImage(f"{path} cannot be read: {reason}", "unreadable") from None

    def _parquet(self, path: str, group: int, row: int) -> bytes | None:
        # Rows are usually read in order: a row group too large for memory is read once, forwards.
        if self._current != (path, group) or row < self._start:
            self._current, self._start, self._batch = (path, group), 0, pa.nulls(0)
            self._rows = _image_column(as_path(path), group, self.column or "image", self.whole)
        with parquet_errors(as_path(path)):
            while row >= self._start + len(self._batch):
                self._start += len(self._batch)
                batch = next(self._rows, None)
                if batch is None:
                    raise DataError(f"{path} was changed while it was in use: row {row} is missing")
                self._batch = batch
        return image_bytes(self._batch[row - self._start].as_py(), as_path(path))


def image_bytes(value: Any, parquet: Path) -> bytes | None:
    """The image bytes of a value: bytes, or a struct {bytes, path} as in Hugging Face datasets."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return _read_named_file(value["path"], parquet)
        value = value.get("bytes")
    return value if value is None else bytes(value)


def _read_named_file(name: str, parquet: Path) -> bytes:
    """The content of the file that a struct without bytes names."""
    # Only in the Parquet file's folder: a foreign table must not read other files of this machine.
    if is_url(name) or name.startswith("/") or ".." in name.split("/"):
        raise UndecodableImage(f"the image at '{name}' is not in the table's folder", "outside")
    file = parquet.parent / name
    try:
        return read_bytes(file, most=MAX_IMAGE_BYTES)
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise UndecodableImage(f"{file} cannot be read: {reason}", "unreadable") from None


def _image_column(file: Path, group: int, column: str, whole: int) -> Iterator[pa.Array]:
    """The image column of a row group; in batches of few rows if it is large."""
    with open_parquet(file) as parquet:
        metadata = parquet.metadata.row_group(group)
        size = sum(
            metadata.column(i).total_uncompressed_size
            for i in range(metadata.num_columns)
            if metadata.column(i).path_in_schema.split(".")[0] == column
        )
        if size <= whole:
            yield from parquet.read_row_group(group, columns=[column])[column].chunks
            return
    with open_parquet(file, in_pieces=True) as parquet:
        batches = parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column])
        yield from itertools.chain.from_iterable(batch.columns for batch in batches)
