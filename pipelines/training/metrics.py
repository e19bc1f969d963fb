"""What a run says while it trains: a bar on the console, a JSONL file, Weights & Biases.

Rank 0 sends events to the driver through a queue; the driver is the only one that writes. After a
restart from a checkpoint, lines of later steps are taken back, so that every step stands once.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.places import write_atomically

FILE = "metrics.jsonl"


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
    """Held-out loss by step, of all evaluations; one that was repeated counts once."""
    events = read_metrics(run_dir)
    return {e["step"]: e["heldout_loss"] for e in events if e["event"] == "eval"}


def columns_read(run_dir: Path) -> list[str]:
    """Columns of the input table that the training read, as its workers say."""
    return [e for e in read_metrics(run_dir) if e["event"] == "eval"][-1]["columns_read"]


class MetricsSink:
    """The driver's end of the queue; use as a context manager around the training."""

    def __init__(
        self, queue: Any, run_dir: Path, stage: str, steps: int, config: dict[str, Any], wandb: str
    ) -> None:
        self.queue = queue
        self.run_dir = run_dir
        self.stage = stage
        self.steps = steps
        self.run = _start_wandb(run_dir, stage, config, wandb)
        self._thread = threading.Thread(target=self._drain, name="metrics", daemon=True)
        self._ended = threading.Event()

    def __enter__(self) -> MetricsSink:
        self._bar = tqdm(total=self.steps, desc=self.stage, unit="step")
        self._heldout = ""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()
        if self.run is not None:
            self.run.finish()

    def _drain(self) -> None:
        from ray.util.queue import Empty

        while True:
            try:
                event = self.queue.get(timeout=0.3)
            except Empty:
                if self._ended.is_set():
                    return
                continue
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        step = event["step"]
        if event["event"] == "start":
            self._forget_after(step)
            self._bar.n = step
            self._bar.refresh()
            return
        with open(self.run_dir / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        if event["event"] == "step":
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {event['loss']:.4f}{self._heldout}")
        elif event["event"] == "eval":
            self._heldout = f", held-out {event['heldout_loss']:.4f}"
        if self.run is not None and event["event"] in ("step", "eval"):
            values = {k: v for k, v in event.items() if isinstance(v, int | float) and k != "step"}
            self.run.log({"step": step, **{f"{self.stage}/{k}": v for k, v in values.items()}})

    def _forget_after(self, step: int) -> None:
        kept = [e for e in read_metrics(self.run_dir) if e["step"] <= step and (step or None)]
        text = "".join(json.dumps(event) + "\n" for event in kept)
        write_atomically(self.run_dir / FILE, text)


def _start_wandb(run_dir: Path, stage: str, config: dict[str, Any], mode: str) -> Any:
    if mode == "disabled":
        return None
    import wandb

    key = os.environ.get("WANDB_API_KEY")
    run = wandb.init(
        project="vlv",
        name=f"{stage}-{run_dir.name}",
        dir=run_dir,
        config=config,
        mode="online" if mode == "auto" and key else "offline",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )
    # Our own step: W&B's may not go back, as it does after a restart from a checkpoint.
    run.define_metric("*", step_metric="step")
    return run
