"""Runs a job's command and measures it: seconds, peak memory of all its processes, size on disk."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults.jobs import environment
from benchmarks.faults.kinds import Attempt, wait_until

_INTERVAL = 0.2  # seconds between two looks at the processes
_LAST_LINES = 15  # of a failed job's output


class JobFailedError(RuntimeError):
    """A job ended with an error; the message has its last lines."""


@dataclass(frozen=True)
class Run:
    """What a command took."""

    seconds: float
    peak_gb: float  # resident memory of the driver and all its processes together
    largest_gb: float  # of the largest process, which holds the model


class _Peak:
    """Watches the resident memory of an attempt's processes from a thread.

    Shared pages (Ray's object store, weights mapped from a file) count once for all processes: those of
    the process that has most of them.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.total = self.largest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL):
            private, shared, largest = 0, 0, 0
            for process in self.attempt.processes():
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_info()
                    private += memory.rss - memory.shared
                    shared, largest = max(shared, memory.shared), max(largest, memory.rss)
            self.total = max(self.total, private + shared)
            self.largest = max(self.largest, largest)


def run(
    command: Sequence[str],
    folder: Path,
    limit: float,
    kill_when: Callable[[], bool] | None = None,
) -> Run:
    """Run a command to its end, at most `limit` seconds; logs to `folder`/jobs.log.

    With `kill_when`, all its processes get SIGKILL as soon as that holds. Raises JobFailedError when the
    job fails, takes longer, or ends before `kill_when` holds.
    """
    begun = time.monotonic()
    attempt = Attempt(command, folder / "jobs.log", _environment(folder))
    peak = _Peak(attempt)
    try:
        in_time = wait_until(
            lambda: not attempt.is_running or bool(kill_when and kill_when()), limit
        )
        ended = not attempt.is_running
    finally:
        peak.stop()
        attempt.kill_all()
    seconds = time.monotonic() - begun
    problem = None
    if not in_time:
        problem = f"took over {limit:g} s"
    elif kill_when and ended:
        problem = f"ended before it was to be killed, after {seconds:.0f} s"
    elif not kill_when and (status := attempt.process.returncode):
        problem = f"ended with status {status} after {seconds:.0f} s"
    if problem:
        last = "\n".join(attempt.output().splitlines()[-_LAST_LINES:])
        raise JobFailedError(f"{' '.join(command[1:3])} {problem}:\n{last}")
    return Run(seconds, peak.total / 1e9, peak.largest / 1e9)


def size_gb(folder: Path) -> float:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9


def _environment(folder: Path) -> dict[str, str]:
    """As for the faults' jobs, but with all cores for the model."""
    cores = str(os.cpu_count() or 1)
    return {**environment(folder), "OMP_NUM_THREADS": cores}
