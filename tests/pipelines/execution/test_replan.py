"""A table goes on after a takedown or a further ingest of its input, and after nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.admin.takedown import TakedownConfig, take_down
from pipelines.cli.config import build
from pipelines.execution.connection import RayConfig
from pipelines.execution.table_job import run_table_job
from pipelines.images.blocklist import Blocklist
from pipelines.images.plans import plan_index, planned_keys, read_plan, write_chunks
from pipelines.images.random_access import ROW, RowReader
from pipelines.images.removal import SIDE_BY_SIDE
from pipelines.images.rows import IMAGE_ROW
from pipelines.images.runs import Run
from pipelines.images.selection import Selection
from pipelines.storage.tables import Table, parquet_files
from tests.pipelines.image_jobs import Names, image_job, open_table
from vlv_model.errors import RunError

CHUNK = 4  # rows of a planned chunk


def image_rows(keys: list[int], states: dict[int, str] | None = None) -> pa.Table:
    rows = []
    for key in keys:
        state = (states or {}).get(key, "ok")
        image = {"bytes": b"%d" % key, "path": None}
        url = f"http://a.invalid/{key}"
        rows.append({"key": key, "url": url, "image": image, "status": state, "run": 1})
    return pa.Table.from_pylist(rows, schema=IMAGE_ROW)


@pytest.fixture
def images(tmp_path: Path) -> Table:
    """Keys 0 … 29 in three parts."""
    table = Table(tmp_path / "images")
    table.create("image", {}, 3)
    Run(table.folder / "_runs/0001", 1).begin({}, [0, 1, 2])
    for chunk in range(3):
        table.write(chunk, image_rows(list(range(10 * chunk, 10 * chunk + 10))), row_group_size=3)
    return table


def ingest_again(images: Table, chunk: int, rows: pa.Table) -> None:
    """What a further run of ingest leaves."""
    number = len(list((images.folder / "_runs").iterdir())) + 1
    Run(images.folder / f"_runs/{number:04d}", number).begin({}, [chunk])
    images.write(chunk, rows, run=number, row_group_size=3)


def opened(images: Table, tmp_path: Path, **more: Any) -> Table:
    select = {"input": str(images.folder), "output": str(tmp_path / "out"), "rows_per_chunk": CHUNK}
    return open_table("caption", build(Selection, select | more), {"model": "x"})


def work(table: Table, chunks: list[int]) -> None:
    """Commit some of the chunks, as a job does."""
    files = [Path(file) for file in table.describe()["files"]]
    for chunk in chunks:
        plan = read_plan(table.folder, chunk)
        reader = RowReader(plan_index(files, plan))
        for position, key in enumerate(plan["key"].to_pylist()):
            assert reader.row(position)["image"] == b"%d" % key  # read where it lies today
        table.write(chunk, pa.table({"key": plan["key"], "status": ["ok"] * plan.num_rows}))


def keys_of(table: Table) -> list[int]:
    parts = [pq.read_table(file) for file in parquet_files(str(table.folder))]
    return [key for part in parts for key in part["key"].to_pylist()]


def take(images: Table, *keys: int, **more: Any) -> None:
    take_down(build(TakedownConfig, {"table": str(images.folder), "keys": keys, **more}))


def test_a_job_goes_on_after_a_takedown(
    images: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work(opened(images, tmp_path), [0, 2])  # keys 0 … 3 and 8 … 11
    beside = tmp_path / "out" / SIDE_BY_SIDE
    beside.mkdir()
    for key in (1, 2):
        (beside / f"{key}.png").touch()
    take(images, 1, 9, 5, 12, 13, 14, 15)  # of written chunks, of waiting ones, and a whole one
    capsys.readouterr()
    table = opened(images, tmp_path)
    assert "7 of the 30 images that the table was planned for are gone, 0 are new" in (
        capsys.readouterr().err
    )
    assert [file.name for file in beside.iterdir()] == ["2.png"]
    assert table.pending() == [1, 3, 4, 5, 6, 7]  # one of them without a row
    work(table, table.pending())
    assert keys_of(table) == [key for key in range(30) if key not in (1, 9, 5, 12, 13, 14, 15)]
    about = table.describe()
    assert (about["planned_rows"], about["identity"]["rows"]) == (23, 23)
    assert opened(images, tmp_path).describe() == about
    assert Blocklist.read(table).keys == {1, 9, 5, 12, 13, 14, 15}
    take(images, 29, derived=[str(table.folder)])  # a finished one, and its own rows
    assert opened(images, tmp_path).pending() == []
    assert keys_of(table)[-1] == 28


@pytest.mark.parametrize("begun", [[], [0]])
def test_a_chunk_that_lost_all_its_rows_is_an_empty_part(
    images: Table, tmp_path: Path, begun: list[int]
) -> None:
    work(opened(images, tmp_path), begun)
    take(images, 12, 13, 14, 15)
    select = {"input": str(images.folder), "output": str(tmp_path / "out"), "rows_per_chunk": CHUNK}
    job = image_job("caption", build(Selection, select), {"model": "x"}, Names)
    run_table_job(job, select["output"], RayConfig(address="in-process"))
    table = Table(tmp_path / "out")
    assert table.pending() == []
    assert table.commit(3).rows == 0
    assert keys_of(table) == [key for key in range(30) if key not in (12, 13, 14, 15)]


def test_new_rows_and_marks_of_a_further_ingest_are_taken_up(images: Table, tmp_path: Path) -> None:
    ingest_again(images, 1, image_rows(list(range(10, 18))))  # before the table is planned
    work(opened(images, tmp_path), [0, 1, 2])
    ingest_again(images, 0, image_rows([-5, *range(10)], {2: "filtered:aesthetic", 3: "duplicate"}))
    ingest_again(images, 2, image_rows([*range(20, 30), *range(40, 46)], {29: "filtered:punsafe"}))
    table = opened(images, tmp_path)
    assert [read_plan(table.folder, chunk)["key"].to_pylist() for chunk in range(9)] == [
        [0, 1], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 20, 21],
        [22, 23, 24, 25], [26, 27, 28], [-5, 40, 41, 42], [43, 44, 45],
    ]  # fmt: skip
    assert table.pending() == [3, 4, 5, 6, 7, 8]
    work(table, table.pending())
    # What was captioned before it was marked has its caption; nothing is made twice.
    assert sorted(keys_of(table)) == sorted([-5, *range(18), *range(20, 29), *range(40, 46)])


def test_a_limit_stays(images: Table, tmp_path: Path) -> None:
    work(opened(images, tmp_path, limit=10), [0])
    take(images, 3, 5)
    ingest_again(images, 0, image_rows([-1, 0, 1, 2, 4, 6, 7, 8, 9]))
    table = opened(images, tmp_path, limit=10)
    work(table, table.pending())
    assert sorted(keys_of(table)) == [-1, 0, 1, 2, 4, 6, 7, 8, 9, 10]


def test_rows_of_a_condition_go_on_too(images: Table, tmp_path: Path) -> None:
    """Of which a listing is made, that is made again; a rescored row need not be marked."""
    where = "key >= 8 and (alt_text is null or alt_text = 'new')"
    work(opened(images, tmp_path, where=where), [0, 1])
    take(images, 9, 20)
    rows = image_rows(list(range(10, 20))).drop_columns(["alt_text"])
    texts = pa.array([None] * 8 + ["old", "new"], pa.string())
    ingest_again(images, 1, rows.append_column("alt_text", texts).select(IMAGE_ROW.names))
    table = opened(images, tmp_path, where=where)
    work(table, table.pending())
    assert keys_of(table) == [key for key in range(8, 30) if key not in (9, 18, 20)]
    assert opened(images, tmp_path, where=where).describe() == table.describe()
    with pytest.raises(RunError, match=r"data\.where: "):
        opened(images, tmp_path, where="key >= 9")
    images.write(2, image_rows([*range(22, 30)]), row_group_size=3)
    with pytest.raises(RunError, match=r"data\.input \(files\): "):
        opened(images, tmp_path, where=where)


def test_a_table_of_which_nothing_is_written_goes_on(images: Table, tmp_path: Path) -> None:
    opened(images, tmp_path)
    take(images, *range(4, 30))
    table = opened(images, tmp_path)
    work(table, table.pending())
    assert sorted(keys_of(table)) == [0, 1, 2, 3]


def test_one_that_an_earlier_version_began_goes_on_after_a_takedown(
    images: Table, tmp_path: Path
) -> None:
    table = opened(images, tmp_path)
    about = table.describe()
    del about["changes"]
    (table.folder / "_table.json").write_text(json.dumps(about))
    take(images, 7)
    assert opened(images, tmp_path).describe()["planned_rows"] == 29


def test_what_changed_by_accident_is_refused(images: Table, tmp_path: Path) -> None:
    work(opened(images, tmp_path), [0])
    images.write(0, image_rows(list(range(1, 10))), row_group_size=3)
    with pytest.raises(RunError, match=r"data\.input \(rows\): 30 there, 29 here"):
        opened(images, tmp_path)
    take(images, 5)  # which does not excuse the other one
    with pytest.raises(RunError, match=r"begun with 1 images .* lacks now.*the first is key 0"):
        opened(images, tmp_path)


def test_a_plan_of_many_chunks_is_read_by_chunk(tmp_path: Path) -> None:
    (tmp_path / "_plan").mkdir()
    chunks = [np.zeros(n % 3, ROW) for n in range(2500)]
    for number, chunk in enumerate(chunks):
        chunk["key"] = number
    write_chunks(tmp_path, chunks)
    for number in (0, 1, 1023, 1024, 2499):
        assert read_plan(tmp_path, number)["key"].to_pylist() == [number] * (number % 3)
    found = list(planned_keys(tmp_path, 2200))
    assert [keys.tolist() for keys in found] == [[n] * (n % 3) for n in range(2200)]
    for file in (tmp_path / "_plan").iterdir():  # as earlier versions named them
        file.rename(file.with_suffix(".parquet"))
    assert read_plan(tmp_path, 2300)["key"].to_pylist() == [2300, 2300]
    write_chunks(tmp_path, [*chunks, np.zeros(1, ROW)])
    assert {file.suffix for file in (tmp_path / "_plan").iterdir()} == {".plan"}
    assert read_plan(tmp_path, 2500)["key"].to_pylist() == [0]
