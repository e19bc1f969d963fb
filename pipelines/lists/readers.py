"""Reads the files of URL lists in batches of rows: Parquet, CSV, TSV, JSONL and JSON.

Text files (UTF-8, with or without a byte order mark, plain or .gz) give columns of strings; blank lines
are skipped.

- CSV fields may be quoted. TSV has no quoting: a quote is an ordinary character. Only WIT's TSV, which
  is recognised by its columns, is quoted.
- A list of two columns without a header, as CC3M and CC12M are published, is read as URLs and captions.
- A damaged file, a file of another format, and an ambiguous CSV line raise one DataError that names the
  file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.lists.json_lists import read_objects
from pipelines.storage.files import is_url
from pipelines.storage.parquet import open_parquet, schema_of
from pipelines.storage.tables import PLAN
from vlv_model.errors import DataError

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")

_BATCH_ROWS = 16_384
_MAX_FIELD = 1 << 24  # characters of one CSV field
_WIT_COLUMN = "caption_reference_description"  # identifies a WIT list
_URL = re.compile(r"\s*https?://", re.IGNORECASE)  # no column name begins like this
# Errors of opening, decompressing and decoding a text file.
_READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeDecodeError)


def format_of(file: Path) -> str:
    """The suffix that names a file's format, in lower case and without `.gz`; a plan is Parquet."""
    name = file.with_suffix("") if _is_gzip(file) else file
    suffix = name.suffix.lower()
    return ".parquet" if suffix == PLAN else suffix


def _is_gzip(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def read_tables(file: Path) -> Iterator[pa.Table]:
    """The rows of a metadata file in batches; a file without rows may give one empty table.

    Raises DataError for an unknown format, a damaged file and a duplicate column name.
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
    """Some columns (default: all) of a Parquet file, at most `rows` rows at a time.

    `columns` may be a function that chooses the columns of each row group by its statistics.
    """
    with open_parquet(file, in_pieces=True) as parquet:
        schema, metadata = schema_of(parquet, file), parquet.metadata
        if not metadata.num_rows:
            yield schema.empty_table()  # the caller still checks its columns
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        chosen = [columns(group) if callable(columns) else columns for group in groups]
        # Neighbouring row groups with the same columns are read together.
        for _, run in groupby(range(len(chosen)), chosen.__getitem__):
            ids = list(run)
            for batch in parquet.iter_batches(rows, row_groups=ids, columns=chosen[ids[0]]):
                yield pa.Table.from_batches([batch])


def _text(file: Path) -> IO[str]:
    if not is_url(file):
        opener: Callable[..., Any] = gzip.open if _is_gzip(file) else open
        return opener(file, "rt", encoding="utf-8-sig", newline="")
    binary: Any = file.open("rb")
    if _is_gzip(file):
        binary = gzip.GzipFile(fileobj=binary)
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")


def _csv(file: Path) -> Iterator[pa.Table]:
    csv.field_size_limit(_MAX_FIELD)
    is_tsv = format_of(file) == ".tsv"
    lines_before = 0  # read by a previous reader
    try:
        with _text(file) as lines:
            # Strict: otherwise an unclosed quote would turn all following lines into one text.
            reader = csv.reader(lines, strict=True)
            if is_tsv:
                reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            names, rows = _names((row for row in reader if row), file)
            _check_unique(names, file)
            if is_tsv and _WIT_COLUMN in names:  # its texts span several lines
                is_tsv, lines_before = False, reader.line_num
                reader = csv.reader(lines, delimiter="\t", strict=True)
                rows = (row for row in reader if row)
            yield pa.table({name: pa.array([], pa.string()) for name in names})
            checked = _check_width(
                _check_one_line(rows, len(names)) if is_tsv else rows, len(names)
            )
            while batch := list(islice(checked, _BATCH_ROWS)):
                columns = {
                    name: pa.array([row[i] if i < len(row) else None for row in batch], pa.string())
                    for i, name in enumerate(names)
                }
                yield pa.table(columns)
    except csv.Error as error:
        advice = (
            "a TSV has one row per line and no quoting: use CSV or Parquet for texts with tabs or line "
            "breaks"
            if is_tsv
            else "quote texts that contain a delimiter or a quote, and double the quotes in them"
        )
        kind = "TSV" if format_of(file) == ".tsv" else "CSV"
        raise DataError(
            f"{file} line {lines_before + reader.line_num} cannot be read as {kind}: {error}: {advice}"
        ) from None
    except _READ_ERRORS as error:
        raise DataError(f"{file} cannot be read as CSV: {_reason(error)}") from None


def _names(rows: Iterator[list[str]], file: Path) -> tuple[list[str], Iterator[list[str]]]:
    """Column names and rows of a file. DataError if it needs a header and has none."""
    first = next(rows, [])
    urls = [i for i, value in enumerate(first) if _URL.match(value)]
    if not urls:
        return first, rows
    if len(first) > 2 or len(urls) > 1:
        raise DataError(
            f"{file} has no header line with column names (its first line has "
            f"'{first[urls[0]][:60]}'): add one, with url for the column of URLs"
        )
    names = ["caption"] * len(first)
    names[urls[0]] = "url"
    return names, chain([first], rows)


def _check_width(rows: Iterable[list[str]], width: int) -> Iterator[list[str]]:
    """The rows. Raises csv.Error for a value beyond the header; short rows are padded later."""
    for row in rows:
        if len(row) > width and any(row[width:]):  # probably an unquoted text with a comma
            raise csv.Error(f"{len(row)} values under a header of {width} names")
        yield row


def _check_one_line(rows: Iterable[list[str]], width: int) -> Iterator[list[str]]:
    """The rows of a TSV. Raises csv.Error if a quoted text seems to span two lines."""
    previous: list[str] = []
    for row in rows:
        last = previous[-1] if previous else ""
        is_open = last.startswith('"') and last.count('"') % 2 == 1
        if is_open and len(row) < width and row[0].count('"') % 2 == 1:
            raise csv.Error("it seems to continue a quoted text of the line before")
        previous = row
        yield row


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} is not UTF-8: convert it to UTF-8"
    return str(error)


def _check_unique(names: list[str], file: Path) -> None:
    repeated = [name for name, n in Counter(names).items() if n > 1 and name]
    if repeated:  # several columns without a name are harmless: nobody can refer to them
        raise DataError(f"{file} has several columns named {repeated[0]!r}: rename all but one")


def _jsonl(file: Path) -> Iterator[pa.Table]:
    try:
        with _text(file) as lines:
            numbered = ((i, line) for i, line in enumerate(lines, start=1) if line.strip())
            yield from _tables(_row_of_line(line, f"{file} line {i}") for i, line in numbered)
    except _READ_ERRORS as error:
        raise DataError(f"{file} cannot be read as JSONL: {_reason(error)}") from None


def _json(file: Path) -> Iterator[pa.Table]:
    try:
        with _text(file) as text:
            objects = enumerate(read_objects(text), start=1)
            yield from _tables(as_texts(row, f"{file} row {i}") for i, row in objects)
    except (*_READ_ERRORS, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {_reason(error)}") from None


def _tables(rows: Iterator[dict[str, str | None]]) -> Iterator[pa.Table]:
    """The rows in batches; a column appears from the first batch that has it."""
    names: dict[str, None] = {}
    while batch := list(islice(rows, _BATCH_ROWS)):
        for row in batch:
            names.update(dict.fromkeys(row))
        yield pa.table(
            {name: pa.array([row.get(name) for row in batch], pa.string()) for name in names}
        )


def _row_of_line(line: str, where: str) -> dict[str, str | None]:
    try:
        return as_texts(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not a JSON object: {str(error)[:120]}") from None


def as_texts(row: Any, where: str) -> dict[str, str | None]:
    """A JSON object with its values as text; null and NaN become None."""
    try:
        if not isinstance(row, dict):
            raise ValueError(f"it is a {type(row).__name__}")
        texts = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in row.items()
            if value is not None and value == value
        }
        "".join([*row, *texts.values()]).encode()  # raises for a lone surrogate
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not a JSON object: {str(error)[:120]}") from None
    return {name: texts.get(name) for name in row}


_READERS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    ".parquet": read_parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
}
