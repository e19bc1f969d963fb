"""Images that lie outside of the table that lists them: files, members of tar shards, Parquet rows.

A listing is a table of our layout whose `image` has a path and no bytes (Hugging Face's struct
means the same by it), with the place of the image in that file beside it (`LISTED_ROW`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.images.rows import IMAGE_STRUCT, OK, key_of
from pipelines.storage.files import as_path, read_bytes
from pipelines.storage.folders import is_folder
from pipelines.storage.parquet import open_parquet, parquet_errors
from pipelines.storage.protocols import is_url
from vlv_model.errors import DataError

LISTED_ROW = pa.schema(
    [
        ("key", pa.int64()),
        ("name", pa.string()),
        ("image", IMAGE_STRUCT),  # no bytes; the file that has them
        ("offset", pa.int64()),  # of a member of a tar shard; else null
        ("size", pa.int64()),  # bytes; null in Parquet
        ("group", pa.int32()),  # row group and row in it, of a Parquet file; else null
        ("row", pa.int64()),
        ("status", pa.string()),
    ]
)
"""A row of a listing. The image column of Parquet is named in the schema's metadata (`column`)."""

PLACE = ["offset", "size", "group", "row"]
COLUMN = b"image_column"

DAMAGED, UNNAMED, ASTRAY = -1, -2, -3
"""Sizes that stand for what cannot be read: the rest of a shard, a file whose name is not UTF-8, a
link to what is not in its shard."""

LARGEST = 512 << 20  # bytes; a larger "image" is not read into memory
_WHOLE = 64 << 20  # bytes of a row group's images up to which it is read at once
_BATCH = 16  # rows that are read at a time of a larger one


def listed_row(
    name: str, path: str, offset: int | None, size: int | None, key: int | None = None
) -> dict[str, Any]:
    """A row of a listing, of an image in a file or a shard; the key is the name's unless given."""
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
    """The name without what UTF-8 does not have."""
    return name.encode("utf-8", "backslashreplace").decode()


class UndecodableImage(DataError):
    """The bytes of a row are no image that can be decoded; `kind` is the status's second part."""

    def __init__(self, message: str, kind: str = "corrupt") -> None:
        super().__init__(message)
        self.kind = kind


class ExternalImages:
    """Reads the images that rows of a listing name."""

    def __init__(self, column: str | None, whole: int = _WHOLE) -> None:
        """`column` of Parquet; a row group of up to `whole` bytes of images is read at once."""
        self.column, self.whole = column, whole
        self._at: tuple[str, int] | None = None  # file and row group of the rows that follow
        self._rows: Iterator[pa.Array] = iter(())
        self._batch: pa.Array = pa.nulls(0)
        self._start = 0  # position of `_batch` in its row group
        self._lock = threading.Lock()  # of these four

    def read(self, row: dict[str, Any]) -> bytes | None:
        """The bytes of the image of a row (`LISTED_ROW`); None where a Parquet row has none.

        Raises UndecodableImage for a file that is gone, unreadable or too large, DataError where
        a shard, a Parquet file or the whole folder is gone.
        """
        path = row["image"]["path"]
        if row["group"] is not None:
            with self._lock:
                return self._parquet(path, row["group"], row["row"])
        if row["size"] == DAMAGED:
            why = f"{path} is damaged from byte {row['offset']} on, or cut, or another archive follows"
            raise UndecodableImage(why, "shard")
        if row["size"] == ASTRAY:
            raise UndecodableImage(f"a link to what is not in {path}", "unreadable")
        if row["size"] == UNNAMED:
            raise UndecodableImage(f"{path}: its name is not UTF-8: rename it", "unreadable")
        if row["size"] is not None and row["size"] > LARGEST:
            raise UndecodableImage(f"{path} has {row['size']:,} bytes: too large", "too_large")
        file = as_path(path)
        try:
            return read_bytes(file, row["offset"] or 0, row["size"], LARGEST)
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            if row["offset"] is not None or not is_folder(file.parent):
                raise DataError(f"{path} cannot be read: {reason}") from None
            raise UndecodableImage(f"{path} cannot be read: {reason}", "unreadable") from None

    def _parquet(self, path: str, group: int, row: int) -> bytes | None:
        # Neighbours come next: a row group too large for memory is passed through once, forwards.
        if self._at != (path, group) or row < self._start:
            self._at, self._start, self._batch = (path, group), 0, pa.nulls(0)
            self._rows = _column(as_path(path), group, self.column or "image", self.whole)
        with parquet_errors(as_path(path)):
            while row >= self._start + len(self._batch):
                self._start += len(self._batch)
                following = next(self._rows, None)
                if following is None:
                    raise DataError(f"{path} was changed while it was in use: row {row} is gone")
                self._batch = following
        return image_bytes(self._batch[row - self._start].as_py(), as_path(path))


def image_bytes(value: Any, parquet: Path) -> bytes | None:
    """The bytes of a row's image: themselves, or the struct {bytes, path} of Hugging Face datasets."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return _named_file(value["path"], parquet)
        value = value.get("bytes")
    return value if value is None else bytes(value)


def _named_file(name: str, parquet: Path) -> bytes:
    """The file that a struct without bytes names, which has to lie in the Parquet file's folder."""
    # A table from elsewhere must not have other files of this machine read.
    if is_url(name) or name.startswith("/") or ".." in name.split("/"):
        raise UndecodableImage(f"the image at '{name}' is not in the table's folder", "outside")
    file = parquet.parent / name
    try:
        return read_bytes(file, most=LARGEST)
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise UndecodableImage(f"{file} cannot be read: {reason}", "unreadable") from None


def _column(file: Path, group: int, column: str, whole: int) -> Iterator[pa.Array]:
    """The image column of a row group, in pieces of few rows where it is large."""
    with open_parquet(file) as parquet:
        about = parquet.metadata.row_group(group)
        size = sum(
            about.column(i).total_uncompressed_size
            for i in range(about.num_columns)
            if about.column(i).path_in_schema.split(".")[0] == column
        )
        if size <= whole:
            yield from parquet.read_row_group(group, columns=[column])[column].chunks
            return
    with open_parquet(file, in_pieces=True) as parquet:
        batches = parquet.iter_batches(_BATCH, row_groups=[group], columns=[column])
        yield from itertools.chain.from_iterable(batch.columns for batch in batches)
