"""Metrics of a run: a JSONL file, and on the driver a progress bar, Weights & Biases and gauges.

Rank 0 writes the file itself, so that no line is lost with the driver, and syncs it to disk before
each checkpoint. After a restart from a checkpoint, lines of later steps are removed, so each step is in
the file once. Rank 0 also sends each event through a queue to the driver, which only displays it;
there, repeated steps are shown again.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pipelines.cli.waiting import waiting
from pipelines.execution import telemetry
from pipelines.report.gallery import GalleryItem
from pipelines.storage.files import write_atomically
from pipelines.training.samples import Sampler
from pipelines.training.wandb_run import start_wandb, warn_failed

FILE = "metrics.jsonl"

GAUGES = {
    "loss": telemetry.TRAIN_LOSS,
    "heldout_loss": telemetry.TRAIN_HELDOUT_LOSS,
    "grad_norm": telemetry.TRAIN_GRAD_NORM,
    "images_per_second": telemetry.TRAIN_IMAGES_PER_SECOND,
    "data_share": telemetry.TRAIN_DATA_SHARE,
}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Events of a run in the order of their steps: `event` is start, step, eval or checkpoint."""
    file = run_dir / FILE
    if not file.is_file():
        return []
    lines = file.read_text().splitlines()
    events = []
    for number, line in enumerate(lines):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:  # a kill can truncate only the last line
                raise
    return events


def heldout_losses(run_dir: Path) -> dict[int, float]:
    """Held-out loss by step, of all evaluations that had rows."""
    losses = {e["step"]: e["heldout_loss"] for e in read_metrics(run_dir) if e["event"] == "eval"}
    return {step: loss for step, loss in losses.items() if loss is not None}


def data_share(events: Iterable[Mapping[str, Any]]) -> float:
    """The fraction of the events' step time that workers waited for rows."""
    steps = [event for event in events if event["event"] == "step"]
    return sum(e["data_seconds"] for e in steps) / sum(e["seconds"] for e in steps)


def columns_read(run_dir: Path) -> list[str]:
    """Columns of the input table that the workers read."""
    return [e for e in read_metrics(run_dir) if e["event"] == "eval"][-1]["columns_read"]


class MetricsLog:
    """Appends to the JSONL file, on rank 0; safe for several threads."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        self._lock = threading.Lock()

    def begin(self, step: int) -> int:
        """Open the file and remove the events after `step`, from which training continues; at 0 all.

        Returns the number of steps that were removed.
        """
        events = read_metrics(self.path.parent)
        kept = [e for e in events if e["step"] <= step and step]
        write_atomically(self.path, "".join(json.dumps(event) + "\n" for event in kept))
        # Stays open: a surviving rank of a killed job writes on to the old, replaced file.
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        return sum(e["event"] == "step" and e["step"] > step for e in events)

    def append(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Flush to disk; called before a checkpoint of these steps is written."""
        os.fsync(self._file.fileno())


class MetricsSink:
    """Displays the queue's events on the driver; a context manager around the training."""

    def __init__(
        self,
        queue: Any,
        run_dir: Path,
        stage: str,
        config: dict[str, Any],
        sampler: Sampler | None = None,
        update_report: Callable[[], None] = lambda: None,
    ) -> None:
        """`update_report` is called after evaluations, checkpoints and samples."""
        train = config["train"]
        self.queue = queue
        self.sampler = sampler
        self.update_report = update_report
        self.stage = stage
        self._tags = {"stage": stage, "run": run_dir.name}
        self.steps = train["steps"]
        self.run = start_wandb(run_dir, stage, config)
        self._thread = threading.Thread(target=self._drain, name="metrics", daemon=True)
        self._ended = threading.Event()

    def __enter__(self) -> MetricsSink:
        # Its first lines come from the first step on: until then a bar would say nothing.
        self._start = ExitStack()
        self._start.enter_context(waiting(f"{self.stage}: starting workers, loading the model"))
        self._bar: tqdm | None = None
        self._heldout = ""
        self._last: deque[dict[str, Any]] = deque(maxlen=50)
        self._thread.start()
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._start.close()
        if self._bar is not None:
            self._bar.close()
        if self.sampler and not failure:
            self.sampler.finish(self._show)
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:  # must not fail a finished training
                warn_failed(error)

    def _drain(self) -> None:
        from ray.util.queue import Empty

        while True:
            if self.sampler:
                self.sampler.poll(self._show)
            try:
                event = self.queue.get(timeout=0.3)
            except Empty:
                if self._ended.is_set():
                    return
                continue
            self._handle(event)

    def _handle(self, event: dict[str, Any]) -> None:
        if self.sampler:
            self.sampler.handle(event)
        step = event["step"]
        telemetry.TRAIN_STEP.set(step, **self._tags)
        if event["event"] == "start":
            bar = self._show_bar(step)
            bar.n = step
            bar.refresh()
            return
        for name, gauge in GAUGES.items():
            if event.get(name) is not None:
                gauge.set(event[name], **self._tags)
        if event["event"] == "step":
            self._last.append(event)
            waiting = f", {data_share(self._last):.0%} of the time waiting for rows"
            bar = self._show_bar(step)
            bar.update(step - bar.n)
            bar.set_postfix_str(f"loss {event['loss']:.4f}{self._heldout}{waiting}")
        elif event["event"] == "eval":
            loss = event["heldout_loss"]  # None when all held-out rows were removed
            self._heldout = "" if loss is None else f", held-out {loss:.4f}"
        if self.run is not None and event["event"] in ("step", "eval"):
            values = {k: v for k, v in event.items() if isinstance(v, int | float) and k != "step"}
            self._log({"step": step, **{f"{self.stage}/{k}": v for k, v in values.items()}})
        if event["event"] in ("eval", "checkpoint"):
            self.update_report()

    def _show_bar(self, step: int) -> tqdm:
        if self._bar is None:
            self._start.close()
            self._bar = tqdm(total=self.steps, initial=step, desc=self.stage, unit="step")
        return self._bar

    def _show(self, step: int, items: list[GalleryItem]) -> None:
        """Show samples in the report, and in W&B beside their originals."""
        self.update_report()
        if self.run is None:
            return
        import wandb

        images = []
        for item in items:
            original = Image.open(io.BytesIO(item.original))
            images.append(
                wandb.Image(original, caption="original" if item.caption is None else item.caption)
            )
            if item.reconstruction:
                reconstruction = Image.open(io.BytesIO(item.reconstruction))
                images.append(wandb.Image(reconstruction, caption="reconstruction"))
        self._log({"step": step, f"{self.stage}/samples": images})

    def _log(self, values: dict[str, Any]) -> None:
        try:
            self.run.log(values)
        except Exception as error:  # W&B's process may have ended
            self.run = None
            warn_failed(error)
