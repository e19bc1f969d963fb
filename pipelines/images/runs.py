"""The runs of an image table: each ingest that had something to do, and what it did.

    _runs/0003/run.json               number, settings, chunks to work on, counts
    _runs/0003/plan/chunk-000007.plan what is to be done to a chunk (pipelines/ingest/plan.py)

A chunk's commit says which run wrote it last, so a killed run goes on with the chunks that an
earlier run wrote. A run of the same settings as the last, finished one has nothing to do, unless
it is told to retry.
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
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Run:
    """One ingest into a table."""

    folder: Path
    number: int

    @property
    def plan_folder(self) -> Path:
        return self.folder / "plan"

    def describe(self) -> dict[str, Any]:
        """Content of run.json."""
        return read_json_object(self.folder / RUN_FILE)

    def begin(self, settings: Mapping[str, Any], work: list[int], **notes: Any) -> None:
        """Declare the run. Done last in planning, so a run that is declared has its whole plan."""
        self._note(
            {
                "number": self.number,
                "settings": dict(settings),
                "chunks": work,
                "started": time.time(),
                **notes,
            }
        )

    def end(self, counts: Mapping[str, int]) -> None:
        """Note that the run is finished and how the table stands; its plan is not needed more."""
        told = self.describe()
        if "finished" not in told:
            self._note({**told, "finished": time.time(), "counts": dict(counts)})
        for folder in (self.plan_folder, self.folder / "copies"):
            remove_folder(folder)

    def pending(self, table: Table) -> list[int]:
        """The run's chunks that it has not finished yet, in order."""
        done = {commit.chunk for commit in table.commits() if commit.run >= self.number}
        return [chunk for chunk in self.describe()["chunks"] if chunk not in done]

    @property
    def is_finished(self) -> bool:
        return "finished" in self.describe()

    def _note(self, content: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / RUN_FILE, json.dumps(content, indent=2))


def runs_of(table: Table) -> list[Run]:
    """The declared runs of a table, in order."""
    found = [file for file in files_below(table.folder / FOLDER) if file.name == RUN_FILE]
    return [_run(table, int(file.parent.name)) for file in found]


def last_run(table: Table) -> Run | None:
    """The newest declared run of a table."""
    return runs[-1] if (runs := runs_of(table)) else None


def next_run(table: Table) -> Run:
    """A run that is not declared yet; what a killed planning of it left is removed."""
    last = last_run(table)
    run = _run(table, last.number + 1 if last else 1)
    remove_folder(run.folder)
    return run


def _run(table: Table, number: int) -> Run:
    return Run(table.folder / FOLDER / f"{number:04d}", number)
