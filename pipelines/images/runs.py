"""The ingest runs of an image table, and what each of them did.

    _runs/0003/run.json               number, settings, chunks to work on, counts
    _runs/0003/plan/chunk-000007.plan the rows to download in a chunk (pipelines/ingest/plan.py)

A chunk's commit names the run that last wrote it, so a killed run continues with the chunks that an
earlier run wrote. A run with the settings of the last finished run has nothing to do, unless retries are
requested.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.storage.files import write_atomically
from pipelines.storage.folders import files_below, remove_folder
from pipelines.storage.tables import Table, read_json_object

FOLDER = "_runs"
IMAGES = "images"  # folder of a run: copies of images that it reads one by one (pipelines/ingest/unpack.py)
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Run:
    """One ingest run into a table."""

    folder: Path
    number: int

    @property
    def plan_folder(self) -> Path:
        """Folder of the plan, one file per chunk."""
        return self.folder / "plan"

    def describe(self) -> dict[str, Any]:
        """Content of run.json."""
        return read_json_object(self.folder / RUN_FILE)

    def begin(self, settings: Mapping[str, Any], work: list[int], **notes: Any) -> None:
        """Write run.json. This is the last step of planning: a run that has begun has its whole plan."""
        self._write(
            {
                "number": self.number,
                "settings": dict(settings),
                "chunks": work,
                "started": time.time(),
                **notes,
            }
        )

    def end(self, counts: Mapping[str, int]) -> None:
        """Record that the run is finished, with the table's counts, and delete its plan."""
        content = self.describe()
        if "finished" not in content:
            self._write({**content, "finished": time.time(), "counts": dict(counts)})
        for folder in (self.plan_folder, self.folder / "copies", self.folder / IMAGES):
            remove_folder(folder)

    def pending(self, table: Table) -> list[int]:
        """The run's unfinished chunks, in order."""
        done = {commit.chunk for commit in table.commits() if commit.run >= self.number}
        return [chunk for chunk in self.describe()["chunks"] if chunk not in done]

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended."""
        return "finished" in self.describe()

    def _write(self, content: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / RUN_FILE, json.dumps(content, indent=2))


def runs_of(table: Table) -> list[Run]:
    """The runs of a table that have begun, in order."""
    files = [file for file in files_below(table.folder / FOLDER) if file.name == RUN_FILE]
    return [_run(table, int(file.parent.name)) for file in files]


def last_run(table: Table) -> Run | None:
    """The newest run of a table; None if there is none."""
    return runs[-1] if (runs := runs_of(table)) else None


def next_run(table: Table) -> Run:
    """The next run, not begun yet. Removes what a run killed while planning left."""
    last = last_run(table)
    run = _run(table, last.number + 1 if last else 1)
    remove_folder(run.folder)
    return run


def _run(table: Table, number: int) -> Run:
    return Run(table.folder / FOLDER / f"{number:04d}", number)
