"""What a later run does to rows of the table: retry them, mark them, or update their metadata.

Scores and texts of the list replace those of the table; values that the list lacks are kept. Filters
are then applied to the updated row, without a download.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.rows import DUPLICATE, FILTERED, METADATA_ROW, OK, status
from pipelines.lists.filters import RULE_COLUMNS, FilterConfig, metadata_failures
from pipelines.storage.tables import Table
from vlv_model.errors import DataError

PLAN_ROW = METADATA_ROW.append(pa.field("mark", pa.string()))
"""A row of a chunk's plan: to be fetched if `mark` is null, or to get `mark` as its status and these metadata.

In the list of a later run, `mark` is the filter that a row fails.
"""

UPDATABLE = [name for name in METADATA_ROW.names if name not in ("key", "url")]
"""Columns of known rows that a later list may change."""

_COLUMNS = [*METADATA_ROW.names, "original_width", "original_height", "width", "status"]
_BITS = 27  # of each key in the Bloom filter: 16 MiB


class KnownKeys:
    """A Bloom filter of a table's keys, 16 MiB: no false negatives, and few false positives below ten
    million keys.
    """

    def __init__(self, table: Table) -> None:
        self._filter = np.zeros(1 << (_BITS - 3), np.uint8)
        chunks = [commit.chunk for commit in table.commits()]
        for rows in table.columns(chunks, ["key"]):
            bits = _bits(rows["key"].to_numpy())
            np.bitwise_or.at(self._filter, bits >> 3, np.uint8(1) << (bits & 7).astype(np.uint8))

    def may_have(self, keys: np.ndarray) -> np.ndarray:
        """Whether each of the keys int64 `[n]` may be in the table: bool `[n]`."""
        bits = _bits(keys)
        is_set: np.ndarray = (self._filter[bits >> 3] >> (bits & 7).astype(np.uint8)) & 1 == 1
        return is_set


def _bits(keys: np.ndarray) -> np.ndarray:
    """The position of each key in the filter: its first _BITS bits, as keys are hashes."""
    return (keys.view(np.uint64) >> np.uint64(64 - _BITS)).astype(np.int64)


def known_rows(table: Table, committed: set[int], chunks: int) -> Iterator[pa.Table]:
    """The small columns of each chunk's part, in order; no rows for a chunk without a part."""
    parts = table.columns(sorted(committed), _COLUMNS)
    for chunk in range(chunks):
        yield next(parts) if chunk in committed else METADATA_ROW.empty_table()


def changes(
    listed: pa.Table, stored: pa.Table, filters: FilterConfig, retry: frozenset[str]
) -> tuple[pa.Table, pa.Table]:
    """The METADATA_ROW rows of a chunk to be fetched, and the PLAN_ROW rows to be marked.

    `listed` are PLAN_ROW rows of the list, `stored` are rows of the table, `retry` are statuses. Where
    `listed` has the places of images, the rows to be fetched have them too, and no other row is fetched.
    """
    indices = pc.index_in(listed["key"], value_set=stored["key"].combine_chunks())
    passes = listed["mark"].is_null()
    new = listed.filter(pc.and_(pc.is_null(indices), passes)).drop_columns(["mark"])
    _check_collisions(listed, stored, indices)
    if not stored.num_rows:
        return new, PLAN_ROW.empty_table()
    places = [name for name in listed.column_names if name not in PLAN_ROW.names]
    found = pc.index_in(stored["key"], value_set=listed["key"].combine_chunks())
    if places:
        can_fetch = pc.and_(found.is_valid(), listed["lost"].take(found).is_null())
    else:  # a name without a URL is that of an image that was there
        can_fetch = pc.fill_null(pc.match_substring(stored["url"], "://"), False)
    has_place = can_fetch.to_pylist()
    stored, is_updated = _update(stored, listed)
    old = stored["status"].to_pylist()
    is_stored = stored["width"].is_valid().to_pylist()
    fetch = np.zeros(len(old), bool)
    marks: list[str | None] = [None] * len(old)
    for i, filtered in enumerate(_filter_statuses(stored, filters)):
        if old[i] in retry:
            fetch[i] = filtered == OK and has_place[i]
        elif old[i] == DUPLICATE:  # `mark_duplicates` decides on it after the downloads
            marks[i] = filtered if filtered != OK else None
        elif old[i] == OK or old[i].startswith(FILTERED):
            if filtered == OK and old[i] != OK and not is_stored[i]:
                fetch[i] = has_place[i]
            elif filtered != old[i]:
                marks[i] = filtered
        if is_updated[i] and not fetch[i] and marks[i] is None:
            marks[i] = old[i]
    metadata = stored.select(METADATA_ROW.names)
    marked = metadata.append_column("mark", pa.array(marks, pa.string()))
    for name in places:
        metadata = metadata.append_column(listed.schema.field(name), listed[name].take(found))
    retried = metadata.filter(pa.array(fetch))
    return pa.concat_tables([new, retried]), marked.filter(marked["mark"].is_valid())


def with_marks(rows: pa.Table, plan: pa.Table) -> pa.Table:
    """The rows of a part, with the status and metadata of the PLAN_ROW rows that have their keys."""
    indices = pc.index_in(rows["key"], value_set=plan["key"].combine_chunks())
    is_marked = indices.is_valid()
    for name, source in (("status", "mark"), *((name, name) for name in UPDATABLE)):
        planned = plan[source].combine_chunks().take(indices)
        position = rows.schema.get_field_index(name)
        values = pc.if_else(is_marked, planned, rows[name])
        rows = rows.set_column(position, rows.schema.field(position), values)
    return rows


def _update(stored: pa.Table, listed: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The stored rows with the metadata of the list, and whether each one changed: bool `[n]`."""
    indices = pc.index_in(stored["key"], value_set=listed["key"].combine_chunks())
    is_updated = np.zeros(stored.num_rows, bool)
    if indices.null_count == len(indices):
        return stored, is_updated
    for name in UPDATABLE:
        new = listed[name].combine_chunks().take(indices)
        if pa.types.is_floating(new.type):
            new = pc.if_else(pc.is_nan(new), None, new)
        same = pc.fill_null(pc.equal(new, stored[name]), False)
        is_updated |= np.asarray(pc.and_(new.is_valid(), pc.invert(same)).to_pylist(), bool)
        position = stored.schema.get_field_index(name)
        stored = stored.set_column(
            position, stored.schema.field(position), pc.coalesce(new, stored[name])
        )
    return stored, is_updated


def _filter_statuses(stored: pa.Table, filters: FilterConfig) -> list[str]:
    """`ok` or `filtered:<rule>` of each row, by its scores and the image's original size."""
    sizes = {name: stored[f"original_{name}"].cast(pa.float64()) for name in ("width", "height")}
    scores = stored.drop_columns(["width"])
    for name, column in sizes.items():
        scores = scores.append_column(name, column)
    statuses = np.full(stored.num_rows, OK, object)
    has_size = np.asarray(stored["original_width"].is_valid().to_pylist(), bool)
    for rule, failed in metadata_failures(filters, scores).items():
        fails = np.asarray(failed, bool) & (statuses == OK)
        if "width" in RULE_COLUMNS[rule]:  # the size of a failed download is unknown
            fails &= has_size
        statuses[fails] = status(FILTERED, rule)
    return statuses.tolist()


def _check_collisions(listed: pa.Table, stored: pa.Table, indices: pa.ChunkedArray) -> None:
    if indices.null_count == len(indices):
        return
    urls = stored["url"].take(indices)
    differ = pc.fill_null(pc.not_equal(urls, listed["url"]), False)
    for i in np.flatnonzero(np.asarray(differ.to_pylist(), bool))[:1].tolist():
        check_same(listed["key"][i].as_py(), urls[i].as_py(), listed["url"][i].as_py())


def check_same(key: int, first: str, second: str) -> None:
    """Raise DataError if two URLs with the same key differ."""
    if first != second:
        raise DataError(
            f"two URLs have the same key {key}: {first} and {second}: remove one of them"
        )
