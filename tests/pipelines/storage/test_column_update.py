"""Replacing some columns of a Parquet file keeps the bytes of the others."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.storage.column_update import update_columns
from pipelines.storage.files import as_path
from pipelines.storage.parquet import read_parquet_file

NAMES = {"number": pa.int64(), "text": pa.string(), "share": pa.float32(), "flag": pa.bool_()}
VALUES = {
    "number": st.none() | st.integers(-(2**63), 2**63 - 1),
    "text": st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    "share": st.none() | st.floats(width=32, allow_nan=False),
    "flag": st.none() | st.booleans(),
}


def images(rows: int, size: int = 50_000, seed: int = 0) -> pa.Array:
    rng = np.random.default_rng(seed)
    content = [{"bytes": rng.bytes(size), "path": None} for _ in range(rows)]
    return pa.array(content, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def column(draw: Any, name: str, rows: int) -> pa.Array:
    values = draw(st.lists(VALUES[name], min_size=1, max_size=4))
    return pa.array([values[i % len(values)] for i in range(rows)], NAMES[name])


@settings(max_examples=30)
@given(data=st.data())
def test_other_readers_see_new_values_and_unchanged_images(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("update") / "part.parquet"
    rows = data.draw(st.integers(1, 40))
    table = pa.table({name: column(data.draw, name, rows) for name in NAMES})
    table = table.add_column(data.draw(st.integers(1, 4)), "image", images(rows, 400_000 // rows))
    table = table.append_column("many", pa.array([[i] * (i % 3) for i in range(rows)]))
    options = {
        "row_group_size": data.draw(st.integers(1, 41)),
        "write_page_index": data.draw(st.booleans()),
        "use_dictionary": data.draw(st.booleans()),
        "data_page_version": data.draw(st.sampled_from(["1.0", "2.0"])),
    }
    pq.write_table(table, path, **options)
    for _ in range(data.draw(st.integers(1, 3))):
        names = data.draw(st.lists(st.sampled_from(sorted(NAMES)), min_size=1, unique=True))
        changed = {name: column(data.draw, name, rows) for name in names}
        before = path.read_bytes()
        assert update_columns(path, pa.table(changed))
        assert path.read_bytes().startswith(before)
        for name, values in changed.items():
            table = table.set_column(table.schema.get_field_index(name), name, values)
    assert pq.read_table(path).equals(table)
    assert pq.read_metadata(path).num_row_groups == -(-rows // options["row_group_size"])
    assert pl.read_parquet(path).equals(pl.DataFrame(pl.from_arrow(table)))
    columns = "number, text, share, flag, image.bytes, many"
    rows_read = duckdb.sql(f"select {columns} from '{path}'").fetchall()
    assert rows_read == duckdb.from_arrow(table).select(columns).fetchall()


def test_update_is_refused_before_half_of_the_file_is_unused(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"image": images(2), "text": ["a", "b"]}), path)
    sizes = [path.stat().st_size]
    texts = pa.table({"text": ["c" * 1000, "d" * 1000]})
    while update_columns(path, texts):
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes))
    assert 1.9 < sizes[-1] / sizes[0] < 2.1
    assert read_parquet_file(path)["text"].to_pylist() == texts["text"].to_pylist()
    assert [file.name for file in tmp_path.iterdir()] == ["part.parquet"]


def test_values_that_do_not_fit_leave_the_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"image": images(2), "text": ["a", "b"]}), path)
    before = path.read_bytes()
    for columns, reason in (
        ({"text": ["c"]}, "2 rows, got 1 values"),
        ({"words": ["c", "d"]}, "no flat column 'words'"),
        ({"image": ["c", "d"]}, "no flat column 'image'"),
    ):
        with pytest.raises(ValueError, match=reason):
            update_columns(path, pa.table(columns))
    assert path.read_bytes() == before


def test_update_of_no_rows_leaves_the_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    before = path.read_bytes()
    assert update_columns(path, pa.table({"text": pa.array([], pa.string())}))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "size", [20_000, 3_000_000]
)  # below and above the size from which S3 copies itself
def test_a_store_copies_the_old_bytes(s3_server: str, size: int) -> None:
    path: Any = as_path(f"s3://columns-{size}/data/part-000000.parquet")
    path.fs.mkdir(path.drive)
    table = pa.table({"image": images(2, size), "text": ["a", "b"]})
    with path.open("wb") as file:
        pq.write_table(table, file)
    for texts in (["c", "d"], ["e", None]):
        assert update_columns(path, pa.table({"text": texts}))
        assert read_parquet_file(path).equals(table.set_column(1, "text", pa.array(texts)))
    composed = path.fs.info(path.path)["ETag"].strip('"').endswith("-2")  # from two objects
    assert composed == (size > 20_000)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
