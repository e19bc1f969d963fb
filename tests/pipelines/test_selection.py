import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import build
from pipelines.images import RowIndex
from pipelines.plans import read_plan, write_plan
from pipelines.runtime import RayConfig
from pipelines.schemas import IMAGE_ROW
from pipelines.selection import ActorConfig, ReadImages, Selection, open_table
from pipelines.storage import Table
from vlv_model.errors import DataError, RunError


def selection(table: Path, output: Path, **more: object) -> Selection:
    values = {"input": str(table), "output": str(output), "rows_per_chunk": 50, **more}
    return build(Selection, values)


def chunk(number: int) -> pa.Table:
    return pa.table({"chunk": [number]})


def test_chunks_hold_every_selected_row_once(pair_table: Path, tmp_path: Path) -> None:
    table = open_table("caption", selection(pair_table, tmp_path / "t"), {})
    assert table.describe()["planned_rows"] == 120
    read = ReadImages(table, image_size=64)
    blocks = [read(chunk(number)) for number in table.pending()]
    assert [block.num_rows for block in blocks] == [50, 50, 20]
    keys = [key for block in blocks for key in block["key"].to_pylist()]
    assert len(set(keys)) == 120
    assert {s for b in blocks for s in b["status"].to_pylist()} == {"ok"}
    assert all(len(p) == 3 * 64 * 64 for b in blocks for p in b["pixels"].to_pylist())


def test_splits_part_the_table(pair_table: Path, tmp_path: Path) -> None:
    chosen = {
        split: set(selection(pair_table, tmp_path, split=split, holdout=0.3).index().keys.tolist())
        for split in ("all", "train", "holdout")
    }
    assert chosen["train"] | chosen["holdout"] == chosen["all"]
    assert not chosen["train"] & chosen["holdout"]
    assert len(selection(pair_table, tmp_path, limit=7).index()) == 7


def test_nothing_selected_is_one_line(pair_table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="selects no image"):
        selection(pair_table, tmp_path, split="holdout", holdout=1e-9).index()


def test_a_rewritten_table_is_another_run(pair_table: Path, tmp_path: Path) -> None:
    """The same keys in other places: a plan of the old places would caption the wrong images."""
    images = tmp_path / "images"
    shutil.copytree(pair_table, images)
    open_table("caption", selection(images, tmp_path / "t"), {})
    file = images / "0.parquet"
    rows = pq.read_table(file)
    pq.write_table(rows.take(list(reversed(range(len(rows))))), file, row_group_size=16)
    with pytest.raises(RunError, match="layout"):
        open_table("caption", selection(images, tmp_path / "t"), {})


def test_one_broken_image_is_one_row(tmp_path: Path, pair_table: Path) -> None:
    good = pq.read_table(pair_table / "0.parquet").to_pylist()[0]
    bad = {"key": 1, "image": {"bytes": b"\x89PNG broken", "path": None}, "status": "ok"}
    table = pa.Table.from_pylist([good, bad], schema=IMAGE_ROW)
    pq.write_table(table, tmp_path / "t.parquet")
    planned = open_table("caption", selection(tmp_path / "t.parquet", tmp_path / "out"), {})
    block = ReadImages(planned, 64)(chunk(0)).to_pylist()
    assert sorted(row["status"] for row in block) == ["decode:corrupt", "ok"]
    assert "key 1" in next(row["error"] for row in block if row["status"] != "ok")


def test_a_table_that_is_gone_is_no_broken_image(tmp_path: Path, pair_table: Path) -> None:
    """A fault of the storage must not become rows that say that images are broken."""
    shutil.copytree(pair_table, tmp_path / "images")
    planned = open_table("caption", selection(tmp_path / "images", tmp_path / "out"), {})
    read = ReadImages(planned, 64)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(DataError, match="is not there any more"):
        read(chunk(0))


@pytest.mark.parametrize(
    ("settings", "there", "count"),
    [
        ({"use_gpu": True}, {"GPU": 3.0, "CPU": 32.0}, (3, 3)),
        ({"use_gpu": True}, {"CPU": 32.0}, (1, 1)),  # the cluster may be asleep
        ({"use_gpu": False}, {"CPU": 1000.0}, (os.cpu_count(),) * 2),
        ({"use_gpu": False}, {"CPU": 1.0}, (1, 1)),
        ({"use_gpu": False, "num_actors": 5}, {"CPU": 1.0}, (5, 5)),
        ({"use_gpu": True, "num_actors": (2, 9)}, {"GPU": 3.0}, (2, 9)),
    ],
)
def test_as_many_actors_as_can_work_at_once(monkeypatch, settings, there, count):
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ActorConfig(**settings).count(RayConfig()) == count


def test_going_on_reads_no_key_again(pair_table: Path, tmp_path: Path, monkeypatch) -> None:
    """While the input is as it was; else its rows are compared, as they are here."""
    shutil.copytree(pair_table, tmp_path / "images")
    select = selection(tmp_path / "images", tmp_path / "t", rows_per_chunk=3)
    made = open_table("caption", select, {}).describe()
    monkeypatch.setattr(RowIndex, "open", lambda *_, **__: pytest.fail("keys are read"))
    assert open_table("caption", select, {}).describe() == made
    with pytest.raises(RunError, match=r"data\.limit: None there, 5 here"):
        open_table("caption", selection(tmp_path / "images", tmp_path / "t", limit=5), {})
    monkeypatch.undo()
    os.utime(tmp_path / "images/0.parquet", (1, 1))  # copied, and the same
    assert open_table("caption", select, {}).describe() == made
    assert ReadImages(Table(tmp_path / "t"), 64)(chunk(39)).num_rows == 3


def test_a_task_reads_no_more_of_a_larger_plan(tmp_path: Path) -> None:
    many = np.arange(5000, dtype=np.int32)
    index = RowIndex([tmp_path / "x"], many.astype(np.int64) * 7, many * 0, many // 16, many % 16)
    assert write_plan(tmp_path, index, 2) == 2500
    assert len(list((tmp_path / "_plan").iterdir())) == 3
    for number in (0, 1023, 1024, 2499):
        rows = read_plan(tmp_path, number).to_pylist()
        assert [row["key"] for row in rows] == [number * 14, number * 14 + 7]
        assert rows[0] == {
            "key": number * 14, "file": 0, "group": number // 8, "row": number * 2 % 16,
        }  # fmt: skip
