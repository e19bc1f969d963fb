"""Passes the chunks of a table through a job's steps, commits them, and counts their rows."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution.cluster import WHOLE, Cluster, Step
from pipelines.execution.progress import BUSY, PRESENT, RowBar
from pipelines.execution.telemetry import ACTOR_BUSY_SECONDS, ACTOR_SECONDS, ROWS


@dataclass(frozen=True)
class CommitChunk:
    """The last step of a chunk: writes its rows, and returns one row of figures for the driver.

    `sums` are those of `run_chunks`.
    """

    write: Callable[..., Any]
    sums: Mapping[str, str]

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Commit rows with their `chunk`."""
        (chunk,) = rows["chunk"].unique().to_pylist()
        return self.commit(chunk, rows.drop_columns(["chunk"]))

    def commit(self, chunk: int, rows: pa.Table, *more: Any) -> pa.Table:
        """Commit the rows of a chunk, which may be none: Ray Data drops blocks without a row.

        `more` are further arguments of `write`.
        """
        timings = [name for name in (BUSY, PRESENT) if name in rows.column_names]
        columns = {**self.sums, **{name: name for name in timings}}
        figures = {name: pc.sum(rows[column]).as_py() or 0 for name, column in columns.items()}
        rows = rows.drop_columns(timings)
        self.write(chunk, rows, *more)
        statuses = Counter(rows["status"].to_pylist())
        return pa.table({"statuses": [json.dumps(statuses)], "figures": [json.dumps(figures)]})


def map_chunks(
    cluster: Cluster, chunks: Sequence[int], step: Step, clock: Callable[[], float] = time.monotonic
) -> Iterator[pa.Table]:
    """The results of `step` for all chunks of a table, in any order.

    `step` takes a block of one row (`chunk`). The first seconds of work happen in this process, since
    workers take as long to start; the cluster processes the rest.
    """
    deadline = clock() + cluster.seconds_here
    remaining = list(chunks)
    while remaining and clock() < deadline:
        yield step(pa.table({"chunk": [remaining.pop(0)]}))
    for wave in cluster.datasets(remaining) if remaining else ():  # which would import Ray Data
        yield from wave.map_batches(step, **WHOLE).iter_batches(**WHOLE)


def run_chunks(
    cluster: Cluster,
    pending: Sequence[int],
    stages: Callable[[Any, CommitChunk], Any],
    write: Callable[..., Any],
    title: str,
    total_rows: int,
    done: Mapping[str, int],
    watch: Callable[[Mapping[str, int]], None] | None = None,
    sums: Mapping[str, str] | None = None,
    start: str = "starting workers",
) -> None:
    """Pass the `pending` chunks of a table through `stages` on the `cluster` and commit the results.

    Args:
        stages: Takes a Ray Dataset with one block per chunk (one row: `chunk`) and the last step, and
            returns a dataset of what the last step returns. Each of its steps is a `map_batches` of
            WHOLE chunks. The last step commits the rows of a chunk, to which actors add their
            timings (pipelines.execution.quarantine).
        write: Commits the rows of a chunk (its number, its rows); runs on the cluster.
        title: The job's name, for the bar and the metrics.
        done: Rows by status of earlier attempts, where the bar starts.
        watch: Receives the rows by status of this attempt, after each chunk.
        sums: Columns whose sums the bar shows as rates, by the name that it shows.
        start: What is waited for until the first chunk is done.
    """
    counts = Counter[str]()
    last = CommitChunk(write, sums or {})
    with RowBar(title, total_rows, done, start) as bar:
        for chunks in cluster.datasets(pending):
            for row in stages(chunks, last).iter_rows():
                statuses = json.loads(row["statuses"])
                counts.update(statuses)
                for status, rows in statuses.items():
                    ROWS.add(rows, job=title, status=status)
                if watch is not None:
                    watch(counts)
                figures = json.loads(row["figures"])
                ACTOR_BUSY_SECONDS.add(figures.get(BUSY, 0), job=title)
                ACTOR_SECONDS.add(figures.get(PRESENT, 0), job=title)
                bar.update(statuses, figures)
