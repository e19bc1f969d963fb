"""Intended changes of a table: takedowns and further ingest runs, which the table records.

A job records the state of its input when it starts. If it continues later and finds other rows, this
module tells whether a takedown or an ingest changed them, and whether that explains each missing row.
The job refuses to continue with rows that are missing for another reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.images.blocklist import FILE, Blocklist
from pipelines.images.rows import OK
from pipelines.images.runs import last_run
from pipelines.storage.files import is_file
from pipelines.storage.tables import Table


def changes_of(path: str) -> dict[str, Any]:
    """The state of a table: its number of ingest runs, a digest of its blocklist, and the state of
    its own input table when it was last planned.

    Empty for files that are not a table of this pipeline, which record nothing.
    """
    table = Table(path)
    if not table.exists:
        return {}
    blocklist, run = table.folder / FILE, last_run(table)
    digest = hashlib.sha256(blocklist.read_bytes()).hexdigest()[:16] if is_file(blocklist) else None
    input_state = table.describe().get("changes")
    return {"runs": run.number if run else 0, "taken_down": digest, "made_of": input_state}


def changed_on_purpose(path: str, before: Mapping[str, Any] | None) -> bool:
    """Whether a takedown or an ingest changed the table since `changes_of` returned `before`.

    None, recorded by an earlier version, counts as the state before any change.
    """
    now = changes_of(path)
    if before is None:
        return bool(now) and (now["taken_down"] is not None or now["runs"] > 1)
    return bool(now) and now != before


def unexplained_keys(path: str, missing: np.ndarray, conditional: bool = False) -> np.ndarray:
    """Which `missing` keys (int64 `[n]`) neither a takedown nor a changed status explains: int64 `[m]`.

    `path` is the table; `missing` were its usable rows. With `conditional`, a condition on other columns
    also selects rows: any row still in the table is then explained, as an ingest may change its columns.
    """
    table = Table(path)
    missing = missing[~np.isin(missing, np.array(sorted(Blocklist.read(table).keys), np.int64))]
    if not len(missing):
        return missing
    chunks = [commit.chunk for commit in table.commits()]
    for rows in table.columns(chunks, ["key", "status"]):
        states = rows["status"].to_pylist()
        explained = np.array([conditional or status != OK for status in states], bool)
        missing = missing[~np.isin(missing, rows["key"].to_numpy()[explained])]
    return missing
