"""Training runs for benchmarks/faults/chaos.py, compared with an undisturbed run.

The comparison reads run folders with the standard library and safetensors only.
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
from benchmarks.faults.targets import ClusterTarget, Target, node
from pipelines.tiny_world.pretrained import FOLDER, STAGE1

EVERY = 5  # steps between checkpoints
TOLERANCE = 1e-6  # relative, of a loss: the same number of workers on CPUs in float32


class Run(Target):
    """A run folder; its commits are its checkpoints."""

    def commits(self) -> set[Any]:
        found = set()
        for folder in self.folder.glob("checkpoints/step-*"):
            with suppress(OSError):
                found.add((folder.name, folder.stat().st_mtime_ns))
        return found

    def find_damage(self) -> str | None:
        """A checkpoint with its final name that is incomplete at this moment, or None."""
        for folder in self.folder.glob("checkpoints/step-*"):
            if (problem := damage(folder)) and folder.exists():  # it may have been pruned meanwhile
                return problem
        return None


class ClusterRun(Run, ClusterTarget):
    """A run folder on a cluster of three machines; two of them fit a rank and its reader each."""

    cpus = 3


@dataclass(frozen=True)
class Curve:
    """A disturbed run compared with an undisturbed one."""

    steps: int
    lost: int  # steps missing in the metrics
    doubled: int  # steps more than once in the metrics
    other_rows: int  # steps that used other rows than in the undisturbed run
    largest_difference: float  # relative difference of a loss
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


def compare(run: Path, undisturbed: Path, job: Job) -> Curve:
    """Compare a finished run with the undisturbed one."""
    steps, expected = (read_events(folder, "step") for folder in (run, undisturbed))
    count = Counter(event["step"] for event in steps)
    by_step = {event["step"]: event for event in steps}
    pairs = [(by_step[e["step"]], e) for e in expected if e["step"] in by_step]
    differences = [abs(one["loss"] / other["loss"] - 1) for one, other in pairs]
    losses = [
        {e["step"]: e["heldout_loss"] for e in read_events(folder, "eval")}
        for folder in (run, undisturbed)
    ]
    checkpoints = list(run.glob("checkpoints/step-*"))
    return Curve(
        steps=len(job.expected),
        lost=len(set(job.expected) - set(count)),
        doubled=sum(n - 1 for n in count.values()),
        other_rows=sum(one["keys"] != other["keys"] for one, other in pairs),
        largest_difference=max(differences, default=1.0),
        evaluations_differing=sum(
            abs(losses[0].get(step, 0) / loss - 1) > TOLERANCE for step, loss in losses[1].items()
        ),
        damaged=tuple(problem for folder in checkpoints if (problem := damage(folder))),
        left_behind=len(list(run.glob("checkpoints/.step-*"))) + len(list(run.glob(".*.tmp*"))),
    )


def read_events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def damage(checkpoint: Path) -> str | None:
    """A problem of a checkpoint, or None."""
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
    """A stage on two workers with a reader each, from shipped weights; checkpoints every few steps."""
    images = folder / "images.parquet"
    drawn_pairs(images, 200)

    def command(run_dir: str) -> list[str]:
        line = [sys.executable, f"jobs/{stage}.py", f"data.input={images}", f"run_dir={run_dir}"]
        line += [f"model.path={FOLDER / STAGE1}", "data.holdout=0.1", "train.use_gpu=false"]
        line += [f"train.steps={steps}", f"train.checkpoint_every={EVERY}", "train.eval_every=50"]
        line += ["train.num_workers=2", "train.global_batch_size=8", "train.micro_batch_size=2"]
        line += ["train.eval_rows=8", "train.learning_rate=0.0001", "train.wandb=disabled"]
        line += ["train.samples=0", "train.max_failures=1000", "train.readers=1"]
        # Two CPUs per rank: no machine fits both, so every lost machine has a rank.
        return [*line, "train.cpus_per_worker=2", *COMMON, "ray.num_cpus=6"]

    return Job(
        command,
        before=lambda run_dir: [],
        expected=range(1, steps + 1),
        span=3.0,
        target=Run,
        targets={"node": partial(node, target=ClusterRun)},
        compare=compare,
        faults=("rank", "reader", "driver", "head"),
    )
