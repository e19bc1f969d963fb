"""Passes the chunks of a table through a job's steps, commits them, and counts their rows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from pipelines.execution.cluster import Cluster
from pipelines.execution.progress import RowBar
from pipelines.execution.steps import Chunk, PlacedStep
from pipelines.execution.telemetry import ACTOR_BUSY_SECONDS, ACTOR_SECONDS, ROWS


@dataclass(frozen=True)
class _Commit:
    """Writes a chunk. Its rows become the figures of the driver: a row for each status.

    `status`, `rows` (their number), and the sums of the columns in `sums`, by their names there.
    """

    write: Callable[[Any], Any]
    sums: Mapping[str, str]

    def __call__(self, chunk: Chunk) -> Chunk:
        self.write(chunk)
        rows = chunk.rows.select(["status", *self.sums.values()])
        sums = [(column, "sum") for column in self.sums.values()]
        counts = rows.group_by("status").aggregate([([], "count_all"), *sums])
        figures = {name: counts[f"{column}_sum"] for name, column in self.sums.items()}
        table = {"status": counts["status"], "rows": counts["count_all"], **figures}
        return replace(chunk, rows=pa.table(table))


def map_chunks(
    cluster: Cluster,
    chunks: Sequence[int],
    step: Callable[[int], pa.Table],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[pa.Table]:
    """The results of `step` for all chunks of a table, by their numbers, in any order.

    The first seconds of work happen in this process, since workers take as long to start; the
    cluster processes the rest.
    """
    deadline = clock() + cluster.seconds_here
    remaining = list(chunks)
    while remaining and clock() < deadline:
        yield step(remaining.pop(0))
    if remaining:  # or Ray Data would be imported
        for chunk in cluster.pass_chunks(remaining, [PlacedStep(partial(_mapped, step))]):
            yield chunk.rows


def _mapped(step: Callable[[int], pa.Table], chunk: Chunk) -> Chunk:
    return replace(chunk, rows=step(chunk.number))


def run_chunks(
    cluster: Cluster,
    pending: Sequence[int],
    steps: Sequence[PlacedStep],
    write: Callable[[Any], Any],
    title: str,
    total_rows: int,
    done: Mapping[str, int],
    watch: Callable[[Mapping[str, int]], None] | None = None,
    sums: Mapping[str, str] | None = None,
    start: str = "starting workers",
    commit_apart: Mapping[str, Any] | None = None,
) -> None:
    """Pass the `pending` chunks of a table through `steps` on the `cluster` and commit the results.

    Args:
        write: Writes and commits a Chunk as the last step returns it; runs on the cluster.
        title: The job's name, for the bar and the metrics.
        done: Rows by status of earlier attempts, where the bar starts.
        watch: Receives the rows by status of this attempt, after each chunk.
        sums: Columns whose sums the bar shows as rates, by the name that it shows.
        commit_apart: Resources of the tasks that commit. Default: the last step's process commits, so
            that no row leaves it.
        start: What is waited for until the first chunk is done.
    """
    counts = Counter[str]()
    commit = _Commit(write, sums or {})
    if commit_apart is None:
        steps = [*steps[:-1], replace(steps[-1], then=commit)]
    else:
        steps = [*steps, PlacedStep(commit, resources=commit_apart)]
    with RowBar(title, total_rows, done, start) as bar:
        for chunk in cluster.pass_chunks(pending, steps):
            figures = chunk.rows.to_pydict()
            statuses = dict(zip(figures.pop("status"), figures.pop("rows"), strict=True))
            counts.update(statuses)
            for status, rows in statuses.items():
                ROWS.add(rows, job=title, status=status)
            if watch is not None:
                watch(counts)
            ACTOR_BUSY_SECONDS.add(chunk.busy, job=title)
            ACTOR_SECONDS.add(chunk.present, job=title)
            totals = {name: sum(filter(None, column)) for name, column in figures.items()}
            bar.update(statuses, totals, chunk.busy, chunk.present)
