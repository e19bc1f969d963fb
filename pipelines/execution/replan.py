"""Plans a begun table again after a takedown or an ingest changed its input.

    planned rows ── taken down, or marked by an ingest ──▶ left out of the plan
                 ── still there ─────────────────────────▶ stay in their chunk, at their new place
    new rows ────────────────────────────────────────────▶ further chunks

Rows that were taken down of the input are also removed from the parts that are written already. A row that
is gone for another reason is an error. The caller holds the table's lock. Memory: 40 bytes a row of the input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.execution.quarantine import FOLDER as ATTEMPTS
from pipelines.images.blocklist import Blocklist
from pipelines.images.card import FILE as CARD_FILE
from pipelines.images.card import write_card
from pipelines.images.changes import changes_of, unexplained_keys
from pipelines.images.plans import UsableRows, planned_keys, write_chunks
from pipelines.images.random_access import ROW, usable_rows
from pipelines.images.removal import remove_files, remove_rows
from pipelines.storage.files import is_file, remove_file
from pipelines.storage.folders import remove_folder
from pipelines.storage.tables import Table
from vlv_model.errors import RunError


def plan_again(
    table: Table,
    path: str,
    images: list[Path],
    chosen: Callable[[np.ndarray], np.ndarray],
    identity: Mapping[str, Any],
    rows_per_chunk: int,
    limit: int | None = None,
    conditional: bool = False,
    usable: UsableRows = usable_rows,
    **notes: Any,
) -> None:
    """Plan `table` again over the `images` of the table at `path`, as they are today.

    A call that is killed is repeated. Raises RunError for planned rows that are gone without a takedown.

    Args:
        chosen: Takes keys int64 `[n]` and returns which of them are selected, bool `[n]`.
        identity: The table's new identity; `notes` replace those in its `_table.json`.
        limit: The most rows in all.
        conditional: See `unexplained`.
        usable: That of `make_plan`.
    """
    about = table.describe()
    today = np.concatenate([np.zeros(0, ROW), *usable(images)])
    today = today[np.argsort(today["key"])]
    planned = list(planned_keys(table.folder, about["chunks"]))
    keys = np.concatenate([np.zeros(0, np.int64), *planned])
    present = np.ascontiguousarray(today["key"])
    missing = keys[~np.isin(keys, present)]
    if len(accidents := unexplained_keys(path, missing, conditional)):
        raise RunError(
            f"{table.folder} was begun with {len(accidents):,} images that {path} lacks now, and "
            f"no takedown or ingest has removed them (the first is key {accidents[0]}): bring them "
            "back, or choose another data.output"
        )
    new = today[chosen(present) & ~np.isin(present, keys)]
    if limit is not None:
        new = new[: max(0, limit - len(keys) + len(missing))]
    new = new[np.lexsort([new[name] for name in ("row", "group", "file")])]
    chunks = [
        today[np.searchsorted(present, some[np.isin(some, missing, invert=True)])]
        for some in planned
    ]
    chunks += [new[i : i + rows_per_chunk] for i in range(0, len(new), rows_per_chunk)]
    if len(missing) or len(new):
        print(
            f"{len(missing):,} of the {len(keys):,} images that the table was planned for are "
            f"gone, {len(new):,} are new",
            file=sys.stderr,
        )
    take_out(table, path)
    remove_folder(table.folder / ATTEMPTS)  # they number rows by their places in a chunk
    write_chunks(table.folder, chunks)
    kept = {k: v for k, v in about.items() if k not in ("kind", "identity", "chunks")}
    kept |= {"planned_rows": sum(map(len, chunks)), "changes": changes_of(path), **notes}
    table.create(about["kind"], identity, len(chunks), **kept)


def take_out(table: Table, path: str) -> None:
    """Remove from `table` the rows that were taken down of its input, the table at `path`."""
    blocked = Blocklist.read(Table(path))
    (Blocklist.read(table) | replace(blocked, unmatched=frozenset())).write(table)
    if remove_rows(table, blocked) and is_file(card := table.folder / CARD_FILE):
        remove_file(card)  # a caption table's card has samples: its job writes it at the end
        write_card(table)
    remove_files(table, blocked.keys)
