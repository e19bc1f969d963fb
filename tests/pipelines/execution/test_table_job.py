"""The frame of jobs that write a table: nobody plans what another one works on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cli.config import build
from pipelines.execution.cluster import Cluster
from pipelines.execution.connection import RayConfig
from pipelines.execution.table_job import TableJob, run_table_job
from pipelines.images.selection import Selection
from pipelines.storage.locks import lock_folder
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import Table, parquet_files
from tests.pipelines.image_jobs import Names, image_job
from vlv_model.errors import RunError

HERE = RayConfig(address="in-process")
FORK = multiprocessing.get_context("fork")
ROUNDS = 8


def name_images(images: Path, output: Path) -> None:
    data = build(Selection, {"input": str(images), "output": str(output), "rows_per_chunk": 16})
    run_table_job(image_job("name", data, {}, Names), str(output), HERE)


def attempt(job: Callable[[], None], start: Any, said: Any) -> None:
    start.wait()
    try:
        job()
        said.put("done")
    except RunError as error:
        said.put(str(error))
    except BaseException as error:
        said.put(f"fault: {error!r}")


def test_of_two_that_begin_at_once_one_waits_for_the_other(
    pair_table: Path, tmp_path: Path
) -> None:
    images = Table(tmp_path / "images")  # our own table needs no decoder process
    images.create("image", {}, 1)
    images.write(0, pq.read_table(pair_table).slice(0, 120), row_group_size=16)
    for number in range(ROUNDS):
        output = tmp_path / f"{number}"
        start, said = FORK.Barrier(2), FORK.Queue()
        at_once = [
            FORK.Process(
                target=attempt, args=(lambda o=output: name_images(images.folder, o), start, said)
            )
            for _ in range(2)
        ]
        for process in at_once:
            process.start()
        lines = sorted(said.get(timeout=60) for _ in at_once)
        for process in at_once:
            process.join()
        assert "done" in lines
        assert all(
            line == "done" or "is in use by a job that is still going" in line for line in lines
        )
        keys = [row["key"] for row in read_rows(parquet_files(str(output)), ["key"])]
        assert len(keys) == len(set(keys)) == 120


class Steps(TableJob):
    """Notes what the frame asks of it, and who holds the table then."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []

    def note(self, step: str, table: Table) -> None:
        try:
            with lock_folder(table.folder, "data.output"):
                held = False
        except RunError:
            held = True
        self.asked.append((step, held))

    def check(self, table: Table) -> None:
        self.asked.append(("check", table.folder.exists()))

    def plan(self, table: Table) -> None:
        self.note("plan", table)
        if not table.exists:
            table.create("numbers", {}, 1)

    def run(self, table: Table, cluster: Cluster) -> None:
        self.note("run", table)
        table.write(0, pa.table({"key": [1], "status": ["ok"]}))

    def finish(self, table: Table) -> None:
        self.note("finish", table)


def test_the_frame_holds_the_table_from_the_plan_to_the_end(tmp_path: Path) -> None:
    output = str(tmp_path / "t")
    first, again = Steps(), Steps()
    assert run_table_job(first, output, HERE) == {"ok": 1}
    assert first.asked == [
        ("check", False), ("check", True), ("plan", True), ("run", True), ("finish", True)
    ]  # fmt: skip
    assert run_table_job(again, output, HERE) == {"ok": 1}
    assert again.asked == [("check", True), ("check", True), ("plan", True), ("finish", True)]
    assert pq.read_table(Table(output).part(0)).num_rows == 1
