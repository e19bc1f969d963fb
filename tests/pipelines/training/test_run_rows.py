"""A training keeps the rows that it began with: what is taken down is left out, what is new waits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.admin.takedown import TakedownConfig, take_down
from pipelines.cli.config import build, load
from pipelines.images.random_access import RowIndex
from pipelines.images.runs import Run
from pipelines.storage.tables import Table, parquet_files
from pipelines.training import run_rows
from pipelines.training.caption_index import CaptionIndex
from pipelines.training.config import Stage1Config, Stage2Config, TrainConfig
from pipelines.training.data import GlobalOrder, StepReader, keys_digest
from pipelines.training.job import OpenedRun, open_run, train
from pipelines.training.metrics import read_metrics
from pipelines.training.run_folder import claim
from pipelines.training.run_rows import split
from pipelines.training.stages import MicroBatch
from tests.conftest import SMALLEST
from vlv_model.errors import DataError, RunError

ROWS, STEPS = 6, 6  # of a step; all of them are of the first epoch


def config(run_dir: Path, table: Path, *more: str) -> Stage1Config:
    return load(Stage1Config, None, [
        f"data.input={table}", f"run_dir={run_dir}", f"model.path={SMALLEST}", "data.holdout=0.2",
        "train.use_gpu=false", f"train.steps={STEPS}", f"train.global_batch_size={ROWS}",
        "train.micro_batch_size=2", "train.eval_rows=4", "train.eval_every=3", "train.samples=0",
        "train.checkpoint_every=3", "train.keep_checkpoints=9", *more,
    ])  # fmt: skip


@pytest.fixture
def table(pair_table: Path, tmp_path: Path) -> Path:
    """An image table with two parts."""
    rows = pa.concat_tables(pq.read_table(file) for file in sorted(pair_table.iterdir()))
    table = Table(tmp_path / "images")
    table.create("image", {}, 2)
    Run(table.folder / "_runs/0001", 1).begin({}, [0, 1])
    for chunk in range(2):
        table.write(chunk, rows.slice(61 * chunk, 61), row_group_size=16)
    return table.folder


def rows_of_steps(table: Path) -> list[list[int]]:
    """The keys of each step's rows."""
    index, _ = split(RowIndex.open(parquet_files(str(table))), 0.2)
    order = GlobalOrder(len(index), 42)
    taken = [order.take(step * ROWS, ROWS) for step in range(STEPS)]
    return [[int(index.keys[row]) for _, row in rows] for rows in taken]


def held_out(table: Path) -> list[int]:
    _, index = split(RowIndex.open(parquet_files(str(table))), 0.2)
    return [int(key) for key in index.keys]


def take(table: Path, keys: list[int]) -> None:
    take_down(build(TakedownConfig, {"table": str(table), "keys": keys}))


def rewrite(table: Path, chunk: int, change: Any) -> None:
    """Rewrite a part with `change`, as nobody should."""
    found = Table(table)
    found.write(chunk, change(pq.read_table(found.part(chunk))), row_group_size=16)


def begin(run_dir: Path, table: Path) -> OpenedRun:
    """Begin a run without training."""
    run = open_run(config(run_dir, table))
    run_dir.mkdir(exist_ok=True)
    claim(run_dir, run.identity)
    run_rows.save_keys(run_dir, run.keys, str(table))
    return run


@pytest.mark.faults
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("noted", [True, False], ids=["now", "by an earlier version"])
def test_losses_of_steps_without_removed_rows_are_bit_identical(
    table: Path, tmp_path: Path, noted: bool
) -> None:
    """Without learning, all such steps; with learning, only those before the first removed row."""
    still = ["train.learning_rate=1e-30"]
    train(config(tmp_path / "whole", table, *still))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    (tmp_path / "run/result.json").unlink()
    if not noted:
        shutil.rmtree(tmp_path / "run" / run_rows.FOLDER)
    steps = rows_of_steps(table)
    gone = [steps[4][1], *steps[5]]  # of the last one all rows
    unseen = held_out(table)[-1]
    take(table, [*gone, unseen])
    train(config(tmp_path / "run", table, *still))
    whole, run = ([e for e in read_metrics(tmp_path / n) if e["event"] == "step"] for n in ("whole", "run"))  # fmt: skip
    assert [e["loss"] for e in run[:4]] == [e["loss"] for e in whole[:4]]
    assert [e["keys"] for e in run[:4]] == [e["keys"] for e in whole[:4]]
    assert run[4]["loss"] != whole[4]["loss"]
    left = [key for key in steps[4] if key not in gone]
    assert run[4]["keys"] == f"{keys_digest(left):016x}"
    assert (run[5]["loss"], run[5]["grad_norm"]) == (0, 0)
    evals = [[e["heldout_loss"] for e in read_metrics(tmp_path / n) if e["event"] == "eval"]
             for n in ("whole", "run")]  # fmt: skip
    assert evals[0] == evals[1]


def test_a_run_continues_without_removed_rows_and_ignores_new_rows(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = begin(tmp_path / "run", table)
    assert open_run(config(tmp_path / "run", table)).identity == begun.identity
    steps = rows_of_steps(table)
    take(table, steps[2][:2])
    run = open_run(config(tmp_path / "run", table))
    assert run.identity == begun.identity
    assert run.keys.tolist() == begun.keys.tolist()
    assert sorted(set(begun.rows[0].keys) - set(run.rows[0].keys)) == sorted(steps[2][:2])
    err = capsys.readouterr().err
    assert "2 of the 120 rows that the run began with were removed" in err
    assert err.endswith("ignores: 0\n")
    # Another ingest adds a row, and marks another one.
    Run(table / "_runs/0002", 2).begin({}, [0])

    def judged(rows: pa.Table) -> pa.Table:
        new = rows.slice(0, 1).set_column(0, "key", pa.array([7], pa.int64()))
        states = ["filtered:aesthetic", *rows["status"].to_pylist()[1:]]
        rows = rows.set_column(rows.schema.get_field_index("status"), "status", pa.array(states))
        return pa.concat_tables([rows, new.cast(rows.schema)])

    marked = pq.read_table(Table(table).part(0))["key"][0].as_py()
    rewrite(table, 0, judged)
    run = open_run(config(tmp_path / "run", table))
    assert run.identity == begun.identity
    left = {int(key) for side in run.rows for key in side.keys}
    assert left == {int(key) for key in begun.keys} - {marked, *steps[2][:2]}
    err = capsys.readouterr().err
    assert "3 of the 120 rows that the run began with were removed" in err
    assert err.endswith("ignores: 1\n")


def test_a_run_continues_but_does_not_start_without_held_out_rows(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = begin(tmp_path / "run", table)
    gone = held_out(table)
    take(table, gone[1:])
    open_run(config(tmp_path / "run", table))
    assert "without evaluation" not in capsys.readouterr().err
    take(table, gone[:1])
    run = open_run(config(tmp_path / "run", table))
    assert run.identity == begun.identity
    assert run.rows[0].keys.tolist() == begun.rows[0].keys.tolist()
    assert len(run.rows[1]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "warning: all held-out rows were removed: the run continues without evaluation"
    )
    with pytest.raises(DataError, match="none is a held-out row"):
        open_run(config(tmp_path / "another", table))


def test_error_names_a_row_that_is_missing_by_accident(table: Path, tmp_path: Path) -> None:
    begun = begin(tmp_path / "run", table)
    first = pq.read_table(Table(table).part(1))["key"][0].as_py()
    rewrite(table, 1, lambda rows: rows.slice(1))
    with pytest.raises(RunError, match=r"rows: \[\d+, \d+\] there, \[\d+, \d+\] here"):
        open_run(config(tmp_path / "run", table))
    take(table, [int(begun.rows[0].keys[5])])  # which does not excuse the other one
    with pytest.raises(RunError, match=rf"began with 1 rows .* lacks now.* key {first}\)"):
        open_run(config(tmp_path / "run", table))


def test_a_run_of_an_earlier_version_continues_after_a_takedown(
    table: Path, tmp_path: Path
) -> None:
    begun = begin(tmp_path / "run", table)
    shutil.rmtree(tmp_path / "run" / run_rows.FOLDER)
    assert open_run(config(tmp_path / "run", table)).identity == begun.identity
    gone = int(begun.rows[1].keys[0])
    take(table, [gone])
    run = open_run(config(tmp_path / "run", table))
    assert run.identity == begun.identity
    assert run.keys.tolist() == begun.keys.tolist()
    note = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(note | {"keys": ["0" * 16, "0" * 16]}))
    with pytest.raises(RunError, match=r"rows: "):
        open_run(config(tmp_path / "run", table))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_without_rows_gets_a_micro_batch_without_valid_tokens(workers: int) -> None:
    settings = TrainConfig(steps=3, global_batch_size=4, micro_batch_size=2)
    whole = GlobalOrder(12, 0)
    gone = {row for _, row in whole.take(4, 4)[:2]} | {whole.take(8, 4)[3][1]}
    here = np.array([-1 if row in gone else row for row in range(12)])
    order = GlobalOrder(12, 0, here)

    def begin(rows: Any) -> Any:
        return lambda: MicroBatch([row for _, row in rows], {}, len(rows))

    ranks = [list(StepReader(order, begin, settings, r, workers).steps(0)) for r in range(workers)]
    for step in range(3):
        taken = dict(batch for rank in ranks for batch in rank[step][1])
        expected = [row for _, row in whole.take(step * 4, 4)]
        for number, batch in taken.items():
            rows = expected[2 * number : 2 * number + 2]
            assert batch.keys == [row for row in rows if row not in gone]
            assert batch.valid_tokens == len(batch.keys)
        assert all(rank[step][1] for rank in ranks)
    reader = StepReader(order, begin, settings, 0, workers)
    assert [reader.rows_of(step) for step in range(3)] == [4, 2, 3]


def test_positions_of_present_and_missing_keys() -> None:
    keys = np.array([-5, 3, 8, 9], np.int64)
    nowhere = np.zeros(2, np.int32)
    index = RowIndex([], np.array([3, 9], np.int64), nowhere, nowhere, nowhere)
    assert run_rows.positions(keys, index).tolist() == [-1, 0, -1, 1]
    nothing = index.select(np.zeros(2, bool))
    assert run_rows.positions(keys, nothing).tolist() == [-1] * 4


def test_stage_2_continues_after_a_takedown(
    table: Path, trained_captioner: Path, tmp_path: Path
) -> None:
    """The takedown lists only images; captions follow."""
    rows = pa.concat_tables(pq.read_table(file) for file in parquet_files(str(table)))
    pq.write_table(rows.select(["url", "caption"]), tmp_path / "teacher.parquet")
    run_dir = tmp_path / "run"
    settings = load(Stage2Config, None, [
        f"data.input={table}", f"data.captions={tmp_path / 'teacher.parquet'}", "data.holdout=0.2","data.join_on=url",
        f"run_dir={run_dir}", f"model.path={trained_captioner.parent / 'stage1'}",
        "train.use_gpu=false", "train.global_batch_size=6",
    ])  # fmt: skip
    begun = open_run(settings)
    claim(run_dir, begun.identity)
    run_rows.save_keys(run_dir, begun.keys, str(table))
    gone = [int(key) for key in begun.rows[0].keys[:2]]
    take(table, gone)
    run = open_run(settings)
    assert run.identity == begun.identity
    assert sorted(set(begun.rows[0].keys) - set(run.rows[0].keys)) == gone
    captions = CaptionIndex.open(run_dir / "captions")
    assert not captions.has(np.array(sorted(gone))).any()
    assert captions.has(run.rows[0].keys).all()
