"""The metadata benchmark's synthetic lists and rows_out-up images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.ingest.lists import write_list
from benchmarks.ingest.metadata import FILTERS, STEPS, PictureMaker, growth
from pipelines.images.rows import IMAGE_ROW, METADATA_ROW
from pipelines.ingest.plan import Plan, read_list
from pipelines.lists.filters import FilterConfig


def test_a_synthetic_list_is_like_a_published_one(tmp_path: Path) -> None:
    folder = write_list(tmp_path / "list", 6_000, rows_per_file=2_500)
    assert len(list(folder.glob("*.parquet"))) == 3
    plan = Plan()
    kept = sum(r.num_rows for r in read_list([*folder.glob("*.parquet")], FilterConfig(), {}, plan))
    assert plan.read == 6_000
    assert plan.dropped == {"repeated_url": 6_000 - kept}
    assert 30 < 6_000 - kept < 120
    for step in ("read", "filter_rows", "plan", "plan_all"):
        assert STEPS[step](tmp_path, folder) == 6_000
    dropped = Plan()
    list(read_list([*folder.glob("*.parquet")], FilterConfig(**FILTERS), {}, dropped))
    assert {f"filtered:{rule}" for rule in FilterConfig(**FILTERS).rules()} <= set(dropped.dropped)


def test_a_list_by_score_is_sorted_in_each_file(tmp_path: Path) -> None:
    folder = write_list(tmp_path / "list", 3_000, "score", group_rows=500)
    (file,) = folder.glob("*.parquet")
    scores = pq.read_table(file)["AESTHETIC_SCORE"].to_numpy()
    assert (np.diff(scores) <= 0).all()
    assert pq.read_metadata(file).num_row_groups == 6


def test_made_up_rows_are_rows_of_ingest() -> None:
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1_000)
    rows = pa.table(
        [pa.array(keys) if f.name == "key" else pa.nulls(1_000, f.type) for f in METADATA_ROW],
        schema=METADATA_ROW,
    )
    rows_out = PictureMaker()(rows)
    assert rows_out.schema.equals(IMAGE_ROW)
    ok = rows_out.filter(pa.compute.equal(rows_out["status"], "ok"))
    assert 600 < ok.num_rows < 700
    assert len(ok["sha256"].unique()) > 0.95 * ok.num_rows


def test_growth_is_between_the_two_longest() -> None:
    found = [{"rows": n, "mb": mb} for n, mb in ((10, 1.0), (100, 50.0), (1_100, 60.0))]
    assert growth(found, "mb") == 0.01
