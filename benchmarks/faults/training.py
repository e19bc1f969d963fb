"""Both stages of training, for benchmarks/faults/chaos.py: tiny runs, and their curves held against an unbroken one.

What is compared is read from the run's folder by the standard library and safetensors alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from benchmarks.faults.jobs import COMMON, Job, drawn_pairs
from benchmarks.faults.places import ClusterPlace, Place, node
from pipelines.tiny_world.pretrained import FOLDER, STAGE1

EVERY = 5  # steps between checkpoints
TOLERANCE = 1e-6  # relative, of a loss: the same number of workers on CPUs in float32


class Run(Place):
    """The folder of a training; its commits are its checkpoints."""

    def commits(self) -> set[Any]:
        found = set()
        for folder in self.folder.glob("checkpoints/step-*"):
            with suppress(OSError):
                found.add((folder.name, folder.stat().st_mtime_ns))
        return found

    def look(self) -> str | None:
        """Whether any checkpoint that bears its name is not whole at this moment."""
        for folder in self.folder.glob("checkpoints/step-*"):
            if (problem := damage(folder)) and folder.exists():  # or it was pruned beside us
                return problem
        return None


class ClusterRun(Run, ClusterPlace):
    """The same on a cluster of three machines, of which two have room for a rank and its reader each."""

    cpus = 3


@dataclass(frozen=True)
class Curve:
    """How a run that was disturbed stands against one that was not."""

    steps: int
    lost: int  # steps that the metrics do not tell
    doubled: int  # steps that they tell more than once
    other_rows: int  # steps that used other rows than the same of the unbroken run
    largest_difference: float  # of a loss, relatively
    evaluations_differing: int
    damaged: tuple[str, ...]
    left_behind: int  # temporary folders and files

    @property
    def is_right(self) -> bool:
        wrong = self.lost + self.doubled + self.other_rows + self.evaluations_differing
        fits = self.largest_difference <= TOLERANCE
        return fits and not wrong + self.left_behind and not self.damaged

    def figures(self) -> dict[str, Any]:
        return {**vars(self), "damaged": len(self.damaged)}


def compare(run: Path, unbroken: Path, job: Job) -> Curve:
    """Hold a finished run against the unbroken one."""
    here, there = (told(folder, "step") for folder in (run, unbroken))
    count = Counter(event["step"] for event in here)
    mine = {event["step"]: event for event in here}
    pairs = [(mine[e["step"]], e) for e in there if e["step"] in mine]
    apart = [abs(one["loss"] / other["loss"] - 1) for one, other in pairs]
    losses = [
        {e["step"]: e["heldout_loss"] for e in told(folder, "eval")} for folder in (run, unbroken)
    ]
    kept = list(run.glob("checkpoints/step-*"))
    return Curve(
        steps=len(job.expected),
        lost=len(set(job.expected) - set(count)),
        doubled=sum(n - 1 for n in count.values()),
        other_rows=sum(one["keys"] != other["keys"] for one, other in pairs),
        largest_difference=max(apart, default=1.0),
        evaluations_differing=sum(
            abs(losses[0].get(step, 0) / loss - 1) > TOLERANCE for step, loss in losses[1].items()
        ),
        damaged=tuple(problem for folder in kept if (problem := damage(folder))),
        left_behind=len(list(run.glob("checkpoints/.step-*"))) + len(list(run.glob(".*.tmp*"))),
    )


def told(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of one sort in the metrics of a run that has ended."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [told for told in map(json.loads, lines) if told["event"] == event]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None: nothing."""
    try:
        about = json.loads((checkpoint / "checkpoint.json").read_text())
        for name in ("model.safetensors", "optimizer.safetensors"):
            with safe_open(checkpoint / name, "np") as file:
                tensors = len(file.keys())
            if not tensors or about["step"] != int(checkpoint.name.removeprefix("step-")):
                return f"{checkpoint.name}: empty, or of another step"
    except (OSError, ValueError, SafetensorError) as error:
        return f"{checkpoint.name}: {error}"
    return None


def training(stage: str, folder: Path, steps: int) -> Job:
    """A stage on two workers, each with a reader, and a checkpoint every few steps; from shipped weights."""
    images = folder / "images.parquet"
    drawn_pairs(images, 200)

    def command(place: str) -> list[str]:
        made = [sys.executable, f"jobs/{stage}.py", f"data.input={images}", f"run_dir={place}"]
        made += [f"model.path={FOLDER / STAGE1}", "data.holdout=0.1", "train.use_gpu=false"]
        made += [f"train.steps={steps}", f"train.checkpoint_every={EVERY}", "train.eval_every=50"]
        made += ["train.num_workers=2", "train.global_batch_size=8", "train.micro_batch_size=2"]
        made += ["train.eval_rows=8", "train.learning_rate=0.0001", "train.wandb=disabled"]
        made += ["train.samples=0", "train.max_failures=1000", "train.readers=1"]
        # So that no machine of a cluster takes both ranks: one that is lost has to have one.
        return [*made, "train.cpus_per_worker=2", *COMMON, "ray.num_cpus=6"]

    return Job(
        command,
        before=lambda place: [],
        expected=range(1, steps + 1),
        span=3.0,
        place=Run,
        places={"node": partial(node, place=ClusterRun)},
        compare=compare,
        faults=("rank", "reader", "driver", "head"),
    )
