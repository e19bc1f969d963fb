"""Reads the captions that stage 2 learns: one of our tables, Parquet, or a list as CSV, TSV, JSONL or JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pipelines.images.rows import require_columns
from pipelines.lists.input_files import input_files
from pipelines.lists.metadata import match_columns
from pipelines.lists.readers import format_of, read_parquet, read_tables
from pipelines.storage.parquet import read_schema
from pipelines.storage.tables import Table, parquet_files
from vlv_model.errors import DataError

JoinOn = Literal["key", "url"]

_BATCH_ROWS = 65_536


def caption_files(path: str) -> list[Path]:
    """The files of `data.captions`. Raises DataError if there are none."""
    if Table(path).exists:
        return parquet_files(path, "data.captions")
    return input_files(path, "data.captions")


def caption_columns(file: Path) -> pa.Schema:
    """The columns of a file of captions: of a text file, those of its first rows."""
    if format_of(file) == ".parquet":
        return read_schema(file)
    return next((rows.schema for rows in read_tables(file) if rows.num_columns), pa.schema([]))


def join_column_of(file: Path) -> JoinOn:
    """`key` if a file of captions has the keys that ingest wrote, else `url`; DataError if it has neither."""
    schema = caption_columns(file)
    # A text file has nothing but texts. In Parquet, texts are another tool's keys.
    is_text = format_of(file) != ".parquet"
    if "key" in schema.names and (is_text or pa.types.is_integer(schema.field("key").type)):
        return "key"
    if "url" in match_columns(schema, {}, str(file)):
        return "url"
    raise DataError(
        f"data.captions: {file} has neither a column `key` of integers nor one of URLs to join it by; "
        f"it has {', '.join(schema.names) or 'no columns'}"
    )


def caption_rows(file: Path, columns: list[str]) -> Iterator[pa.Table]:
    """Some columns of a file, in batches; `key` is int64, also from a text file."""
    if format_of(file) == ".parquet":
        yield from read_parquet(file, columns, _BATCH_ROWS)
        return
    for rows in read_tables(file):
        if not rows.num_rows:  # its columns may come later
            continue
        require_columns(rows.schema, columns, f"data.captions: {file}")
        rows = rows.select(columns)
        if "key" in columns:
            try:
                keys = rows["key"].cast(pa.int64())
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"{file}: column 'key' has other values than the integers that ingest wrote "
                    f"({error}): data.join_on=url joins by URL"
                ) from None
            rows = rows.set_column(columns.index("key"), "key", keys)
        yield rows
