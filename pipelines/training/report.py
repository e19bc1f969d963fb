"""Collects the content of a training run's report and writes it into the run folder.

The page is written by the driver, from the folder: at each evaluation and checkpoint, when samples are
made, and at the end. So it also covers the starts of earlier, killed jobs.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.cli.config import dump
from pipelines.execution.model import latest_checkpoint
from pipelines.images.rows import OK
from pipelines.report.charts import series
from pipelines.report.figures import change, count, loss, percent
from pipelines.storage.files import write_atomically
from pipelines.storage.tables import Table, read_json_object
from pipelines.training.config import Stage1Config, Stage2Config, TrainConfig
from pipelines.training.metrics import read_metrics
from pipelines.training.page import LAST, Start, TrainingReport, clipped, render, waiting_share
from pipelines.training.run_folder import IDENTITY, RESULT, flatten
from pipelines.training.sample_files import read_samples
from vlv_model.checkpoints.files import read_checkpoint
from vlv_model.errors import one_line

FILE = "report.html"
_STEPS_SAMPLED = 6
_FEW_ROWS = 50  # held-out rows, below which the held-out loss says little
_WAITING = 0.02  # share of the time, above which docs/training.md advises more readers
_CLIPPED_STEPS, _CLIPPED_SHARE = 500, 0.5  # of the last steps
_UNUSED = 0.1  # share of the input's rows
_LEAST_STEPS = 20  # to warn about speed or clipping
_HIGHER = 0.01  # of a held-out loss above the lowest one
_DRIVER_SHARE = 0.05  # of the driver's time, spent on writing pages during the training

_TRAINED, _HELD_OUT = "trained on", "held out"


class RunReport:
    """Writes the report of a run, as often as it is worth the driver's time."""

    def __init__(
        self,
        config: Stage1Config | Stage2Config,
        rows: Mapping[str, int],
        removed: int = 0,
    ) -> None:
        """`rows` as `count_rows` returns them; `removed` were there when the run began."""
        self.config, self.rows, self.removed = config, rows, removed
        self._next = 0.0  # time of the next page

    def write(self, failure: BaseException | None = None) -> None:
        """Write the page; `failure` ended the training."""
        run_dir = Path(self.config.run_dir)
        write_atomically(run_dir / FILE, render(self._content(run_dir, failure)))

    def update(self) -> None:
        """Write the page unless the last one was written recently; prints a failure."""
        began = time.monotonic()
        if began < self._next:
            return
        try:
            self.write()
        except Exception as error:  # the training is worth more than its report
            print(f"warning: no report of this run: {one_line(error)}", file=sys.stderr)
        ended = time.monotonic()
        self._next = ended + (ended - began) / _DRIVER_SHARE

    def _content(self, run_dir: Path, failure: BaseException | None) -> TrainingReport:
        train, events = self.config.train, read_metrics(run_dir)
        state = f"as of {_time(time.time())}"
        if failure is not None:
            state = "ended by an error"
        elif (run_dir / RESULT).is_file():
            state = "finished"
        settings = [
            (name, "none" if value is None else str(value))
            for name, value in flatten(dump(self.config))
            if not name.startswith(("model.", "estimate.", "dry_run"))
        ]
        starts = [event for event in events if event["event"] == "start"]
        return TrainingReport(
            title=f"Training run {run_dir.name}",
            stage="stage2" if isinstance(self.config, Stage2Config) else "stage1",
            state=state,
            steps=train.steps,
            schedule=f"train.schedule={train.schedule} over {count(train.steps)} steps, "
            f"{count(train.warmup_steps)} of them warm-up.",
            max_grad_norm=train.max_grad_norm,
            events=events,
            notes=warnings(train, events, self.rows, self.removed, failure),
            rows=self.rows,
            removed=self.removed,
            samples=read_samples(run_dir, _STEPS_SAMPLED),
            sampled_images=train.samples,
            starts=[
                Start(_time(e["time"]), e["step"], e["workers"], e["device"], e["repeated"])
                for e in starts
            ],
            identity=_identity(run_dir),
            settings=settings,
            versions=starts[-1]["versions"] if starts else {},
        )


def count_rows(table: str, trained: int, held_out: int) -> dict[str, int]:
    """What became of the rows of the input `table`; the numbers add up to its rows.

    Parquet of others counts with its usable rows only.
    """
    rows = {_TRAINED: trained, _HELD_OUT: held_out}
    if (opened := Table(table)).exists:
        counts, description = opened.counts(), opened.describe()
        rows["without a caption, or added since the run began"] = (
            counts.pop(OK, 0) - trained - held_out
        )
        if "images" in description:  # a pair table, which has no row for an image without caption
            rows["images without a caption"] = description["images"] - opened.counts().get(OK, 0)
        rows |= {f"not used: {status}": number for status, number in counts.items()}
    return {
        what: number for what, number in rows.items() if number or what in (_TRAINED, _HELD_OUT)
    }


def warnings(
    train: TrainConfig,
    events: Sequence[Mapping[str, Any]],
    rows: Mapping[str, int],
    removed: int = 0,
    failure: BaseException | None = None,
) -> list[str]:
    """What a reader of the run's figures has to know, one sentence each."""
    steps = [event for event in events if event["event"] == "step"]
    lines = []
    if failure is not None:
        lines.append(f"The training ended with an error: {one_line(failure)}")
    lines += _about_heldout_loss(events)
    if broken := sum(not math.isfinite(event["loss"]) for event in steps):
        lines.append(f"The training loss is not finite in {count(broken)} steps.")
    last = steps[-_CLIPPED_STEPS:]
    often = clipped(last, train.max_grad_norm)
    if len(last) >= _LEAST_STEPS and often >= _CLIPPED_SHARE * len(last):
        lines.append(
            f"The gradient was clipped in {percent(often, len(last))} of the last {count(len(last))} "
            f"steps: its norm was above train.max_grad_norm={train.max_grad_norm:g}. A lower "
            "train.learning_rate or a higher limit changes that."
        )
    waiting = waiting_share(steps[-LAST:])
    if len(steps) >= _LEAST_STEPS and waiting and waiting > _WAITING:
        lines.append(
            f"{percent(waiting, 1)} of the time of the last {min(LAST, len(steps))} steps went into "
            "waiting for rows: more train.cpus_per_worker or train.readers shorten it."
        )
    total, used = sum(rows.values()), rows.get(_TRAINED, 0) + rows.get(_HELD_OUT, 0)
    if total and total - used > _UNUSED * total:
        lines.append(
            f"{count(total - used)} of the {count(total)} rows of data.input are not used "
            f"({percent(total - used, total)}): see Rows."
        )
    if removed:
        lines.append(f"{count(removed)} rows were removed since the run began, and are skipped.")
    return lines


def _about_heldout_loss(events: Sequence[Mapping[str, Any]]) -> list[str]:
    evaluations = [event for event in events if event["event"] == "eval"]
    if not evaluations:
        return []
    lines, rows = [], evaluations[-1]["rows"]
    if not rows:
        return ["All held-out rows were removed: nothing is evaluated."]
    if rows < _FEW_ROWS:
        lines.append(
            f"The held-out loss is of {count(rows)} row{'s' if rows > 1 else ''}; below {_FEW_ROWS} "
            "it varies by chance: train.eval_rows, data.holdout and more images raise that number."
        )
    losses = series(evaluations, "eval", "heldout_loss")
    if any(not math.isfinite(value) for _, value in losses):
        lines.append("The held-out loss is not finite in some evaluations.")
    elif len(losses) > 1:
        best, lowest = min(losses, key=lambda point: point[1])
        final = losses[-1][1]
        if final > lowest + _HIGHER * abs(lowest):
            lines.append(
                f"The held-out loss was lowest at step {count(int(best))} ({loss(lowest)}), and is "
                f"{change(lowest, final).lstrip('+')} higher at step {count(int(losses[-1][0]))}."
            )
    return lines


def _identity(run_dir: Path) -> list[tuple[str, str]]:
    """Models, rows and weights, as a run's identity records them."""
    recorded = read_json_object(run_dir / IDENTITY)
    lines = [
        (name, str(value))
        for name, value in recorded.items()
        if name.startswith(("model.", "parent", "latents")) and value not in (None, "", {})
    ]
    lines += [
        (f"{which} rows", f"{number:,}, keys {digest}")
        for which, number, digest in zip(
            ("training", "held-out"), recorded["rows"], recorded["keys"], strict=True
        )
    ]
    if (size := recorded["bytes"]) is not None:  # images of others are identified by their listing
        lines.append(("bytes of data.input", f"{size:,}"))
    if latest := latest_checkpoint(run_dir):
        info = read_checkpoint(latest)
        lines.append(
            ("newest checkpoint", f"step {info.step:,}, weights sha256:{info.sha256[:16]}")
        )
    return lines


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
