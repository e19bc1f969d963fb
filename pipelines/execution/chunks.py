"""Passing the chunks of a table through a job's steps, and counting what comes out."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution.cluster import WHOLE, Cluster, Step
from pipelines.execution.metrics import ACTOR_BUSY_SECONDS, ACTOR_SECONDS, ROWS
from pipelines.execution.progress import BUSY, PRESENT, RowBar


def _write_chunk(
    rows: pa.Table, write: Callable[[int, pa.Table], Any], sums: Mapping[str, str]
) -> pa.Table:
    """Last step of a chunk: its rows go into the table, a line of figures goes to the driver."""
    (chunk,) = rows["chunk"].unique().to_pylist()
    passing = [name for name in (BUSY, PRESENT) if name in rows.column_names]
    columns = {**sums, **{name: name for name in passing}}
    figures = {name: pc.sum(rows[column]).as_py() or 0 for name, column in columns.items()}
    rows = rows.drop_columns(["chunk", *passing])
    write(chunk, rows)
    statuses = Counter(rows["status"].to_pylist())
    return pa.table({"statuses": [json.dumps(statuses)], "figures": [json.dumps(figures)]})


def map_chunks(
    cluster: Cluster, chunks: Sequence[int], step: Step, clock: Callable[[], float] = time.monotonic
) -> Iterator[pa.Table]:
    """What `step` makes of each of the chunks of a table, in any order.

    It gets a block of one row (`chunk`). A table that is through in a few seconds is worked on in this
    process, where workers would take as long to start; of others the rest goes to the cluster.
    """
    until = clock() + cluster.seconds_here
    left = list(chunks)
    while left and clock() < until:
        yield step(pa.table({"chunk": [left.pop(0)]}))
    for wave in cluster.datasets(left) if left else ():  # which would import Ray Data
        yield from wave.map_batches(step, **WHOLE).iter_batches(**WHOLE)


def run_chunks(
    cluster: Cluster,
    pending: Sequence[int],
    stages: Callable[[Any, Step], Any],
    write: Callable[[int, pa.Table], Any],
    title: str,
    total_rows: int,
    done: Mapping[str, int],
    watch: Callable[[Mapping[str, int]], None] | None = None,
    sums: Mapping[str, str] | None = None,
) -> None:
    """Pass the `pending` chunks of a table through `stages` on the `cluster`, `write` what comes out.

    `done` are the rows by status of earlier attempts, which the bar goes on from; `watch` gets
    those of this attempt, after each chunk. `stages` gets a Ray Dataset with one block per chunk (one
    row: `chunk`), which it takes through `map_batches` of WHOLE chunks, and `last`. That has to be
    called once for each chunk, with the rows that go into the table, each with its `chunk` and,
    where an actor says so (pipelines.execution.quarantine), with what part of its time it was at work; what it
    returns is the chunk's block in the dataset that `stages` returns. The bar also tells the rates
    of `sums`: what a column adds up to, by the name that it has there.
    """
    ours = Counter[str]()
    last = partial(_write_chunk, write=write, sums=sums or {})
    with RowBar(title, total_rows, done) as bar:
        for chunks in cluster.datasets(pending):
            for row in stages(chunks, last).iter_rows():
                statuses = json.loads(row["statuses"])
                ours.update(statuses)
                for status, rows in statuses.items():
                    ROWS.add(rows, job=title, status=status)
                if watch is not None:
                    watch(ours)
                figures = json.loads(row["figures"])
                ACTOR_BUSY_SECONDS.add(figures.get(BUSY, 0), job=title)
                ACTOR_SECONDS.add(figures.get(PRESENT, 0), job=title)
                bar.update(statuses, figures)
