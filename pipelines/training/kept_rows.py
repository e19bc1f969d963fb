"""The rows that a training keeps: the keys that it began with, whatever becomes of its table.

    <run_dir>/rows/keys.npy       int64 `[n]`, ascending: those trained on and those held out
    <run_dir>/rows/changes.json   what had changed the table by then (pipelines.images.changes)

A row that was taken down since, or that an ingest has marked since, is left out of its steps, and the
loss is divided by what is left. Where all held-out rows are gone, nothing is evaluated. Rows added since wait for a new run. So the steps without a removed row
stay what they were: the order is one of the keys at the beginning.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.images.blocklist import Blocklist
from pipelines.images.changes import changed_on_purpose, changes_of, unexplained_keys
from pipelines.images.random_access import RowIndex, in_holdout
from pipelines.storage.files import write_atomically
from pipelines.storage.tables import Table, read_json_object
from vlv_model.errors import RunError

FOLDER, _KEYS, _CHANGES = "rows", "keys.npy", "changes.json"
_DECIDED = ("rows", "keys", "bytes")  # of a run's identity


def keep(run_dir: Path, keys: np.ndarray, table: str) -> None:
    """Note with which keys of a table a run begins, unless it is noted."""
    folder = run_dir / FOLDER
    if (folder / _KEYS).is_file():
        return
    folder.mkdir(exist_ok=True)
    write_atomically(folder / _CHANGES, json.dumps(changes_of(table)))
    content = io.BytesIO()
    np.save(content, np.sort(keys))
    write_atomically(folder / _KEYS, content.getvalue())


def kept(run_dir: Path) -> np.ndarray | None:
    """The keys int64 `[n]` that a run began with; None where it is not noted (yet)."""
    file = run_dir / FOLDER / _KEYS
    return np.load(file) if file.is_file() else None


@dataclass(frozen=True)
class Left:
    """What is left of the rows that a run began with, of which `keys` are all, int64 `[n]`.

    `identity` is what the run keeps of its own, whatever the table has today.
    """

    rows: RowIndex
    keys: np.ndarray
    identity: dict[str, Any] = field(default_factory=dict)


def go_on(
    run_dir: Path,
    there: Mapping[str, Any],
    table: str,
    holdout: float,
    index: RowIndex,
    size: int,
) -> Left:
    """The rows that a run goes on with whose identity is `there`, or that begins.

    `index` has all rows of the `table` today, and its files are of `size` bytes. Where all is as it was,
    and where no takedown or ingest has changed it, these are all rows: the identities will tell. Raises
    RunError for rows that are gone and were not taken down.
    """
    keys, before = kept(run_dir), None
    if keys is not None:
        before = read_json_object(run_dir / FOLDER / _CHANGES)
    if not there or _is_same(there, keys, index, size):
        return Left(index, index.keys)
    if not changed_on_purpose(table, before):
        return Left(index, index.keys)
    if keys is None and (keys := _guessed(there, table, holdout, index)) is None:
        return Left(index, index.keys)
    missing = keys[~np.isin(keys, index.keys)]
    if len(accidents := unexplained_keys(table, missing)):
        raise RunError(
            f"{run_dir} was begun with {len(accidents):,} rows that {table} lacks now, and no takedown "
            f"or ingest has removed them (the first is key {accidents[0]}): bring them back, or choose "
            "another run_dir"
        )
    left = index.select(np.isin(index.keys, keys))
    if len(missing) or len(left) < len(index):
        print(
            f"{len(missing):,} of the {len(keys):,} rows that the run began with are gone and are "
            f"left out; {len(index) - len(left):,} that are new wait for a new run",
            file=sys.stderr,
        )
    if in_holdout(keys, holdout).any() and not in_holdout(left.keys, holdout).any():
        print(
            "warning: all rows that the run held out are gone: it goes on without an evaluation, and "
            "heldout_loss stays empty; another run_dir would hold out other rows",
            file=sys.stderr,
        )
    return Left(left, keys, {name: there[name] for name in _DECIDED})


def positions(keys: np.ndarray, index: RowIndex) -> np.ndarray:
    """Where keys (ascending) lie in an index: int64 `[n]`, -1 for what it lacks."""
    if not len(index):
        return np.full(len(keys), -1, np.int64)
    at = np.minimum(np.searchsorted(index.keys, keys), len(index) - 1)
    return np.where(index.keys[at] == keys, at, -1)


def _is_same(there: Mapping[str, Any], keys: np.ndarray | None, index: RowIndex, size: int) -> bool:
    return there.get("bytes") == size and (keys is None or np.array_equal(keys, index.keys))


def _guessed(
    there: Mapping[str, Any], table: str, holdout: float, index: RowIndex
) -> np.ndarray | None:
    """The keys of a run of an earlier version, which noted their digests alone: those of today and
    all that were taken down, where that has these digests.
    """
    gone = np.array(sorted(Blocklist.read(Table(table)).keys), np.int64)
    keys = np.union1d(index.keys, gone)
    held = in_holdout(keys, holdout)
    nowhere = np.zeros(len(keys), np.int32)
    sides = RowIndex([], keys, nowhere, nowhere, nowhere)
    digests = [sides.select(mask).digest() for mask in (~held, held)]
    return keys if digests == there.get("keys") else None
