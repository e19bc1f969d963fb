"""The steps of a chunk of ingest: its plan is read, its rows are fetched, its part is written."""

from __future__ import annotations

import threading
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution.cluster import Step
from pipelines.images.blocklist import Blocklist
from pipelines.images.rows import IMAGE_ROW, with_image_feature
from pipelines.images.runs import Run
from pipelines.ingest.fetch import ImageFetcher
from pipelines.ingest.known_rows import CARRIED, with_marks
from pipelines.ingest.plan import read_chunk
from pipelines.storage.parquet import open_parquet, read_parquet_file
from pipelines.storage.tables import IMAGE_ROW_GROUP, Table

# A part is in memory several times while it is written. A retry of few rows in many chunks would
# otherwise have as many parts there as chunks are in work.
_writing = threading.BoundedSemaphore(2)


class Merge:
    """Writes a chunk: what was fetched and marked, in the place of what its part had of it."""

    def __init__(self, table: Table, run: Run) -> None:
        self.table = table
        self.run = run

    def __call__(self, chunk: int, fetched: pa.Table) -> None:
        with _writing:
            if fetched.num_rows or not self.table.is_committed(chunk):
                self._write(chunk, fetched)
            else:
                self._update(chunk)

    def _write(self, chunk: int, fetched: pa.Table) -> None:
        number = pa.array([self.run.number] * fetched.num_rows, pa.int32())
        position = fetched.schema.get_field_index("run")
        rows = fetched.set_column(position, IMAGE_ROW.field("run"), number)
        if self.table.is_committed(chunk):
            rows = pa.concat_tables([self._kept(chunk, rows["key"]), rows])
        order = pc.sort_indices(rows["key"])
        self.table.write(
            chunk, rows.take(order), run=self.run.number, row_group_size=IMAGE_ROW_GROUP
        )

    def _kept(self, chunk: int, fetched: pa.ChunkedArray) -> pa.Table:
        """The rows of the part that were not fetched, with their new marks and metadata."""
        there = read_parquet_file(self.table.part(chunk))
        there = there.filter(pc.invert(pc.is_in(there["key"], value_set=fetched)))
        return with_marks(there, self._marked(chunk))

    def _update(self, chunk: int) -> None:
        """Mark rows of a part of which nothing was fetched: its pictures stay where they are."""
        with open_parquet(self.table.part(chunk)) as parquet:
            there = parquet.read(columns=["key", "status", *CARRIED])
        rows = with_marks(there, self._marked(chunk))
        changed = [n for n in CARRIED if not rows[n].equals(there[n])]
        columns = rows.select(["status", *changed])
        self.table.update(chunk, columns, run=self.run.number, row_group_size=IMAGE_ROW_GROUP)

    def _marked(self, chunk: int) -> pa.Table:
        """The rows of the chunk's plan that are marked and not fetched."""
        plan = read_chunk(self.run.plan_folder, chunk)
        return plan.filter(plan["mark"].is_valid())


class FetchAndWrite:
    """Last step of a chunk: what the `fetcher` makes of its rows, and `last` of that."""

    def __init__(self, fetcher: type[ImageFetcher], settings: tuple[Any, ...], last: Step) -> None:
        self.fetch = fetcher(*settings)
        self.last = last

    def __call__(self, rows: pa.Table) -> pa.Table:
        return self.last(self.fetch(rows))

    def close(self) -> None:
        """End the fetcher's connections and decoders."""
        self.fetch.close()


class ReadPlan:
    """First step of a chunk: its METADATA_ROW rows that are to be fetched, with its number."""

    def __init__(self, run: Run, merge: Merge) -> None:
        self.run = run
        self.merge = merge

    def __call__(self, chunks: pa.Table) -> pa.Table:
        (chunk,) = chunks["chunk"].to_pylist()
        plan = read_chunk(self.run.plan_folder, chunk)
        rows = plan.filter(plan["mark"].is_null()).drop_columns(["mark"])
        blocked = Blocklist.read(self.merge.table)  # since the run was planned, perhaps
        rows = rows.filter(pa.array(~blocked.mask(rows["key"], rows["url"])))
        if not rows.num_rows:  # Ray Data passes on no empty block
            self.merge(chunk, with_image_feature(IMAGE_ROW).empty_table())
        return rows.append_column("chunk", pa.array([chunk] * rows.num_rows, pa.int64()))
