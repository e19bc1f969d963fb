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

The footer is a struct of Thrift's compact protocol, of which only what changes is replaced. Source: Parquet's
`parquet.thrift` (FileMetaData 4, RowGroup 1, 2, 6, ColumnChunk 2 to 7, ColumnMetaData 6 to 14), and
`thrift-compact-protocol.md` in Thrift's documentation.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.files import open_parquet, patiently, readable, remove_file, whole_file
from pipelines.storage.protocols import is_url

_MAGIC = b"PAR1"
_LEAST_PART = 5 * 2**20  # bytes of an object that S3 takes for a part of another one
_BOOLEANS, _NUMBER, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 5, 7, 8, (9, 10), 11, 12

Patch = tuple[int, int, bytes]
"""Bytes from one place in a buffer to another, and what stands there from now on."""


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
        source = patiently(lambda: remote.open("rb"), path)
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
        patches.append(_added(footer, old.plain, plain))
        if old.packed:
            patches.append(_added(footer, old.packed, packed))
        live += (_number(footer, old.packed[0]) if old.packed else 0) + packed
    new_footer = _patched(footer, 0, len(footer), patches)
    ending = len(new_footer).to_bytes(4, "little") + _MAGIC
    return pages + new_footer + ending, live + len(new_footer)


@dataclass(frozen=True)
class _RowGroup:
    """Where parts of a row group's description lie in a footer, each from one byte to another."""

    columns: list[tuple[int, int]]
    plain: tuple[int, int]  # total_byte_size, without compression
    packed: tuple[int, int] | None  # total_compressed_size, which writers may leave out


def _row_groups(footer: bytes) -> Iterator[_RowGroup]:
    at = _fields(footer, 0, until=4)[4][0]
    count, _, at = _list_header(footer, at)
    for _ in range(count):
        columns: list[tuple[int, int]] = []
        group = _fields(footer, at, elements={1: columns})
        yield _RowGroup(columns, group[2], group.get(6))
        at = max(end for _, end in group.values()) + 1


def _sizes(footer: bytes, column: int) -> tuple[int, int]:
    """Bytes of a ColumnChunk's pages, without and with compression."""
    about = _fields(footer, _fields(footer, column)[3][0])
    return _number(footer, about[6][0]), _number(footer, about[7][0])


def _moved(footer: bytes, start: int, end: int, by: int) -> bytes:
    """A ColumnChunk whose pages and indexes lie `by` bytes further behind."""
    chunk = _fields(footer, start)
    about = _fields(footer, chunk[3][0])
    places = [chunk[i] for i in (2, 4, 6) if i in chunk]
    places += [about[i] for i in (9, 10, 11, 14) if i in about]
    patches = [_added(footer, place, by) for place in places if _number(footer, place[0])]
    return _patched(footer, start, end, patches)


# ------------------------------------------------------------- Thrift's compact protocol


def _patched(buffer: bytes, start: int, end: int, patches: Sequence[Patch]) -> bytes:
    pieces = []
    for first, last, new in sorted(patches):
        pieces += [buffer[start:first], new]
        start = last
    return b"".join([*pieces, buffer[start:end]])


def _added(buffer: bytes, place: tuple[int, int], more: int) -> Patch:
    value = _number(buffer, place[0]) + more
    return *place, _varint((value << 1) ^ (value >> 63))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _read_varint(buffer: bytes, at: int) -> tuple[int, int]:
    """A whole number without a sign, and where it ends."""
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _number(buffer: bytes, at: int) -> int:
    value, _ = _read_varint(buffer, at)
    return (value >> 1) ^ -(value & 1)


def _fields(
    buffer: bytes,
    at: int,
    until: int | None = None,
    elements: Mapping[int, list[tuple[int, int]]] = MappingProxyType({}),
) -> dict[int, tuple[int, int]]:
    """Where the values of a struct's fields begin and end, by their numbers.

    Field `until` is the last one that is looked at, and only where it begins. Those of `elements` are
    lists, into which goes where each of their elements begins and ends.
    """
    found: dict[int, tuple[int, int]] = {}
    number = 0
    while header := buffer[at]:
        at += 1
        if header >> 4:
            number += header >> 4
        else:
            number, at = _number(buffer, at), _end(buffer, at, _NUMBER)
        start, kind = at, header & 15
        if number == until:
            return {**found, number: (start, start)}
        if number in elements:
            count, kind, at = _list_header(buffer, at)
            for _ in range(count):
                first, at = at, _end(buffer, at, kind)
                elements[number].append((first, at))
        elif kind not in _BOOLEANS:
            at = _end(buffer, at, kind)
        found[number] = (start, at)
    return found


def _list_header(buffer: bytes, at: int) -> tuple[int, int, int]:
    count, kind = buffer[at] >> 4, buffer[at] & 15
    at += 1
    if count == 15:
        count, at = _read_varint(buffer, at)
    return count, kind, at


def _end(buffer: bytes, at: int, kind: int) -> int:
    """Where a value that begins at `at` ends; one of BOOLEANS is an element of a list, of a byte."""
    if _NUMBER - 1 <= kind <= _NUMBER + 1:  # whole numbers of 16, 32, 64 bits
        while buffer[at] > 127:
            at += 1
        return at + 1
    if kind == _BINARY:
        length, at = _read_varint(buffer, at)
        return at + length
    if kind == _STRUCT:
        while header := buffer[at]:
            at += 1
            if not header >> 4:
                at = _end(buffer, at, _NUMBER)
            if header & 15 not in _BOOLEANS:
                at = _end(buffer, at, header & 15)
        return at + 1
    if kind in _LISTS:
        count, inner, at = _list_header(buffer, at)
        for _ in range(count):
            at = _end(buffer, at, inner)
        return at
    if kind == _MAP:
        count, at = _read_varint(buffer, at)
        kinds = buffer[at] if count else 0
        at += bool(count)
        for _ in range(count):
            at = _end(buffer, _end(buffer, at, kinds >> 4), kinds & 15)
        return at
    return at + (8 if kind == _DOUBLE else 1)


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
    about: Mapping[str, Any] = patiently(lambda: remote.fs.info(remote.path), path)
    if merge and about["size"] >= _LEAST_PART:
        beside: Any = path.with_name(
            f".{path.name}.tail"
        )  # of one name: a repeated update writes it over
        patiently(lambda: beside.write_bytes(tail), path)
        try:
            patiently(lambda: merge(remote.path, [remote.path, beside.path]), path)
        finally:
            remove_file(beside)
        return
    whole = patiently(lambda: path.read_bytes(), path) + tail
    patiently(lambda: path.write_bytes(whole), path)
