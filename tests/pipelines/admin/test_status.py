"""Status of a finished, an unfinished and a missing table, and of training runs."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.admin.status import StatusConfig, status_text
from pipelines.images.runs import next_run
from pipelines.storage.tables import Table
from vlv_model.errors import DataError

ROWS = pa.table({"key": [1, 2, 3], "status": ["ok", "ok", "download:dns"]})


def test_a_table_during_writing_and_when_finished(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    run = next_run(table)
    run.begin({"retry": []}, [0, 1], fetched=6, marked=0)
    table.create("image", {}, 2)
    table.write(1, ROWS)
    text = status_text(StatusConfig(table=str(tmp_path / "t")))
    assert "image table" in text
    assert "1 of 2 chunks are written" in text
    assert "run 1: 6 rows to fetch, 0 to mark" in text
    assert "1 of 2 chunks done, about 0 min left" in text
    assert " ".join(text.split()).endswith("ok 2 66.7% download:dns 1 33.3% total 3")
    table.write(0, ROWS)
    run.end(table.counts())
    assert "finished 2" in status_text(StatusConfig(table=str(tmp_path / "t")))


def test_a_table_without_runs(tmp_path: Path) -> None:
    table = Table(tmp_path / "t")
    table.create("caption", {}, 3)
    table.write(0, ROWS)
    assert "2 chunks are missing" in status_text(StatusConfig(table=str(tmp_path / "t")))


def test_a_folder_without_a_table_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    message = (
        r"holds no table, no training run and no model, nor do the folders in it: expected a folder "
        r"with a _table\.json, a run\.json or a checkpoint\.json"
    )
    with pytest.raises(DataError, match=message):
        status_text(StatusConfig(table=str(tmp_path)))


MADE = Path(__file__).parents[2] / "compatibility/made-2026-11"


def test_a_training_that_was_killed_half_way() -> None:
    """The compatibility fixture: a run of twelve steps with a checkpoint."""
    text = status_text(StatusConfig(table=str(MADE / "killed/stage1")))
    for words in (
        "5 of 12 steps are done", "newest checkpoint: step 4, written", "held-out loss 0.9518 at step 0", "not finished",
        "min left if it is running",
    ):  # fmt: skip
        assert words in text, text


def test_a_folder_of_outputs_gives_a_line_for_each(tmp_path: Path) -> None:
    lines = status_text(StatusConfig(table=str(MADE))).splitlines()
    assert lines[0] == f"outputs in {MADE}:"
    for line in (
        "captioner  stage2 model, step 12",
        "captions   caption table, 20 rows, ok 100%",
        "stage1     training run, 12 of 12 steps, finished",
    ):
        assert line in lines, lines
    assert not [line for line in lines if line.startswith(("models", "web", "killed"))]
    lines = status_text(StatusConfig(table=str(MADE / "killed"))).splitlines()
    assert "stage1    training run, 5 of 12 steps, not finished" in lines
    assert [line for line in lines if "chunks left" in line]
    (tmp_path / "new/_plan").mkdir(parents=True)
    asked = json.dumps({"asked": {"input": "/photos"}})
    (tmp_path / "new/_plan/listing.json").write_text(asked)
    assert "list of images" in status_text(StatusConfig(table=str(tmp_path)))
    listing = status_text(StatusConfig(table=str(tmp_path / "new")))
    assert listing.startswith("list of the images of /photos in ")


def test_an_exported_model_and_one_that_was_copied_in_part(tmp_path: Path) -> None:
    text = status_text(StatusConfig(table=str(MADE / "captioner")))
    for words in (
        "stage2 model",
        "step 12",
        "weights sha256:d3399c9a",
        "language_model",
        "README.md",
    ):
        assert words in text, text
    assert "not complete" not in text
    (tmp_path / "checkpoint.json").write_bytes((MADE / "captioner/checkpoint.json").read_bytes())
    assert "it is not complete" in status_text(StatusConfig(table=str(tmp_path)))


def test_the_report_of_an_output_is_named(tmp_path: Path) -> None:
    report = MADE / "captions/_report.html"
    assert status_text(StatusConfig(table=str(MADE / "captions"))).endswith(f"report: {report}")
    (tmp_path / "run.json").write_text('{"train.steps": 60000}')
    assert "report:" not in status_text(StatusConfig(table=str(tmp_path)))
    (tmp_path / "report.html").touch()
    assert status_text(StatusConfig(table=str(tmp_path))).endswith("/report.html")


def test_a_training_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"train.steps": 60000}')
    text = status_text(StatusConfig(table=str(tmp_path)))
    assert "0 of 60,000 steps are done" in text
    assert "no checkpoint yet" in text
