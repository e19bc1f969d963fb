"""The files that lists of URLs come in, a batch of rows at a time: Parquet, CSV and JSONL.

CSV and JSONL (UTF-8, with or without a byte order mark, plain or .gz) give columns of strings;
blank lines are passed over. A file that is damaged, or is not what its name says, ends as one
DataError that names it: so does a line of CSV that could be read in several ways.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
    name = file.with_suffix("") if _is_packed(file) else file
    return name.suffix.lower()


def _is_packed(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


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
        opener: Callable[..., Any] = gzip.open if _is_packed(file) else open
        return opener(file, "rt", encoding="utf-8-sig", newline="")
    binary: Any = file.open("rb")
    if _is_packed(file):
        binary = gzip.GzipFile(fileobj=binary)
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")


def _csv(file: Path) -> Iterator[pa.Table]:
    csv.field_size_limit(_MAX_FIELD)
    try:
        with _text(file) as lines:
            delimiter = "\t" if format_of(file) == ".tsv" else ","
            # Not strict, a quote that nothing closes takes all lines behind it for one text.
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            rows = (row for row in reader if row)
            names = next(rows, [])
            _refuse_repeats(names, file)
            yield pa.table({name: pa.array([], pa.string()) for name in names})
            while batch := list(islice(_of_width(rows, len(names), reader), _BATCH_ROWS)):
                columns = {
                    name: pa.array([row[i] if i < len(row) else None for row in batch], pa.string())
                    for i, name in enumerate(names)
                }
                yield pa.table(columns)
    except csv.Error as error:
        raise DataError(
            f"{file} line {reader.line_num} cannot be read as CSV: {error}: texts with a "
            "delimiter or a quote in them have to be quoted, and the quotes within doubled"
        ) from None
    except _UNREADABLE as error:
        raise DataError(f"{file} cannot be read as CSV: {_why(error)}") from None


def _of_width(rows: Iterable[list[str]], width: int, reader: Any) -> Iterator[list[str]]:
    """The rows, of which none has a value beyond the header; short ones are filled up later."""
    for row in rows:
        if len(row) > width and any(row[width:]):  # a text with a comma, cut into two
            raise csv.Error(f"{len(row)} values under a header of {width} names")
        yield row


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} is not UTF-8: write it anew as UTF-8"
    return str(error)


def _refuse_repeats(names: list[str], file: Path) -> None:
    repeated = [name for name, n in Counter(names).items() if n > 1 and name]
    if repeated:  # columns without a name may be many: nobody can mean one of them
        raise DataError(f"{file} has several columns named {repeated[0]!r}: rename all but one")


def _jsonl(file: Path) -> Iterator[pa.Table]:
    names: dict[str, None] = {}
    try:
        with _text(file) as lines:
            numbered = ((i, line) for i, line in enumerate(lines, start=1) if line.strip())
            while batch := list(islice(numbered, _BATCH_ROWS)):
                rows = [_json_object(line, f"{file} line {i}") for i, line in batch]
                for row in rows:
                    names.update(dict.fromkeys(row))
                yield pa.table(
                    {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
                )
    except _UNREADABLE as error:
        raise DataError(f"{file} cannot be read as JSONL: {_why(error)}") from None


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
