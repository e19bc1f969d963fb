"""Removes blocked rows from the parts of a table, and their image files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import pyarrow as pa

from pipelines.images.blocklist import Blocklist
from pipelines.images.urls import addresses_of
from pipelines.storage.files import remove_file
from pipelines.storage.folders import names_in
from pipelines.storage.parquet import open_parquet, read_schema
from pipelines.storage.tables import Commit, Table


def blocked_rows(
    table: Table, blocked: Blocklist
) -> Iterator[tuple[Commit, pa.Table, np.ndarray, np.ndarray]]:
    """Per part: its commit, a table of keys and URLs, their addresses int64 `[n]`, which are blocked."""
    commits = table.commits()
    if not commits:
        return
    names = read_schema(table.part(commits[0].chunk)).names
    is_image = table.describe()["kind"] == "image"
    present = [name for name in ("key", "url") if name in names]
    columns = table.columns([commit.chunk for commit in commits], present)
    for commit, rows in zip(commits, columns, strict=True):
        urls = (
            rows["url"] if "url" in present else pa.chunked_array([pa.nulls(len(rows), "string")])
        )
        # Only in image tables is the key a hash of the URL.
        addresses = addresses_of(urls, rows["key"] if is_image else None)
        yield commit, rows, addresses, blocked.mask(rows["key"], urls, addresses)


def remove_rows(
    table: Table,
    blocked: Blocklist,
    on_removal: Callable[[pa.Table, np.ndarray], None] = lambda rows, addresses: None,
) -> int:
    """Rewrite the parts that have blocked rows without them; returns the number of removed rows.

    `on_removal` is called with these rows' keys and URLs, and their addresses int64 `[n]`.
    """
    removed = 0
    for commit, rows, addresses, mask in blocked_rows(table, blocked):
        if mask.any():
            on_removal(rows.filter(pa.array(mask)), addresses[mask])
            with open_parquet(table.part(commit.chunk)) as parquet:
                group = parquet.metadata.row_group(0).num_rows
                kept = parquet.read().filter(pa.array(~mask))
            table.write(commit.chunk, kept, run=commit.run, row_group_size=group)
            removed += int(mask.sum())
        elif len(rows) != commit.rows:
            table.recommit(commit)  # a removal was killed between part and commit
    return removed


SIDE_BY_SIDE = "_side_by_side"
"""Folder of a reconstruction table: an image file for each key."""


def file_name(key: int) -> str:
    """The name of a key's image file in SIDE_BY_SIDE."""
    return f"{key}.png"


def remove_files(table: Table, keys: Collection[int]) -> None:
    """Delete the image files of some keys."""
    to_remove = {file_name(key) for key in keys}
    for name in names_in(table.folder / SIDE_BY_SIDE):
        if name in to_remove:
            remove_file(table.folder / SIDE_BY_SIDE / name)
