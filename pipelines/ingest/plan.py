"""The plan of a run: what the run does to each chunk of the image table.

    metadata -> filters -> normalised URL, key -> buckets by key -> chunks by ranges of keys
                                                                         |
    rows that the table has: keys, statuses, scores, sizes ──────────────┴─▶ fetch, or mark (known_rows)

The first run cuts the sorted list into chunks, whose ranges of keys never change: a row of a later
list belongs to the chunk of its range, so the key ranges of parts do not overlap. Memory does not
grow with the list (pipelines/storage/sorting.py).
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

from pipelines.images.blocklist import Blocklist
from pipelines.images.rows import FILTERED, METADATA_ROW, has_text, key_of, normalise_url
from pipelines.ingest.known_rows import (
    PLAN_ROW,
    KnownKeys,
    changes,
    check_same,
    known_rows,
)
from pipelines.ingest.local_images import LocalImages, by_metadata
from pipelines.ingest.located_rows import PLACE
from pipelines.lists.filters import FilterConfig, check_columns, metadata_failures
from pipelines.lists.input_files import input_bytes
from pipelines.lists.metadata import InvalidValues, read_batches
from pipelines.storage.parquet import read_parquet_file, write_parquet
from pipelines.storage.sorting import ExternalSort, SortFactory
from pipelines.storage.tables import PLAN, Table, plan_file
from vlv_model.errors import DataError

CHUNKS_FILE = "_chunks.npy"
_MIN_KEY = -(2**63)
_MAX_GROWTH = 32  # of the rows of a chunk, when a longer list falls into the same key ranges


@dataclass(frozen=True)
class Places:
    """The images of a plan that are there already."""

    images: int  # to be read
    lost: int  # rows without an image
    files: int  # that contain the images
    bytes: int  # of the images; of Parquet, of its files
    names: list[str]  # some of them
    unpacked: bool  # copied into the table's folder first


@dataclass
class Plan:
    """The numbers of a plan; all but `chunks` and those of a dry run are rows."""

    chunks: list[int] = field(default_factory=list)  # the chunks to work on
    fetched: int = 0  # to be fetched
    again: int = 0  # of these, rows that the table has, which may be missing in the list
    marked: int = 0  # to get another status or other metadata only
    listed: int = 0  # of the list, that pass the filters
    read: int = 0  # of the list
    dropped: dict[str, int] = field(default_factory=dict)  # by the first rule that they fail
    failing: dict[str, int] = field(default_factory=dict)  # by each rule that they fail
    # Of a dry run alone:
    sites: int = 0  # of the rows to be fetched
    site_files: list[str] = field(default_factory=list)  # the rules that each site has in a file
    places: Places | None = None


def chunk_file(folder: Path, chunk: int) -> Path:
    """The Parquet file with the plan of one chunk, in the run's folder of plans."""
    return folder / f"chunk-{chunk:06d}{PLAN}"


def read_chunk(folder: Path, chunk: int) -> pa.Table:
    """The PLAN_ROW rows of one chunk."""
    return read_parquet_file(plan_file(chunk_file(folder, chunk)))


def read_list(
    files: list[Path] | LocalImages,
    filters: FilterConfig,
    columns: Mapping[str, str | None],
    plan: Plan,
    blocked: Blocklist = Blocklist(),  # noqa: B008 (it is frozen)
    sorting: SortFactory = ExternalSort,
    known: KnownKeys | None = None,
) -> Iterator[pa.Table]:
    """The METADATA_ROW rows of `files` that pass the filters, sorted by key, one for each key.

    Those of images that are there also have the columns PLACE.
    With the `known` keys of a table they are PLAN_ROW rows, and include rows that fail a filter if the
    table may have them. Of several rows with one URL the first is kept. Counts into `plan`. Raises
    DataError for an empty list, if no row is left, and if two different URLs have the same key.
    """
    dropped: Counter[str] = Counter()
    failing: Counter[str] = Counter()
    is_local = isinstance(files, LocalImages)
    num_bytes = files.num_bytes if isinstance(files, LocalImages) else input_bytes(files)
    buckets = sorting(_schema(is_local, known), num_bytes)
    for rows in passing(files, filters, columns, plan, dropped, failing, known):
        taken_down = blocked.mask(rows["key"], rows["url"])
        dropped["taken_down"] += int((taken_down & ~_fails(rows)).sum())
        buckets.add(rows.filter(pa.array(~taken_down)))
    if plan.read == 0 and not isinstance(files, LocalImages):
        raise DataError(f"{files[0]}: the list of URLs has no rows: nothing to ingest")
    plan.listed = plan.read - dropped.total()
    rescored = 0
    for rows in buckets.sorted():
        before = dropped["repeated_url"]
        unique = _without_repeats(rows, dropped)
        plan.listed -= dropped["repeated_url"] - before
        rescored += unique.num_rows if known else 0
        yield unique
    buckets.remove()
    plan.dropped = {rule: n for rule, n in sorted(dropped.items()) if n}
    plan.failing = {rule: n for rule, n in sorted(failing.items()) if n}
    if not plan.listed and not rescored:
        counts = ", ".join(f"{rule} {n}" for rule, n in plan.dropped.items())
        filtered = any(rule.startswith(FILTERED) for rule in plan.dropped)
        advice = "loosen filter.*" if filtered else "give a list with other URLs"
        raise DataError(f"none of the {plan.read} rows of the list is left ({counts}): {advice}")


def passing(
    files: list[Path] | LocalImages,
    filters: FilterConfig,
    columns: Mapping[str, str | None],
    plan: Plan,
    dropped: Counter[str],
    failing: Counter[str],
    known: KnownKeys | None = None,
) -> Iterator[pa.Table]:
    """The rows of `files` that have a URL and pass the filters, in the order of the files; see `read_list`.

    The others are counted: `dropped` by the first rule that they fail, `failing` by each rule. Prints one
    warning for each column with values that were taken as missing.
    """
    odd_values: InvalidValues = {}
    if isinstance(files, LocalImages):
        filters = by_metadata(filters)
        batches = files.batches(filters, odd_values)
    else:
        batches = _batches(files, filters, columns, odd_values, known)
    for batch in batches:
        plan.read += batch.num_rows
        yield _filter_batch(batch, filters, dropped, failing, known)
    for name, (count, first) in odd_values.items():
        print(
            f"warning: column '{name}' of the list: {count:,} values that cannot be read were taken "
            f"as missing (the first: {first}), as no filter reads them",
            file=sys.stderr,
        )


def _batches(
    files: list[Path],
    filters: FilterConfig,
    columns: Mapping[str, str | None],
    odd_values: InvalidValues,
    known: KnownKeys | None,
) -> Iterator[pa.Table]:
    # With known rows, row groups in which no row passes are read too: the table may have the rows.
    read_all = filters.model_copy(update={"optional": tuple(filters.rules())}) if known else filters
    for file in files:
        for batch in read_batches(file, columns, read_all, odd_values):
            if known:
                check_columns(filters, batch.schema, set(batch.column_names), str(file))
            yield batch


def _schema(is_local: bool, known: KnownKeys | None) -> pa.Schema:
    """That of a list's rows."""
    return pa.schema([*(PLAN_ROW if known else METADATA_ROW), *(PLACE if is_local else ())])


def first_plan(
    rows: Iterator[pa.Table], folder: Path, size: Callable[[int], int], plan: Plan
) -> bytes:
    """Cut the sorted `rows` into chunks, all to be fetched.

    `size` gives the rows of a chunk for a number of rows. Returns the first key of each chunk, as the
    content of CHUNKS_FILE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = []
    first = next(rows)  # sets plan.listed
    for chunk, part in enumerate(_regroup(chain([first], rows), size(plan.listed))):
        starts.append(_MIN_KEY if chunk == 0 else part["key"][0].as_py())
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
    """Plan new rows, retries and marks, from the sorted `rows` of a list and an existing table.

    `rows` are PLAN_ROW rows; `retry` are statuses. New metadata of known rows are taken over. A row
    that the filters now drop is marked. One that passes again becomes `ok`, or is fetched if its image
    was not stored. `size` as in `first_plan`. Raises DataError if chunks would have so many rows that
    no worker could hold one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.load(io.BytesIO((table.folder / CHUNKS_FILE).read_bytes()))
    committed = {commit.chunk: commit.rows for commit in table.commits()}
    first = next(rows)  # sets plan.listed
    usual = max(size(max(1, plan.listed)), *committed.values(), 1)
    if plan.listed > _MAX_GROWTH * usual * len(starts):
        raise DataError(
            f"{table.folder} was created from a much shorter list: each of its files would now have "
            f"{plan.listed // len(starts):,} rows (usual: {usual:,}): choose another data.output"
        )
    known = known_rows(table, set(committed), len(starts))
    by_range = _by_range(chain([first], rows), starts)
    for chunk, (listed, stored) in enumerate(zip(by_range, known, strict=True)):
        fetch, marks = changes(listed, stored, filters, retry)
        if fetch.num_rows or marks.num_rows or chunk not in committed:
            planned = pa.concat_tables([_to_fetch(fetch), marks], promote_options="default")
            write_parquet(chunk_file(folder, chunk), planned)
            plan.chunks.append(chunk)
            plan.fetched += fetch.num_rows
            is_known = pc.is_in(fetch["key"], value_set=stored["key"].combine_chunks())
            plan.again += pc.sum(is_known, min_count=0).as_py()
            plan.marked += marks.num_rows


# ------------------------------------------------------------------------- the list, by key


def _filter_batch(
    batch: pa.Table,
    filters: FilterConfig,
    dropped: Counter[str],
    failing: Counter[str],
    known: KnownKeys | None,
) -> pa.Table:
    """The rows of a batch to be fetched or compared with the table; the others are counted."""
    if "key" in batch.column_names:
        pass  # images that are there: each has a name
    elif "url" in batch.column_names:  # otherwise all rows have a URL, and none passes
        has_url = has_text(batch["url"])
        dropped["no_url"] += batch.num_rows - pc.sum(has_url, min_count=0).as_py()
        batch = batch.filter(has_url)
    passes = np.ones(batch.num_rows, bool)
    marks = np.full(batch.num_rows if known else 0, None, object)
    for rule, failed in metadata_failures(filters, batch).items():
        fails = np.asarray(failed, bool)
        failing[f"filtered:{rule}"] += int(fails.sum())
        fails = fails & passes  # count a row for its first failed rule only
        dropped[f"filtered:{rule}"] += int(fails.sum())
        passes &= ~fails
        if known:
            marks[fails] = f"filtered:{rule}"
    if not known:
        batch = batch.filter(pa.array(passes))
    schema = _schema("lost" in batch.column_names, known)
    if not batch.num_rows:
        return schema.empty_table()
    values = {name: batch[name] for name in schema.names if name in batch.column_names}
    if "key" not in batch.column_names:
        urls = [normalise_url(url) for url in batch["url"].to_pylist()]
        values |= {
            "key": pa.array([key_of(url) for url in urls], pa.int64()),
            "url": pa.array(urls, pa.string()),
        }
    if known:
        values["mark"] = pa.array(marks, pa.string())
    empty = pa.nulls(batch.num_rows)
    rows = pa.table([values.get(f.name, empty).cast(f.type) for f in schema], schema=schema)
    if known:
        rows = rows.filter(pa.array(passes | known.may_have(rows["key"].to_numpy())))
    return rows


def _fails(rows: pa.Table) -> np.ndarray:
    """Whether each row fails a filter, bool `[n]`."""
    if "mark" not in rows.column_names:
        return np.zeros(rows.num_rows, bool)
    return np.asarray(rows["mark"].is_valid().to_pylist(), bool)


def _is_lost(rows: pa.Table) -> np.ndarray:
    """Whether it is known that a row has no image, bool `[n]`."""
    if "lost" not in rows.column_names:
        return np.zeros(rows.num_rows, bool)
    return np.asarray(rows["lost"].is_valid().to_pylist(), bool)


def _without_repeats(rows: pa.Table, dropped: Counter[str]) -> pa.Table:
    """One row of each key: the first that passes, or else the first; those with an image come first.

    `rows` are sorted by key.

    Raises DataError if two URLs have the same key.
    """
    keys, fails = rows["key"].to_numpy(), _fails(rows)
    repeats = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    if not len(repeats):
        return rows
    urls = rows["url"]
    for i in repeats.tolist():
        check_same(keys[i], urls[i - 1].as_py(), urls[i].as_py())
    order = np.lexsort((_is_lost(rows), fails, keys))  # stable: otherwise rows keep their order
    first = np.ones(len(keys), bool)
    first[1:] = keys[order][1:] != keys[order][:-1]
    dropped["repeated_url"] += int((~first & ~fails[order]).sum())
    return rows.take(pa.array(order[first]))


def _regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Regroup `tables` into tables of `rows` rows; the last may be shorter."""
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while rest.num_rows >= rows:
            yield rest.slice(0, rows)
            rest = rest.slice(rows)
        rest = rest.combine_chunks()
    if rest is not None and rest.num_rows:
        yield rest


def _by_range(tables: Iterable[pa.Table], starts: np.ndarray) -> Iterator[pa.Table]:
    """Split the sorted rows of `tables` by chunk: from each start up to the next."""
    source = iter(tables)
    rest = next(source)
    for end in starts[1:]:
        while not rest.num_rows or rest["key"][-1].as_py() < end:
            if (more := next(source, None)) is None:
                break
            rest = pa.concat_tables([rest, more])
        cut = int(np.searchsorted(rest["key"].to_numpy(), end))
        yield rest.slice(0, cut)
        rest = rest.slice(cut).combine_chunks()
    yield pa.concat_tables([rest, *source])


def _to_fetch(rows: pa.Table) -> pa.Table:
    position = len(METADATA_ROW)
    mark = pa.nulls(rows.num_rows, pa.string())
    return rows.add_column(position, PLAN_ROW.field("mark"), mark)
