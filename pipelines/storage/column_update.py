"""Replaces the values of some columns of a Parquet file without rewriting the other columns.

A Parquet file ends with its footer, which says where the pages of each column of each row group lie.
To replace columns, we append new pages for them and a new footer:

    PAR1 │ pages of all columns │ old footer │ pages of the new columns │ new footer │ PAR1
         └────────────── copied, not decoded ┘

The old pages and the old footer stay in the file; readers ignore them. Once they would be half of the
file, the caller has to rewrite it instead. The file system makes the copy (by reference where it can
share blocks), or the store does (S3 and GCS can compose an object from others). Otherwise the bytes
pass through this process.

Only the changed bytes of the footer are replaced. Source: Parquet's `parquet.thrift` (FileMetaData 4,
RowGroup 1, 2, 6, ColumnChunk 2 to 7, ColumnMetaData 6 to 14).
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

from pipelines.storage.files import is_url, remove_file, replace_atomically, with_retries
from pipelines.storage.parquet import open_parquet, parquet_errors
from pipelines.storage.thrift import (
    add_to_integer,
    apply_patches,
    list_header,
    read_integer,
    struct_fields,
)

_MAGIC = b"PAR1"
_MIN_PART_BYTES = 5 * 2**20  # smallest object that S3 accepts as a part of another one


def update_columns(path: Path, columns: pa.Table) -> bool:
    """Replace flat columns of a Parquet file by `columns`, whose rows are in the file's order.

    Readers see the old file or the new one. Returns False, and changes nothing, if more than half of
    the new file would be unused. Raises DataError if the file cannot be read, and ValueError for
    columns that do not fit it.
    """
    with open_parquet(path) as parquet:
        old, schema = parquet.metadata, parquet.schema_arrow
    if columns.num_rows != old.num_rows:
        raise ValueError(f"{path} has {old.num_rows} rows, got {columns.num_rows} values")
    leaves = {old.schema.column(i).path: i for i in range(old.num_columns)}
    if unknown := [name for name in columns.column_names if name not in leaves]:
        raise ValueError(f"{path} has no flat column {unknown[0]!r}")
    columns = columns.cast(pa.schema([schema.field(name) for name in columns.column_names]))
    if not columns.num_rows:
        return True
    group_rows = [old.row_group(i).num_rows for i in range(old.num_row_groups)]
    size, footer = _read_footer(path)
    replaced = [leaves[name] for name in columns.column_names]
    tail, used = _tail(footer, size, replaced, _parquet_bytes(columns, group_rows))
    if size + len(tail) > 2 * used:
        return False
    _append(path, tail)
    return True


def _read_footer(path: Path) -> tuple[int, bytes]:
    """Size of a Parquet file in bytes, and its footer."""
    with parquet_errors(path):
        remote: Any = path
        source = with_retries(lambda: remote.open("rb"), path)
        with source:
            size = source.seek(0, os.SEEK_END)
            source.seek(size - 8)
            length = int.from_bytes(source.read(4), "little")
            source.seek(size - 8 - length)
            return size, source.read(length)


def _parquet_bytes(columns: pa.Table, group_rows: Sequence[int]) -> bytes:
    """A Parquet file of `columns` alone, with row groups of the given numbers of rows."""
    file = io.BytesIO()
    with pq.ParquetWriter(file, columns.schema, compression="zstd") as writer:
        first = 0
        for rows in group_rows:
            writer.write_table(columns.slice(first, rows), row_group_size=max(1, rows))
            first += rows
    return file.getvalue()


def _tail(footer: bytes, size: int, replaced: Sequence[int], new_file: bytes) -> tuple[bytes, int]:
    """The bytes to append to a file of `size` bytes with this footer, and the bytes then in use.

    Column `i` of the Parquet file `new_file` replaces column `replaced[i]`.
    """
    length = int.from_bytes(new_file[-8:-4], "little")
    pages, new_columns_footer = new_file[len(_MAGIC) : -8 - length], new_file[-8 - length : -8]
    shift = size - len(_MAGIC)
    patches, used = [], 0
    for old, new in zip(_row_groups(footer), _row_groups(new_columns_footer), strict=True):
        uncompressed = compressed = 0
        for column, new_span in zip(replaced, new.columns, strict=True):
            start, end = old.columns[column]
            before, after = _page_bytes(footer, start), _page_bytes(new_columns_footer, new_span[0])
            uncompressed += after[0] - before[0]
            compressed += after[1] - before[1]
            patches.append((start, end, _shifted_column(new_columns_footer, *new_span, shift)))
        patches.append(add_to_integer(footer, old.uncompressed, uncompressed))
        if old.compressed:
            patches.append(add_to_integer(footer, old.compressed, compressed))
        used += (read_integer(footer, old.compressed[0]) if old.compressed else 0) + compressed
    new_footer = apply_patches(footer, 0, len(footer), patches)
    ending = len(new_footer).to_bytes(4, "little") + _MAGIC
    return pages + new_footer + ending, used + len(new_footer)


@dataclass(frozen=True)
class _RowGroup:
    """Byte spans (start, end) of the fields of a RowGroup struct in a footer."""

    columns: list[tuple[int, int]]
    uncompressed: tuple[int, int]  # total_byte_size
    compressed: tuple[int, int] | None  # total_compressed_size, which is optional


def _row_groups(footer: bytes) -> Iterator[_RowGroup]:
    position = struct_fields(footer, 0, until=4)[4][0]
    count, _, position = list_header(footer, position)
    for _ in range(count):
        columns: list[tuple[int, int]] = []
        group = struct_fields(footer, position, elements={1: columns})
        yield _RowGroup(columns, group[2], group.get(6))
        position = max(end for _, end in group.values()) + 1


def _page_bytes(footer: bytes, column: int) -> tuple[int, int]:
    """Bytes of a ColumnChunk's pages: uncompressed, compressed."""
    metadata = struct_fields(footer, struct_fields(footer, column)[3][0])
    return read_integer(footer, metadata[6][0]), read_integer(footer, metadata[7][0])


def _shifted_column(footer: bytes, start: int, end: int, shift: int) -> bytes:
    """A ColumnChunk struct whose pages and indexes lie `shift` bytes later in the file."""
    chunk = struct_fields(footer, start)
    metadata = struct_fields(footer, chunk[3][0])
    offsets = [chunk[i] for i in (2, 4, 6) if i in chunk]
    offsets += [metadata[i] for i in (9, 10, 11, 14) if i in metadata]
    patches = [
        add_to_integer(footer, span, shift) for span in offsets if read_integer(footer, span[0])
    ]
    return apply_patches(footer, start, end, patches)


# ------------------------------------------------------------------ appending


def _append(path: Path, tail: bytes) -> None:
    """Append `tail` to a file; readers see the old file or the new one."""
    if is_url(path):
        _append_remote(path, tail)
        return
    with (
        replace_atomically(path) as temporary,
        open(path, "rb") as old,
        open(temporary, "wb") as new,
    ):
        _copy(old, new)
        new.write(tail)


def _copy(old: Any, new: Any) -> None:
    """Copy an open file in the kernel where possible: a file system may then share its blocks."""
    left = os.fstat(old.fileno()).st_size
    with suppress(OSError):  # another file system or kernel
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
    info: Mapping[str, Any] = with_retries(lambda: remote.fs.info(remote.path), path)
    if merge and info["size"] >= _MIN_PART_BYTES:
        # Always the same name: a repeated update overwrites it.
        tail_file: Any = path.with_name(f".{path.name}.tail")
        with_retries(lambda: tail_file.write_bytes(tail), path)
        try:
            with_retries(lambda: merge(remote.path, [remote.path, tail_file.path]), path)
        finally:
            remove_file(tail_file)
        return
    whole = with_retries(lambda: path.read_bytes(), path) + tail
    with_retries(lambda: path.write_bytes(whole), path)
