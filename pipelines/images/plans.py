"""The plan of a job over the images of a table: the rows of each chunk, and where they lie.

    _plan/rows-0000.plan    Parquet, a row group for each of the first 1,024 chunks: key, file, group, row
    _plan/rows-0001.plan    …

The plan is written in one pass over the table's keys, which need not fit into memory. A task opens only
the file with its chunk: a single file would have a footer that grows with the table.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images.random_access import (
    COLUMNS,
    ROW,
    RowIndex,
    no_usable_row,
    repeated_key,
    usable_rows,
)
from pipelines.storage.files import is_file, remove_file, write_atomically
from pipelines.storage.parquet import open_parquet, write_parquet
from pipelines.storage.sorting import ExternalSort, original_key, spread_keys
from pipelines.storage.tables import PLAN, plan_file

_CHUNKS = 1024  # per file
LAYOUT = f"files of {_CHUNKS} chunks, in the order of the table"
"""Recorded in a table, so that a plan of another layout is refused."""

UsableRows = Callable[[Sequence[Path]], Iterator[np.ndarray]]
"""The rows of files that can be planned, as `usable_rows` gives them."""


@dataclass(frozen=True)
class PlanSummary:
    """Result of `make_plan`."""

    usable: int  # rows of the table with status `ok`
    rows: int  # of these, the selected ones
    layout: str  # digest of the selected rows and where they lie


def make_plan(
    files: Sequence[Path],
    chosen: Callable[[np.ndarray], np.ndarray],
    write: tuple[Path, int] | None = None,
    usable: UsableRows = usable_rows,
) -> PlanSummary:
    """Make a plan in one pass over a table's rows, in constant memory.

    `chosen` maps keys int64 `[n]` to a mask bool `[n]`. `write` is a folder and the rows per chunk; if
    None, the plan is not written. `usable` gives the rows of files that can be planned. Raises
    DataError like `RowIndex.open`.
    """
    scan = _Scan()
    batches = scan.batches(usable(files), chosen)
    if write is not None:
        _write(write[0], batches, write[1])
    for _ in batches:
        pass
    if not scan.usable:
        raise no_usable_row(files)
    if not scan.ascending:
        _check_unique_keys(files, usable, scan.usable)
    sizes = "".join(f"{file.name} {file.stat().st_size}\n" for file in files)
    scan.digest.update(sizes.encode())
    return PlanSummary(scan.usable, scan.rows, scan.digest.hexdigest()[:16])


class _Scan:
    """A pass over rows that counts and hashes them."""

    def __init__(self) -> None:
        self.usable = self.rows = 0
        self.digest = hashlib.sha256()
        self.ascending = True  # strictly ascending keys are unique
        self._last: int | None = None

    def batches(
        self, usable: Iterator[np.ndarray], chosen: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[np.ndarray]:
        for rows in usable:
            keys = rows["key"]
            if not len(keys):
                continue
            continues = self._last is None or self._last < keys[0]
            self.ascending = self.ascending and continues and bool((keys[1:] > keys[:-1]).all())
            self._last = keys[-1]
            selected = rows[chosen(keys)]
            self.usable += len(rows)
            self.rows += len(selected)
            self.digest.update(selected.tobytes())
            yield selected


def _write(folder: Path, batches: Iterable[np.ndarray], rows_per_chunk: int) -> None:
    """Divide rows into chunks in the order of the table, so that a chunk reads neighbouring rows."""
    (folder / "_plan").mkdir(parents=True, exist_ok=True)
    step = _CHUNKS * rows_per_chunk
    buffer, number = np.zeros(0, ROW), 0
    for rows in itertools.chain(batches, [None]):
        if rows is not None:
            buffer = np.concatenate([buffer, rows])
        while len(buffer) >= step or (rows is None and len(buffer)):
            planned, buffer = buffer[:step], buffer[step:]
            table = pa.table({name: np.ascontiguousarray(planned[name]) for name in COLUMNS})
            write_parquet(_file(folder, number), table, row_group_size=rows_per_chunk)
            number += 1


def write_chunks(folder: Path, chunks: Sequence[np.ndarray]) -> None:
    """Replace the plan by one of these chunks, ROW `[n]` each."""
    for number, start in enumerate(range(0, len(chunks), _CHUNKS)):
        content = io.BytesIO()
        schema = pa.schema([(n, pa.from_numpy_dtype(ROW[n])) for n in COLUMNS])
        with pq.ParquetWriter(content, schema, compression="zstd") as writer:
            for rows in chunks[start : start + _CHUNKS]:
                columns = {name: np.ascontiguousarray(rows[name]) for name in COLUMNS}
                writer.write_table(pa.table(columns, schema=schema), max(1, len(rows)))
        file = _file(folder, number)
        write_atomically(file, content.getvalue())
        remove_file(file.with_suffix(".parquet"))  # of an earlier version


def _check_unique_keys(files: Sequence[Path], usable: UsableRows, count: int) -> None:
    """Raise DataError if a key occurs twice, by an external sort."""
    keys = ExternalSort(pa.schema([("key", pa.int64())]), count * 8)
    try:
        for rows in usable(files):
            # Foreign keys may lie close together.
            keys.add(pa.table({"key": spread_keys(rows["key"])}))
        for bucket in keys.sorted():
            ordered = bucket["key"].to_numpy()
            if (repeated := ordered[1:][ordered[1:] == ordered[:-1]]).size:
                raise repeated_key(files, original_key(int(repeated[0])))
    finally:
        keys.remove()


def has_plan(folder: Path) -> bool:
    """Whether `folder` contains a plan."""
    return is_file(plan_file(_file(folder, 0)))


def read_plan(folder: Path, chunk: int) -> pa.Table:
    """The rows of a chunk: columns `key`, `file`, `group`, `row`."""
    with open_parquet(plan_file(_file(folder, chunk // _CHUNKS))) as parquet:
        return parquet.read_row_group(chunk % _CHUNKS)


def planned_keys(folder: Path, chunks: int) -> Iterator[np.ndarray]:
    """The keys int64 `[n]` of each of the first `chunks` chunks."""
    for number, start in enumerate(range(0, chunks, _CHUNKS)):
        with open_parquet(plan_file(_file(folder, number))) as parquet:
            # Fewer row groups if a job was killed after a new plan and before it updated its table.
            for group in range(min(_CHUNKS, chunks - start, parquet.num_row_groups)):
                yield parquet.read_row_group(group, columns=["key"])["key"].to_numpy()


def plan_index(files: list[Path], rows: pa.Table) -> RowIndex:
    """The rows of a plan as an index of the `files` from which it was made."""
    return RowIndex(files, *(rows[name].to_numpy() for name in COLUMNS))


def _file(folder: Path, number: int) -> Path:
    return folder / f"_plan/rows-{number:04d}{PLAN}"
