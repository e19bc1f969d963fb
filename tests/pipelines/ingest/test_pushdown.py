"""Rows that cannot pass by a Parquet list's statistics are counted, not read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.ingest.plan import Plan, read_list
from pipelines.lists.filters import FilterConfig
from pipelines.lists.metadata import read_batches
from vlv_model.errors import DataError

LIMITS: dict[str, Any] = {"min_aesthetic": 5, "max_pwatermark": 0.5, "min_short_side": 512}
SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("LANGUAGE", pa.string()),
        ("AESTHETIC_SCORE", pa.float64()),
        ("pwatermark", pa.float32()),
        ("WIDTH", pa.int32()),
        ("HEIGHT", pa.float64()),
    ]
)


def write(file: Path, rows: list[dict[str, Any]], group: int) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, row_group_size=group)
    return file


def plan_of(file: Path, **filters: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The counts of planning, and the rows that pass."""
    plan = Plan()
    try:
        rows = [
            r for t in read_list([file], FilterConfig(**filters), {}, plan) for r in t.to_pylist()
        ]
    except DataError:
        rows = []
    return asdict(plan), rows


def row(number: int, score: float | None, width: int | None = 800) -> dict[str, Any]:
    url = f"http://a.org/{number}.jpg"
    return {"URL": url, "AESTHETIC_SCORE": score, "WIDTH": width, "HEIGHT": 600.0, "TEXT": "x"}


def columns_of(file: Path, **filters: Any) -> list[list[str]]:
    return [batch.column_names for batch in read_batches(file, {}, FilterConfig(**filters))]


def test_only_needed_columns_are_read(tmp_path: Path) -> None:
    (names,) = columns_of(write(tmp_path / "l.parquet", [row(1, 6.0)], 9))
    assert names == ["url", "alt_text", "width", "height", "pwatermark", "aesthetic"]


def test_urls_of_row_groups_that_cannot_pass_are_not_read(tmp_path: Path) -> None:
    rows = [row(i, 8 - i / 4) for i in range(40)]  # 13 of them pass, those of two row groups
    file = write(tmp_path / "l.parquet", rows, 8)
    whole = plan_of(file, min_aesthetic=5)
    assert whole[0]["dropped"] == {"filtered:aesthetic": 27}
    data = bytearray(file.read_bytes())
    about = pq.read_metadata(file)
    for group in range(2, about.num_row_groups):
        for column in (0, 1):  # URL and TEXT
            pages = about.row_group(group).column(column)
            start = pages.dictionary_page_offset or pages.data_page_offset
            data[start : start + pages.total_compressed_size] = (
                b"\xff" * pages.total_compressed_size
            )
    file.write_bytes(data)
    assert plan_of(file, min_aesthetic=5) == whole
    with pytest.raises(DataError, match="not a readable Parquet file"):
        columns_of(file)


@pytest.mark.parametrize("url", [None, "", " ", "\u3000"])
def test_row_groups_with_a_missing_url_are_read(tmp_path: Path, url: str | None) -> None:
    file = write(tmp_path / "l.parquet", [row(0, 6.0), row(1, 2.0), {**row(2, 2.0), "URL": url}], 1)
    names = columns_of(file, min_aesthetic=5)
    assert ["url" in found for found in names] == [True, False, True]
    assert plan_of(file, min_aesthetic=5)[0]["dropped"] == {"filtered:aesthetic": 1, "no_url": 1}


def test_a_value_rounded_up_to_the_limit_passes(tmp_path: Path) -> None:
    # Scores are float32 with us, and the file's float64 is judged as what it becomes.
    file = write(tmp_path / "l.parquet", [row(0, float(np.nextafter(5.0, 0.0)))], 1)
    assert plan_of(file, min_aesthetic=5)[0]["listed"] == 1


scores = st.none() | st.sampled_from([float("nan"), 0.4, 0.5, 4.9, 5.0, 6.0])
sides = st.none() | st.sampled_from([0, 400, 512, 2000])
found_rows = st.fixed_dictionaries(
    {
        "URL": st.sampled_from(["http://a/1", "http://a/2", "ä", " ", "", None]),
        "AESTHETIC_SCORE": scores,
        "pwatermark": scores,
        "WIDTH": sides,
        "HEIGHT": sides,
    }
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(found_rows, min_size=1, max_size=12),
    st.sets(st.sampled_from(["aesthetic", "pwatermark", "short_side"])),
    st.booleans(),
)
def test_the_counts_equal_those_of_reading_all(
    tmp_path_factory: Any, rows: list[dict[str, Any]], optional: set[str], by_score: bool
) -> None:
    folder = tmp_path_factory.mktemp("lists")
    if by_score:
        rows = sorted(rows, key=lambda r: r["AESTHETIC_SCORE"] or 0.0)
    table = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(table, folder / "groups.parquet", row_group_size=2)
    pq.write_table(table, folder / "blind.parquet", write_statistics=False)
    filters = {**LIMITS, "optional": tuple(optional)}
    found, expected = (plan_of(folder / f"{n}.parquet", **filters) for n in ("groups", "blind"))
    assert str(found) == str(expected)  # NaN is NaN
