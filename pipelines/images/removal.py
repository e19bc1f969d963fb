"""Taking blocked rows out of the parts of a table, and the image files of their keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import pyarrow as pa

from pipelines.images.blocklist import Blocked
from pipelines.images.urls import addresses_of
from pipelines.storage.files import remove_file
from pipelines.storage.folders import names_in
from pipelines.storage.parquet import open_parquet, read_schema
from pipelines.storage.tables import Commit, Table

Looked = tuple[Commit, pa.Table, np.ndarray, np.ndarray]


def blocked_rows(table: Table, blocked: Blocked) -> Iterator[Looked]:
    """Of each part its commit, its keys and URLs (`[n]`), their addresses, and which are blocked."""
    commits = table.commits()
    if not commits:
        return
    names = read_schema(table.part(commits[0].chunk)).names
    is_image = table.describe()["kind"] == "image"
    wanted = [name for name in ("key", "url") if name in names]
    columns = table.columns([commit.chunk for commit in commits], wanted)
    for commit, rows in zip(commits, columns, strict=True):
        urls = rows["url"] if "url" in wanted else pa.chunked_array([pa.nulls(len(rows), "string")])
        # Keys of other tables may be anything, and say nothing of an address.
        addresses = addresses_of(urls, rows["key"] if is_image else None)
        yield commit, rows, addresses, blocked.mask(rows["key"], urls, addresses)


def remove_rows(
    table: Table,
    blocked: Blocked,
    look: Callable[[pa.Table, np.ndarray], None] = lambda rows, addresses: None,
) -> int:
    """Write the parts that have blocked rows again without them; how many rows are gone.

    `look` is given the keys and URLs of these rows, and their addresses int64 `[n]`.
    """
    removed = 0
    for commit, rows, addresses, mask in blocked_rows(table, blocked):
        if mask.any():
            look(rows.filter(pa.array(mask)), addresses[mask])
            with open_parquet(table.part(commit.chunk)) as parquet:
                group = parquet.metadata.row_group(0).num_rows
                left = parquet.read().filter(pa.array(~mask))
            table.write(commit.chunk, left, run=commit.run, row_group_size=group)
            removed += int(mask.sum())
    return removed


SIDE_BY_SIDE = "_side_by_side"
"""Folder of a table of reconstructions: an image file for each key."""


def file_of(key: int) -> str:
    """The name of a key's file in SIDE_BY_SIDE."""
    return f"{key}.png"


def remove_files(table: Table, keys: Collection[int]) -> None:
    """Take away the files of some images."""
    named = {file_of(key) for key in keys}
    for name in names_in(table.folder / SIDE_BY_SIDE):
        if name in named:
            remove_file(table.folder / SIDE_BY_SIDE / name)
