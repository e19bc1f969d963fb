"""Random access to the images of a table: an index of its rows, and a reader of bytes and pixels."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.images.external import (
    COLUMN,
    LOCATION_COLUMNS,
    ExternalImages,
    UndecodableImage,
    image_bytes,
)
from pipelines.images.rows import OK, check_status, has_text, require_columns
from pipelines.storage.parquet import open_parquet, read_schema
from vlv_model.errors import DataError
from vlv_model.squares import Square

Decode = Callable[[bytes, Square], np.ndarray]
"""From the bytes of an image to its square, uint8 `[3 s s]`; raises DecodeError."""

K = TypeVar("K")
V = TypeVar("V")

# Decompressed row groups cached per reader: neighbouring rows are often read next.
_CACHE_BYTES = 512 * 2**20
# Footers cached per reader: without a cached footer, reading a row also reads the footer.
_FOOTER_BYTES = 512 * 2**20
_CHUNK_BYTES = 900  # per column and row group of a footer in memory, measured (docs/experiments.md)

_BATCH_ROWS = 1 << 16  # rows of small columns read at a time

NAMES = ("name", "url")  # columns that name an image, by preference


COLUMNS = ("key", "file", "group", "row")
ROW = np.dtype(list(zip(COLUMNS, ("<i8", "<i4", "<i4", "<i4"), strict=True)))
"""Where a row lies: index of its file in a list, row group in the file, row in the group."""


def in_holdout(keys: np.ndarray, share: float) -> np.ndarray:
    """Mask bool `[n]` of the held-out rows: keys int64 `[n]`, hashed again, below `share`."""
    mixed = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53 < share


@dataclass(frozen=True)
class RowIndex:
    """Where each usable row lies: parallel arrays, sorted by key."""

    files: list[Path]
    keys: np.ndarray  # int64 [n]
    file: np.ndarray  # int32 [n], position in `files`
    group: np.ndarray  # int32 [n], row group in that file
    row: np.ndarray  # int32 [n], row in that group

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, mask: np.ndarray) -> RowIndex:
        """The rows of a mask bool `[n]`."""
        return RowIndex(
            self.files, self.keys[mask], self.file[mask], self.group[mask], self.row[mask]
        )

    def digest(self) -> str:
        """A hash of the set of keys, independent of their order."""
        return hashlib.sha256(np.sort(self.keys).tobytes()).hexdigest()[:16]

    @classmethod
    def open(
        cls,
        files: Sequence[Path],
        texts: Sequence[str] = (),
        needed: Sequence[str] = ("image",),
    ) -> RowIndex:
        """Index the rows of status `ok` that have text in every column of `texts`.

        Raises DataError for a missing column (`key`, those of `texts` and `needed`), a column of the wrong
        type, an unreadable file, a table without usable rows, and a key that occurs twice.
        """
        batches = list(usable_rows(files, texts, needed))
        rows = np.concatenate(batches) if batches else np.zeros(0, ROW)
        keys = rows["key"]
        if not len(keys):
            raise no_usable_row(files, texts)
        order = np.argsort(keys, kind="stable")
        if (repeated := keys[order][1:][np.diff(keys[order]) == 0]).size:
            raise repeated_key(files, repeated[0])
        return cls(list(files), *(rows[name][order] for name in COLUMNS))


def usable_rows(
    files: Sequence[Path], texts: Sequence[str] = (), needed: Sequence[str] = ("image",)
) -> Iterator[np.ndarray]:
    """The rows that `RowIndex.open` indexes, in the order of the files: arrays ROW `[n]`, n <= 65,536.

    Raises the same errors, but does not check for repeated keys or a table without usable rows.
    """
    for number, path in enumerate(files):
        schema = read_schema(path)
        _check_columns(path, schema, texts, needed)
        names = ["key", *(["status"] if "status" in schema.names else []), *texts]
        with open_parquet(path) as parquet:
            metadata = parquet.metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            first = 0
            # Not one call per row group: image tables have many small ones.
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=names):
                table = pa.Table.from_batches([batch])
                if table["key"].null_count:
                    raise DataError(f"{path}: {table['key'].null_count} rows have no key")
                positions = np.flatnonzero(_usable(table, texts))
                group = np.searchsorted(starts, positions + first, "right") - 1
                rows = np.empty(len(positions), ROW)
                rows["key"], rows["file"] = table["key"].to_numpy()[positions], number
                rows["group"], rows["row"] = group, positions + first - starts[group]
                yield rows
                first += table.num_rows


def no_usable_row(files: Sequence[Path], texts: Sequence[str] = ()) -> DataError:
    """The error for a table without a usable row."""
    with_texts = "".join(f" with a {name}" for name in texts)
    return DataError(f"{files[0].parent} holds no row of status 'ok'{with_texts}")


def repeated_key(files: Sequence[Path], key: int) -> DataError:
    """The error for a key that occurs twice."""
    return DataError(
        f"{files[0].parent}: key {key} occurs more than once; each image must be one row"
    )


def _check_columns(
    path: Path, schema: pa.Schema, texts: Sequence[str], needed: Sequence[str]
) -> None:
    require_columns(schema, ["key", *needed, *texts], str(path))
    if not pa.types.is_integer(schema.field("key").type):
        found = schema.field("key").type
        raise DataError(f"{path}: column 'key' is {found}, expected int64")
    check_status(schema, str(path))
    for name in texts:
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: column {name!r} is {kind}, expected text")


def _usable(table: pa.Table, texts: Sequence[str]) -> np.ndarray:
    """Mask bool `[n]` of the rows with status `ok` and text in every column of `texts`."""
    usable = np.ones(table.num_rows, bool)
    if "status" in table.column_names:
        usable &= pc.fill_null(pc.equal(table["status"], OK), False).to_numpy()
    for name in texts:
        usable &= has_text(table[name]).to_numpy()
    return usable


def _signed(key: int) -> int:
    """The int64 with the bits of a key, which foreign tables may store as uint64."""
    return (key + 2**63) % 2**64 - 2**63


class RowReader:
    """Reads rows of an index by position, with a cache of row groups and footers. Thread-safe."""

    def __init__(
        self,
        index: RowIndex,
        columns: Sequence[str] = (),
        *,
        image: bool = True,
        named: bool = False,
        decode: Decode | None = None,
        cache_bytes: int = _CACHE_BYTES,
        footer_bytes: int = _FOOTER_BYTES,
    ) -> None:
        """`columns` are read in addition to the image; `image=False` leaves the image out.

        `named` is required to call `names`. `decode` replaces `square_of` (pipelines.pictures.squares).
        `cache_bytes` of row groups and `footer_bytes` of footers are cached, but at least one of each.
        """
        self.index, self.named, self.decode = index, named, decode
        self.columns = list(columns)
        self.columns_read = ["key", *(["image"] if image else []), *columns]
        self._groups: _Cache[tuple[int, int], pa.Table] = _Cache(cache_bytes)
        self._footers: _Cache[int, pq.FileMetaData] = _Cache(footer_bytes)
        self._external: dict[int, ExternalImages] = {}  # by file, for files of a listing

    def row(self, position: int) -> dict[str, Any]:
        """The requested columns of a row; `image` is its bytes, or None if it has none.

        Raises UndecodableImage if the row names an image in another file that cannot be read, and
        DataError if the file has changed since it was indexed.
        """
        file = int(self.index.file[position])
        group = self._group(file, int(self.index.group[position]))
        rows = group.slice(int(self.index.row[position]), 1).to_pylist()
        key = int(self.index.keys[position])
        if not rows or _signed(rows[0].pop("key")) != key:
            raise DataError(
                f"{self.index.files[file]} was changed while it was in use: the row of key {key} has moved"
            )
        values = rows[0]
        if file in self._external and "image" in self.columns_read:
            content = self._external[file].read(values)
            return {"image": content, **{name: values[name] for name in self.columns}}
        if "image" in values:
            values["image"] = image_bytes(values["image"], self.index.files[file])
        return values

    def names(self) -> list[str]:
        """The names of the images of all rows: a file name, a URL, or else the key."""
        names: list[str] = []
        for position in range(len(self.index)):
            group = self._group(int(self.index.file[position]), int(self.index.group[position]))
            column = next((name for name in NAMES if name in group.column_names), "key")
            names.append(str(group[column][int(self.index.row[position])].as_py()))
        return names

    def square(self, position: int, square: Square, content: bytes | None = None) -> np.ndarray:
        """The row's image, decoded and cropped to a square: uint8 `[3 s s]`.

        `content` are its bytes, if already read. Raises UndecodableImage if it cannot be decoded.
        """
        from pipelines.pictures.decode import DecodeError
        from pipelines.pictures.squares import square_of

        key = self.index.keys[position]
        content = content or self.row(position)["image"]
        if not content:
            raise UndecodableImage(f"the row of key {key} has no image", "no_image")
        try:
            return (self.decode or square_of)(content, square)
        except DecodeError as error:
            reason = f"the image of key {key} cannot be decoded: {error}"
            raise UndecodableImage(reason, error.kind) from None

    def _group(self, file: int, group: int) -> pa.Table:
        location = (file, group)
        if (cached := self._groups.get(location)) is not None:
            return cached
        footer = self._footers.get(file)
        try:
            table, schema = self._read(file, group, footer)
        except DataError:
            if footer is None:
                raise
            # The file was rewritten, so the footer is out of date; `row` notices a moved row by its key.
            self._footers.drop(file)
            table, schema = self._read(file, group, None)
        if set(LOCATION_COLUMNS) <= set(schema.names):
            column = (schema.metadata or {}).get(COLUMN)
            images = ExternalImages(column.decode() if column else None)
            self._external.setdefault(file, images)  # keeps the one of the first thread
        self._groups.put(location, table, table.nbytes)
        return table

    def _read(
        self, file: int, group: int, footer: pq.FileMetaData | None
    ) -> tuple[pa.Table, pa.Schema]:
        # Without a lock, so that threads can read different groups concurrently.
        with open_parquet(self.index.files[file], footer=footer) as parquet:
            metadata = parquet.metadata
            size = metadata.num_row_groups * metadata.num_columns * _CHUNK_BYTES
            self._footers.put(file, metadata, size)
            schema = parquet.schema_arrow
            columns = [
                *self.columns_read,
                *(LOCATION_COLUMNS if set(LOCATION_COLUMNS) <= set(schema.names) else ()),
            ]
            if self.named:
                present = [name for name in NAMES if name in schema.names]
                columns += [name for name in present[:1] if name not in columns]
            return parquet.read_row_group(group, columns=columns), schema


class _Cache(Generic[K, V]):
    """A thread-safe LRU cache of at most `limit` bytes, but of at least one value."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def drop(self, key: K) -> None:
        with self._lock:
            if key in self._values:
                self._size -= self._values.pop(key)[1]

    def put(self, key: K, value: V, size: int) -> None:
        with self._lock:
            if key in self._values:
                return
            self._values[key] = (value, size)
            self._size += size
            while self._size > self._limit and len(self._values) > 1:
                self._size -= self._values.popitem(last=False)[1][1]
