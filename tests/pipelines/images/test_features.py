"""Feature tables: reading in batches, and joining two of them by key."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.images.features import (
    FEATURES,
    KIND,
    FeatureTable,
    as_vectors,
    feature_row,
    join_features,
    vectors,
)
from pipelines.storage.tables import Table
from vlv_model.errors import DataError


def write_features(
    folder: Path,
    keys: Sequence[int],
    features: np.ndarray,
    *,
    failed: Sequence[int] = (),
    rows_per_chunk: int = 3,
    scores: dict[str, np.ndarray] | None = None,
) -> str:
    """A finished feature table; the features of `failed` keys are null."""
    table, given = Table(folder), scores or {}
    starts = range(0, len(keys), rows_per_chunk)
    table.create(KIND, {"embed.extractor": "test"}, len(starts), versions={"torch": "2"})
    statuses = ["embed:failed" if key in failed else "ok" for key in keys]
    usable = pa.array([status == "ok" for status in statuses])
    columns = {
        "key": pa.array(keys, pa.int64()),
        "name": [str(key) for key in keys],
        "status": statuses,
        "error": pa.nulls(len(keys), pa.string()),
        FEATURES: pa.array(
            [
                row if ok else None
                for row, ok in zip(features.tolist(), usable.to_pylist(), strict=True)
            ],
            pa.list_(pa.float32(), features.shape[1]),
        ),
        **{name: pa.array(values, pa.float32()) for name, values in given.items()},
    }
    rows = pa.table(columns, schema=feature_row(features.shape[1], list(given)))
    for chunk, start in enumerate(starts):
        table.write(chunk, rows.slice(start, rows_per_chunk))
    return str(folder)


def test_a_table_reads_in_batches_without_its_failed_rows(tmp_path: Path) -> None:
    features = np.arange(28, dtype=np.float32).reshape(7, 4)
    path = write_features(
        tmp_path / "t", range(7), features, failed=[3], scores={"aesthetic": np.arange(7.0)}
    )
    table = FeatureTable(path)
    assert (table.rows, table.width, table.scores) == (6, 4, ["aesthetic"])
    assert table.extractor == {"extractor": "test"}
    assert table.versions == {"torch": "2"}
    batches = list(table.batches(2))
    assert max(len(batch.keys) for batch in batches) == 2
    kept = [0, 1, 2, 4, 5, 6]
    assert np.concatenate([batch.keys for batch in batches]).tolist() == kept
    assert (np.concatenate([batch.features for batch in batches]) == features[kept]).all()
    scores = pa.concat_tables(table.columns(["aesthetic"]))
    assert scores["aesthetic"].to_pylist() == kept


def test_two_tables_join_by_key_whatever_their_order_and_chunks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.permutation(50), rng.permutation(np.arange(20, 70))
    left = rng.normal(size=(50, 3)).astype(np.float32)
    right = rng.normal(size=(50, 5)).astype(np.float32)
    one = FeatureTable(write_features(tmp_path / "a", first.tolist(), left, rows_per_chunk=7))
    other = FeatureTable(
        write_features(tmp_path / "b", second.tolist(), right, failed=[25], rows_per_chunk=11)
    )
    pairs = list(join_features(one, other))
    keys = np.concatenate([a.keys for a, _ in pairs])
    assert sorted(keys.tolist()) == [key for key in range(20, 50) if key != 25]
    for a, b in pairs:
        assert (a.keys == b.keys).all()
        for row, key in enumerate(a.keys):
            assert (a.features[row] == left[first.tolist().index(key)]).all()
            assert (b.features[row] == right[second.tolist().index(key)]).all()
    # The order is that of the keys, so swapping the tables changes nothing.
    assert np.concatenate([a.keys for a, _ in join_features(other, one)]).tolist() == keys.tolist()


def test_a_table_of_another_kind_and_one_without_vectors_are_refused(tmp_path: Path) -> None:
    other = Table(tmp_path / "captions")
    other.create("caption", {}, 1)
    other.write(0, pa.table({"key": [1], "status": ["ok"]}))
    with pytest.raises(DataError, match=r"is a caption table, expected one that jobs/embed\.py"):
        FeatureTable(str(tmp_path / "captions"))
    scores = Table(tmp_path / "scores")
    scores.create(KIND, {}, 1)
    row = {"key": [1], "name": ["a"], "status": ["ok"], "error": [None], "aesthetic": [6.5]}
    scores.write(0, pa.table(row, schema=feature_row(None, ["aesthetic"])))
    table = FeatureTable(str(tmp_path / "scores"))
    assert (table.width, table.scores) == (None, ["aesthetic"])
    with pytest.raises(DataError, match="no column 'features'; it has key, name"):
        next(table.batches())


def test_vectors_survive_a_round_trip_from_any_slice() -> None:
    features = np.arange(12, dtype=np.float32).reshape(4, 3)
    column = pa.chunked_array([as_vectors(features)])
    assert (vectors(column.slice(1, 2)) == features[1:3]).all()
    assert vectors(column.slice(0, 0)).shape == (0, 3)
