"""Copies images out of Parquet, so that each can be read alone.

A chunk has the rows of a range of keys, which are hashes: its images lie in all row groups of the input,
and a row group has to be read as a whole. So before the chunks each row group is read once:

    plan ─▶ wanted rows of each unit ─▶ _runs/0003/images/unit-000007.images    the files, one after another
            (some row groups)           _runs/0003/images/unit-000007.places    key, offset, size of each

Units are unpacked by the cluster's processes. A continued run unpacks those that it lacks. All are deleted at
the run's end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution.chunks import map_chunks
from pipelines.execution.cluster import Cluster
from pipelines.images.external import ExternalImages, UndecodableImage
from pipelines.images.runs import IMAGES, Run
from pipelines.storage.files import is_url, read_bytes, write_atomically, write_pieces
from pipelines.storage.folders import files_below
from pipelines.storage.parquet import open_parquet, read_parquet_file, write_parquet
from pipelines.storage.sorting import ExternalSort, original_key, spread_keys
from pipelines.storage.tables import PLAN

_PLACE = np.dtype([("key", "<i8"), ("offset", "<i8"), ("size", "<i8")])
_WANTED = pa.schema(
    [
        ("key", pa.int64()),  # of the unit, spread
        ("image", pa.int64()),  # key of the row
        ("path", pa.string()),
        ("group", pa.int32()),
        ("row", pa.int64()),
    ]
)
_ROW_BYTES = 64  # of _WANTED


def write_wanted(run: Run) -> int:
    """List the planned images of each unit, in the run's folder. Returns the number of units."""
    plans = [file for file in files_below(run.plan_folder) if file.suffix == PLAN]
    sorting = ExternalSort(_WANTED, sum(file.stat().st_size for file in plans) + _ROW_BYTES)
    for file in plans:
        with open_parquet(file) as parquet:
            rows = parquet.read(columns=["key", "mark", "lost", "unit", "path", "group", "row"])
        rows = rows.filter(pc.and_(rows["mark"].is_null(), rows["lost"].is_null()))
        if rows.num_rows:
            units = spread_keys(rows["unit"].to_numpy())
            columns = [units, *(rows[name] for name in ("key", "path", "group", "row"))]
            sorting.add(pa.table(columns, schema=_WANTED))
    written = 0
    for bucket in sorting.sorted():
        keys = bucket["key"].to_numpy()
        starts = [i for i in range(len(keys)) if not i or keys[i] != keys[i - 1]]
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            unit = original_key(int(keys[start]))
            rows = bucket.slice(start, end - start).drop_columns(["key"])
            write_parquet(
                _file(run, unit, PLAN), rows.sort_by([("group", "ascending"), ("row", "ascending")])
            )
            written += 1
    sorting.remove()
    return written


def unpack(cluster: Cluster, run: Run, column: str | None) -> None:
    """Unpack the units that the run lacks."""
    files = files_below(run.folder / IMAGES)
    names = {file.name for file in files}
    wanted = [int(file.stem.rpartition("-")[2]) for file in files if file.suffix == PLAN]
    lacking = [unit for unit in wanted if _file(run, unit, ".places").name not in names]
    for _ in map_chunks(cluster, lacking, partial(_unpack, run=run, column=column)):
        pass


def _unpack(unit: int, run: Run, column: str | None) -> pa.Table:
    rows = read_parquet_file(_file(run, unit, PLAN)).to_pylist()
    images = ExternalImages(column)
    places = np.zeros(len(rows), _PLACE)
    count = 0

    def contents() -> Iterator[bytes]:
        nonlocal count
        offset = 0
        for row in rows:
            try:
                data = images.read(
                    {**row, "image": {"path": row["path"]}, "offset": None, "size": None}
                )
            except UndecodableImage:
                continue  # read again where it lies, which gives the row's error
            if data:
                places[count] = (row["image"], offset, len(data))
                offset, count = offset + len(data), count + 1
                yield data

    write_pieces(_file(run, unit, ".images"), contents())
    write_atomically(_file(run, unit, ".places"), np.sort(places[:count], order="key").tobytes())
    return pa.table({"rows": [count]})


class UnpackedImages:
    """Reads images that a run has unpacked. Thread-safe."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._places: dict[int, np.ndarray] = {}  # 24 bytes for each image of the run
        self._lock = threading.Lock()

    def read(self, unit: int, key: int) -> bytes | None:
        """The bytes of a row's image; None if they could not be unpacked."""
        with self._lock:
            if unit not in self._places:
                content = read_bytes(_file(self.run, unit, ".places"))
                self._places[unit] = np.frombuffer(content, _PLACE)
            places = self._places[unit]
        position = int(np.searchsorted(places["key"], key))
        if position == len(places) or places["key"][position] != key:
            return None
        _, offset, size = places[position].tolist()
        return read_bytes(_file(self.run, unit, ".images"), offset, size)


def _file(run: Run, unit: int, suffix: str) -> Path:
    folder = run.folder / IMAGES
    if suffix == PLAN and not is_url(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"unit-{unit:06d}{suffix}"
