"""Duplicates by content, in the whole table with all its runs: one copy stays `ok`.

    parts ─▶ (key, run, sha256, phash, address, chunk) ─▶ sorted on disk by hash ─▶ later copies ─▶ parts

The copy of the earliest run stays, then that with the smallest key. Rows that a filter drops do not
count, so every run computes the marks again: a copy becomes `ok` when the other one is dropped, and
a job that was killed here is repeated without harm.

Rows whose URLs are spellings of one address (pipelines.images.urls) are copies too, even if the
server sent different files.

Near duplicates have perceptual hashes with few different bits. A row is one if any earlier row is
near it (pipelines.storage.banding).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipelines.execution.chunks import map_chunks
from pipelines.execution.cluster import Cluster
from pipelines.images.rows import DUPLICATE, OK
from pipelines.images.urls import addresses_of
from pipelines.storage.banding import add_by_band, bands_of_bits, begins_group
from pipelines.storage.parquet import open_parquet, read_parquet_file, write_parquet
from pipelines.storage.sorting import ExternalSort, SortFactory
from pipelines.storage.tables import IMAGE_ROW_GROUP, PLAN, Table
from vlv_model.config import Config

_ROW_BYTES = 48  # of a row of _HASHES; determines the number of buckets
_HASHES = pa.schema(
    [("key", pa.int64()), *((n, pa.int64()) for n in ("image", "run", "chunk", "low"))]
)
"""`key` is the sort key: 64 bits of sha256, a band of the phash, or the URL's address. `image` is the
key of the row. `low` are 64 further bits of sha256, the whole phash, or zero."""
_BLOCK = 4096  # rows compared with each other at a time
_FLAT = 0  # phash of any image of one colour


class DuplicateConfig(Config):
    """Which rows are duplicates."""

    by: Literal["none", "exact", "near"] = Field(
        "exact",
        description="exact: the same downloaded bytes, or one URL in two spellings; near: also images "
        "that look the same",
    )
    distance: int = Field(
        3, ge=0, le=15, description="near: how many of the 64 bits of phash may differ"
    )


def mark_duplicates(
    cluster: Cluster,
    table: Table,
    config: DuplicateConfig,
    run: int,
    folder: Path,
    sorting: SortFactory = ExternalSort,
) -> int:
    """Set the status `duplicate` for all copies but one, and `ok` for rows that are no longer copies.

    `folder` is for temporary files. Returns the number of rows whose status changed.
    """
    commits = table.commits()
    chunks = [commit.chunk for commit in commits]
    copies = np.zeros((0, 2), np.int64)
    if config.by != "none":
        rows = sum(commit.rows for commit in commits)
        copies = _later_copies(cluster, table, chunks, rows, config, sorting)
    starts = np.searchsorted(copies[:, 0], chunks)
    ends = np.searchsorted(copies[:, 0], chunks, "right")
    folder.mkdir(parents=True, exist_ok=True)
    to_mark = []
    for commit, start, end in zip(commits, starts, ends, strict=True):
        # A chunk without copies, now and before, is not opened.
        if start < end or commit.statuses.get(DUPLICATE):
            keys = pa.table({"key": pa.array(copies[start:end, 1], pa.int64())})
            write_parquet(folder / f"copies-{commit.chunk:06d}{PLAN}", keys)
            to_mark.append(commit.chunk)
    mark = partial(_mark, table=table, run=run, folder=folder)
    return sum(pc.sum(block["changed"]).as_py() for block in map_chunks(cluster, to_mark, mark))


def _mark(chunk: int, table: Table, run: int, folder: Path) -> pa.Table:
    """Update the statuses of a chunk's part, if they differ."""
    copies = read_parquet_file(folder / f"copies-{chunk:06d}{PLAN}")["key"]
    with open_parquet(table.part(chunk)) as parquet:
        rows = parquet.read(columns=["key", "status"])
    is_copy = pc.is_in(rows["key"], value_set=copies)
    was_copy = pc.and_(pc.equal(rows["status"], DUPLICATE), pc.invert(is_copy))
    statuses = pc.if_else(is_copy, DUPLICATE, pc.if_else(was_copy, OK, rows["status"]))
    changed = pc.sum(pc.not_equal(statuses, rows["status"]), min_count=0).as_py()
    # A job may have been killed between the write of a part and its commit.
    if changed or table.commit(chunk).statuses != Counter(statuses.to_pylist()):
        columns = pa.table({"status": statuses})
        table.update(chunk, columns, run=run, row_group_size=IMAGE_ROW_GROUP)
    return pa.table({"changed": [changed]})


# ------------------------------------------------------------------------------------- hashes


def _later_copies(
    cluster: Cluster,
    table: Table,
    chunks: list[int],
    rows: int,
    config: DuplicateConfig,
    sorting: SortFactory,
) -> np.ndarray:
    """(chunk, key) of every row that has an earlier copy, sorted, int64 `[n 2]`."""
    num_bands = config.distance + 1 if config.by == "near" else 0
    by_address, by_sha = (sorting(_HASHES, rows * _ROW_BYTES) for _ in range(2))
    by_band = sorting(_HASHES, rows * _ROW_BYTES * num_bands)
    other_spellings = 0
    read = partial(_read_hashes, table=table)
    for block in map_chunks(cluster, chunks, read):
        by_address.add(_keyed(block, block["address"], pa.array(np.zeros(len(block), np.int64))))
        other_spellings += pc.sum(pc.not_equal(block["address"], block["image"])).as_py() or 0
        by_sha.add(_keyed(block, block["sha_high"], block["sha_low"]))
        if num_bands:
            not_flat = block.filter(pc.not_equal(block["phash"], _FLAT))
            bands = bands_of_bits(not_flat["phash"].to_numpy(), num_bands)
            hashes = _keyed(not_flat, not_flat["image"], not_flat["phash"]).drop_columns(["key"])
            add_by_band(by_band, bands, hashes)
    copies = [_exact(bucket) for bucket in by_sha.sorted()]
    if other_spellings:  # otherwise every row has its own address
        copies += [_exact(bucket) for bucket in by_address.sorted()]
    copies += [_near(bucket, config.distance) for bucket in by_band.sorted()]
    for sorter in (by_address, by_sha, by_band):
        sorter.remove()
    return np.unique(np.concatenate([*copies, np.zeros((0, 2), np.int64)]), axis=0)


def _read_hashes(chunk: int, table: Table) -> pa.Table:
    """Key, run, hashes and address of each row of a chunk with status `ok` or `duplicate`."""
    columns = ["key", "url", "run", "sha256", "phash", "status"]
    with open_parquet(table.part(chunk)) as parquet:
        rows = parquet.read(columns=columns)  # in a table without URLs, keys are the addresses
    rows = rows.filter(pc.is_in(rows["status"], value_set=pa.array([OK, DUPLICATE])))
    digests = [bytes.fromhex(text) for text in rows["sha256"].to_pylist()]
    sha = np.frombuffer(b"".join(d[:16] for d in digests), ">i8").reshape(-1, 2).astype(np.int64)
    phashes = b"".join(bytes.fromhex(text) for text in rows["phash"].to_pylist())
    addresses = rows["key"]
    if "url" in rows.column_names:
        addresses = addresses_of(rows["url"], rows["key"])
    return pa.table(
        {
            "image": rows["key"],
            "run": rows["run"].cast(pa.int64()),
            "chunk": pa.array([chunk] * rows.num_rows, pa.int64()),
            "address": addresses,
            "sha_high": sha[:, 0],
            "sha_low": sha[:, 1],
            "phash": np.frombuffer(phashes, ">i8").astype(np.int64),
        }
    )


def _keyed(block: pa.Table, key: Any, low: Any) -> pa.Table:
    return pa.table([key, block["image"], block["run"], block["chunk"], low], schema=_HASHES)


def _columns(bucket: pa.Table, *order: str) -> dict[str, np.ndarray]:
    """A bucket's columns as arrays, sorted by the columns `order`."""
    columns = {name: bucket[name].to_numpy() for name in bucket.column_names}
    sort = np.lexsort([columns[name] for name in reversed(order)])
    return {name: column[sort] for name, column in columns.items()}


def _exact(bucket: pa.Table) -> np.ndarray:
    """(chunk, key) of the rows of a bucket with the same hash as an earlier row."""
    rows = _columns(bucket, "key", "low", "run", "image")
    copy = ~(begins_group(rows["key"]) | begins_group(rows["low"]))
    return np.stack([rows["chunk"][copy], rows["image"][copy]], axis=1)


def _near(bucket: pa.Table, distance: int) -> np.ndarray:
    """(chunk, key) of the rows of a bucket that are near an earlier row with the same band."""
    rows = _columns(bucket, "key", "low", "run", "image")
    # Of rows with one hash only the earliest is compared; the others are copies.
    first = begins_group(rows["key"]) | begins_group(rows["low"])
    copies = [np.stack([rows["chunk"][~first], rows["image"][~first]], axis=1)]
    for group in _groups({name: column[first] for name, column in rows.items()}):
        order = np.lexsort((group["image"], group["run"]))
        hashes = group["low"][order].view(np.uint64)
        for start in range(0, len(order), _BLOCK):
            later = hashes[start : start + _BLOCK]
            near = np.zeros(len(later), bool)
            for other in range(0, start + len(later), _BLOCK):
                earlier = hashes[other : min(other + _BLOCK, start + len(later))]
                is_near = np.bitwise_count(later[:, None] ^ earlier[None]) <= distance
                is_earlier = (
                    np.arange(len(earlier))[None] + other < np.arange(len(later))[:, None] + start
                )
                near |= (is_near & is_earlier).any(axis=1)
            chosen = order[start : start + _BLOCK][near]
            copies.append(np.stack([group["chunk"][chosen], group["image"][chosen]], axis=1))
    return np.concatenate(copies)


def _groups(rows: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The rows of each `key` that at least two rows have."""
    edges = [*np.flatnonzero(begins_group(rows["key"])), len(rows["key"])]
    for start, end in pairwise(edges):
        if end - start > 1:
            yield {name: column[start:end] for name, column in rows.items()}
