"""Run every job at the published sizes on this machine's CPU, and compare with the estimates.

    python -m benchmarks.full_size [PART ...] [--size full|tiny] [--folder FOLDER] [--keep]

Writes base models with random weights in the published configurations, then runs each part for a step,
an image or a picture, as users do. The job of stage 1 is killed after its first checkpoint and continued.
The whole takes 24 GB of memory, 35 GB of disk and about an hour on two cores; each part runs alone, too.
Without --keep the folder is removed at the end. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.full_size.measuring import JobFailedError, Run, run, size_gb
from benchmarks.full_size.parts import PARTS, STEPS, Job, Work
from benchmarks.full_size.predicting import Predicted, predict
from pipelines.estimate.flops import matrix_rate
from pipelines.training.metrics import read_metrics

MARGIN_GB = 3.0  # of memory, beside the model: Ray, imports, and what loading takes for a moment
INPUTS_GB = 14.0  # base models and checkpoints of the full size
MARKER = ".full-size"  # in the folder: all of it may be removed
LIMIT = 3600.0  # seconds of one job
HEAD = (
    "| part | seconds | a step | predicted | all processes GB | largest GB | predicted | on disk GB "
    "| predicted |"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--folder", type=Path, default=Path("runs/full-size"))
    parser.add_argument("--keep", action="store_true", help="keep the models for another run")
    given = parser.parse_args(arguments)
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"unknown part '{unknown[0]}': choose from {', '.join(PARTS)}")
    work = Work(given.folder.absolute(), given.size)
    jobs = {part: PARTS[part](work, part) for part in given.parts or PARTS}
    results: dict[str, Any] = {}
    work.folder.mkdir(parents=True, exist_ok=True)
    if any(work.folder.iterdir()) and not (work.folder / MARKER).exists():
        parser.error(f"--folder {given.folder} holds other files: give a new or an empty folder")
    (work.folder / MARKER).touch()
    try:
        predicted = {part: [predict(work, job) for job in jobs[part]] for part in jobs}
        if problem := shortage(work, predicted):
            print(problem, file=sys.stderr)
            return 2
        rate = matrix_rate(torch.device("cpu"))
        print(HEAD + "\n|" + "---|" * (HEAD.count("|") - 1), flush=True)
        for part in jobs:
            if problem := shortage(work, {part: predicted[part]}):  # other programs took it
                results[part] = {"error": problem}
            else:
                results[part] = measure(work, jobs[part], predicted[part], rate)
            print(row(part, results[part]), flush=True)
    finally:
        if not given.keep:
            shutil.rmtree(work.folder, ignore_errors=True)
    print(json.dumps({"benchmark": "full size", "size": given.size, "parts": results}))
    return int(any("error" in result for result in results.values()))


def shortage(work: Work, predicted: Mapping[str, Sequence[Predicted]]) -> str | None:
    """What this machine lacks for these parts, in one line; None: nothing."""
    free = psutil.virtual_memory().available / 1e9
    needed = {part: max(p.memory_gb for p in jobs) + MARGIN_GB for part, jobs in predicted.items()}
    if largest := [part for part in needed if needed[part] > free]:
        fitting = [part for part in needed if part not in largest]
        return (
            f"{', '.join(largest)} needs {max(needed.values()):.0f} GB of free memory, this machine "
            f"has {free:.0f} GB: give the parts that fit ({', '.join(fitting) or 'none'})"
        )
    disk = shutil.disk_usage(work.folder).free / 1e9
    outputs = max(sum(2 * p.disk_gb for p in jobs) for jobs in predicted.values())
    inputs = (INPUTS_GB if work.size == "full" else 0.1) - size_gb(work.folder)
    if disk < inputs + outputs:
        return (
            f"{work.folder} needs {inputs + outputs:.0f} GB of disk, {disk:.0f} GB are free: give "
            "--folder on a larger disk"
        )
    return None


def measure(
    work: Work, jobs: Sequence[Job], predicted: Sequence[Predicted], rate: float
) -> dict[str, Any]:
    """Figures of a part; `error` and the last lines of the output if a job failed.

    A step is predicted at `rate`, the FLOP/s of large matrix products here: no step can be faster.
    """
    seconds, peak, largest = 0.0, 0.0, 0.0
    for job in jobs:  # of a run that was interrupted
        shutil.rmtree(job.output, ignore_errors=True)
    try:
        for job in jobs:
            work.write(job.model)
            for one in runs(work, job):
                seconds += one.seconds
                peak, largest = max(peak, one.peak_gb), max(largest, one.largest_gb)
        size = sum(size_gb(job.output) for job in jobs)
        result = {
            "seconds": round(seconds, 1),
            "step_seconds": step_seconds(jobs[-1]),
            "predicted_step_seconds": round(predicted[-1].flops / rate, 2) or None,
            "peak_gb": round(peak, 2),
            "largest_gb": round(largest, 2),
            "predicted_gb": round(max(p.memory_gb for p in predicted), 4),
            "disk_gb": round(size, 3),
            "predicted_disk_gb": round(sum(p.disk_gb for p in predicted), 3),
        }
    except JobFailedError as error:
        result = {"error": str(error)}
    for job in jobs:
        shutil.rmtree(job.output, ignore_errors=True)
    return result


def runs(work: Work, job: Job) -> Iterator[Run]:
    """Run a job; a killed one twice, until its first checkpoint and to its end."""
    if job.killed:
        yield run(job.command, work.folder, LIMIT, lambda: bool(checkpoints(job)))
    yield run(job.command, work.folder, LIMIT)
    if job.killed and (steps := steps_of(job)) != (expected := list(range(1, STEPS + 1))):
        raise JobFailedError(f"the continued run has the steps {steps}, expected {expected}")


def checkpoints(job: Job) -> list[Path]:
    return list(job.output.glob("checkpoints/step-*/checkpoint.json"))


def steps_of(job: Job) -> list[int]:
    """The steps in a run's metrics."""
    return [event["step"] for event in read_metrics(job.output) if event["event"] == "step"]


def step_seconds(job: Job) -> float | None:
    """Seconds of a training's last step; None for other jobs."""
    events = [event for event in read_metrics(job.output) if event["event"] == "step"]
    return round(events[-1]["seconds"], 2) if events else None


def row(part: str, result: Mapping[str, Any]) -> str:
    """A line of the table."""
    if "error" in result:
        return f"| {part} | failed: {result['error'].splitlines()[0]} |"
    return f"| {part} | {' | '.join('–' if v is None else f'{v:g}' for v in result.values())} |"


if __name__ == "__main__":
    sys.exit(main())
