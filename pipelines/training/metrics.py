"""What a run says while it trains: a JSONL file; a bar on the console, Weights & Biases, gauges.

The file is written by rank 0 of the training itself, so that no line is lost with a driver, and is
on the disk before any checkpoint of its steps. After a restart from a checkpoint, lines of later
steps are taken back: every step stands there once. Besides, rank 0 sends each event to the driver
through a queue, for all that is only shown: there, steps that are done again are told again.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pipelines.execution import metrics as telemetry
from pipelines.report.gallery import GalleryItem
from pipelines.storage.files import write_atomically
from pipelines.training.samples import Sampler
from pipelines.training.wandb_run import give_up, start_wandb

FILE = "metrics.jsonl"

GAUGES = {
    "loss": telemetry.TRAIN_LOSS,
    "heldout_loss": telemetry.TRAIN_HELDOUT_LOSS,
    "grad_norm": telemetry.TRAIN_GRAD_NORM,
    "images_per_second": telemetry.TRAIN_IMAGES_PER_SECOND,
    "data_share": telemetry.TRAIN_DATA_SHARE,
}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Events of a run in the order of their steps: `event` is step, eval or checkpoint."""
    file = run_dir / FILE
    if not file.is_file():
        return []
    lines = file.read_text().splitlines()
    events = []
    for number, line in enumerate(lines):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:  # only the last line can be torn by a kill
                raise
    return events


def heldout_losses(run_dir: Path) -> dict[int, float]:
    """Held-out loss by step, of all evaluations that had a row; one that was repeated counts once."""
    losses = {e["step"]: e["heldout_loss"] for e in read_metrics(run_dir) if e["event"] == "eval"}
    return {step: loss for step, loss in losses.items() if loss is not None}


def data_share(events: Iterable[Mapping[str, Any]]) -> float:
    """Share of the time of steps that workers waited for rows, of all steps among the events."""
    steps = [event for event in events if event["event"] == "step"]
    return sum(e["data_seconds"] for e in steps) / sum(e["seconds"] for e in steps)


def columns_read(run_dir: Path) -> list[str]:
    """Columns of the input table that the training read, as its workers say."""
    return [e for e in read_metrics(run_dir) if e["event"] == "eval"][-1]["columns_read"]


class MetricsLog:
    """The JSONL file as rank 0 writes it; several threads may."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        self._lock = threading.Lock()

    def begin(self, step: int) -> None:
        """Take back what was told behind `step`, from which the training goes on; at 0 all."""
        kept = [e for e in read_metrics(self.path.parent) if e["step"] <= step and step]
        write_atomically(self.path, "".join(json.dumps(event) + "\n" for event in kept))
        # Held open: a rank of a killed job that does not know yet goes on with the file of before.
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Have the disk keep it: called before a checkpoint says that these steps are done."""
        os.fsync(self._file.fileno())


class MetricsSink:
    """The driver's end of the queue; use as a context manager around the training."""

    def __init__(
        self,
        queue: Any,
        run_dir: Path,
        stage: str,
        config: dict[str, Any],
        sampler: Sampler | None = None,
    ) -> None:
        train = config["train"]
        self.queue = queue
        self.sampler = sampler
        self.stage = stage
        self._tags = {"stage": stage, "run": run_dir.name}
        self.steps = train["steps"]
        self.run = start_wandb(run_dir, stage, config)
        self._thread = threading.Thread(target=self._drain, name="metrics", daemon=True)
        self._ended = threading.Event()

    def __enter__(self) -> MetricsSink:
        self._bar = tqdm(total=self.steps, desc=self.stage, unit="step")
        self._heldout = ""
        self._last: deque[dict[str, Any]] = deque(maxlen=50)
        self._thread.start()
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()
        if self.sampler and not failure:
            self.sampler.end(self._show)
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:  # behind the last step, it must not fail the training
                give_up(error)

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
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        if self.sampler:
            self.sampler.take(event)
        step = event["step"]
        telemetry.TRAIN_STEP.set(step, **self._tags)
        if event["event"] == "start":
            self._bar.n = step
            self._bar.refresh()
            return
        for figure, gauge in GAUGES.items():
            if event.get(figure) is not None:
                gauge.set(event[figure], **self._tags)
        if event["event"] == "step":
            self._last.append(event)
            waits = f", waits {data_share(self._last):.1%}"
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {event['loss']:.4f}{self._heldout}{waits}")
        elif event["event"] == "eval":
            loss = event["heldout_loss"]  # none where its rows were taken down
            self._heldout = "" if loss is None else f", held-out {loss:.4f}"
        if self.run is not None and event["event"] in ("step", "eval"):
            values = {k: v for k, v in event.items() if isinstance(v, int | float) and k != "step"}
            self._log({"step": step, **{f"{self.stage}/{k}": v for k, v in values.items()}})

    def _show(self, step: int, items: list[GalleryItem]) -> None:
        """Samples: pictures beside their originals, or originals with their captions."""
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
                made = Image.open(io.BytesIO(item.reconstruction))
                images.append(wandb.Image(made, caption="reconstruction"))
        self._log({"step": step, f"{self.stage}/samples": images})

    def _log(self, values: dict[str, Any]) -> None:
        try:
            self.run.log(values)
        except Exception as error:  # its process may have ended
            self.run = None
            give_up(error)
