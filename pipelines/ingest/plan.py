"""The plan of a run: what is to be done to each chunk of the image table.

    metadata -> filters -> normalised URL, key -> buckets by key -> chunks by ranges of keys
                                                                         |
    rows that the table has: keys, statuses, scores, sizes ──────────────┴─▶ fetch, or mark

The first run cuts the sorted list into chunks, and their ranges of keys stay for ever: a row of a
later list belongs to the chunk of its range. So the ranges of the table's parts never overlap.
Memory does not grow with the list (pipelines/buckets.py).
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.buckets import Buckets, Sorting
from pipelines.ingest.blocked import Blocked
from pipelines.ingest.filters import RULE_COLUMNS, FilterConfig, metadata_failures
from pipelines.ingest.list_files import input_bytes
from pipelines.ingest.metadata import OddValues, read_batches
from pipelines.places import write_parquet
from pipelines.schemas import (
    DUPLICATE,
    FILTERED,
    METADATA_ROW,
    OK,
    has_text,
    key_of,
    normalise_url,
    status,
)
from pipelines.storage import Table
from vlv_model.errors import DataError

PLAN_ROW = METADATA_ROW.append(pa.field("mark", pa.string()))
"""A row of a chunk's plan: to be fetched, or only to be given the status `mark`."""

CHUNKS_FILE = "_chunks.npy"  # no Parquet: a glob of the folder finds the rows alone
_LEAST = -(2**63)
_MOST_GROWTH = 32  # times the usual rows of a chunk: its ranges of keys were cut for a shorter list
_KNOWN = [*METADATA_ROW.names, "original_width", "original_height", "width", "status"]


@dataclass
class Plan:
    """What planning found: `dropped` counts by rule what was read and is not fetched."""

    chunks: list[int] = field(default_factory=list)  # that have something to do
    fetched: int = 0  # rows that are to be fetched
    marked: int = 0  # rows that only change their status
    listed: int = 0  # rows of the list that pass
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by the first rule that they fail
    failing: dict[str, int] = field(default_factory=dict)  # by each rule that they fail


def chunk_file(folder: Path, chunk: int) -> Path:
    """Where the plan of one chunk lies, by the run's folder of plans."""
    return folder / f"chunk-{chunk:06d}.parquet"


def read_list(
    files: list[Path],
    filters: FilterConfig,
    columns: Mapping[str, str | None],
    plan: Plan,
    blocked: Blocked = Blocked(),  # noqa: B008 (it is frozen)
    sorting: Sorting = Buckets,
) -> Iterator[pa.Table]:
    """The rows of the metadata `files` that pass the filters, sorted by key, every key once.

    Counts into `plan`. Of several rows of one URL the first counts. Raises DataError for an empty
    list, for one of which no row is left, and where two different URLs have the same key.
    """
    dropped: Counter[str] = Counter()
    failing: Counter[str] = Counter()
    buckets = sorting(METADATA_ROW, input_bytes(files))
    for rows in passing(files, filters, columns, plan, dropped, failing):
        taken_down = blocked.mask(rows["key"], rows["url"])
        dropped["taken_down"] += int(taken_down.sum())
        buckets.add(rows.filter(pa.array(~taken_down)))
    if plan.read == 0:
        raise DataError(f"{files[0]}: the list of URLs has no rows: nothing to ingest")
    plan.listed = plan.read - dropped.total()
    for rows in buckets.sorted():
        unique = _without_repeats(rows, dropped)
        plan.listed -= rows.num_rows - unique.num_rows
        yield unique
    buckets.remove()
    plan.dropped = {rule: n for rule, n in sorted(dropped.items()) if n}
    plan.failing = {rule: n for rule, n in sorted(failing.items()) if n}
    if plan.listed == 0:
        counts = ", ".join(f"{rule} {n}" for rule, n in plan.dropped.items())
        filtered = any(rule.startswith(FILTERED) for rule in plan.dropped)
        advice = "loosen filter.*" if filtered else "give a list with other URLs"
        raise DataError(f"none of the {plan.read} rows of the list is left ({counts}): {advice}")


def passing(
    files: list[Path],
    filters: FilterConfig,
    columns: Mapping[str, str | None],
    plan: Plan,
    dropped: Counter[str],
    failing: Counter[str],
) -> Iterator[pa.Table]:
    """The METADATA_ROW rows of `files` that have a URL and pass the filters, as they come.

    The others are counted: `dropped` by the first rule that they fail, `failing` by each. Odd values
    that were taken as missing get one line of warning for each column.
    """
    odd: OddValues = {}
    for file in files:
        for batch in read_batches(file, columns, filters, odd):
            plan.read += batch.num_rows
            yield _planned(batch, filters, dropped, failing)
    for name, (count, first) in odd.items():
        print(
            f"warning: column '{name}' of the list: {count:,} values that cannot be read were taken "
            f"as missing (the first: {first}), as no filter reads them",
            file=sys.stderr,
        )


def first_plan(
    rows: Iterator[pa.Table], folder: Path, size: Callable[[int], int], plan: Plan
) -> bytes:
    """Cut the sorted `rows` into chunks, to be fetched all; `size` says of how many rows.

    `size` is told how many rows there are. Returns where the chunks' ranges of keys start, as the table keeps it in CHUNKS_FILE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = []
    first = next(rows)  # how many pass is known from here on
    for chunk, part in enumerate(_regroup(chain([first], rows), size(plan.listed))):
        starts.append(_LEAST if chunk == 0 else part["key"][0].as_py())
        write_parquet(chunk_file(folder, chunk), _to_fetch(part))
        plan.chunks.append(chunk)
        plan.fetched += part.num_rows
    content = io.BytesIO()
    np.save(content, np.array(starts, np.int64))
    return content.getvalue()


def next_plan(
    rows: Iterator[pa.Table],
    table: Table,
    folder: Path,
    filters: FilterConfig,
    retry: frozenset[str],
    size: Callable[[int], int],
    plan: Plan,
) -> None:
    """Plan what the table lacks of the sorted `rows`, what is tried again, what is marked anew.

    `retry` holds statuses. A row that the filters now rule out is marked; one that they let pass
    again is taken back, or fetched where its image was never stored. `size` as in `first_plan`:
    DataError where chunks would hold many times as many rows, which no worker could.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.load(io.BytesIO((table.folder / CHUNKS_FILE).read_bytes()))
    committed = {commit.chunk: commit.rows for commit in table.commits()}
    first = next(rows)  # how many pass is known from here on
    usual = max(size(plan.listed), *committed.values(), 1)
    if plan.listed > _MOST_GROWTH * usual * len(starts):
        raise DataError(
            f"{table.folder} was begun with so short a list that each of its files would now hold "
            f"{plan.listed // len(starts):,} rows (usual: {usual:,}): choose another data.output"
        )
    known = _known_rows(table, set(committed), len(starts))
    by_range = _by_range(chain([first], rows), starts)
    for chunk, (listed, here) in enumerate(zip(by_range, known, strict=True)):
        fetch, marks = _changes(listed, here, filters, retry)
        if fetch.num_rows or marks.num_rows or chunk not in committed:
            write_parquet(chunk_file(folder, chunk), pa.concat_tables([_to_fetch(fetch), marks]))
            plan.chunks.append(chunk)
            plan.fetched += fetch.num_rows
            plan.marked += marks.num_rows


# ------------------------------------------------------------------------- the list, by key


def _planned(
    batch: pa.Table, filters: FilterConfig, dropped: Counter[str], failing: Counter[str]
) -> pa.Table:
    """The METADATA_ROW rows of a batch that are to be fetched; the others are counted."""
    if "url" in batch.column_names:  # else all rows have one, and none of them passes
        has_url = has_text(batch["url"])
        dropped["no_url"] += batch.num_rows - pc.sum(has_url, min_count=0).as_py()
        batch = batch.filter(has_url)
    keep = np.ones(batch.num_rows, bool)
    for rule, failed in metadata_failures(filters, batch).items():
        fails = np.asarray(failed, bool) & keep  # a row counts for the first rule that it fails
        dropped[f"filtered:{rule}"] += int(fails.sum())
        failing[f"filtered:{rule}"] += pc.sum(failed, min_count=0).as_py()
        keep &= ~fails
    if not keep.any():
        return METADATA_ROW.empty_table()
    batch = batch.filter(pa.array(keep))
    urls = [normalise_url(url) for url in batch["url"].to_pylist()]
    known = {name: batch[name] for name in METADATA_ROW.names if name in batch.column_names}
    known |= {
        "key": pa.array([key_of(url) for url in urls], pa.int64()),
        "url": pa.array(urls, pa.string()),
    }
    empty = pa.nulls(len(urls))
    return pa.table(
        [known.get(f.name, empty).cast(f.type) for f in METADATA_ROW], schema=METADATA_ROW
    )


def _without_repeats(rows: pa.Table, dropped: Counter[str]) -> pa.Table:
    """Sorted rows with the first of each key; DataError where two URLs share a key."""
    keys = rows["key"].to_numpy()
    again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    urls = rows["url"]
    for i in again.tolist():
        _check_same(keys[i], urls[i - 1].as_py(), urls[i].as_py())
    dropped["repeated_url"] += len(again)
    keep = np.ones(len(keys), bool)
    keep[again] = False
    return rows.filter(pa.array(keep))


def _check_same(key: int, first: str, second: str) -> None:
    if first != second:
        raise DataError(
            f"two URLs have the same key {key}: {first} and {second}: remove one of them"
        )


def _regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of `tables` in tables of `rows` rows; the last may be shorter."""
    rest = METADATA_ROW.empty_table()
    for table in tables:
        rest = pa.concat_tables([rest, table])
        while rest.num_rows >= rows:
            yield rest.slice(0, rows)
            rest = rest.slice(rows)
        rest = rest.combine_chunks()
    if rest.num_rows:
        yield rest


def _by_range(tables: Iterable[pa.Table], starts: np.ndarray) -> Iterator[pa.Table]:
    """The sorted rows of `tables` by chunk: for each start those up to the next one."""
    rest, source = METADATA_ROW.empty_table(), iter(tables)
    for end in starts[1:]:
        while not rest.num_rows or rest["key"][-1].as_py() < end:
            if (more := next(source, None)) is None:
                break
            rest = pa.concat_tables([rest, more])
        cut = int(np.searchsorted(rest["key"].to_numpy(), end))
        yield rest.slice(0, cut)
        rest = rest.slice(cut).combine_chunks()
    yield pa.concat_tables([rest, *source])


# ------------------------------------------------------------------------- what the table has


def _known_rows(table: Table, committed: set[int], chunks: int) -> Iterator[pa.Table]:
    """The small columns of each chunk's part, in order; of a chunk without a part no rows."""
    parts = table.columns(sorted(committed), _KNOWN)
    for chunk in range(chunks):
        yield next(parts) if chunk in committed else METADATA_ROW.empty_table()


def _changes(
    listed: pa.Table, here: pa.Table, filters: FilterConfig, retry: frozenset[str]
) -> tuple[pa.Table, pa.Table]:
    """The METADATA_ROW rows of a chunk to be fetched, and the PLAN_ROW rows to be marked."""
    places = pc.index_in(listed["key"], value_set=here["key"].combine_chunks())
    new = listed.filter(pc.is_null(places))
    _check_collisions(listed, here, places)
    if not here.num_rows:
        return new, PLAN_ROW.empty_table()
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
    known = here.select(METADATA_ROW.names)
    changed = known.append_column("mark", pa.array(marks, pa.string()))
    again = known.filter(pa.array(fetch))
    return pa.concat_tables([new, again]), changed.filter(changed["mark"].is_valid())


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
        _check_same(listed["key"][i].as_py(), there[i].as_py(), listed["url"][i].as_py())


def _to_fetch(rows: pa.Table) -> pa.Table:
    return rows.append_column("mark", pa.nulls(rows.num_rows, pa.string())).cast(PLAN_ROW)
