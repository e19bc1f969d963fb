"""Random access to the images of a table: where each row lies, and its bytes and pixels."""

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

from pipelines.images.external import COLUMN, PLACE, ExternalImages, UndecodableImage, image_bytes
from pipelines.images.rows import OK, check_status, has_text, require_columns
from pipelines.storage.parquet import open_parquet, read_schema
from vlv_model.errors import DataError
from vlv_model.squares import Square

K = TypeVar("K")
V = TypeVar("V")

# Decompressed row groups that one reader keeps, in bytes: neighbours of a row are often next.
_CACHE_BYTES = 512 * 2**20
# Memory of the footers that one reader keeps: without its file's, a row costs the reading of one.
_FOOTER_BYTES = 512 * 2**20
_CHUNK_BYTES = 900  # of one column of one row group in a footer, as measured (docs/experiments.md)

_BATCH_ROWS = 1 << 16  # of small columns that are looked at together

NAMES = ("name", "url")  # columns that say what an image is called


COLUMNS = ("key", "file", "group", "row")
ROW = np.dtype(list(zip(COLUMNS, ("<i8", "<i4", "<i4", "<i4"), strict=True)))
"""Where a row lies: position of its file in a list, row group in it, row in that."""


def in_holdout(keys: np.ndarray, share: float) -> np.ndarray:
    """Mask of the held-out rows: keys (already hashes) mixed once more and compared to `share`."""
    mixed = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53 < share


@dataclass(frozen=True)
class RowIndex:
    """Where each usable row lies: parallel arrays sorted by key."""

    files: list[Path]
    keys: np.ndarray  # int64 [n]
    file: np.ndarray  # int32 [n], position in `files`
    group: np.ndarray  # int32 [n], row group in that file
    row: np.ndarray  # int32 [n], row in that group

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, mask: np.ndarray) -> RowIndex:
        return RowIndex(
            self.files, self.keys[mask], self.file[mask], self.group[mask], self.row[mask]
        )

    def digest(self) -> str:
        """A name for this set of keys, whatever their order."""
        return hashlib.sha256(np.sort(self.keys).tobytes()).hexdigest()[:16]

    @classmethod
    def open(
        cls,
        files: Sequence[Path],
        texts: Sequence[str] = (),
        needed: Sequence[str] = ("image",),
    ) -> RowIndex:
        """Index the rows of status `ok` that have a text in each of the columns `texts`.

        Raises DataError for missing columns (beside `key` and `texts` those `needed`), columns of another type, an unreadable file, a table
        without a usable row, and a key that occurs twice.
        """
        found = list(usable_rows(files, texts, needed))
        rows = np.concatenate(found) if found else np.zeros(0, ROW)
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
    """The rows that `RowIndex.open` indexes, file by file as they lie, some 65,000 at a time: ROW `[n]`.

    Raises what it raises but for keys that occur twice and a table without a usable row.
    """
    for number, path in enumerate(files):
        schema = read_schema(path)
        _check_columns(path, schema, texts, needed)
        names = ["key", *(["status"] if "status" in schema.names else []), *texts]
        with open_parquet(path) as parquet:
            about = parquet.metadata
            sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            first = 0
            # Not group by group: tables of images have small ones, and each call costs its own.
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=names):
                table = pa.Table.from_batches([batch])
                if table["key"].null_count:
                    raise DataError(f"{path}: {table['key'].null_count} rows have no key")
                at = np.flatnonzero(_usable(table, texts))
                group = np.searchsorted(starts, at + first, "right") - 1
                rows = np.empty(len(at), ROW)
                rows["key"], rows["file"] = table["key"].to_numpy()[at], number
                rows["group"], rows["row"] = group, at + first - starts[group]
                yield rows
                first += table.num_rows


def no_usable_row(files: Sequence[Path], texts: Sequence[str] = ()) -> DataError:
    with_texts = "".join(f" with a {name}" for name in texts)
    return DataError(f"{files[0].parent} holds no row of status 'ok'{with_texts}")


def repeated_key(files: Sequence[Path], key: int) -> DataError:
    return DataError(
        f"{files[0].parent}: key {key} occurs more than once; each image must be one row"
    )


def _check_columns(
    path: Path, schema: pa.Schema, texts: Sequence[str], needed: Sequence[str]
) -> None:
    require_columns(schema, ["key", *needed, *texts], str(path))
    if not pa.types.is_integer(schema.field("key").type):
        found = schema.field("key").type
        raise DataError(f"{path}: column 'key' is {found}, expected int64 as ingest writes it")
    check_status(schema, str(path))
    for name in texts:
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: column {name!r} is {kind}, expected text")


def _usable(table: pa.Table, texts: Sequence[str]) -> np.ndarray:
    """Mask of the rows of status `ok` whose texts are not blank."""
    usable = np.ones(table.num_rows, bool)
    if "status" in table.column_names:
        usable &= pc.fill_null(pc.equal(table["status"], OK), False).to_numpy()
    for name in texts:
        usable &= has_text(table[name]).to_numpy()
    return usable


def _signed(key: int) -> int:
    """The int64 with the bits of a key, which others may store as uint64."""
    return (key + 2**63) % 2**64 - 2**63


class RowReader:
    """Reads rows of an index by position, keeping the row groups and footers that it read last.

    Several threads may read at the same time.
    """

    def __init__(
        self,
        index: RowIndex,
        columns: Sequence[str] = (),
        *,
        image: bool = True,
        named: bool = False,
        decode: Callable[[bytes, Square], np.ndarray] | None = None,
        cache_bytes: int = _CACHE_BYTES,
        footer_bytes: int = _FOOTER_BYTES,
    ) -> None:
        """`columns` beside the image, which can be left out; `named` where `names` will be asked;
        `decode` in place of `square_of` (pipelines.pictures.squares). At most so many bytes of row
        groups (`cache_bytes`) and of footers are kept, though always one of each.
        """
        self.index, self.named, self.decode = index, named, decode
        self.columns = list(columns)
        # And nothing else of the table.
        self.columns_read = ["key", *(["image"] if image else []), *columns]
        self._groups: _Cache[tuple[int, int], pa.Table] = _Cache(cache_bytes)
        self._footers: _Cache[int, pq.FileMetaData] = _Cache(footer_bytes)
        self._external: dict[int, ExternalImages] = {}  # by file, of those that are listings

    def row(self, position: int) -> dict[str, Any]:
        """`image` (its bytes, None where it has none), unless left out, and the columns asked for.

        Raises UndecodableImage where the row only names an image that cannot be read.
        """
        file = int(self.index.file[position])
        group = self._group(file, int(self.index.group[position]))
        rows = group.slice(int(self.index.row[position]), 1).to_pylist()
        key = int(self.index.keys[position])
        if not rows or _signed(rows[0].pop("key")) != key:
            raise DataError(
                f"{self.index.files[file]} was changed while it was in use: the row of key {key} is "
                "no longer in its place"
            )
        values = rows[0]
        if file in self._external and "image" in self.columns_read:
            content = self._external[file].read(values)
            return {"image": content, **{name: values[name] for name in self.columns}}
        if "image" in values:
            values["image"] = image_bytes(values["image"], self.index.files[file])
        return values

    def names(self) -> list[str]:
        """What the images of all rows are called: the name of a file, a URL, else the key."""
        found: list[str] = []
        for position in range(len(self.index)):
            group = self._group(int(self.index.file[position]), int(self.index.group[position]))
            column = next((name for name in NAMES if name in group.column_names), "key")
            found.append(str(group[column][int(self.index.row[position])].as_py()))
        return found

    def square(self, position: int, square: Square, content: bytes | None = None) -> np.ndarray:
        """The square of the row's image, uint8 `[3 s s]`.

        `content` are its bytes, where they were read already. Raises UndecodableImage if it is none.
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
        where = (file, group)
        if (kept := self._groups.get(where)) is not None:
            return kept
        footer = self._footers.get(file)
        try:
            table, schema = self._read(file, group, footer)
        except DataError:
            if footer is None:
                raise
            # A file that was written anew meanwhile: `row` says so by the key that is there now.
            self._footers.drop(file)
            table, schema = self._read(file, group, None)
        if set(PLACE) <= set(schema.names):
            column = (schema.metadata or {}).get(COLUMN)
            images = ExternalImages(column.decode() if column else None)
            self._external.setdefault(file, images)  # the first thread's, if there are several
        self._groups.put(where, table, table.nbytes)
        return table

    def _read(
        self, file: int, group: int, footer: pq.FileMetaData | None
    ) -> tuple[pa.Table, pa.Schema]:
        # Without a lock: other threads read other groups meanwhile.
        with open_parquet(self.index.files[file], footer=footer) as parquet:
            about = parquet.metadata
            self._footers.put(file, about, about.num_row_groups * about.num_columns * _CHUNK_BYTES)
            schema = parquet.schema_arrow
            columns = [*self.columns_read, *(PLACE if set(PLACE) <= set(schema.names) else ())]
            if self.named:
                known = [name for name in NAMES if name in schema.names]
                columns += [name for name in known[:1] if name not in columns]
            return parquet.read_row_group(group, columns=columns), schema


class _Cache(Generic[K, V]):
    """What was used last, of at most so many bytes, though always one; safe for several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
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
                self._held -= self._values.pop(key)[1]

    def put(self, key: K, value: V, size: int) -> None:
        with self._lock:
            if key in self._values:
                return
            self._values[key] = (value, size)
            self._held += size
            while self._held > self._limit and len(self._values) > 1:
                self._held -= self._values.popitem(last=False)[1][1]
