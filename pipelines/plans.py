"""The plan of a job over the images of a table: which rows each chunk has, and where they lie.

    _plan/rows-0000.parquet    a row group for each of the first 1,024 chunks: key, file, group, row
    _plan/rows-0001.parquet    …

Written once. A task opens the file that has its chunk, so what it reads does not grow with the
table: one file for all of them would have a footer as long as the table.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.images import RowIndex
from pipelines.places import is_file, open_parquet, write_parquet

_CHUNKS = 1024  # of a file
LAYOUT = f"files of {_CHUNKS} chunks"
"""What a table says of its plan, so that one of another layout is refused."""

COLUMNS = ("key", "file", "group", "row")


def write_plan(folder: Path, index: RowIndex, rows_per_chunk: int) -> int:
    """Lay the rows of an index into chunks; returns their number."""
    # Rows that lie together are read together.
    order = np.lexsort((index.row, index.group, index.file))
    (folder / "_plan").mkdir(parents=True, exist_ok=True)
    step = _CHUNKS * rows_per_chunk
    for number, start in enumerate(range(0, len(order), step)):
        some = order[start : start + step]
        arrays = (index.keys[some], index.file[some], index.group[some], index.row[some])
        rows = pa.table(dict(zip(COLUMNS, arrays, strict=True)))
        write_parquet(_file(folder, number), rows, row_group_size=rows_per_chunk)
    return -(-len(order) // rows_per_chunk)


def has_plan(folder: Path) -> bool:
    """Whether there is one that `read_plan` reads."""
    return is_file(_file(folder, 0))


def read_plan(folder: Path, chunk: int) -> pa.Table:
    """The rows of a chunk: `key file group row`."""
    with open_parquet(_file(folder, chunk // _CHUNKS)) as parquet:
        return parquet.read_row_group(chunk % _CHUNKS)


def planned(files: list[Path], rows: pa.Table) -> RowIndex:
    """Rows of a plan as an index of the `files` that it was made of."""
    return RowIndex(files, *(rows[name].to_numpy() for name in COLUMNS))


def _file(folder: Path, number: int) -> Path:
    return folder / f"_plan/rows-{number:04d}.parquet"
