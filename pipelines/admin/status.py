"""How a table stands, while a job writes it or afterwards: what `jobs/status.py` prints."""

from __future__ import annotations

import time
from datetime import datetime

from pydantic import Field

from pipelines.cli.config import InputPlace
from pipelines.execution.progress import counts_table
from pipelines.images.runs import runs_of
from pipelines.storage.tables import Table
from vlv_model.config import Config
from vlv_model.errors import DataError


class StatusConfig(Config):
    """Everything that `jobs/status.py` needs to know."""

    table: InputPlace = Field(description="folder of a table that one of our jobs writes or wrote")


def status_text(config: StatusConfig) -> str:
    """Kind, chunks, runs, size and rows by status. Raises DataError where there is no table."""
    table = Table(config.table)
    if not table.exists:
        raise DataError(f"{config.table} holds no table: expected a folder with a _table.json")
    about, commits, pending = table.describe(), table.commits(), table.pending()
    size = sum(table.part(commit.chunk).stat().st_size for commit in commits)
    lines = [
        f"{about['kind']} table {config.table}",
        f"{len(commits):,} of {about['chunks']:,} chunks are written, {size / 1e9:,.2f} GB",
    ]
    runs = runs_of(table)
    for run in runs:
        told, left = run.describe(), len(run.pending(table))
        work = f"run {run.number}: {told['fetched']:,} rows to fetch, {told['marked']:,} to mark"
        if "finished" in told:
            state = f"finished {_when(told['finished'])}"
        else:
            done = len(told["chunks"]) - left
            state = f"{done:,} of {len(told['chunks']):,} chunks done"
            spent = time.time() - told["started"]
            if done and left and run is runs[-1]:
                state += f", about {spent / done * left / 60:,.0f} min to go if it is still going"
        lines.append(f"{work}; began {_when(told['started'])}, {state}")
    if not pending and (lacking := table.lacks()):
        lines.append(f"it {lacking}: the job that writes it says which")
    if pending and not runs:
        lines.append(f"{len(pending):,} chunks are missing: the job that writes it continues it")
    return "\n".join([*lines, counts_table(table.counts())])


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
