"""What changed a table on purpose: takedowns and further runs of ingest, which the table records.

A job notes how its input stands when it begins. When it goes on and finds other rows there, this tells
whether a takedown or an ingest has changed them since, and whether that explains each row that is gone.
What is not explained is an accident, and is refused by the job.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.images.blocklist import FILE, Blocked
from pipelines.images.rows import OK
from pipelines.images.runs import last_run
from pipelines.storage.files import is_file
from pipelines.storage.tables import Table


def changes_of(path: str) -> dict[str, Any]:
    """What a table records of its changes: how many runs of ingest it has, a digest of its takedown
    note, and how the table that it was made of stood when it was last planned.

    Empty for other people's files, which record nothing.
    """
    table = Table(path)
    if not table.exists:
        return {}
    note, run = table.folder / FILE, last_run(table)
    taken_down = hashlib.sha256(note.read_bytes()).hexdigest()[:16] if is_file(note) else None
    made_of = table.describe().get("changes")
    return {"runs": run.number if run else 0, "taken_down": taken_down, "made_of": made_of}


def changed_on_purpose(path: str, before: Mapping[str, Any] | None) -> bool:
    """Whether a takedown or an ingest has changed the table since `changes_of` it was `before`.

    None is what an earlier version noted: it may have begun before any of them.
    """
    now = changes_of(path)
    if before is None:
        return bool(now) and (now["taken_down"] is not None or now["runs"] > 1)
    return bool(now) and now != before


def unexplained(path: str, missing: np.ndarray, conditional: bool = False) -> np.ndarray:
    """Which of the keys int64 `[n]`, no usable rows any more, were not taken down of the table at
    `path`, nor have another status there now: int64 `[m]`.

    `conditional` where a condition on other columns decides, too, which an ingest may have changed.
    """
    table = Table(path)
    missing = missing[~np.isin(missing, np.array(sorted(Blocked.read(table).keys), np.int64))]
    if not len(missing):
        return missing
    chunks = [commit.chunk for commit in table.commits()]
    for rows in table.columns(chunks, ["key", "status"]):
        states = rows["status"].to_pylist()
        judged = np.array([conditional or status != OK for status in states], bool)
        missing = missing[~np.isin(missing, rows["key"].to_numpy()[judged])]
    return missing
