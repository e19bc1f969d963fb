"""Duplicates by content: the result depends only on the table, and equals brute force."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cli.config import build
from pipelines.execution.cluster import InProcess, RayCluster
from pipelines.images.rows import DUPLICATE, OK
from pipelines.ingest import duplicates
from pipelines.ingest.duplicates import DuplicateConfig, _read_hashes, mark_duplicates
from pipelines.storage.sorting import ExternalSort
from pipelines.storage.tables import Table

Row = tuple[int, int, int, str]  # run, content, phash, status


def table_of(folder: Path, rows: list[Row], chunk: int = 5) -> Table:
    """A table whose keys are the positions of `rows`."""
    table = Table(folder)
    parts = [rows[i : i + chunk] for i in range(0, len(rows), chunk)]
    table.create("image", {}, len(parts))
    for number, part in enumerate(parts):
        columns = {
            "key": pa.array([number * chunk + i for i in range(len(part))], pa.int64()),
            "run": pa.array([row[0] for row in part], pa.int32()),
            "sha256": [hashlib.sha256(bytes([row[1]])).hexdigest() for row in part],
            "phash": [f"{row[2]:016x}" for row in part],
            "status": [row[3] for row in part],
        }
        table.write(number, pa.table(columns))
    return table


def statuses(table: Table) -> list[str]:
    found = [pq.read_table(table.part(c.chunk))["status"].to_pylist() for c in table.commits()]
    told: dict[str, int] = {}
    for status in (status for part in found for status in part):
        told[status] = told.get(status, 0) + 1
    assert told == table.counts()  # the commits know
    return [status for part in found for status in part]


def expected(rows: list[Row], by: str, distance: int) -> list[str]:
    """By comparing all pairs."""
    order = [(run, key) for key, (run, *_) in enumerate(rows)]
    counted = [status in (OK, DUPLICATE) for *_, status in rows]

    def is_copy(i: int, j: int) -> bool:
        if not counted[j] or order[j] >= order[i]:
            return False
        (_, content, phash, _), (_, other, other_phash, _) = rows[i], rows[j]
        near = (phash ^ other_phash).bit_count() <= distance and phash and other_phash
        return content == other or (by == "near" and bool(near))

    return [
        status
        if not counted[i]
        else DUPLICATE
        if any(is_copy(i, j) for j in range(len(rows)))
        else OK
        for i, (*_, status) in enumerate(rows)
    ]


hashes = st.integers(0, 2**64 - 1)
near_hashes = st.lists(st.integers(0, 63), max_size=5).map(lambda bits: sum({1 << b for b in bits}))
kinds = st.sampled_from([OK, OK, OK, DUPLICATE, "filtered:aesthetic"])
tables = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 12), near_hashes | hashes, kinds), max_size=30
)


@settings(deadline=None, max_examples=60)
@given(tables, st.sampled_from(["none", "exact", "near"]), st.integers(0, 8))
def test_marks_equal_brute_force_and_are_stable(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], by: str, distance: int
) -> None:
    folder = tmp_path_factory.mktemp("table")
    table = table_of(folder / "t", rows)
    config = build(DuplicateConfig, {"by": by, "distance": distance})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_BLOCK", 4)
        changed = mark_duplicates(InProcess(), table, config, 2, folder / "copies")
        again = mark_duplicates(InProcess(), table, config, 3, folder / "copies")
    wanted = expected(rows, by, distance)
    if by == "none":
        wanted = [OK if status == DUPLICATE else status for *_, status in rows]
    assert statuses(table) == wanted
    assert changed == sum(a != b for a, b in zip(wanted, [row[3] for row in rows], strict=True))
    assert again == 0  # and no part is rewritten


@pytest.mark.usefixtures("ray_local")
def test_on_a_cluster_with_many_buckets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows: list[Row] = [
        (int(rng.integers(1, 4)), int(rng.integers(60)), int(rng.integers(1, 2**62)), OK)
        for _ in range(200)
    ]
    rows = [*rows, *((r, 60 + i, p ^ (1 << i), s) for i, (r, _, p, s) in enumerate(rows[:20]))]
    table = table_of(tmp_path / "t", rows, chunk=16)
    config = build(DuplicateConfig, {"by": "near", "distance": 3})
    cluster = RayCluster(seconds_here=0)  # or none of so small a table would leave the driver
    small = partial(ExternalSort, bucket_bytes=512)
    assert mark_duplicates(cluster, table, config, 4, tmp_path / "copies", small) > 20
    assert statuses(table) == expected(rows, "near", 3)
    copies = {c.chunk for c in table.commits() if c.run == 4}
    assert 0 < len(copies) <= len(table.commits())


def test_images_of_one_colour_are_not_near_duplicates(tmp_path: Path) -> None:
    table = table_of(tmp_path / "t", [(1, 1, 0, OK), (1, 2, 0, OK)])
    read = _read_hashes(0, table)
    assert read["phash"].to_pylist() == [0, 0]
    assert (
        mark_duplicates(InProcess(), table, DuplicateConfig(by="near"), 1, tmp_path / "copies") == 0
    )


def test_marks_do_not_rewrite_images_and_repair_a_commit(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    noise = np.random.default_rng(0)
    table.create("image", {}, 1)
    columns = {
        "key": pa.array([1, 2, 3], pa.int64()),
        "image": [noise.bytes(20_000) for _ in range(3)],
        "run": pa.array([1, 1, 1], pa.int32()),
        "sha256": ["ab" * 32, "cd" * 32, "ab" * 32],
        "phash": ["01" * 8, "02" * 8, "01" * 8],
        "status": [OK, OK, OK],
    }
    before = table.write(0, pa.table(columns))
    content = table.part(0).read_bytes()
    config = DuplicateConfig()
    assert mark_duplicates(InProcess(), table, config, 1, tmp_path / "copies") == 1
    assert table.part(0).read_bytes().startswith(content)
    assert statuses(table) == [OK, OK, DUPLICATE]
    # A job that was killed behind the part, and before its commit.
    (table.folder / "_commits" / "000000.json").write_text(before.to_json())
    assert mark_duplicates(InProcess(), table, config, 1, tmp_path / "copies") == 0
    assert statuses(table) == [OK, OK, DUPLICATE]
