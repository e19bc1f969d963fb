"""The plan of an ingest: chunks of rows that are to be fetched, sorted by key.

    metadata -> filters -> normalised URL, key -> buckets by key -> chunks of sorted rows

The plan is sorted over the whole list, so the key ranges of chunks do not overlap, and neither do
those of the image table's parts. Memory does not grow with the list (pipelines/buckets.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.buckets import Buckets
from pipelines.ingest.filters import FilterConfig, metadata_failures
from pipelines.ingest.metadata import input_bytes, read_batches
from pipelines.places import remove_folder, write_parquet
from pipelines.schemas import METADATA_ROW, normalise_url, url_key
from vlv_model.errors import DataError


@dataclass(frozen=True)
class Plan:
    """What planning found: `dropped` counts by rule what was read and is not fetched."""

    chunks: int
    rows: int
    read: int
    dropped: dict[str, int]


def chunk_file(folder: Path, chunk: int) -> Path:
    """Where the plan of one chunk lies, by the table's folder."""
    return folder / "_plan" / f"chunk-{chunk:06d}.parquet"


def write_plan(
    files: list[Path],
    folder: Path,
    filters: FilterConfig,
    columns: Mapping[str, str],
    rows_per_chunk: int,
) -> Plan:
    """Read the metadata `files` and write the plan of the table in `folder`.

    What an earlier, killed planning left is removed first. Of several rows of one URL the first
    counts. Raises DataError for an empty list, for one of which no row is left, and where two
    different URLs have the same key.
    """
    plan_folder = folder / "_plan"
    remove_folder(plan_folder)
    plan_folder.mkdir(parents=True)
    dropped: Counter[str] = Counter()
    buckets = Buckets(METADATA_ROW, input_bytes(files))
    read = 0
    for file in files:
        for batch in read_batches(file, columns, filters):
            read += batch.num_rows
            buckets.add(_planned(batch, filters, dropped))
    if read == 0:
        raise DataError(f"{files[0]}: the list of URLs has no rows: nothing to ingest")
    chunks = rows = 0
    unique = (_without_repeats(rows, dropped) for rows in buckets.sorted())
    for chunk, table in enumerate(_regroup(unique, rows_per_chunk)):
        write_parquet(chunk_file(folder, chunk), table)
        chunks, rows = chunk + 1, rows + table.num_rows
    buckets.remove()
    if rows == 0:
        counts = ", ".join(f"{rule} {n}" for rule, n in _told(dropped).items())
        raise DataError(f"none of the {read} rows of the list is left ({counts}): loosen filter.*")
    return Plan(chunks, rows, read, _told(dropped))


def _told(dropped: Counter[str]) -> dict[str, int]:
    return {rule: n for rule, n in sorted(dropped.items()) if n}


def _planned(batch: pa.Table, filters: FilterConfig, dropped: Counter[str]) -> pa.Table:
    """The METADATA_ROW rows of a batch that are to be fetched; the others are counted."""
    has_url = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(batch["url"]), ""), False)
    dropped["no_url"] += batch.num_rows - pc.sum(has_url, min_count=0).as_py()
    batch = batch.filter(has_url)
    failures = metadata_failures(filters, batch)
    keep = np.ones(batch.num_rows, bool)
    for rule, failed in failures.items():  # a row counts for the first rule that it fails
        fails = np.asarray(failed, bool) & keep
        dropped[f"filtered:{rule}"] += int(fails.sum())
        keep &= ~fails
    batch = batch.filter(pa.array(keep))
    urls = [normalise_url(url) for url in batch["url"].to_pylist()]
    known = {name: batch[name] for name in METADATA_ROW.names if name in batch.column_names}
    known |= {
        "key": pa.array([url_key(url) for url in urls], pa.int64()),
        "url": pa.array(urls, pa.string()),
    }
    empty = pa.nulls(len(urls))
    return pa.table(
        [known.get(f.name, empty).cast(f.type) for f in METADATA_ROW], schema=METADATA_ROW
    )


def _without_repeats(rows: pa.Table, dropped: Counter[str]) -> pa.Table:
    """Sorted rows with the first of each key; DataError where two URLs share a key."""
    keys = rows["key"].to_numpy()
    again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    urls = rows["url"]
    for i in again.tolist():
        first, second = urls[i - 1].as_py(), urls[i].as_py()
        if first != second:
            raise DataError(
                f"two URLs have the same key {keys[i]}: {first} and {second}: remove one of them"
            )
    dropped["repeated_url"] += len(again)
    keep = np.ones(len(keys), bool)
    keep[again] = False
    return rows.filter(pa.array(keep))


def _regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of `tables` in tables of `rows` rows; the last may be shorter."""
    rest = METADATA_ROW.empty_table()
    for table in tables:
        rest = pa.concat_tables([rest, table])
        while rest.num_rows >= rows:
            yield rest.slice(0, rows)
            rest = rest.slice(rows)
        rest = rest.combine_chunks()
    if rest.num_rows:
        yield rest
