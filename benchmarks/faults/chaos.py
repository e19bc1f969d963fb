"""Inject faults into real jobs and count lost and duplicate rows or steps.

    python benchmarks/faults/chaos.py runs/chaos --job ingest --kills 50 --seed 1
    python benchmarks/faults/chaos.py runs/chaos --job ingest --faults disk --kills 5
    python benchmarks/faults/chaos.py runs/chaos --job recaption --kills 20 --seed 2
    python benchmarks/faults/chaos.py runs/chaos --job stage1 --kills 30

After each fault the same command runs again until it succeeds. Then a reader that shares no code with
the pipeline compares the table with the input and with the table of an undisturbed run. For a training
it compares the loss and the rows of every step (`--rows` is the number of steps). Faults (`--faults`):

    driver group worker rank reader decoder head   SIGKILL: see KILLS in benchmarks/faults/kinds.py
    disk                               the table's file system is full
    store                              the table is on an S3 server, which fails or hangs for a while
    node                               a machine of a cluster of three is lost and replaced

Prints a table and, as the last line, JSON. Exit status 1 if a row (or step) is lost, duplicated or
different, or if the job does not finish.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, too
from benchmarks.faults.jobs import JOBS, Job, environment
from benchmarks.faults.kinds import ENDS_JOB, KILLS, REPO, Attempt, enter_namespace, wait_until
from benchmarks.faults.targets import TARGETS, Target
from benchmarks.faults.training import training

HANG_SECONDS = 180.0  # a job without a commit for so long counts as hung


@dataclass
class InjectedFault:
    """One fault and its effect."""

    fault: str
    at: float
    went_on: bool = True  # the job survived
    recovered: float | None = None  # seconds until the next commit
    last_line: str = ""  # last output of a job that the fault ended


class Chaos:
    """Disturbs one job until all faults are injected and it has finished."""

    def __init__(self, job: Job, target: Target, folder: Path, rng: random.Random) -> None:
        self.job, self.target, self.folder, self.rng = job, target, folder, rng
        self.injected: list[InjectedFault] = []
        self.unclear: list[str] = []  # jobs that ended neither by a kill nor with a one-line error
        self.problems: list[str] = []
        self.attempts: list[Attempt] = []
        self.start_seconds = 10.0
        self.attempt: Attempt | None = None

    def run(self, faults: Sequence[str]) -> None:
        """Inject `faults` one after the other, then let the job finish."""
        left = list(faults)
        # Slow the input down, so that the job is still running at the last fault.
        self.job.pace(max(4.0, len(self.job.expected) / (len(left) + 1) / self.job.span))
        while left:
            attempt = self.attempt or self._start()
            before = self.target.commits()
            if self._wait_for_moment(before):
                if not self._inject(left[0], attempt):
                    left.append(left[0])  # later, when such a process exists
                left.pop(0)
            elif attempt.is_running:
                self.problems.append("hung: no commit in three minutes")
                self._ended(attempt)
            elif attempt.process.returncode == 0:
                self.attempt = None
                self.problems.append(
                    f"finished before its last {len(left)} faults: increase --rows"
                )
                break
            else:
                self._ended(attempt)
        self._finish()

    def _wait_for_moment(self, before: set[Any]) -> bool:
        """Wait for the moment of the next fault; False if the job ended or hangs before it.

        The moment is a random time after a new commit. After a start or a fault, one in four is
        before the first commit; once a job commits, waiting that long would use up its rows.
        """
        attempt = self.attempt
        assert attempt is not None
        early = self._is_starting() and self.rng.random() < 0.25
        patience = self.rng.uniform(0, self.start_seconds) if early else HANG_SECONDS
        if wait_until(lambda: self._has_committed(before) or not attempt.is_running, patience):
            attempt.wait(self.rng.uniform(0, self.job.span))
        elif not early:
            return False
        return attempt.is_running

    def _is_starting(self) -> bool:
        """Whether the job has not committed since its start or the last fault."""
        return not self.injected or self.injected[-1].recovered is None

    def _has_committed(self, before: set[Any]) -> bool:
        """Whether there is a commit that is not in `before`; if so, notes the recovery."""
        if not self.target.commits() - before:
            return False
        self._note_recovery()
        return True

    def _note_recovery(self) -> None:
        last = self.injected[-1] if self.injected else None
        if last and last.recovered is None:
            last.recovered = time.monotonic() - last.at

    def _start(self) -> Attempt:
        command = self.job.command(self.target.table)
        env = {**environment(self.folder), **self.target.environment}
        self.attempt = Attempt(command, self.folder / "log.txt", env)
        self.attempts.append(self.attempt)
        return self.attempt

    def _inject(self, fault: str, attempt: Attempt) -> bool:
        """Inject a fault; False if no process of that kind exists at the moment."""
        attempt.processes()
        new = InjectedFault(fault, time.monotonic())
        if fault in KILLS:
            if not attempt.kill(fault, self.rng):
                return False
            if fault in ENDS_JOB and not attempt.wait(HANG_SECONDS):
                self.problems.append(f"hung: the driver still ran {HANG_SECONDS:g} s after {fault}")
        else:
            self.target.inject(self.rng, lambda: attempt.is_running)
        self.injected.append(new)
        if not attempt.is_running:
            self._ended(attempt)
        if problem := self.target.find_damage():
            self.problems.append(f"after {new.fault}: {problem}")
        return True

    def _ended(self, attempt: Attempt) -> None:
        """Note how an attempt ended that must be repeated."""
        if attempt.process.returncode == 0:  # the job finished before the fault
            self.attempt = None
            return
        killed = attempt.is_running or attempt.process.returncode == -9
        last = self.injected[-1] if self.injected else None
        if last:
            last.went_on = False
            if not killed:
                lines = attempt.output().rstrip().splitlines()
                last.last_line = lines[-1] if lines else ""
                if attempt.process.returncode != 2 and last.fault not in ENDS_JOB:
                    self.unclear.append(f"{last.fault}: {last.last_line}")
        elif not killed:
            self.problems.append(f"ended without a fault: {attempt.output()[-300:]}")
        if attempt.is_running:
            attempt.kill_all()
        self.attempt = None

    def _finish(self) -> None:
        """Run the command until it succeeds."""
        self.job.pace(0)
        for _ in range(5):
            attempt = self.attempt or self._start()
            self._watch(attempt)
            if not attempt.wait(600):
                self.problems.append("hung: not finished in ten minutes")
                attempt.kill_all()
            self.attempt = None
            if attempt.process.returncode == 0:
                self._note_recovery()
                break
            self._ended(attempt)
        else:
            self.problems.append(f"never succeeded: {attempt.output()[-500:]}")
        for one in self.attempts:
            one.kill_all()

    def _watch(self, attempt: Attempt) -> None:
        """Note when the job recovers from the last fault."""
        before = self.target.commits()
        wait_until(lambda: self._has_committed(before) or not attempt.is_running, HANG_SECONDS)


def undisturbed(job: Job, folder: Path) -> tuple[Target, float]:
    """The table of an undisturbed run, and the seconds to its first commit."""
    target, began = job.target(folder / "undisturbed"), 0.0
    for command in [*job.before(target.table), job.command(target.table)]:
        began = time.time()
        attempt = Attempt(command, folder / "undisturbed.txt", environment(folder))
        if attempt.process.wait():
            raise SystemExit(f"the run without faults failed: {attempt.output()[-1000:]}")
    first = min(written for _, written in target.commits() if written > began * 1e9)
    return target, first / 1e9 - began


def print_report(chaos: Chaos, counted: Any) -> dict[str, Any]:
    """Print the table; returns the figures for the JSON line."""
    print(
        f"{'fault':<10}{'injected':>9}{'survived':>9}{'seconds to recover: median':>28}{'max':>8}"
    )
    for fault in dict.fromkeys(one.fault for one in chaos.injected):
        faults = [one for one in chaos.injected if one.fault == fault]
        seconds = [one.recovered for one in faults if one.recovered is not None]
        median = f"{statistics.median(seconds):.1f}" if seconds else "-"
        longest = f"{max(seconds):.1f}" if seconds else "-"
        survived = sum(one.went_on for one in faults)
        print(f"{fault:<10}{len(faults):>9}{survived:>9}{median:>28}{longest:>8}")
    for name, value in vars(counted).items():
        print(f"{name.replace('_', ' ')}: {value}")
    for line in sorted({one.last_line for one in chaos.injected if one.last_line}):
        print(f"last line of an ended job: {line[:300]}")
    for line in [*chaos.unclear, *chaos.problems]:
        print(f"problem: {line[:600]}")
    seconds = [one.recovered for one in chaos.injected if one.recovered is not None]
    return {
        "faults": len(chaos.injected),
        "attempts": len(chaos.attempts),
        **counted.figures(),
        "seconds_to_recover": round(statistics.median(seconds), 1) if seconds else None,
        "problems": len(chaos.problems) + len(chaos.unclear),
    }


@contextmanager
def temporary_ray() -> Iterator[None]:
    """Put Ray's sessions into a temporary folder, with a short path as its sockets need."""
    folder = tempfile.mkdtemp(prefix="cr", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    stages = {name: partial(training, name) for name in ("stage1", "stage2")}
    jobs = {**JOBS, **stages}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for inputs, tables and logs")
    parser.add_argument("--job", choices=sorted(jobs), default="ingest")
    parser.add_argument("--kills", type=int, default=10, help="total number of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rows",
        type=int,
        help="input rows, default 400 + 40 per fault; for a training: steps, default 40 + 15 per fault",
    )
    parser.add_argument(
        "--faults", default="", help="kinds of faults, comma-separated; default: the job's kills"
    )
    given = parser.parse_args(arguments)
    kinds = given.faults.split(",") if given.faults else []
    if unknown := set(kinds) - {*KILLS, *TARGETS}:
        parser.error(f"--faults {min(unknown)}: choose from {', '.join([*KILLS, *TARGETS])}")
    where = [kind for kind in kinds if kind in TARGETS]
    if "disk" in where:
        enter_namespace()
    rng = random.Random(given.seed)
    folder = given.folder.absolute() / f"{given.job}-{'-'.join(where) or 'kills'}-{given.seed}"
    for name in ("undisturbed", "table", "tmp", "log.txt"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "log.txt").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(temporary_ray())
        base, per_fault = (40, 15) if given.job in stages else (400, 40)
        job = jobs[given.job](folder, given.rows or base + per_fault * given.kills)
        kinds = kinds or list(job.faults)
        faults = [kinds[i % len(kinds)] for i in range(given.kills)]
        rng.shuffle(faults)
        whole, seconds = undisturbed(job, folder)
        if where and where[0] not in job.targets:
            parser.error(f"--faults {where[0]}: not possible with --job {given.job}")
        target = job.target(folder / "table")
        if where:
            target = stack.enter_context(job.targets[where[0]](folder))
        for command in job.before(target.table):
            env = {**environment(folder), **target.environment}
            subprocess.run(command, cwd=REPO, env=env, check=True, capture_output=True)
        chaos = Chaos(job, target, folder, rng)
        chaos.start_seconds = seconds
        chaos.run(faults)
        counted = job.compare(target.local(), whole.folder, job)
    figures = print_report(chaos, counted)
    print(json.dumps({"benchmark": "chaos", "job": given.job, "seed": given.seed, **figures}))
    return 0 if counted.is_right and not chaos.problems and not chaos.unclear else 1


if __name__ == "__main__":
    sys.exit(main())
