"""The progress of a table or a training run, as printed by `jobs/status.py`."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from pydantic import Field
from tqdm import tqdm

from pipelines.cli.config import InputPathOrUrl
from pipelines.execution.model import latest_checkpoint, step_of
from pipelines.execution.progress import counts_table
from pipelines.images.runs import runs_of
from pipelines.storage.files import as_path, is_file
from pipelines.storage.tables import Table, read_json_object
from pipelines.training.metrics import data_share, heldout_losses, read_metrics
from pipelines.training.run_folder import RESULT
from vlv_model.config import Config
from vlv_model.errors import DataError

_STEPS = 50  # last steps, over which the speed is averaged


class StatusConfig(Config):
    """All settings of `jobs/status.py`."""

    table: InputPathOrUrl = Field(description="folder of a table or a training run")


def status_text(config: StatusConfig) -> str:
    """The progress of the table or training run in a folder. Raises DataError if it has neither."""
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
    description, commits, pending = table.describe(), table.commits(), table.pending()
    size = sum(table.part(commit.chunk).stat().st_size for commit in commits)
    lines = [
        f"{description['kind']} table {path}",
        f"{len(commits):,} of {description['chunks']:,} chunks are written, "
        f"{tqdm.format_sizeof(size, 'B')}",
    ]
    runs = runs_of(table)
    for run in runs:
        info, left = run.describe(), len(run.pending(table))
        work = f"run {run.number}: {info['fetched']:,} rows to fetch, {info['marked']:,} to mark"
        if "finished" in info:
            state = f"finished {_format_time(info['finished'])}"
        else:
            done = len(info["chunks"]) - left
            state = f"{done:,} of {len(info['chunks']):,} chunks done"
            spent = time.time() - info["started"]
            if done and left and run is runs[-1]:
                state += f", about {spent / done * left / 60:,.0f} min left if it is running"
        lines.append(f"{work}; began {_format_time(info['started'])}, {state}")
    if not pending and (lacking := table.incomplete_reason()):
        lines.append(f"it {lacking}: the job that writes it shows which")
    if pending and not runs:
        lines.append(f"{len(pending):,} chunks are missing: run the job again to write them")
    return "\n".join([*lines, counts_table(table.counts())])


def _training_text(run_dir: Path) -> str:
    """Step, losses, speed, time left and the newest checkpoint."""
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
            lines.append(f"about {left:,.0f} min left if it is running")
    if losses := heldout_losses(run_dir):
        items = list(losses.items())
        ends = [f"{loss:.4f} at step {at:,}" for at, loss in dict([items[0], items[-1]]).items()]
        lines.append(f"held-out loss {', '.join(ends)}")
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        lines.append("no checkpoint yet: if killed now, it restarts at step 0")
    else:
        written = _format_time(checkpoint.stat().st_mtime)
        lines.append(f"newest checkpoint: step {step_of(checkpoint):,}, written {written}")
    finished = (run_dir / RESULT).is_file()
    lines.append("it is finished" if finished else "not finished: the same command continues it")
    return "\n".join(lines)


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
