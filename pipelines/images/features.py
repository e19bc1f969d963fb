"""Tables of features: a vector for each image or caption, by key (jobs/embed.py writes them).

    key  name  status  error  features fixed_size_list<float32>[d]  aesthetic float32 (scores, if any)

Readers hold a batch in memory, never a table. `_table.json` records in its identity what decides the
features (`embed.*`: extractor, digest of its weights, resizing, precision) and, as `versions`, the
libraries that computed them.

Features are float32. A Fréchet distance is a small difference of large sums, and half precision moves
it (torcheval #192 reports 13.7 in place of 53.7); the table of an extractor is a thousandth of the
pictures' pixels either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.rows import OK, require_columns
from pipelines.storage.parquet import open_parquet, read_schema
from pipelines.storage.sorting import ExternalSort, spread_keys
from pipelines.storage.tables import Table, parquet_files
from vlv_model.errors import DataError

KIND = "features"
FEATURES = "features"
"""The column of vectors."""

_BATCH_ROWS = 4096  # of 2,048 features each: 32 MiB


def feature_row(width: int | None, scores: Sequence[str] = ()) -> pa.Schema:
    """The columns of a feature table: vectors of `width` numbers, or None, and scores by name."""
    vectors = [] if width is None else [(FEATURES, pa.list_(pa.float32(), width))]
    return pa.schema(
        [
            ("key", pa.int64()),
            ("name", pa.string()),
            ("status", pa.string()),
            ("error", pa.string()),
            *vectors,
            *((name, pa.float32()) for name in scores),
        ]
    )


@dataclass(frozen=True)
class FeatureBatch:
    """Some rows of a feature table; all arrays are in the same order."""

    keys: np.ndarray  # int64 [n]
    features: np.ndarray  # float32 [n d]


class FeatureTable:
    """Reads a finished table of features, rows of status `ok` only."""

    def __init__(self, path: str, setting: str = "data.input") -> None:
        """Raises DataError if `path` is not a finished table that jobs/embed.py wrote."""
        self.path = path
        self.files = parquet_files(path, setting)
        table = Table(path)
        described: dict[str, Any] = table.describe() if table.exists else {"kind": "foreign"}
        if described["kind"] != KIND:
            raise DataError(
                f"{setting}={path} is a {described['kind']} table, expected one that jobs/embed.py "
                "wrote"
            )
        self.rows = table.counts().get(OK, 0)
        """Rows of status `ok`."""
        self.extractor: dict[str, Any] = {
            name.removeprefix("embed."): value
            for name, value in described["identity"].items()
            if name.startswith("embed.")
        }
        """What decides the features: `extractor`, `weights` (a digest), `resize`, `precision`, …"""
        self.versions: dict[str, str] = described.get("versions", {})
        schema = read_schema(self.files[0])
        self.scores = [f.name for f in schema if pa.types.is_float32(f.type)]
        self.width: int | None = (
            schema.field(FEATURES).type.list_size if FEATURES in schema.names else None
        )

    def batches(self, rows: int = _BATCH_ROWS) -> Iterator[FeatureBatch]:
        """Keys and features in the order of the table, at most `rows` at a time.

        Raises DataError for a table of scores alone.
        """
        for batch in self.columns([FEATURES], rows):
            yield FeatureBatch(batch["key"].to_numpy(), vectors(batch[FEATURES]))

    def columns(self, names: Sequence[str], rows: int = _BATCH_ROWS) -> Iterator[pa.Table]:
        """`key` and the columns `names`, in the order of the table; DataError if one is missing."""
        for file in self.files:
            with open_parquet(file) as parquet:
                require_columns(parquet.schema_arrow, list(names), str(file))
                for batch in parquet.iter_batches(rows, columns=["key", "status", *names]):
                    table = pa.Table.from_batches([batch])
                    table = table.filter(pc.equal(table["status"], OK))
                    if table.num_rows:
                        yield table.drop_columns(["status"])


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors without nulls as float32 `[n d]`."""
    width = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    joined = np.concatenate([np.zeros(0, np.float32), *parts])
    return joined.astype(np.float32, copy=False).reshape(-1, width)


def as_vectors(features: np.ndarray) -> pa.FixedSizeListArray:
    """The inverse of `vectors`: float `[n d]` as a column."""
    values = pa.array(np.ascontiguousarray(features, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, features.shape[1])


def join_features(
    first: FeatureTable, second: FeatureTable
) -> Iterator[tuple[FeatureBatch, FeatureBatch]]:
    """The rows that two tables have in common, by key: batches with the same keys in the same order.

    The order depends on the keys alone. Both tables are sorted on this machine's disk (TMPDIR) first,
    so memory holds one bucket of each. Features may differ in width.
    """
    most = max(table.rows * 4 * (table.width or 0) for table in (first, second))
    sorters = [_sorted_features(table, most) for table in (first, second)]
    try:
        # The buckets of both have the same bounds, since these depend on `most` alone.
        for one, other in zip(*(sorter.sorted() for sorter in sorters), strict=True):
            _, in_one, in_other = np.intersect1d(
                one["key"].to_numpy(), other["key"].to_numpy(), return_indices=True
            )
            if len(in_one):
                yield _batch(one, in_one), _batch(other, in_other)
    finally:
        for sorter in sorters:
            sorter.remove()


def _sorted_features(table: FeatureTable, input_bytes: int) -> ExternalSort:
    vector = pa.list_(pa.float32(), table.width or 0)  # without vectors, `batches` raises
    schema = pa.schema([("key", pa.int64()), ("image", pa.int64()), (FEATURES, vector)])
    sorter = ExternalSort(schema, input_bytes, buffer_rows=_BATCH_ROWS)
    for batch in table.batches():
        # Keys of other tools may lie close together, in one bucket.
        columns = [spread_keys(batch.keys), batch.keys, as_vectors(batch.features)]
        sorter.add(pa.table(columns, schema=schema))
    return sorter


def _batch(rows: pa.Table, positions: np.ndarray) -> FeatureBatch:
    chosen = rows.take(pa.array(positions))
    return FeatureBatch(chosen["image"].to_numpy(), vectors(chosen[FEATURES]))
