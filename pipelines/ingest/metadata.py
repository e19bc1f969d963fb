"""Reading lists of URLs as they are published: Parquet, CSV and JSONL, in many spellings.

Files are read a batch at a time; their columns get our names and types (`schemas.METADATA_ROW`,
and `width` and `height`, which only the filters use).
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.ingest.filters import FilterConfig, check_columns
from pipelines.schemas import METADATA_ROW, require_columns
from pipelines.storage import read_schema
from vlv_model.errors import ConfigError, DataError

COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "url": ("url", "image_url", "img_url"),
    "alt_text": ("text", "alt_text", "caption", "alt"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "similarity": ("similarity",),
    "pwatermark": ("pwatermark", "watermark"),
    "punsafe": ("punsafe", "unsafe"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics"),
    "hash": ("hash",),
}
"""Our name of a column and the names it goes by, in any case, the likeliest first."""

_TYPES = {name: METADATA_ROW.field(name).type for name in METADATA_ROW.names} | {
    "width": pa.float64(),  # LAION's are integers in one release, floats in the next
    "height": pa.float64(),
}
_BATCH_ROWS = 16_384
_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")


# --------------------------------------------------------------------------------------- input


def input_files(path: str) -> list[Path]:
    """The metadata files behind `data.input`: a file, a folder's, or those that a glob matches.

    Raises DataError where there are none.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = (p for p in place.rglob("*") if p.is_file() and p.name[0] not in "._")
        files = sorted(p for p in found if _format(p) in _SUFFIXES)
    else:
        files = sorted(p for p in map(Path, glob.glob(path, recursive=True)) if p.is_file())
    if not files:
        what = "holds no metadata" if place.is_dir() else "does not exist"
        raise DataError(f"data.input={path} {what}: expected {', '.join(_SUFFIXES)} files")
    return files


def input_bytes(files: Iterable[Path]) -> int:
    """Size of the files together, compressed or not."""
    return sum(file.stat().st_size for file in files)


def fingerprint(files: Iterable[Path]) -> dict[str, str]:
    """What tells one list from another: per file its size and a digest of its two ends."""
    prints = {}
    for file in files:
        size, end = file.stat().st_size, 1 << 16
        with open(file, "rb") as stream:
            head = stream.read(end)
            stream.seek(max(0, size - end))
            digest = hashlib.blake2b(head + stream.read(), digest_size=8).hexdigest()
        prints[file.name] = f"{size} bytes, {digest}"
    return prints


def _format(file: Path) -> str:
    name = file.with_suffix("") if file.suffix == ".gz" else file
    return name.suffix.lower()


def our_columns(schema: pa.Schema, extra: Mapping[str, str], where: str) -> dict[str, str]:
    """Which of a file's columns is which of ours: {our name: the file's name}.

    `extra` (`data.columns`: {the file's name: our name}) goes before the table of spellings.
    Raises ConfigError for a name that is not ours, DataError for one that the file has not.
    """
    if unknown := sorted(set(extra.values()) - set(COLUMN_NAMES)):
        raise ConfigError(
            f"data.columns: '{unknown[0]}' is no column of ours; they are {', '.join(COLUMN_NAMES)}"
        )
    require_columns(schema, list(extra), f"{where} (data.columns)")
    by_lower: dict[str, str] = {}
    for name in schema.names:
        by_lower.setdefault(name.lower(), name)
    found = {}
    for ours, spellings in COLUMN_NAMES.items():
        if theirs := next((by_lower[name] for name in spellings if name in by_lower), None):
            found[ours] = theirs
    return found | {ours: theirs for theirs, ours in extra.items()}


def read_batches(file: Path, extra: Mapping[str, str], filters: FilterConfig) -> Iterator[pa.Table]:
    """The rows of one metadata file under our names and types, a batch at a time.

    Raises DataError for a file that cannot be read, lacks `url` or a filter's column, or has
    values of another kind than its columns should have.
    """
    reader = _READERS.get(_format(file))
    if reader is None:
        raise DataError(f"{file}: metadata are read from {', '.join(_SUFFIXES)} files")
    found: dict[str, str] = {}
    for batch in reader(file):
        if not found:
            found = our_columns(batch.schema, extra, str(file))
            _check(found, batch.schema, filters, str(file))
        known = {ours: theirs for ours, theirs in found.items() if theirs in batch.column_names}
        yield pa.table(
            {ours: _cast(batch[theirs], ours, theirs, file) for ours, theirs in known.items()}
        )


def _check(found: Mapping[str, str], schema: pa.Schema, filters: FilterConfig, where: str) -> None:
    if "url" not in found:
        spellings = " or ".join(repr(name) for name in COLUMN_NAMES["url"])
        require_columns(schema, ["url"], f"{where} (read as url: {spellings}, in any case)")
    check_columns(filters, schema, set(found), where)


def _cast(column: pa.ChunkedArray, ours: str, theirs: str, file: Path) -> pa.ChunkedArray:
    if pa.types.is_string(column.type) and not pa.types.is_string(_TYPES[ours]):
        column = pc.if_else(pc.equal(column, ""), None, column)
    try:
        return column.cast(_TYPES[ours], safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(
            f"{file}: column '{theirs}' is {column.type} and cannot be read as {_TYPES[ours]}; "
            "rename it, or map another one in data.columns"
        ) from None


def _parquet(file: Path) -> Iterator[pa.Table]:
    schema = read_schema(file)
    with pq.ParquetFile(file) as parquet:
        if not parquet.metadata.num_rows:
            yield schema.empty_table()  # its columns are checked all the same
        for batch in parquet.iter_batches(_BATCH_ROWS):
            yield pa.Table.from_batches([batch])


def _text(file: Path) -> IO[str]:
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    return opener(file, "rt", encoding="utf-8", newline="")


def _csv(file: Path) -> Iterator[pa.Table]:
    csv.field_size_limit(1 << 24)
    with _text(file) as lines:
        try:
            rows = csv.reader(lines, delimiter="\t" if _format(file) == ".tsv" else ",")
            names = next(rows, [])
            yield pa.table({name: pa.array([], pa.string()) for name in names})
            while batch := list(islice(rows, _BATCH_ROWS)):
                # Short lines are filled up; what is beyond the header has no name.
                columns = {
                    name: pa.array([row[i] if i < len(row) else None for row in batch], pa.string())
                    for i, name in enumerate(names)
                }
                yield pa.table(columns)
        except (csv.Error, UnicodeDecodeError, OSError, EOFError) as error:
            raise DataError(f"{file} cannot be read as CSV: {error}") from None


def _jsonl(file: Path) -> Iterator[pa.Table]:
    names: dict[str, None] = {}
    with _text(file) as lines:
        number = 0
        try:
            while batch := list(islice(lines, _BATCH_ROWS)):
                rows = []
                for line in batch:
                    number += 1
                    if line.strip():
                        rows.append(dict(json.loads(line)))
                        names.update(dict.fromkeys(rows[-1]))
                yield pa.table(
                    {n: pa.array([_plain(row.get(n)) for row in rows], pa.string()) for n in names}
                )
        except (ValueError, TypeError, OSError, EOFError) as error:
            raise DataError(f"{file} line {number} is not a JSON object: {error}") from None


def _plain(value: Any) -> str | None:
    """A JSON value as text; null and NaN are null."""
    if value is None or value != value:
        return None
    return value if isinstance(value, str) else json.dumps(value)


def _unknown(file: Path) -> Iterator[pa.Table]:
    raise DataError(f"{file}: metadata are read from {', '.join(_SUFFIXES)} files (or .gz of text)")


_READERS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
}
