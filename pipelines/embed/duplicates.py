"""Duplicates by meaning: rows whose features point almost the same way as an earlier row's.

    table ─▶ sample ─▶ centroids ─▶ each row with its two nearest, on disk ─▶ cosines within a cluster ─▶ table

Comparing all pairs of n rows takes n² products, so a row is compared within clusters only, as SemDeDup
does (Abbas et al., arXiv 2303.09540). Two rows that are near each other, but on both sides of a border,
still meet, since each is in two clusters: docs/experiments.md has the recall against all pairs. A table of
few rows is one cluster, so its result is exact.

The column `duplicate` is the largest cosine with a row of a smaller key, where it reaches the bound, else
0. So `data.features=[TABLE] data.where='duplicate < 0.97'` leaves duplicates out, at any higher bound.
Memory: a sample, one bucket of the sort, 16 bytes a duplicate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipelines.execution.image_job import ROW_GROUP
from pipelines.images.features import FEATURES, FeatureTable, as_vectors, vectors
from pipelines.images.rows import OK
from pipelines.storage.banding import begins_group
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.parquet import open_parquet
from pipelines.storage.sorting import ExternalSort, SortFactory, spread_keys
from pipelines.storage.tables import Table, read_json_object

COLUMN = "duplicate"
_FILE = "_duplicates.json"

CLUSTER_ROWS = 4096
"""Rows that a cluster is meant to have; up to these, all pairs are compared."""
_MOST_CLUSTERS = 4096
_SAMPLE = 16  # rows of the sample for each centroid
_ROUNDS = 8  # of k-means
_NEAREST = 2  # clusters of a row
_BLOCK = 2048  # rows compared at a time


def is_marked(table: Table, bound: float) -> bool:
    """Whether `mark_duplicates` has finished for the table's present rows."""
    file = table.folder / _FILE
    return is_file(file) and read_json_object(file) == _state(table, bound)


def mark_duplicates(table: Table, bound: float, sorting: SortFactory = ExternalSort) -> int:
    """Fill the column `duplicate` of a finished feature table; returns how many rows reach the bound.

    Runs in this process. A call that is killed is repeated.
    """
    keys, cosines = find_duplicates(FeatureTable(str(table.folder)), bound, sorting)
    for commit in table.commits():
        with open_parquet(table.part(commit.chunk)) as parquet:
            rows = parquet.read(columns=["key", "status", COLUMN])
        own = rows["key"].to_numpy()
        found = np.zeros(len(own), np.float32)
        if len(keys):
            places = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
            found = np.where(keys[places] == own, cosines[places], found)
        failed = np.array([status != OK for status in rows["status"].to_pylist()], bool)
        column = pa.chunked_array([pa.array(found, pa.float32(), mask=failed)])
        if not column.equals(rows[COLUMN]):
            columns = pa.table({COLUMN: column, "status": rows["status"]})
            table.update(commit.chunk, columns, run=commit.run, row_group_size=ROW_GROUP)
    write_atomically(table.folder / _FILE, json.dumps(_state(table, bound)))
    return len(keys)


def _state(table: Table, bound: float) -> dict[str, object]:
    return {"bound": bound, "rows": table.counts()}


def find_duplicates(
    table: FeatureTable, bound: float, sorting: SortFactory = ExternalSort
) -> tuple[np.ndarray, np.ndarray]:
    """Keys int64 `[m]`, sorted, of rows with a cosine of at least `bound` with a row of a smaller key,
    and the largest such cosine float32 `[m]`."""
    assert table.width is not None
    centroids = _centroids(table)
    near = min(_NEAREST, len(centroids))
    schema = pa.schema(
        [
            ("key", pa.int64()),
            ("image", pa.int64()),
            (FEATURES, pa.list_(pa.float32(), table.width)),
        ]
    )
    sorter = sorting(schema, table.rows * near * 4 * table.width)
    keys, cosines = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    try:
        for batch in table.batches():
            unit = _normalised(batch.features)
            clusters = np.argpartition(-(unit @ centroids.T), near - 1, axis=1)[:, :near]
            for cluster in clusters.T:
                columns = [spread_keys(cluster), batch.keys, as_vectors(unit)]
                sorter.add(pa.table(columns, schema=schema))
        for bucket in sorter.sorted():
            for group in _groups(bucket):
                image = group["image"].to_numpy()
                order = np.argsort(image)
                best = _best_earlier(vectors(group[FEATURES])[order])
                reached = best >= bound
                keys.append(image[order][reached])
                cosines.append(best[reached])
    finally:
        sorter.remove()
    return _largest(np.concatenate(keys), np.concatenate(cosines))


def _best_earlier(unit: np.ndarray) -> np.ndarray:
    """The largest cosine of each row, unit `[n d]`, with a row before it, float32 `[n]`; -1 for the first."""
    best = np.full(len(unit), -1, np.float32)
    for start in range(0, len(unit), _BLOCK):
        later = unit[start : start + _BLOCK]
        for other in range(0, start + len(later), _BLOCK):
            cosines = later @ unit[other : other + _BLOCK].T
            if other == start:
                cosines[np.triu_indices(len(later))] = -1
            np.maximum(
                best[start : start + _BLOCK], cosines.max(axis=1), best[start : start + _BLOCK]
            )
    return best


def _groups(bucket: pa.Table) -> Iterator[pa.Table]:
    """The rows of each cluster that has at least two."""
    if bucket.num_rows:
        edges = [*np.flatnonzero(begins_group(bucket["key"].to_numpy())), bucket.num_rows]
        for start, end in pairwise(edges):
            if end - start > 1:
                yield bucket.slice(start, end - start)


def _largest(keys: np.ndarray, cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, with its largest cosine."""
    order = np.lexsort((-cosines, keys))
    keys, cosines = keys[order], cosines[order]
    first = begins_group(keys) if len(keys) else np.zeros(0, bool)
    return keys[first], cosines[first]


def _centroids(table: FeatureTable) -> np.ndarray:
    """Unit vectors `[k d]` in the middle of k groups of rows: spherical k-means on a sample by key."""
    assert table.width is not None
    count = min(_MOST_CLUSTERS, -(-table.rows // CLUSTER_ROWS))
    if count <= 1:
        return np.ones((1, table.width), np.float32)
    share = min(1.0, _SAMPLE * count * 2 / table.rows)
    limit = np.uint64(min(share * 2**64, 2**64 - 1024))
    sample = []
    for batch in table.batches():
        # Twice: so that neighbouring keys are not chosen together.
        mixed = spread_keys(spread_keys(batch.keys)).view(np.uint64)
        sample.append(batch.features[mixed <= limit])
    unit = _normalised(np.concatenate(sample))
    rng = np.random.default_rng(0)
    centroids = unit[rng.permutation(len(unit))[:count]]
    for _ in range(_ROUNDS):
        nearest = np.argmax(unit @ centroids.T, axis=1)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, unit)
        filled = np.bincount(nearest, minlength=len(centroids)) > 0
        centroids = np.where(filled[:, None], _normalised(sums), centroids)
    return centroids


def _normalised(features: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = (features / np.maximum(length, 1e-12)).astype(np.float32)
    return unit
