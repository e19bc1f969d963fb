"""The progress of an output, or of all outputs in a folder, as printed by `jobs/status.py`."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from pydantic import Field
from tqdm import tqdm

from pipelines.cli.config import InputPathOrUrl
from pipelines.execution.model import is_finished, latest_checkpoint, step_of
from pipelines.execution.progress import counts_table, summary
from pipelines.images.listing import DESCRIPTION
from pipelines.images.runs import runs_of
from pipelines.ingest.report import REPORT as TABLE_REPORT
from pipelines.storage.files import as_path, is_file
from pipelines.storage.folders import is_folder, names_in
from pipelines.storage.tables import TABLE_FILE, Table, read_json_object
from pipelines.training.metrics import data_share, heldout_losses, read_metrics
from pipelines.training.report import FILE as RUN_REPORT
from pipelines.training.run_folder import IDENTITY, RESULT
from pipelines.training.skipped_rows import skipped_line
from vlv_model.checkpoints.files import CHECKPOINT_FILE, WEIGHTS_FILE, read_checkpoint
from vlv_model.config import Config
from vlv_model.errors import DataError

_STEPS = 50  # last steps, over which the speed is averaged


class StatusConfig(Config):
    """All settings of `jobs/status.py`."""

    table: InputPathOrUrl = Field(
        description="folder of a table, a training run or an exported model, or a folder of such folders"
    )


def status_text(config: StatusConfig) -> str:
    """The state of an output, with the path of its report; of a folder of outputs, a line of each.

    Raises DataError if the folder has neither.
    """
    folder = as_path(config.table)
    if (kind := _kind(folder)) is not None:
        texts = {
            TABLE_FILE: _table_text,
            IDENTITY: _training_text,
            CHECKPOINT_FILE: _model_text,
            DESCRIPTION: _listing_text,
        }
        return texts[kind](folder)
    lines = {name: _line(folder / name) for name in sorted(names_in(folder))}
    if found := {name: line for name, line in lines.items() if line}:
        width = max(map(len, found))
        return "\n".join(
            [
                f"outputs in {folder}:",
                *(f"{name:<{width}}  {line}" for name, line in found.items()),
                *_report_line(folder / RUN_REPORT),
            ]
        )
    raise DataError(
        f"{config.table} holds no table, no training run and no model, nor do the folders in it: expected "
        f"a folder with a {TABLE_FILE}, a {IDENTITY} or a {CHECKPOINT_FILE}"
    )


def _kind(folder: Path) -> str | None:
    """The file that says what a folder is; None if there is none."""
    files = (TABLE_FILE, IDENTITY, CHECKPOINT_FILE, DESCRIPTION)
    return next((name for name in files if is_file(folder / name)), None)


def _line(folder: Path) -> str | None:
    """The state of an output in a line; None if the folder is none."""
    kind = _kind(folder) if is_folder(folder) else None
    if kind == TABLE_FILE:
        table = Table(folder)
        about, counts = table.describe(), table.counts()
        left = len(table.pending())
        state = f"{left:,} of {about['chunks']:,} chunks left, " if left else ""
        return f"{about['kind']} table, {state}{sum(counts.values()):,} rows, {summary(counts)}"
    if kind == IDENTITY:
        done, steps = _steps(folder)
        state = "finished" if is_file(folder / RESULT) else "not finished"
        return f"training run, {done:,} of {steps:,} steps, {state}"
    if kind == CHECKPOINT_FILE:
        info = read_checkpoint(folder)
        return f"{info.stage} model, step {info.step:,}"
    return "list of images of a job that has not begun its table" if kind else None


def _report_line(file: Path) -> list[str]:
    return [f"report: {file}"] if is_file(file) else []


def _listing_text(folder: Path) -> str:
    """The input whose images a job has listed before its first chunk."""
    asked = read_json_object(folder / DESCRIPTION)["asked"]
    return (
        f"list of the images of {asked['input']} in {folder}: the job that made it has not begun its table, "
        "run it again"
    )


def _model_text(folder: Path) -> str:
    """Stage, step, parts and digest of a checkpoint or an export."""
    info = read_checkpoint(folder)
    lines = [f"{info.stage} model {folder}, step {info.step:,}"]
    if info.sha256:
        lines.append(f"weights sha256:{info.sha256[:16]}")
    if info.base_models:
        lines.append(f"base models: {', '.join(sorted(info.base_models))}")
    if not is_finished(folder):
        lines.append(
            f"it is not complete: {WEIGHTS_FILE} or another of its files is missing or cut off"
        )
    lines += [f"card: {folder / 'README.md'}"] if is_file(folder / "README.md") else []
    return "\n".join(lines)


def _table_text(path: Path) -> str:
    """Kind, chunks, runs, size, rows by status and report."""
    table = Table(path)
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
    return "\n".join(
        [*lines, counts_table(table.counts()), *_report_line(table.folder / TABLE_REPORT)]
    )


def _training_text(run_dir: Path) -> str:
    """Step, losses, speed, time left, the newest checkpoint and the report."""
    step, steps = _steps(run_dir)
    done = [event for event in read_metrics(run_dir) if event["event"] == "step"]
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
    if skipped := skipped_line(run_dir):
        lines.append(skipped)
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        lines.append("no checkpoint yet: if killed now, it restarts at step 0")
    else:
        written = _format_time(checkpoint.stat().st_mtime)
        lines.append(f"newest checkpoint: step {step_of(checkpoint):,}, written {written}")
    finished = (run_dir / RESULT).is_file()
    lines.append("it is finished" if finished else "not finished: the same command continues it")
    return "\n".join([*lines, *_report_line(run_dir / RUN_REPORT)])


def _steps(run_dir: Path) -> tuple[int, int]:
    """Done and planned steps."""
    done = [event["step"] for event in read_metrics(run_dir) if event["event"] == "step"]
    return (done[-1] if done else 0), read_json_object(run_dir / IDENTITY)["train.steps"]


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
