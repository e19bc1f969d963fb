"""Captions in buckets sorted by key, on disk: written once by a plan, looked up by each chunk.

starts.plan                   the first key of each bucket
captions-0000.plan, …         key, caption; each key once
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.rows import has_text, require_columns
from pipelines.images.urls import address_of
from pipelines.lists.input_files import input_bytes
from pipelines.lists.metadata import as_text, match_columns
from pipelines.storage.parquet import read_parquet_file, write_parquet
from pipelines.storage.sorting import ExternalSort, SortFactory
from pipelines.storage.tables import PLAN, plan_file
from pipelines.training.captions import JoinOn, caption_columns, caption_rows
from vlv_model.errors import DataError

_STARTS = f"starts{PLAN}"
_CAPTIONS = pa.schema([("key", pa.int64()), ("caption", pa.string())])


def sort_captions(
    folder: Path,
    files: list[Path],
    caption_column: str,
    join_on: JoinOn,
    sorting: SortFactory = ExternalSort,
) -> dict[str, int]:
    """Write the captions in buckets sorted by key, each key once; returns counts."""
    counts: Counter[str] = Counter(captions=0, repeated_captions=0, blank_captions=0)
    buckets = sorting(_CAPTIONS, input_bytes(files))
    for file in files:
        schema = caption_columns(file)
        names = match_columns(schema, {}, str(file)) if join_on == "url" else {}
        join_column = names.get(join_on, join_on)
        where = f"{file} (data.join_on={join_on}, data.caption_column={caption_column})"
        require_columns(schema, [join_column, caption_column], where)
        for rows in caption_rows(file, [join_column, caption_column]):
            text = as_text(rows[caption_column], f"{file}: column '{caption_column}'")
            usable = pc.and_(has_text(text), rows[join_column].is_valid())
            counts["blank_captions"] += len(text) - pc.sum(usable, min_count=0).as_py()
            values = rows[join_column].filter(usable)
            keys = join_keys(values, join_on, f"{file}: column '{join_column}'")
            buckets.add(pa.table([keys, text.filter(usable)], schema=_CAPTIONS))
    for i, rows in enumerate(buckets.sorted()):
        keys = rows["key"].to_numpy()
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        counts["repeated_captions"] += len(keys) - int(first.sum())
        counts["captions"] += int(first.sum())
        write_parquet(folder / f"captions-{i:04d}{PLAN}", rows.filter(pa.array(first)))
    buckets.remove()
    write_parquet(folder / _STARTS, pa.table({"start": buckets.starts}))
    return dict(counts)


def captions_of(keys: pa.ChunkedArray, plan: Path) -> pa.Array:
    """The caption of each key, string `[n]`; null if there is none."""
    captions = pa.nulls(len(keys), pa.string())
    if len(keys) == keys.null_count:
        return captions
    least, greatest = pc.min_max(keys).as_py().values()
    starts = read_parquet_file(plan_file(plan / _STARTS))["start"].to_numpy()
    first = int(np.searchsorted(starts, least, "right")) - 1
    last = int(np.searchsorted(starts, greatest, "right")) - 1
    for bucket in range(first, last + 1):
        rows = read_parquet_file(plan_file(plan / f"captions-{bucket:04d}{PLAN}"))
        indices = pc.index_in(keys, value_set=rows["key"].combine_chunks())
        captions = pc.coalesce(captions, rows["caption"].combine_chunks().take(indices))
    return captions.combine_chunks() if isinstance(captions, pa.ChunkedArray) else captions


def join_keys(
    column: pa.ChunkedArray,
    join_on: JoinOn,
    where: str,
    hash_url: Callable[[str], int] = address_of,
) -> pa.ChunkedArray:
    """Join keys int64 `[n]` of a column of keys or URLs; nulls stay null.

    `address_of` gives all spellings of a URL the same key.
    """
    column = joinable(column, join_on, where)
    if join_on == "key":
        return column
    keys = [None if url is None else hash_url(url) for url in column.to_pylist()]
    return pa.chunked_array([pa.array(keys, pa.int64())])


def joinable(column: pa.ChunkedArray, join_on: JoinOn, where: str) -> pa.ChunkedArray:
    """Cast a join column to URLs or int64 keys; DataError, beginning with `where`, if impossible."""
    if join_on == "url":
        return as_text(column, where)
    if not pa.types.is_integer(column.type):  # a key rounded to float is a wrong key
        raise DataError(f"{where} is {column.type}, expected the int64 keys that ingest wrote")
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        raise DataError(
            f"{where} is {column.type} and has values beyond int64: reinterpret its 64 bits as signed"
        ) from None
