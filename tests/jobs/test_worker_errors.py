"""An error on a worker also ends the job with one line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs.conftest import Job

pytestmark = pytest.mark.end_to_end


def test_a_damaged_image_is_named_by_its_key(
    job: Job, ray_local: None, pair_table: Path, tiny_models: Path, tmp_path: Path
) -> None:
    """Ingest writes no damaged images, so the table is not from ingest. Training stops at the image."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(pair_table.glob("*.parquet"))])
    rows = table.to_pylist()
    for row in rows:
        if row["status"] == "ok":
            row["image"]["bytes"] = row["image"]["bytes"][:100]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "t.parquet")
    ended = job(
        "stage1", f"data.input={tmp_path / 't.parquet'}", f"model.path={tiny_models}",
        f"run_dir={tmp_path / 'run'}", "data.holdout=0.2", "train.use_gpu=false",
        "train.global_batch_size=4", "train.steps=2", "train.max_failures=0",
        "train.wandb=disabled",
        "train.samples=0",
    )  # fmt: skip
    assert ended.status == 2
    assert ended.last_line.startswith("error: the image of key ")
    assert "cannot be decoded" in ended.last_line
