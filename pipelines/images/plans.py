"""The plan of a job over the images of a table: which rows each chunk has, and where they lie.

    _plan/rows-0000.plan    Parquet, a row group for each of the first 1,024 chunks: key, file, group, row
    _plan/rows-0001.plan    …

Written once, while the table's keys pass by: no machine holds them all. A task opens the file that has its chunk, so what it reads does not grow with the
table: one file for all of them would have a footer as long as the table.
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
from pipelines.storage.sorting import ExternalSort
from pipelines.storage.tables import PLAN, plan_file

_CHUNKS = 1024  # of a file
LAYOUT = f"files of {_CHUNKS} chunks, in the order of the table"
"""What a table says of its plan, so that one of another layout is refused."""

_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Laid:
    """What a plan came to, or would: its rows, and a name for them and for where they lie."""

    usable: int  # rows of the table, of which `rows` are chosen
    rows: int
    layout: str


def lay_out(
    files: Sequence[Path],
    chosen: Callable[[np.ndarray], np.ndarray],
    write: tuple[Path, int] | None = None,
) -> Laid:
    """Pass over a table's rows once, in memory that does not grow with them.

    `chosen` tells of keys int64 `[n]` which are taken (bool `[n]`); these are laid into a plan where
    `write` names a folder and the rows of a chunk. Raises DataError as `RowIndex.open` does.
    """
    passed = _Passed()
    batches = passed.batches(files, chosen)
    if write is not None:
        _write(write[0], batches, write[1])
    for _ in batches:
        pass
    if not passed.usable:
        raise no_usable_row(files)
    if not passed.ascending:
        _check_keys(files, passed.usable)
    sizes = "".join(f"{file.name} {file.stat().st_size}\n" for file in files)
    passed.digest.update(sizes.encode())
    return Laid(passed.usable, passed.rows, passed.digest.hexdigest()[:16])


class _Passed:
    """What is known of the rows that a pass has seen."""

    def __init__(self) -> None:
        self.usable = self.rows = 0
        self.digest = hashlib.sha256()
        self.ascending = True  # the keys, so that none occurs twice
        self._last: int | None = None

    def batches(
        self, files: Sequence[Path], chosen: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[np.ndarray]:
        for rows in usable_rows(files):
            keys = rows["key"]
            if not len(keys):
                continue
            below = self._last is None or self._last < keys[0]
            self.ascending = self.ascending and below and bool((keys[1:] > keys[:-1]).all())
            self._last = keys[-1]
            taken = rows[chosen(keys)]
            self.usable += len(rows)
            self.rows += len(taken)
            self.digest.update(taken.tobytes())
            yield taken


def _write(folder: Path, batches: Iterable[np.ndarray], rows_per_chunk: int) -> None:
    """Lay rows into chunks, in the order in which they lie: what is read together comes together."""
    (folder / "_plan").mkdir(parents=True, exist_ok=True)
    step = _CHUNKS * rows_per_chunk
    waiting, number = np.zeros(0, ROW), 0
    for rows in itertools.chain(batches, [None]):
        if rows is not None:
            waiting = np.concatenate([waiting, rows])
        while len(waiting) >= step or (rows is None and len(waiting)):
            some, waiting = waiting[:step], waiting[step:]
            table = pa.table({name: np.ascontiguousarray(some[name]) for name in COLUMNS})
            write_parquet(_file(folder, number), table, row_group_size=rows_per_chunk)
            number += 1


def write_chunks(folder: Path, chunks: Sequence[np.ndarray]) -> None:
    """Write a plan of these chunks, ROW `[n]` each, in the place of the one that is there."""
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


def _check_keys(files: Sequence[Path], rows: int) -> None:
    """Raise DataError where a key occurs twice; keys in no order are sorted on disk."""
    keys = ExternalSort(pa.schema([("key", pa.int64())]), rows * 8)
    try:
        for some in usable_rows(files):
            # Keys of others may lie close together: multiplied they are spread over the buckets.
            spread = some["key"].astype(np.uint64) * _ODD
            keys.add(pa.table({"key": spread.view(np.int64)}))
        for bucket in keys.sorted():
            found = bucket["key"].to_numpy()
            if (repeated := found[1:][found[1:] == found[:-1]]).size:
                key = repeated[:1].view(np.uint64) * np.uint64(pow(int(_ODD), -1, 2**64))
                raise repeated_key(files, int(key.view(np.int64)[0]))
    finally:
        keys.remove()


def has_plan(folder: Path) -> bool:
    """Whether there is one that `read_plan` reads."""
    return is_file(plan_file(_file(folder, 0)))


def read_plan(folder: Path, chunk: int) -> pa.Table:
    """The rows of a chunk: `key file group row`."""
    with open_parquet(plan_file(_file(folder, chunk // _CHUNKS))) as parquet:
        return parquet.read_row_group(chunk % _CHUNKS)


def planned_keys(folder: Path, chunks: int) -> Iterator[np.ndarray]:
    """The keys int64 `[n]` of the rows of each of so many chunks."""
    for number, start in enumerate(range(0, chunks, _CHUNKS)):
        with open_parquet(plan_file(_file(folder, number))) as parquet:
            # Fewer where a plan was laid out again and its table not told of it yet.
            for group in range(min(_CHUNKS, chunks - start, parquet.num_row_groups)):
                yield parquet.read_row_group(group, columns=["key"])["key"].to_numpy()


def planned(files: list[Path], rows: pa.Table) -> RowIndex:
    """Rows of a plan as an index of the `files` that it was made of."""
    return RowIndex(files, *(rows[name].to_numpy() for name in COLUMNS))


def _file(folder: Path, number: int) -> Path:
    return folder / f"_plan/rows-{number:04d}{PLAN}"
