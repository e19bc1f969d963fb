"""The files that lists of URLs come in, a batch of rows at a time: Parquet, CSV and JSONL.

CSV and JSONL (UTF-8, with or without a byte order mark, plain or .gz) give columns of strings.
A file that is damaged, or is not what its name says, ends as one DataError that names it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import is_url
from pipelines.places import open_parquet
from pipelines.storage import schema_of
from vlv_model.errors import DataError

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")

_BATCH_ROWS = 16_384
_MAX_FIELD = 1 << 24  # characters of one CSV field
# What opening, decompressing and decoding a text file can raise.
_UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)


def format_of(file: Path) -> str:
    """The suffix that tells a file's format, in lower case, without `.gz`."""
    name = file.with_suffix("") if file.suffix == ".gz" else file
    return name.suffix.lower()


def read_tables(file: Path) -> Iterator[pa.Table]:
    """The rows of a Parquet, CSV, TSV or JSONL file; of an empty one a table without rows.

    Raises DataError for a file of another format, a damaged one, and a repeated column name.
    """
    reader = _READERS.get(format_of(file))
    if reader is None:
        raise DataError(f"{file}: metadata are read from {', '.join(SUFFIXES)} files")
    return reader(file)


def read_parquet(
    file: Path,
    columns: list[str] | Callable[[pq.RowGroupMetaData], list[str]] | None = None,
    rows: int = _BATCH_ROWS,
) -> Iterator[pa.Table]:
    """Some columns, or all, of a Parquet file, at most `rows` rows at a time.

    `columns` may be a function that chooses them for each row group, by its statistics.
    """
    with open_parquet(file, in_pieces=True) as parquet:
        schema, about = schema_of(parquet, file), parquet.metadata
        if not about.num_rows:
            yield schema.empty_table()  # its columns are checked all the same
        groups = map(about.row_group, range(about.num_row_groups))
        chosen = [columns(group) if callable(columns) else columns for group in groups]
        for _, alike in groupby(range(len(chosen)), chosen.__getitem__):
            some = list(alike)
            for batch in parquet.iter_batches(rows, row_groups=some, columns=chosen[some[0]]):
                yield pa.Table.from_batches([batch])


def _text(file: Path) -> IO[str]:
    if not is_url(file):
        opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
        return opener(file, "rt", encoding="utf-8-sig", newline="")
    binary: Any = file.open("rb")
    if file.suffix == ".gz":
        binary = gzip.GzipFile(fileobj=binary)
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")


def _csv(file: Path) -> Iterator[pa.Table]:
    csv.field_size_limit(_MAX_FIELD)
    try:
        with _text(file) as lines:
            rows = csv.reader(lines, delimiter="\t" if format_of(file) == ".tsv" else ",")
            names = next(rows, [])
            _refuse_repeats(names, file)
            yield pa.table({name: pa.array([], pa.string()) for name in names})
            while batch := list(islice(rows, _BATCH_ROWS)):
                # Short lines are filled up; what is beyond the header has no name.
                columns = {
                    name: pa.array([row[i] if i < len(row) else None for row in batch], pa.string())
                    for i, name in enumerate(names)
                }
                yield pa.table(columns)
    except (csv.Error, *_UNREADABLE) as error:
        raise DataError(f"{file} cannot be read as CSV: {error}") from None


def _refuse_repeats(names: list[str], file: Path) -> None:
    repeated = [name for name, n in Counter(names).items() if n > 1 and name]
    if repeated:  # columns without a name may be many: nobody can mean one of them
        raise DataError(f"{file} has several columns named {repeated[0]!r}: rename all but one")


def _jsonl(file: Path) -> Iterator[pa.Table]:
    names: dict[str, None] = {}
    number = 0
    try:
        with _text(file) as lines:
            while batch := list(islice(lines, _BATCH_ROWS)):
                rows = []
                for line in batch:
                    number += 1
                    if line.strip():
                        rows.append(_json_object(line, f"{file} line {number}"))
                        names.update(dict.fromkeys(rows[-1]))
                yield pa.table(
                    {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
                )
    except _UNREADABLE as error:
        raise DataError(f"{file} cannot be read as JSONL: {error}") from None


def _json_object(line: str, where: str) -> dict[str, str | None]:
    """A line's object with its values as text; null and NaN are null."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"it is a {type(row).__name__}")
        texts = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in row.items()
            if value is not None and value == value
        }
        "".join([*row, *texts.values()]).encode()  # raises for a lone surrogate, which is no text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not a JSON object: {str(error)[:120]}") from None
    return {name: texts.get(name) for name in row}


_READERS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    ".parquet": read_parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
}
