"""The files that lists of URLs come in, a batch of rows at a time: Parquet, CSV, JSONL and JSON.

CSV, JSONL and JSON (UTF-8, with or without a byte order mark, plain or .gz) give columns of strings;
blank lines are passed over. In CSV a text may stand in quotes; a TSV has no quoting: a quote is a
character as any other (but WIT's, which are told by their columns). A list of two columns without a
line of names, as CC3M and CC12M are published, is read as addresses and captions. A file that is
damaged, or is not what its name says, ends as one DataError that names it: so does a line of CSV
that could be read in several ways.
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
from pipelines.storage.parquet import open_parquet, schema_of
from pipelines.storage.protocols import is_url
from vlv_model.errors import DataError

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")

_BATCH_ROWS = 16_384
_MAX_FIELD = 1 << 24  # characters of one CSV field
_OF_WIT = "caption_reference_description"  # a column by which WIT is told
_ADDRESS = re.compile(r"\s*https?://", re.IGNORECASE)  # what no name of a column begins with
# What opening, decompressing and decoding a text file can raise.
_UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)


def format_of(file: Path) -> str:
    """The suffix that tells a file's format, in lower case, without `.gz`."""
    name = file.with_suffix("") if _is_packed(file) else file
    return name.suffix.lower()


def _is_packed(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def read_tables(file: Path) -> Iterator[pa.Table]:
    """The rows of a Parquet, CSV, TSV, JSONL or JSON file; of an empty one a table without rows.

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
    is_tsv = format_of(file) == ".tsv"
    before = 0  # lines that another reader has read
    try:
        with _text(file) as lines:
            # Not strict, a quote that nothing closes takes all lines behind it for one text.
            reader = csv.reader(lines, strict=True)
            if is_tsv:
                reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            names, rows = _names((row for row in reader if row), file)
            _refuse_repeats(names, file)
            if is_tsv and _OF_WIT in names:  # its texts go over several lines
                is_tsv, before = False, reader.line_num
                reader = csv.reader(lines, delimiter="\t", strict=True)
                rows = (row for row in reader if row)
            yield pa.table({name: pa.array([], pa.string()) for name in names})
            wide = _of_width(_of_one_line(rows, len(names)) if is_tsv else rows, len(names))
            while batch := list(islice(wide, _BATCH_ROWS)):
                columns = {
                    name: pa.array([row[i] if i < len(row) else None for row in batch], pa.string())
                    for i, name in enumerate(names)
                }
                yield pa.table(columns)
    except csv.Error as error:
        advice = (
            "a TSV has one row a line, without quoting: write texts with tabs or line breaks as CSV "
            "or Parquet"
            if is_tsv
            else "texts with a delimiter or a quote in them have to be quoted, and the quotes within "
            "doubled"
        )
        kind = "TSV" if format_of(file) == ".tsv" else "CSV"
        raise DataError(
            f"{file} line {before + reader.line_num} cannot be read as {kind}: {error}: {advice}"
        ) from None
    except _UNREADABLE as error:
        raise DataError(f"{file} cannot be read as CSV: {_why(error)}") from None


def _names(rows: Iterator[list[str]], file: Path) -> tuple[list[str], Iterator[list[str]]]:
    """The names of a file's columns, and its rows. DataError where names are needed and missing."""
    first = next(rows, [])
    addresses = [i for i, value in enumerate(first) if _ADDRESS.match(value)]
    if not addresses:
        return first, rows
    if len(first) > 2 or len(addresses) > 1:
        raise DataError(
            f"{file} has no line with the names of its columns (its first line has "
            f"'{first[addresses[0]][:60]}'): put one before it, with url for the addresses"
        )
    names = ["caption"] * len(first)
    names[addresses[0]] = "url"
    return names, chain([first], rows)


def _of_width(rows: Iterable[list[str]], width: int) -> Iterator[list[str]]:
    """The rows, of which none has a value beyond the header; short ones are filled up later."""
    for row in rows:
        if len(row) > width and any(row[width:]):  # a text with a comma, cut into two
            raise csv.Error(f"{len(row)} values under a header of {width} names")
        yield row


def _of_one_line(rows: Iterable[list[str]], width: int) -> Iterator[list[str]]:
    """The rows of a TSV, of which none is the rest of a quoted text that goes over two lines."""
    before: list[str] = []
    for row in rows:
        opened = bool(before) and before[-1].startswith('"') and before[-1].count('"') % 2 == 1
        if opened and len(row) < width and row[0].count('"') % 2 == 1:
            raise csv.Error("it seems to be the rest of a text in quotes of the line before")
        before = row
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
    try:
        with _text(file) as lines:
            numbered = ((i, line) for i, line in enumerate(lines, start=1) if line.strip())
            yield from _tables(_row_of_line(line, f"{file} line {i}") for i, line in numbered)
    except _UNREADABLE as error:
        raise DataError(f"{file} cannot be read as JSONL: {_why(error)}") from None


def _json(file: Path) -> Iterator[pa.Table]:
    try:
        with _text(file) as text:
            objects = enumerate(read_objects(text), start=1)
            yield from _tables(_texts(row, f"{file} row {i}") for i, row in objects)
    except (*_UNREADABLE, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {_why(error)}") from None


def _tables(rows: Iterator[dict[str, str | None]]) -> Iterator[pa.Table]:
    """The rows in tables; a column is there from the first row on that has it."""
    names: dict[str, None] = {}
    while batch := list(islice(rows, _BATCH_ROWS)):
        for row in batch:
            names.update(dict.fromkeys(row))
        yield pa.table(
            {name: pa.array([row.get(name) for row in batch], pa.string()) for name in names}
        )


def _row_of_line(line: str, where: str) -> dict[str, str | None]:
    try:
        return _texts(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not a JSON object: {str(error)[:120]}") from None


def _texts(row: Any, where: str) -> dict[str, str | None]:
    """An object with its values as text; null and NaN are null."""
    try:
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
    ".json": _json,
}
