"""Parquet files on disks and in object stores: reading, atomic writing, schema checks."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.files import (
    FINAL_ERRORS,
    is_url,
    replace_atomically,
    store_unavailable,
    with_retries,
)
from vlv_model.errors import DataError

_BUFFER_BYTES = 1 << 20  # read buffer per column; eight times as large for a remote file
_SIGNATURE_BYTES = 28  # after the plain-text footer of an encrypted Parquet file


def write_parquet(path: Path, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file that readers see complete or not at all; `options` are Arrow's."""
    if is_url(path):
        # In memory first: if an error closed a remote file, the store would keep the truncated file.
        file = io.BytesIO()
        _write_rows(file, table, options)
        with_retries(lambda: path.write_bytes(file.getvalue()), path)
        return
    with replace_atomically(path) as temporary:
        _write_rows(temporary, table, options)


def _write_rows(file: Path | IO[bytes], table: pa.Table, options: dict[str, Any]) -> None:
    if table.num_rows:
        pq.write_table(table, file, compression="zstd", **options)
    else:  # no row group: Hugging Face `datasets` fails on an empty one
        pq.ParquetWriter(file, table.schema).close()


@contextmanager
def parquet_errors(file: Path) -> Iterator[None]:
    """Turn Arrow's errors about a damaged Parquet file into one DataError line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{file} no longer exists") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a readable Parquet file: {str(error)[:160]}") from error
    except Exception as error:
        if not is_url(file) or isinstance(error, FINAL_ERRORS):
            raise
        raise store_unavailable(file, error) from error


@contextmanager
def open_parquet(
    file: Path, in_pieces: bool = False, footer: pq.FileMetaData | None = None
) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading; DataError if it cannot be read.

    By default a row group is fetched whole, in few requests. `in_pieces` is for row groups that may
    exceed memory. `footer` is the file's `metadata` from an earlier opening, which saves reading it.
    """
    options: dict[str, Any] = {"pre_buffer": True}
    if in_pieces:
        options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES * (8 if is_url(file) else 1)}
    options["metadata"] = footer
    with parquet_errors(file):
        source: Any
        if is_url(file):
            source = with_retries(lambda: file.open("rb"), file)
        else:
            source = pa.OSFile(os.fsencode(file))
        with source, pq.ParquetFile(source, **options) as parquet:
            if footer is None:
                _check_not_encrypted(parquet.metadata, source, file)
            yield parquet


def _check_not_encrypted(footer: pq.FileMetaData, source: IO[bytes], file: Path) -> None:
    """Raise DataError if columns are encrypted under a plain-text footer.

    Arrow terminates the process (C++ `terminate`) when such a column's statistics are read. The
    footer length includes the signature, which reveals the encryption.
    """
    source.seek(-8, os.SEEK_END)
    if int.from_bytes(source.read(4), "little") == footer.serialized_size + _SIGNATURE_BYTES:
        raise DataError(f"{file} has encrypted columns: rewrite it without encryption")


def read_parquet_file(file: Path) -> pa.Table:
    """All rows of a small Parquet file."""
    with open_parquet(file) as parquet:
        return parquet.read()


def read_schema(file: Path) -> pa.Schema:
    """Schema of a Parquet file; DataError if it cannot be read or has duplicate column names."""
    with open_parquet(file) as parquet:
        return schema_of(parquet, file)


def schema_of(parquet: pq.ParquetFile, file: Path) -> pa.Schema:
    """Schema of an open Parquet file; DataError if it has duplicate column names."""
    schema = parquet.schema_arrow
    if repeated := [name for name, n in Counter(schema.names).items() if n > 1]:
        raise DataError(f"{file} has several columns named {repeated[0]!r}: rename all but one")
    return schema


def read_rows(files: list[Path], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some columns of all rows, in the order of the files."""
    for file in files:
        with open_parquet(file) as parquet:
            for batch in parquet.iter_batches(256, columns=columns):
                yield from batch.to_pylist()
