"""How a table or a training stands, while it is written or afterwards: what `jobs/status.py` prints."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from pydantic import Field

from pipelines.cli.config import InputPathOrUrl
from pipelines.execution.checkpoints import latest_checkpoint, step_of
from pipelines.execution.progress import counts_table
from pipelines.images.runs import runs_of
from pipelines.storage.files import as_path, is_file
from pipelines.storage.tables import Table, read_json_object
from pipelines.training.metrics import data_share, heldout_losses, read_metrics
from pipelines.training.run_folder import RESULT
from vlv_model.config import Config
from vlv_model.errors import DataError

_STEPS = 50  # of whose time the speed is a mean


class StatusConfig(Config):
    """Everything that `jobs/status.py` needs to know."""

    table: InputPathOrUrl = Field(
        description="folder of a table or of a training run that one of our jobs writes or wrote"
    )


def status_text(config: StatusConfig) -> str:
    """How the folder's table or training stands. Raises DataError where it holds neither."""
    table = Table(config.table)
    if table.exists:
        return _table_text(config.table, table)
    if is_file(as_path(config.table) / "run.json"):
        return _training_text(Path(config.table))
    raise DataError(
        f"{config.table} holds no table and no training run: expected a folder with a _table.json or a "
        "run.json"
    )


def _table_text(path: str, table: Table) -> str:
    """Kind, chunks, runs, size and rows by status."""
    about, commits, pending = table.describe(), table.commits(), table.pending()
    size = sum(table.part(commit.chunk).stat().st_size for commit in commits)
    lines = [
        f"{about['kind']} table {path}",
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
    if not pending and (lacking := table.incomplete_reason()):
        lines.append(f"it {lacking}: the job that writes it says which")
    if pending and not runs:
        lines.append(f"{len(pending):,} chunks are missing: the job that writes it continues it")
    return "\n".join([*lines, counts_table(table.counts())])


def _training_text(run_dir: Path) -> str:
    """Step, losses, speed, the newest checkpoint, and what is left."""
    steps = read_json_object(run_dir / "run.json")["train.steps"]
    events = read_metrics(run_dir)
    done = [event for event in events if event["event"] == "step"]
    step = done[-1]["step"] if done else 0
    lines = [f"training run {run_dir}", f"{step:,} of {steps:,} steps are done"]
    if done:
        last = done[-_STEPS:]
        seconds = sum(event["seconds"] for event in last) / len(last)
        lines.append(
            f"loss {last[-1]['loss']:.4f}, {seconds:.2g} s a step, of which {data_share(last):.0%} "
            "waiting for rows"
        )
        if step < steps:
            left = seconds * (steps - step) / 60
            lines.append(f"about {left:,.0f} min to go if it is still going")
    if losses := heldout_losses(run_dir):
        shown = list(losses.items())
        told = [f"{loss:.4f} at step {at:,}" for at, loss in dict([shown[0], shown[-1]]).items()]
        lines.append(f"held-out loss {', '.join(told)}")
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        lines.append("no checkpoint yet: what is killed now begins at step 0")
    else:
        written = _when(checkpoint.stat().st_mtime)
        lines.append(f"newest checkpoint: step {step_of(checkpoint):,}, written {written}")
    finished = (run_dir / RESULT).is_file()
    lines.append("it is finished" if finished else "it is not finished: the same command goes on")
    return "\n".join(lines)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
