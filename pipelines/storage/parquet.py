"""Parquet files on disks and in object stores: read, written whole, their schemas checked."""

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

from pipelines.storage.files import whole_file
from pipelines.storage.protocols import is_url
from pipelines.storage.retries import ANSWERS, unavailable, with_retries
from vlv_model.errors import DataError

_PIECE = 1 << 20  # bytes of a column that are read at a time; eight times as many of a remote file
_SIGNATURE = 28  # bytes of the signature behind the plain footer of an encrypted Parquet file


def write_parquet(path: Path, table: pa.Table, **options: Any) -> None:
    """Write one Parquet file, whole or not at all."""
    if is_url(path):
        # In memory first: a remote file that is closed by an error would be kept, cut.
        file = io.BytesIO()
        _write_rows(file, table, options)
        with_retries(lambda: path.write_bytes(file.getvalue()), path)
        return
    with whole_file(path) as temporary:
        _write_rows(temporary, table, options)


def _write_rows(file: Path | IO[bytes], table: pa.Table, options: dict[str, Any]) -> None:
    if table.num_rows:
        pq.write_table(table, file, compression="zstd", **options)
    else:  # no row group: Hugging Face `datasets` fails at one without a row
        pq.ParquetWriter(file, table.schema).close()


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn what Arrow says of a damaged Parquet file into one DataError line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{file} is not there any more") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a readable Parquet file: {str(error)[:160]}") from error
    except Exception as error:
        if not is_url(file) or isinstance(error, ANSWERS):
            raise
        raise unavailable(file, error) from error


@contextmanager
def open_parquet(
    file: Path, in_pieces: bool = False, footer: pq.FileMetaData | None = None
) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read from; DataError where it is none.

    `in_pieces` for row groups that may be larger than memory: they are not fetched whole, as they
    are otherwise, in few requests. `footer` is the file's `metadata` of an earlier time, which is
    then not read again.
    """
    options: dict[str, Any] = {"pre_buffer": True}
    if in_pieces:
        options = {"pre_buffer": False, "buffer_size": _PIECE * (8 if is_url(file) else 1)}
    options["metadata"] = footer
    with readable(file):
        source: Any
        if is_url(file):
            source = with_retries(lambda: file.open("rb"), file)
        else:
            source = pa.OSFile(os.fsencode(file))
        with source, pq.ParquetFile(source, **options) as parquet:
            if footer is None:
                _check_plain(parquet.metadata, source, file)
            yield parquet


def _check_plain(footer: pq.FileMetaData, source: IO[bytes], file: Path) -> None:
    """Refuse a file with encrypted columns under a footer that is not encrypted.

    Arrow ends the process (C++'s terminate) where the statistics of such a column are asked for. The
    footer's length counts its signature, which it is told by.
    """
    source.seek(-8, os.SEEK_END)
    if int.from_bytes(source.read(4), "little") == footer.serialized_size + _SIGNATURE:
        raise DataError(f"{file} has encrypted columns: write it anew without encryption")


def read_parquet_file(file: Path) -> pa.Table:
    """All of a small Parquet file."""
    with open_parquet(file) as parquet:
        return parquet.read()


def read_schema(file: Path) -> pa.Schema:
    """Schema of one Parquet file; DataError where it is none, or names a column twice."""
    with open_parquet(file) as parquet:
        return schema_of(parquet, file)


def schema_of(parquet: pq.ParquetFile, file: Path) -> pa.Schema:
    """Schema of a Parquet file that is open; DataError where it names a column twice."""
    schema = parquet.schema_arrow
    if repeated := [name for name, n in Counter(schema.names).items() if n > 1]:
        raise DataError(f"{file} has several columns named {repeated[0]!r}: rename all but one")
    return schema


def read_rows(files: list[Path], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of some columns, one after the other, in the order of the files."""
    for file in files:
        with open_parquet(file) as parquet:
            for batch in parquet.iter_batches(256, columns=columns):
                yield from batch.to_pylist()
