"""Duplicates by content, over the whole table and all of its runs: one copy stays `ok`.

    parts ─▶ (key, run, sha256, phash, address, chunk) ─▶ sorted on disk by hash ─▶ later copies ─▶ parts

Which copy stays is a function of the table alone: the one of the earlier run, then of the smallest
key. Rows that a filter rules out do not count, so marks are found anew by every run: a copy whose
better one is gone is `ok` again, and a job that is killed here only has to be repeated.

Rows whose URLs are spellings of one address (pipelines.images.urls) are copies of one another, too, whatever
the server gave at the second time.

Near copies have perceptual hashes of few different bits. A row is one where an earlier row is near
it, whether that one stays or not. Two hashes that differ in at most d of 64 bits are equal in one
of d + 1 bands of bits at least, so each band is sorted and rows of equal bands are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
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
from pipelines.storage.parquet import open_parquet, read_parquet_file, write_parquet
from pipelines.storage.sorting import ExternalSort, SortFactory
from pipelines.storage.tables import IMAGE_ROW_GROUP, PLAN, Table
from vlv_model.config import Config

_ROW_BYTES = 48  # of a row of hashes, for the number of buckets
_HASHES = pa.schema(
    [("key", pa.int64()), *((n, pa.int64()) for n in ("image", "run", "chunk", "low"))]
)
"""`key` is what is sorted by: 64 bits of sha256, a band of the phash, or the URL's address; `image` is
the row's key; `low` are 64 further bits of sha256, the whole phash, or nothing."""
_COMPARED = 4096  # rows that are compared with one another at a time
_FLAT = 0  # phash of a picture of one colour, which says nothing of the colour


class DuplicateConfig(Config):
    """What counts as a copy."""

    by: Literal["none", "exact", "near"] = Field(
        "exact",
        description="exact: the same bytes as downloaded, or one URL in two spellings; near: pictures "
        "that look the same, too",
    )
    distance: int = Field(
        3, ge=0, le=15, description="near: bits of the 64 of phash that may differ"
    )


def mark_duplicates(
    cluster: Cluster,
    table: Table,
    config: DuplicateConfig,
    run: int,
    folder: Path,
    sorting: SortFactory = ExternalSort,
) -> int:
    """Give all copies but one the status `duplicate`, and `ok` to those that are none any more.

    `folder` takes the marks while they are written. Returns the number of rows whose status changed.
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
    work = []
    for commit, start, end in zip(commits, starts, ends, strict=True):
        # A chunk without a copy, now and before, is not opened.
        if start < end or commit.statuses.get(DUPLICATE):
            keys = pa.table({"key": pa.array(copies[start:end, 1], pa.int64())})
            write_parquet(folder / f"copies-{commit.chunk:06d}{PLAN}", keys)
            work.append(commit.chunk)
    mark = partial(_mark, table=table, run=run, folder=folder)
    return sum(pc.sum(block["changed"]).as_py() for block in map_chunks(cluster, work, mark))


def _mark(chunks: pa.Table, table: Table, run: int, folder: Path) -> pa.Table:
    """Change the statuses in a chunk's part where they say something else of its copies."""
    (chunk,) = chunks["chunk"].to_pylist()
    copies = read_parquet_file(folder / f"copies-{chunk:06d}{PLAN}")["key"]
    with open_parquet(table.part(chunk)) as parquet:
        small = parquet.read(columns=["key", "status"])
    is_copy = pc.is_in(small["key"], value_set=copies)
    no_copy_now = pc.and_(pc.equal(small["status"], DUPLICATE), pc.invert(is_copy))
    states = pc.if_else(is_copy, DUPLICATE, pc.if_else(no_copy_now, OK, small["status"]))
    changed = pc.sum(pc.not_equal(states, small["status"]), min_count=0).as_py()
    # A job may have been killed between the part and its commit.
    if changed or table.commit(chunk).statuses != Counter(states.to_pylist()):
        statuses = pa.table({"status": states})
        table.update(chunk, statuses, run=run, row_group_size=IMAGE_ROW_GROUP)
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
    bands = config.distance + 1 if config.by == "near" else 0
    buckets = [sorting(_HASHES, rows * _ROW_BYTES) for _ in range(2 + bands)]
    addresses, *buckets = buckets
    other_spellings = 0
    read = partial(_read_hashes, table=table)
    for block in map_chunks(cluster, chunks, read):
        addresses.add(_keyed(block, block["address"], pa.array(np.zeros(len(block), np.int64))))
        other_spellings += pc.sum(pc.not_equal(block["address"], block["image"])).as_py() or 0
        buckets[0].add(_keyed(block, block["sha_high"], block["sha_low"]))
        flat = pc.equal(block["phash"], _FLAT)
        seen = block.filter(pc.invert(flat))
        for number in range(bands):
            band = _band(seen["phash"].to_numpy(), number, bands)
            buckets[1 + number].add(_keyed(seen, pa.array(band), seen["phash"]))
    found = [_exact(bucket) for bucket in buckets[0].sorted()]
    if other_spellings:  # else every row has its own address
        found += [_exact(bucket) for bucket in addresses.sorted()]
    for several in buckets[1:]:
        found += [_near(bucket, config.distance) for bucket in several.sorted()]
    for several in (addresses, *buckets):
        several.remove()
    return np.unique(np.concatenate([*found, np.zeros((0, 2), np.int64)]), axis=0)


def _read_hashes(chunks: pa.Table, table: Table) -> pa.Table:
    """Of each row of a chunk that may stay or be a copy: key, run, hashes, address."""
    (chunk,) = chunks["chunk"].to_pylist()
    columns = ["key", "url", "run", "sha256", "phash", "status"]
    with open_parquet(table.part(chunk)) as parquet:
        rows = parquet.read(columns=columns)  # without URLs keys are the addresses
    rows = rows.filter(pc.is_in(rows["status"], value_set=pa.array([OK, DUPLICATE])))
    digests = [bytes.fromhex(text) for text in rows["sha256"].to_pylist()]
    whole = np.frombuffer(b"".join(d[:16] for d in digests), ">i8").reshape(-1, 2).astype(np.int64)
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
            "sha_high": whole[:, 0],
            "sha_low": whole[:, 1],
            "phash": np.frombuffer(phashes, ">i8").astype(np.int64),
        }
    )


def _keyed(block: pa.Table, key: Any, low: Any) -> pa.Table:
    return pa.table([key, block["image"], block["run"], block["chunk"], low], schema=_HASHES)


def _band(phash: np.ndarray, number: int, bands: int) -> np.ndarray:
    """The bits of one of `bands` bands, spread over the range of int64 as buckets want it."""
    edges = np.linspace(0, 64, bands + 1).astype(int)
    width = int(edges[number + 1] - edges[number])
    bits = phash.view(np.uint64) >> np.uint64(edges[number])
    bits &= np.uint64(2**width - 1) if width < 64 else np.uint64(2**64 - 1)
    mixed = bits * np.uint64(0x9E3779B97F4A7C15)  # odd: another value for each value
    return mixed.view(np.int64)


def _columns(bucket: pa.Table, *order: str) -> dict[str, np.ndarray]:
    """A bucket's columns as arrays, sorted by those of `order`, the first one foremost."""
    columns = {name: bucket[name].to_numpy() for name in bucket.column_names}
    sort = np.lexsort([columns[name] for name in reversed(order)])
    return {name: column[sort] for name, column in columns.items()}


def _exact(bucket: pa.Table) -> np.ndarray:
    """(chunk, key) of the rows of a bucket whose bytes an earlier row has."""
    rows = _columns(bucket, "key", "low", "run", "image")
    again = np.zeros(len(rows["key"]), bool)
    again[1:] = (rows["key"][1:] == rows["key"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    return np.stack([rows["chunk"][again], rows["image"][again]], axis=1)


def _near(bucket: pa.Table, distance: int) -> np.ndarray:
    """(chunk, key) of the rows of a bucket to which an earlier row of their band is near."""
    rows = _columns(bucket, "key", "low", "run", "image")
    # Of rows of one hash the earliest speaks for all; the others are copies.
    first = np.ones(len(rows["key"]), bool)
    first[1:] = (rows["key"][1:] != rows["key"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
    copies = [np.stack([rows["chunk"][~first], rows["image"][~first]], axis=1)]
    for group in _groups({name: column[first] for name, column in rows.items()}):
        order = np.lexsort((group["image"], group["run"]))
        hashes = group["low"][order].view(np.uint64)
        for start in range(0, len(order), _COMPARED):
            later = hashes[start : start + _COMPARED]
            near = np.zeros(len(later), bool)
            for other in range(0, start + len(later), _COMPARED):
                earlier = hashes[other : min(other + _COMPARED, start + len(later))]
                apart = np.bitwise_count(later[:, None] ^ earlier[None]) <= distance
                before = (
                    np.arange(len(earlier))[None] + other < np.arange(len(later))[:, None] + start
                )
                near |= (apart & before).any(axis=1)
            chosen = order[start : start + _COMPARED][near]
            copies.append(np.stack([group["chunk"][chosen], group["image"][chosen]], axis=1))
    return np.concatenate(copies)


def _groups(rows: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The rows of equal `key`, of which there are two at least."""
    edges = np.flatnonzero(np.diff(rows["key"])) + 1
    for start, end in zip([0, *edges], [*edges, len(rows["key"])], strict=True):
        if end - start > 1:
            yield {name: column[start:end] for name, column in rows.items()}
