"""Other values for some columns of a Parquet file, while the bytes of all others stay as they are.

A Parquet file ends with its footer, which says where the pages of each column of each row group lie. So a
file with other values in some columns is the old file, then pages for these columns, then a footer that
leads to them:

    PAR1 │ pages of all columns │ old footer │ pages of the changed columns │ new footer │ PAR1
         └────────────── copied, not decoded ┘

Pages and footers that nothing leads to any more stay in the file, which every reader passes over; where
they would be half of it, the file is to be written whole. The copy is made by the file system (one that
shares blocks copies nothing) or by the store (S3 and GCS put one object together from others); only where
neither can, the bytes go through this process.

Only what changes of the footer is replaced. Source: Parquet's `parquet.thrift` (FileMetaData 4, RowGroup 1, 2, 6,
ColumnChunk 2 to 7, ColumnMetaData 6 to 14).
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.files import remove_file, whole_file
from pipelines.storage.parquet import open_parquet, readable
from pipelines.storage.protocols import is_url
from pipelines.storage.retries import with_retries
from pipelines.storage.thrift import fields, list_header, number_at, patched, with_added

_MAGIC = b"PAR1"
_LEAST_PART = 5 * 2**20  # bytes of an object that S3 takes for a part of another one


def update_columns(path: Path, columns: pa.Table) -> bool:
    """Give the rows of a Parquet file other values in `columns`, which are flat and in its order.

    Readers see the file as it was, or as it is then. False, and nothing is done, where half of the file
    would be bytes that nothing leads to. Raises DataError where the file cannot be read, and ValueError
    for columns that do not fit to it.
    """
    with open_parquet(path) as parquet:
        old, schema = parquet.metadata, parquet.schema_arrow
    if columns.num_rows != old.num_rows:
        raise ValueError(f"{path} has {old.num_rows} rows, {columns.num_rows} values came")
    leaves = {old.schema.column(i).path: i for i in range(old.num_columns)}
    if strange := [name for name in columns.column_names if name not in leaves]:
        raise ValueError(f"{path} has no flat column {strange[0]!r}")
    columns = columns.cast(pa.schema([schema.field(name) for name in columns.column_names]))
    if not columns.num_rows:
        return True
    groups = [old.row_group(i).num_rows for i in range(old.num_row_groups)]
    size, footer = _footer(path)
    replaced = [leaves[name] for name in columns.column_names]
    tail, live = _tail(footer, size, replaced, _written(columns, groups))
    if size + len(tail) > 2 * live:
        return False
    _append(path, tail)
    return True


def _footer(path: Path) -> tuple[int, bytes]:
    """Size of a Parquet file in bytes, and its footer."""
    with readable(path):
        remote: Any = path
        source = with_retries(lambda: remote.open("rb"), path)
        with source:
            size = source.seek(0, os.SEEK_END)
            source.seek(size - 8)
            length = int.from_bytes(source.read(4), "little")
            source.seek(size - 8 - length)
            return size, source.read(length)


def _written(columns: pa.Table, groups: Sequence[int]) -> bytes:
    """A Parquet file of the columns alone, in row groups of the given numbers of rows."""
    file = io.BytesIO()
    with pq.ParquetWriter(file, columns.schema, compression="zstd") as writer:
        first = 0
        for rows in groups:
            writer.write_table(columns.slice(first, rows), row_group_size=max(1, rows))
            first += rows
    return file.getvalue()


def _tail(footer: bytes, size: int, replaced: Sequence[int], changed: bytes) -> tuple[bytes, int]:
    """What follows a file of `size` bytes and `footer`, and how many bytes are then led to.

    Column `i` of the file `changed` takes the place of column `replaced[i]`.
    """
    length = int.from_bytes(changed[-8:-4], "little")
    pages, changed_footer = changed[len(_MAGIC) : -8 - length], changed[-8 - length : -8]
    moved = size - len(_MAGIC)
    patches, live = [], 0
    for old, new in zip(_row_groups(footer), _row_groups(changed_footer), strict=True):
        plain = packed = 0
        for ours, theirs in zip(replaced, new.columns, strict=True):
            start, end = old.columns[ours]
            before, after = _sizes(footer, start), _sizes(changed_footer, theirs[0])
            plain += after[0] - before[0]
            packed += after[1] - before[1]
            patches.append((start, end, _moved(changed_footer, *theirs, moved)))
        patches.append(with_added(footer, old.plain, plain))
        if old.packed:
            patches.append(with_added(footer, old.packed, packed))
        live += (number_at(footer, old.packed[0]) if old.packed else 0) + packed
    new_footer = patched(footer, 0, len(footer), patches)
    ending = len(new_footer).to_bytes(4, "little") + _MAGIC
    return pages + new_footer + ending, live + len(new_footer)


@dataclass(frozen=True)
class _RowGroup:
    """Where parts of a row group's description lie in a footer, each from one byte to another."""

    columns: list[tuple[int, int]]
    plain: tuple[int, int]  # total_byte_size, without compression
    packed: tuple[int, int] | None  # total_compressed_size, which writers may leave out


def _row_groups(footer: bytes) -> Iterator[_RowGroup]:
    at = fields(footer, 0, until=4)[4][0]
    count, _, at = list_header(footer, at)
    for _ in range(count):
        columns: list[tuple[int, int]] = []
        group = fields(footer, at, elements={1: columns})
        yield _RowGroup(columns, group[2], group.get(6))
        at = max(end for _, end in group.values()) + 1


def _sizes(footer: bytes, column: int) -> tuple[int, int]:
    """Bytes of a ColumnChunk's pages, without and with compression."""
    about = fields(footer, fields(footer, column)[3][0])
    return number_at(footer, about[6][0]), number_at(footer, about[7][0])


def _moved(footer: bytes, start: int, end: int, by: int) -> bytes:
    """A ColumnChunk whose pages and indexes lie `by` bytes further behind."""
    chunk = fields(footer, start)
    about = fields(footer, chunk[3][0])
    places = [chunk[i] for i in (2, 4, 6) if i in chunk]
    places += [about[i] for i in (9, 10, 11, 14) if i in about]
    patches = [with_added(footer, place, by) for place in places if number_at(footer, place[0])]
    return patched(footer, start, end, patches)


# ------------------------------------------------------------------ the file with its tail


def _append(path: Path, tail: bytes) -> None:
    """Put `tail` behind a file, seen whole or not at all."""
    if is_url(path):
        _append_remote(path, tail)
        return
    with whole_file(path) as temporary, open(path, "rb") as old, open(temporary, "wb") as new:
        _copy(old, new)
        new.write(tail)


def _copy(old: Any, new: Any) -> None:
    """Copy an open file within the kernel where it can, which a file system may do by reference."""
    left = os.fstat(old.fileno()).st_size
    with suppress(OSError):  # other file systems, or another kernel
        while left and hasattr(os, "copy_file_range"):
            if not (copied := os.copy_file_range(old.fileno(), new.fileno(), left)):
                break
            left -= copied
    if left:
        old.seek(new.seek(0, os.SEEK_END))
        shutil.copyfileobj(old, new, 2**20)


def _append_remote(path: Path, tail: bytes) -> None:
    remote: Any = path
    merge: Callable[..., Any] | None = getattr(remote.fs, "merge", None)
    about: Mapping[str, Any] = with_retries(lambda: remote.fs.info(remote.path), path)
    if merge and about["size"] >= _LEAST_PART:
        beside: Any = path.with_name(
            f".{path.name}.tail"
        )  # of one name: a repeated update writes it over
        with_retries(lambda: beside.write_bytes(tail), path)
        try:
            with_retries(lambda: merge(remote.path, [remote.path, beside.path]), path)
        finally:
            remove_file(beside)
        return
    whole = with_retries(lambda: path.read_bytes(), path) + tail
    with_retries(lambda: path.write_bytes(whole), path)
