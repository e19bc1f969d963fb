"""Rows that a training leaves out because their image cannot be read or decoded, and their record.

    <run_dir>/rows/skipped-<rank>.jsonl   a line for each row: epoch, key, status, error

Ingest decodes every image that it stores, but nobody has decoded the files in a folder or a shard. A
broken one must not end a run of days, so it counts as a row taken down: its place in the step stays
empty, and the loss is the mean over the other rows. From its epoch on, a recorded row is left out
without being read again, so a resumed run leaves out the same rows in the same steps, also where an
image took too long only once. A file that could not be read (`decode:unreadable`) is tried again in the
next epoch.

A worker ends the run if it cannot use most of the images that it reads: then the disk or a setting is
at fault, not an image.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.images.rows import DECODE, status
from pipelines.training.run_rows import FOLDER
from vlv_model.errors import DataError, one_line

HELD_OUT = -1
"""The epoch of held-out rows."""

_UNREADABLE = status(DECODE, "unreadable")
_WINDOW, _FEWEST = 256, 32  # images of which most must be usable


@dataclass(frozen=True)
class SkippedRow:
    """A row that was left out of an epoch, and why."""

    epoch: int
    key: int
    status: str
    error: str


class SkippedRows:
    """The rows that a run leaves out. Thread-safe; every worker writes a file of its own."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Read the records of all workers, whatever their number was."""
        self._file = run_dir / FOLDER / f"skipped-{rank}.jsonl"
        self._seen: set[tuple[int, int]] = set()  # (epoch, key)
        self._undecodable: dict[int, int] = {}  # key -> first epoch
        for row in skipped_rows(run_dir):
            self._note(row)
        self._recent: deque[bool] = deque(maxlen=_WINDOW)  # whether an image was usable
        self._lock = threading.Lock()

    def __contains__(self, row: tuple[int, int]) -> bool:
        """Whether a row, as (epoch, key), is left out without being read."""
        epoch, key = row
        first = self._undecodable.get(key)
        return row in self._seen or (first is not None and epoch >= first)

    def add(self, failed: Iterable[SkippedRow], usable: int) -> None:
        """Record the rows of a batch that failed beside `usable` ones.

        Raises DataError when most of the images that were read lately failed.
        """
        with self._lock:
            self._recent.extend([True] * usable)
            for row in failed:
                self._recent.append(False)
                self._record(row)
                bad, tried = self._recent.count(False), len(self._recent)
                if tried >= _FEWEST and bad * 2 > tried:
                    raise DataError(
                        f"{row.error}; {bad} of the last {tried} images could not be used: check that "
                        "data.input can be read, and data.image_encoding and data.image_column"
                    )

    def _record(self, row: SkippedRow) -> None:
        if (row.epoch, row.key) in self._seen:
            return
        self._note(row)
        self._file.parent.mkdir(exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def _note(self, row: SkippedRow) -> None:
        self._seen.add((row.epoch, row.key))
        if row.status != _UNREADABLE:
            first = self._undecodable.get(row.key, row.epoch)
            self._undecodable[row.key] = min(first, row.epoch)


def skipped_row(epoch: int, key: int, kind: str, error: Exception) -> SkippedRow:
    """The record of an image that failed with `error`; `kind` is the second part of its status."""
    return SkippedRow(epoch, key, status(DECODE, kind), one_line(error)[:300])


def skipped_rows(run_dir: Path) -> list[SkippedRow]:
    """All records of a run, a line that a killed worker did not finish excepted."""
    found = []
    for file in sorted((run_dir / FOLDER).glob("skipped-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                found.append(SkippedRow(**json.loads(line)))
            except (ValueError, TypeError):
                continue
    return found


def skipped_line(run_dir: Path) -> str | None:
    """How many images a run has left out, and why; None if it left out none."""
    by_key = {row.key: row for row in skipped_rows(run_dir)}
    if not by_key:
        return None
    reasons = Counter(row.status for row in by_key.values()).most_common(3)
    shown = ", ".join(f"{n:,} {reason}" for reason, n in reasons)
    return f"images left out: {len(by_key):,} ({shown}), see {run_dir / FOLDER}/skipped-*.jsonl"
