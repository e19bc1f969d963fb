"""The rows of a training run: the keys that it began with, although the table may change later.

    <run_dir>/rows/keys.npy       int64 `[n]`, ascending: training and held-out rows
    <run_dir>/rows/changes.json   changes of the table until then (pipelines.images.changes)

Rows removed later, by a takedown or by an ingest, are left out of their steps; the loss is the mean
over the remaining rows. If all held-out rows are removed, nothing is evaluated. Rows added later are
ignored. The order of rows follows from the initial keys, so steps without a removed row do not change.
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
from vlv_model.errors import DataError, RunError

FOLDER, _KEYS, _CHANGES = "rows", "keys.npy", "changes.json"
DATA_FIELDS = ("rows", "keys", "bytes", "files", "layout", "scores")  # of a run's identity


def save_keys(run_dir: Path, keys: np.ndarray, table: str) -> None:
    """Save the keys of `table` that a run begins with, unless they are saved already."""
    folder = run_dir / FOLDER
    if (folder / _KEYS).is_file():
        return
    folder.mkdir(exist_ok=True)
    write_atomically(folder / _CHANGES, json.dumps(changes_of(table)))
    content = io.BytesIO()
    np.save(content, np.sort(keys))
    write_atomically(folder / _KEYS, content.getvalue())


def load_keys(run_dir: Path) -> np.ndarray | None:
    """The keys, int64 `[n]`, that a run began with; None when none are saved."""
    file = run_dir / FOLDER / _KEYS
    return np.load(file) if file.is_file() else None


@dataclass(frozen=True)
class RunRows:
    """The rows that a run trains on and holds out now.

    `keys`, int64 `[n]`, are those that it began with. `identity` holds the fields of the run's identity
    that stay as recorded although the table has changed.
    """

    rows: RowIndex
    keys: np.ndarray
    identity: dict[str, Any] = field(default_factory=dict)


def rows_of_run(
    run_dir: Path,
    recorded: Mapping[str, Any],
    table: str,
    holdout: float,
    index: RowIndex,
    stamp: Mapping[str, Any],
    conditional: bool = False,
) -> RunRows:
    """The rows of a new run, or of one whose identity is `recorded`.

    `index` has all current rows of `table`, and `stamp` the fields of the run's identity that tell of
    its files; `conditional`: a condition selected the rows. Returns all rows when the table is unchanged, and also when neither a takedown nor an ingest explains a change: then the
    comparison of identities fails. Raises RunError for missing rows that no takedown or ingest removed.
    """
    keys, changes = load_keys(run_dir), None
    if keys is not None:
        changes = read_json_object(run_dir / FOLDER / _CHANGES)
    if not recorded or _is_unchanged(recorded, keys, index, stamp):
        return RunRows(index, index.keys)
    if not changed_on_purpose(table, changes):
        return RunRows(index, index.keys)
    if keys is None and (keys := _infer_keys(recorded, table, holdout, index)) is None:
        return RunRows(index, index.keys)
    missing = keys[~np.isin(keys, index.keys)]
    if len(lost := unexplained_keys(table, missing, conditional)):
        raise RunError(
            f"{run_dir} began with {len(lost):,} rows that {table} lacks now, and no takedown or ingest "
            f"has removed them (the first is key {lost[0]}): restore them, or choose another run_dir"
        )
    rows = index.select(np.isin(index.keys, keys))
    if len(missing) or len(rows) < len(index):
        print(
            f"{len(missing):,} of the {len(keys):,} rows that the run began with were removed and are "
            f"skipped; new rows, which this run ignores: {len(index) - len(rows):,}",
            file=sys.stderr,
        )
    if in_holdout(keys, holdout).any() and not in_holdout(rows.keys, holdout).any():
        print(
            "warning: all held-out rows were removed: the run continues without evaluation and "
            "heldout_loss stays empty; a new run_dir would hold out other rows",
            file=sys.stderr,
        )
    return RunRows(rows, keys, {name: recorded[name] for name in DATA_FIELDS if name in recorded})


def positions(keys: np.ndarray, index: RowIndex) -> np.ndarray:
    """Positions of ascending `keys` in an index: int64 `[n]`, -1 for a missing key."""
    if not len(index):
        return np.full(len(keys), -1, np.int64)
    found = np.minimum(np.searchsorted(index.keys, keys), len(index) - 1)
    return np.where(index.keys[found] == keys, found, -1)


def _is_unchanged(
    recorded: Mapping[str, Any],
    keys: np.ndarray | None,
    index: RowIndex,
    stamp: Mapping[str, Any],
) -> bool:
    same_files = all(recorded.get(name) == value for name, value in stamp.items())
    return same_files and (keys is None or np.array_equal(keys, index.keys))


def _infer_keys(
    recorded: Mapping[str, Any], table: str, holdout: float, index: RowIndex
) -> np.ndarray | None:
    """The initial keys of a run of an earlier version, which recorded only their digests.

    These are the current keys and all that were taken down, provided the digests match; else None.
    """
    removed = np.array(sorted(Blocklist.read(Table(table)).keys), np.int64)
    keys = np.union1d(index.keys, removed)
    held_out = in_holdout(keys, holdout)
    unknown = np.zeros(len(keys), np.int32)
    rows = RowIndex([], keys, unknown, unknown, unknown)
    digests = [rows.select(mask).digest() for mask in (~held_out, held_out)]
    return keys if digests == recorded.get("keys") else None


def split(
    index: RowIndex, holdout: float, initial_keys: np.ndarray | None = None
) -> tuple[RowIndex, RowIndex]:
    """Split rows into (training rows, held-out rows).

    Raises DataError when either is empty. With `initial_keys`, int64 `[n]`, the keys that the run began
    with, all held-out rows may have been removed since.
    """
    mask = in_holdout(index.keys, holdout)
    initial_mask = mask if initial_keys is None else in_holdout(initial_keys, holdout)
    if mask.all() or not initial_mask.any():
        side = "training" if mask.all() else "held-out"
        raise DataError(
            f"of {len(index)} usable rows none is a {side} row at data.holdout={holdout}: add rows or "
            "choose another share; if all rows of a run were taken down, choose a new run_dir"
        )
    return index.select(~mask), index.select(mask)
