"""Chunks reach every machine, each is done once, and a machine that goes takes none with it."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.execution.chunks import map_chunks, run_chunks
from pipelines.execution.cluster import InProcess
from pipelines.execution.steps import Chunk, PlacedStep
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import Table, parquet_files

CHUNKS = 24


@pytest.mark.parametrize(
    ("seconds", "there"), [(0.5, [7, 3, 5, 4]), (2.5, [5, 4]), (4.5, []), (100, [])]
)
def test_chunks_are_mapped_here_first_and_each_once(seconds: float, there: list[int]) -> None:
    sent: list[int] = []

    class Noting(InProcess):
        seconds_here = seconds

        def pass_chunks(
            self, chunks: Sequence[int], steps: Sequence[PlacedStep]
        ) -> Iterator[Chunk]:
            sent.extend(chunks)
            return super().pass_chunks(chunks, steps)

    mapped = map_chunks(Noting(), [7, 3, 5, 4], number_alone, clock=count().__next__)
    assert [rows["number"].to_pylist() for rows in mapped] == [[7], [3], [5], [4]]
    assert sent == there


def number_alone(chunk: int) -> pa.Table:
    return pa.table({"number": [chunk]})


def statuses_of(chunk: int) -> list[str]:
    return ["ok"] * chunk + ["download:timeout"]


def with_statuses(chunk: Chunk) -> Chunk:
    states = statuses_of(chunk.number) if chunk.number else []
    rows = {"status": pa.array(states, pa.string()), "tokens": pa.array(range(len(states)))}
    return replace(chunk, rows=pa.table(rows))


written: dict[int, pa.Table] = {}  # a step is sent as on a cluster, and finds this by its name


def write(chunk: Chunk) -> None:
    written[chunk.number] = chunk.rows


@pytest.mark.parametrize("apart", [True, False])
def test_what_is_written_is_told_by_status_after_each_chunk(
    apart: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    written.clear()
    told: list[dict[str, int]] = []

    run_chunks(
        InProcess(), [2, 0, 3], [PlacedStep(with_statuses)], write, "job", 9, {"ok": 2},
        watch=lambda ours: told.append(dict(ours)), sums={"tokens": "tokens"},
        commit_apart={"num_cpus": 1} if apart else None,
    )  # fmt: skip
    assert {chunk: rows["status"].to_pylist() for chunk, rows in written.items()} == {
        2: statuses_of(2), 0: [], 3: statuses_of(3)
    }  # fmt: skip
    first = {"ok": 2, "download:timeout": 1}
    assert told == [first, first, {"ok": 5, "download:timeout": 2}]
    bar = capsys.readouterr().err
    assert "9/9" in bar  # with the two of an earlier attempt
    assert "ok 78%" in bar


# A process of its own, since it needs another Ray than the other tests.
JOB = """
import sys, threading, time
from dataclasses import replace
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from pipelines.execution.chunks import run_chunks
from pipelines.execution.connection import RayConfig, ray_session
from pipelines.execution.steps import PlacedStep
from pipelines.storage.tables import Table

class Slow:
    def __init__(self, seen):
        self.head, self.seen = ray.get_runtime_context().get_node_id(), seen

    def __call__(self, chunk):
        here = ray.get_runtime_context().get_node_id()
        while here == self.head and not self.seen.exists():  # or nothing is left for the other one
            time.sleep(0.1)
        time.sleep(0.5)
        return replace(chunk, rows=pa.table({"status": ["ok"], "name": [here]}))

def lose():
    while True:
        time.sleep(0.1)
        parts = [table.part(commit.chunk) for commit in table.commits()]
        if any(there.node_id in part.read_bytes().decode("latin-1") for part in parts):
            break
    seen.touch()
    cluster.remove_node(there, allow_graceful=False)

if __name__ == "__main__":
    health = {"health_check_initial_delay_ms": 0, "health_check_failure_threshold": 12}
    health |= {"health_check_period_ms": 500, "health_check_timeout_ms": 20_000}
    head = {"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": health})
    there = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    table, chunks = Table(sys.argv[1]), int(sys.argv[2])
    seen = table.folder.with_suffix(".seen")  # a part that the machine wrote which is to be lost
    table.create("caption", {}, chunks)
    def write(chunk):
        rows = chunk.rows.append_column("key", pa.array([chunk.number]))
        table.write(chunk.number, rows)
    threading.Thread(target=lose, daemon=True).start()
    with ray_session(RayConfig(address=cluster.address)) as machines:
        slow = PlacedStep(Slow(seen), resources={"num_cpus": 1})
        run_chunks(machines, range(chunks), [slow], write, "slow", chunks, {})
    print(there.node_id)
    cluster.shutdown()
"""


@pytest.mark.end_to_end
def test_a_machine_that_is_lost_takes_no_chunk_with_it(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    table = tmp_path / "table"
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py", table, str(CHUNKS)],
        cwd=Path(__file__).parents[3],
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lost = done.stdout.splitlines()[-1]
    assert Table(table).pending() == []
    rows = list(read_rows(parquet_files(str(table)), ["key", "name"]))
    assert sorted(row["key"] for row in rows) == list(range(CHUNKS))
    # It had committed a part when it was lost. Ray may have lost that part's figures with it, and then
    # the other machine repeated the chunk.
    assert table.with_suffix(".seen").exists()
    assert sum(row["name"] == lost for row in rows) < CHUNKS / 2


def test_a_chunk_keeps_its_rows_and_their_types_in_a_block_of_ray() -> None:
    schema = pa.schema([("key", pa.int64()), ("text", pa.string())], {"about": "texts"})
    rows = pa.table({"key": [5, 6], "text": ["a", None]}, schema=schema)
    for chunk in (Chunk(7), Chunk(7, rows, 0.5, 1.5), Chunk(7, rows.slice(0, 0))):
        block = chunk.to_block()
        assert block.num_rows > 0  # or Ray Data would drop it
        again = Chunk.of_block(block)
        assert again == chunk
        assert again.rows.schema.equals(chunk.rows.schema, check_metadata=True)
