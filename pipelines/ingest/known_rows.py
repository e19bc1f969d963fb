"""What a further run does to rows that the table has: fetch them again, mark them, rescore them.

A list that gives other scores or texts for a known URL wins over what the table has; where it gives
none the table keeps its own. The rows are judged by what they have then, without a download.
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
"""A row of a chunk's plan: to be fetched, or to be given the status `mark` and these metadata.

Of a list that is read for a further run, `mark` says which filter a row fails.
"""

CARRIED = [name for name in METADATA_ROW.names if name not in ("key", "url")]
"""Columns of known rows that a later list may change."""

_KNOWN = [*METADATA_ROW.names, "original_width", "original_height", "width", "status"]
_BITS = 27  # of a key that `KnownKeys` looks at: 16 MiB


class KnownKeys:
    """The keys of a table in 16 MiB, however many they are: `may_have` is never wrong about one that
    is there, and seldom about another one as long as there are less than ten million.
    """

    def __init__(self, table: Table) -> None:
        self._seen = np.zeros(1 << (_BITS - 3), np.uint8)
        chunks = [commit.chunk for commit in table.commits()]
        for rows in table.columns(chunks, ["key"]):
            places = _places(rows["key"].to_numpy())
            np.bitwise_or.at(self._seen, places >> 3, np.uint8(1) << (places & 7).astype(np.uint8))

    def may_have(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys int64 `[n]` may be in the table: bool `[n]`."""
        places = _places(keys)
        found: np.ndarray = (self._seen[places >> 3] >> (places & 7).astype(np.uint8)) & 1 == 1
        return found


def _places(keys: np.ndarray) -> np.ndarray:
    return (keys.view(np.uint64) >> np.uint64(64 - _BITS)).astype(np.int64)


def known_rows(table: Table, committed: set[int], chunks: int) -> Iterator[pa.Table]:
    """The small columns of each chunk's part, in order; of a chunk without a part no rows."""
    parts = table.columns(sorted(committed), _KNOWN)
    for chunk in range(chunks):
        yield next(parts) if chunk in committed else METADATA_ROW.empty_table()


def changes(
    listed: pa.Table, here: pa.Table, filters: FilterConfig, retry: frozenset[str]
) -> tuple[pa.Table, pa.Table]:
    """The METADATA_ROW rows of a chunk to be fetched, and the PLAN_ROW rows to be marked.

    `listed` are PLAN_ROW rows; `retry` holds statuses.
    """
    places = pc.index_in(listed["key"], value_set=here["key"].combine_chunks())
    passes = listed["mark"].is_null()
    new = listed.filter(pc.and_(pc.is_null(places), passes)).select(METADATA_ROW.names)
    _check_collisions(listed, here, places)
    if not here.num_rows:
        return new, PLAN_ROW.empty_table()
    here, rescored = _with_listed(here, listed)
    now = here["status"].to_pylist()
    stored = here["width"].is_valid().to_pylist()
    fetch = np.zeros(len(now), bool)
    marks: list[str | None] = [None] * len(now)
    for i, verdict in enumerate(_verdicts(here, filters)):
        if now[i] in retry:
            fetch[i] = verdict == OK
        elif now[i] == DUPLICATE:  # stays, or is found to be none any more, behind the fetching
            marks[i] = verdict if verdict != OK else None
        elif now[i] == OK or now[i].startswith(FILTERED):
            if verdict == OK and now[i] != OK and not stored[i]:
                fetch[i] = True
            elif verdict != now[i]:
                marks[i] = verdict
        if rescored[i] and not fetch[i] and marks[i] is None:
            marks[i] = now[i]
    known = here.select(METADATA_ROW.names)
    changed = known.append_column("mark", pa.array(marks, pa.string()))
    again = known.filter(pa.array(fetch))
    return pa.concat_tables([new, again]), changed.filter(changed["mark"].is_valid())


def with_marks(rows: pa.Table, plan: pa.Table) -> pa.Table:
    """The rows of a part with the status and the metadata of the PLAN_ROW rows of their keys."""
    places = pc.index_in(rows["key"], value_set=plan["key"].combine_chunks())
    marked = places.is_valid()
    for name, source in (("status", "mark"), *((name, name) for name in CARRIED)):
        given = plan[source].combine_chunks().take(places)
        position = rows.schema.get_field_index(name)
        values = pc.if_else(marked, given, rows[name])
        rows = rows.set_column(position, rows.schema.field(position), values)
    return rows


def _with_listed(here: pa.Table, listed: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The rows with what the list gives for them, and which of them it changes: bool `[n]`."""
    places = pc.index_in(here["key"], value_set=listed["key"].combine_chunks())
    rescored = np.zeros(here.num_rows, bool)
    if places.null_count == len(places):
        return here, rescored
    for name in CARRIED:
        given = listed[name].combine_chunks().take(places)
        if pa.types.is_floating(given.type):
            given = pc.if_else(pc.is_nan(given), None, given)
        same = pc.fill_null(pc.equal(given, here[name]), False)
        rescored |= np.asarray(pc.and_(given.is_valid(), pc.invert(same)).to_pylist(), bool)
        position = here.schema.get_field_index(name)
        here = here.set_column(
            position, here.schema.field(position), pc.coalesce(given, here[name])
        )
    return here, rescored


def _verdicts(here: pa.Table, filters: FilterConfig) -> list[str]:
    """`ok` or `filtered:<rule>` of each row, by its scores and the image's own size."""
    sizes = {name: here[f"original_{name}"].cast(pa.float64()) for name in ("width", "height")}
    scores = here.drop_columns(["width"])
    for name, column in sizes.items():
        scores = scores.append_column(name, column)
    verdicts = np.full(here.num_rows, OK, object)
    has_size = np.asarray(here["original_width"].is_valid().to_pylist(), bool)
    for rule, failed in metadata_failures(filters, scores).items():
        fails = np.asarray(failed, bool) & (verdicts == OK)
        if "width" in RULE_COLUMNS[rule]:  # of an image that was never seen nothing is known
            fails &= has_size
        verdicts[fails] = status(FILTERED, rule)
    return verdicts.tolist()


def _check_collisions(listed: pa.Table, here: pa.Table, places: pa.ChunkedArray) -> None:
    if places.null_count == len(places):
        return
    there = here["url"].take(places)
    differ = pc.fill_null(pc.not_equal(there, listed["url"]), False)
    for i in np.flatnonzero(np.asarray(differ.to_pylist(), bool))[:1].tolist():
        check_same(listed["key"][i].as_py(), there[i].as_py(), listed["url"][i].as_py())


def check_same(key: int, first: str, second: str) -> None:
    if first != second:
        raise DataError(
            f"two URLs have the same key {key}: {first} and {second}: remove one of them"
        )
