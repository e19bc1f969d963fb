"""Injects faults into real jobs and counts what their tables or runs have lost or have twice.

    python benchmarks/faults/chaos.py runs/chaos --job ingest --kills 50 --seed 1
    python benchmarks/faults/chaos.py runs/chaos --job ingest --faults disk --kills 5
    python benchmarks/faults/chaos.py runs/chaos --job recaption --kills 20 --seed 2
    python benchmarks/faults/chaos.py runs/chaos --job stage1 --kills 30

After each fault the same command is run again, until it ends right. Then a reader that has nothing
of our code counts the table against the input and against that of a run that nothing disturbed; of a
training, it compares the losses and the rows of every step (`--rows` are steps there). Faults (`--faults`):

    driver group worker rank reader decoder head   SIGKILL: see benchmarks/faults/kinds.py
    disk                               the table's file system is full
    store                              the table is in an S3 server, which fails or hangs for a while
    node                               a machine of a cluster of three goes, and another one comes

Prints a table and, as the last line, JSON. Exit status 1 if a row (or step) is lost, doubled or another,
or if the job did not end right.
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
from benchmarks.faults.kinds import ENDING, KILLS, REPO, Attempt, own_namespace, until
from benchmarks.faults.places import PLACES, Place
from benchmarks.faults.training import training

PATIENCE = 180.0  # seconds without a commit after which a job counts as hung


@dataclass
class Injected:
    """One fault, and what came of it."""

    fault: str
    at: float
    went_on: bool = True  # the job itself went on
    recovered: float | None = None  # seconds until the next commit
    said: str = ""  # by a job that ended of it


class Chaos:
    """Disturbs one job until all faults are injected and it has ended right."""

    def __init__(self, job: Job, place: Place, folder: Path, rng: random.Random) -> None:
        self.job, self.place, self.folder, self.rng = job, place, folder, rng
        self.injected: list[Injected] = []
        self.unclear: list[str] = []  # what jobs said that ended otherwise than by a kill or a line
        self.problems: list[str] = []
        self.attempts: list[Attempt] = []
        self.start_seconds = 10.0
        self.attempt: Attempt | None = None

    def run(self, faults: Sequence[str]) -> None:
        """Inject `faults` one after the other; then let the job end."""
        left = list(faults)
        # So slow that there is something to do up to the last fault.
        self.job.pace(max(4.0, len(self.job.expected) / (len(left) + 1) / self.job.span))
        while left:
            attempt = self.attempt or self._start()
            before = self.place.commits()
            if self._comes(before):
                if not self._inject(left[0], attempt):
                    left.append(left[0])  # later, when there is one of that sort
                left.pop(0)
            elif attempt.is_going:
                self.problems.append("hung: no commit in three minutes")
                self._ended(attempt)
            elif attempt.process.returncode == 0:
                self.attempt = None
                self.problems.append(f"ended before its last {len(left)} faults: give more --rows")
                break
            else:
                self._ended(attempt)
        self._finish()

    def _comes(self, before: set[Any]) -> bool:
        """Wait for the moment of the next fault; False where the job ended or hangs before it.

        A moment is behind a new commit. One in four of those that follow a start or a fault is before
        the first: a job that already commits would only use up its rows while we wait as long.
        """
        attempt = self.attempt
        assert attempt is not None
        early = self._is_starting() and self.rng.random() < 0.25
        patience = self.rng.uniform(0, self.start_seconds) if early else PATIENCE
        if until(lambda: self._told(before) or not attempt.is_going, patience):
            attempt.wait(self.rng.uniform(0, self.job.span))
        elif not early:
            return False
        return attempt.is_going

    def _is_starting(self) -> bool:
        """Whether the job has committed nothing since its start, or since the last fault."""
        return not self.injected or self.injected[-1].recovered is None

    def _told(self, before: set[Any]) -> bool:
        """Whether there is a commit that was not there before; notes who has recovered by it."""
        if not self.place.commits() - before:
            return False
        self._note_recovery()
        return True

    def _note_recovery(self) -> None:
        last = self.injected[-1] if self.injected else None
        if last and last.recovered is None:
            last.recovered = time.monotonic() - last.at

    def _start(self) -> Attempt:
        command = self.job.command(self.place.table)
        env = {**environment(self.folder), **self.place.environment}
        self.attempt = Attempt(command, self.folder / "log.txt", env)
        self.attempts.append(self.attempt)
        return self.attempt

    def _inject(self, fault: str, attempt: Attempt) -> bool:
        """False where no process of that sort is there at the moment."""
        attempt.family()
        new = Injected(fault, time.monotonic())
        if fault in KILLS:
            if not attempt.kill(fault, self.rng):
                return False
            if fault in ENDING and not attempt.wait(PATIENCE):
                self.problems.append(f"hung: the driver still lived {PATIENCE:g} s after {fault}")
        else:
            self.place.inject(self.rng, lambda: attempt.is_going)
        self.injected.append(new)
        if not attempt.is_going:
            self._ended(attempt)
        if problem := self.place.look():
            self.problems.append(f"after {new.fault}: {problem}")
        return True

    def _ended(self, attempt: Attempt) -> None:
        """Note how an attempt ended that has to be repeated."""
        if attempt.process.returncode == 0:  # all was done when the fault came
            self.attempt = None
            return
        killed = attempt.is_going or attempt.process.returncode == -9
        last = self.injected[-1] if self.injected else None
        if last:
            last.went_on = False
            if not killed:
                lines = attempt.said().rstrip().splitlines()
                last.said = lines[-1] if lines else ""
                if attempt.process.returncode != 2 and last.fault not in ENDING:
                    self.unclear.append(f"{last.fault}: {last.said}")
        elif not killed:
            self.problems.append(f"ended without a fault: {attempt.said()[-300:]}")
        if attempt.is_going:
            attempt.sweep()
        self.attempt = None

    def _finish(self) -> None:
        """Run the command until it ends right."""
        self.job.pace(0)
        for _ in range(5):
            attempt = self.attempt or self._start()
            self._watch(attempt)
            if not attempt.wait(600):
                self.problems.append("hung: not ended in ten minutes")
                attempt.sweep()
            self.attempt = None
            if attempt.process.returncode == 0:
                self._note_recovery()
                break
            self._ended(attempt)
        else:
            self.problems.append(f"never ended right: {attempt.said()[-500:]}")
        for one in self.attempts:
            one.sweep()

    def _watch(self, attempt: Attempt) -> None:
        """Note when the last fault has been recovered from."""
        before = self.place.commits()
        until(lambda: self._told(before) or not attempt.is_going, PATIENCE)


def unbroken(job: Job, folder: Path) -> tuple[Place, float]:
    """The table of a run that nothing disturbs, and the seconds to its first commit."""
    place, began = job.place(folder / "unbroken"), 0.0
    for command in [*job.before(place.table), job.command(place.table)]:
        began = time.time()
        attempt = Attempt(command, folder / "unbroken.txt", environment(folder))
        if attempt.process.wait():
            raise SystemExit(f"the run without faults failed: {attempt.said()[-1000:]}")
    first = min(written for _, written in place.commits() if written > began * 1e9)
    return place, first / 1e9 - began


def tell(chaos: Chaos, counted: Any) -> dict[str, Any]:
    """Print the table; returns the figures of the last line."""
    print(
        f"{'fault':<10}{'injected':>9}{'went on':>9}{'seconds to recover: median':>28}{'most':>8}"
    )
    for fault in dict.fromkeys(one.fault for one in chaos.injected):
        those = [one for one in chaos.injected if one.fault == fault]
        seconds = [one.recovered for one in those if one.recovered is not None]
        middle = f"{statistics.median(seconds):.1f}" if seconds else "-"
        most = f"{max(seconds):.1f}" if seconds else "-"
        went_on = sum(one.went_on for one in those)
        print(f"{fault:<10}{len(those):>9}{went_on:>9}{middle:>28}{most:>8}")
    for name, value in vars(counted).items():
        print(f"{name.replace('_', ' ')}: {value}")
    for said in sorted({one.said for one in chaos.injected if one.said}):
        print(f"a job that ended said: {said[:300]}")
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
    """Ray's sessions go into a folder that is removed; its sockets want a short path."""
    place = tempfile.mkdtemp(prefix="cr", dir="/tmp")
    os.environ["RAY_TMPDIR"] = place
    try:
        yield
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    stages = {name: partial(training, name) for name in ("stage1", "stage2")}
    jobs = {**JOBS, **stages}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where inputs, tables and logs are kept")
    parser.add_argument("--job", choices=sorted(jobs), default="ingest")
    parser.add_argument("--kills", type=int, default=10, help="faults in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rows",
        type=int,
        help="rows of the input; default: 400, and 40 for each fault; of a training: steps, 40 and 15",
    )
    parser.add_argument(
        "--faults", default="", help="sorts of faults, which take turns; default: all that kill"
    )
    given = parser.parse_args(arguments)
    kinds = given.faults.split(",") if given.faults else []
    if unknown := set(kinds) - {*KILLS, *PLACES}:
        parser.error(f"--faults {min(unknown)}: expected some of {', '.join([*KILLS, *PLACES])}")
    where = [kind for kind in kinds if kind in PLACES]
    if "disk" in where:
        own_namespace()
    rng = random.Random(given.seed)
    folder = given.folder.absolute() / f"{given.job}-{'-'.join(where) or 'kills'}-{given.seed}"
    for name in ("unbroken", "table", "tmp", "log.txt"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "log.txt").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(temporary_ray())
        least, each = (40, 15) if given.job in stages else (400, 40)
        job = jobs[given.job](folder, given.rows or least + each * given.kills)
        kinds = kinds or list(job.faults)
        faults = [kinds[i % len(kinds)] for i in range(given.kills)]
        rng.shuffle(faults)
        whole, seconds = unbroken(job, folder)
        if where and where[0] not in job.places:
            parser.error(f"--faults {where[0]}: not for --job {given.job}")
        place = job.place(folder / "table")
        if where:
            place = stack.enter_context(job.places[where[0]](folder))
        for command in job.before(place.table):
            env = {**environment(folder), **place.environment}
            subprocess.run(command, cwd=REPO, env=env, check=True, capture_output=True)
        chaos = Chaos(job, place, folder, rng)
        chaos.start_seconds = seconds
        chaos.run(faults)
        counted = job.compare(place.local(), whole.folder, job)
    told = {"benchmark": "chaos", "job": given.job, "seed": given.seed, **tell(chaos, counted)}
    print(json.dumps(told))
    return 0 if counted.is_right and not chaos.problems and not chaos.unclear else 1


if __name__ == "__main__":
    sys.exit(main())
