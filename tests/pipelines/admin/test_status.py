"""What is told of a table that is written, half written, or not there."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.admin.status import StatusConfig, status_text
from pipelines.images.runs import next_run
from pipelines.storage.tables import Table
from vlv_model.errors import DataError

ROWS = pa.table({"key": [1, 2, 3], "status": ["ok", "ok", "download:dns"]})


def test_a_table_that_is_being_written_and_then_is(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    run = next_run(table)
    run.begin({"retry": []}, [0, 1], fetched=6, marked=0)
    table.create("image", {}, 2)
    table.write(1, ROWS)
    told = status_text(StatusConfig(table=str(tmp_path / "t")))
    assert "image table" in told
    assert "1 of 2 chunks are written" in told
    assert "run 1: 6 rows to fetch, 0 to mark" in told
    assert "1 of 2 chunks done, about 0 min to go" in told
    assert " ".join(told.split()).endswith("ok 2 66.7% download:dns 1 33.3% total 3")
    table.write(0, ROWS)
    run.end(table.counts())
    assert "finished 2" in status_text(StatusConfig(table=str(tmp_path / "t")))


def test_a_table_without_runs(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    table.create("caption", {}, 3)
    table.write(0, ROWS)
    assert "2 chunks are missing" in status_text(StatusConfig(table=str(tmp_path / "t")))


def test_what_is_no_table_is_one_line(tmp_path: Path) -> None:
    said = (
        r"holds no table and no training run: expected a folder with a _table\.json or a run\.json"
    )
    with pytest.raises(DataError, match=said):
        status_text(StatusConfig(table=str(tmp_path)))


MADE = Path(__file__).parents[2] / "compatibility/made-2026-11"


def test_a_training_that_was_killed_half_way() -> None:
    """As the fixtures of compatibility have it: of twelve steps, with a checkpoint."""
    told = status_text(StatusConfig(table=str(MADE / "killed/stage1")))
    for words in (
        "5 of 12 steps are done", "newest checkpoint: step 4, written", "held-out loss 0.9518 at step 0", "it is not finished",
        "min to go if it is still going",
    ):  # fmt: skip
        assert words in told, told


def test_a_training_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"train.steps": 60000}')
    told = status_text(StatusConfig(table=str(tmp_path)))
    assert "0 of 60,000 steps are done" in told
    assert "no checkpoint yet" in told
