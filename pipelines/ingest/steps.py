"""The steps of a chunk: read its plan, fetch its rows, write its part."""

from __future__ import annotations

import threading
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution.chunks import CommitChunk
from pipelines.images.blocklist import Blocklist
from pipelines.images.rows import IMAGE_ROW, with_image_feature
from pipelines.images.runs import Run
from pipelines.ingest.fetch import ImageFetcher
from pipelines.ingest.known_rows import UPDATABLE, with_marks
from pipelines.ingest.plan import read_chunk
from pipelines.storage.parquet import open_parquet, read_parquet_file
from pipelines.storage.tables import IMAGE_ROW_GROUP, Table

# Writing a part takes several times its memory. A retry of few rows in many chunks would otherwise
# write as many parts at a time as chunks are in flight.
_write_slots = threading.BoundedSemaphore(2)


class Merge:
    """Writes a chunk: fetched and marked rows replace those of the existing part."""

    def __init__(self, table: Table, run: Run) -> None:
        self.table = table
        self.run = run

    def __call__(self, chunk: int, fetched: pa.Table) -> None:
        with _write_slots:
            if fetched.num_rows or not self.table.is_committed(chunk):
                self._write(chunk, fetched)
            else:
                self._update(chunk)

    def _write(self, chunk: int, fetched: pa.Table) -> None:
        number = pa.array([self.run.number] * fetched.num_rows, pa.int32())
        position = fetched.schema.get_field_index("run")
        rows = fetched.set_column(position, IMAGE_ROW.field("run"), number)
        if self.table.is_committed(chunk):
            rows = pa.concat_tables([self._other_rows(chunk, rows["key"]), rows])
        order = pc.sort_indices(rows["key"])
        self.table.write(
            chunk, rows.take(order), run=self.run.number, row_group_size=IMAGE_ROW_GROUP
        )

    def _other_rows(self, chunk: int, fetched: pa.ChunkedArray) -> pa.Table:
        """The rows of the part that were not fetched, with their new marks and metadata."""
        stored = read_parquet_file(self.table.part(chunk))
        stored = stored.filter(pc.invert(pc.is_in(stored["key"], value_set=fetched)))
        return with_marks(stored, self._marked(chunk))

    def _update(self, chunk: int) -> None:
        """Mark rows of a part without fetched rows; its images are not rewritten."""
        with open_parquet(self.table.part(chunk)) as parquet:
            stored = parquet.read(columns=["key", "status", *UPDATABLE])
        rows = with_marks(stored, self._marked(chunk))
        changed = [name for name in UPDATABLE if not rows[name].equals(stored[name])]
        columns = rows.select(["status", *changed])
        self.table.update(chunk, columns, run=self.run.number, row_group_size=IMAGE_ROW_GROUP)

    def _marked(self, chunk: int) -> pa.Table:
        """The rows of the chunk's plan that are marked, not fetched."""
        plan = read_chunk(self.run.plan_folder, chunk)
        return plan.filter(plan["mark"].is_valid())


class IngestChunk:
    """The one step of a chunk: reads its plan, fetches its rows, and commits them.

    All of it happens in one actor, so that no image passes through Ray's object store.
    """

    def __init__(
        self,
        fetcher: type[ImageFetcher],
        settings: tuple[Any, ...],
        run: Run,
        table: Table,
        last: CommitChunk,
    ) -> None:
        self.fetch = fetcher(*settings)
        self.run = run
        self.table = table
        self.last = last

    def __call__(self, chunks: pa.Table) -> pa.Table:
        (chunk,) = chunks["chunk"].to_pylist()
        planned = self._planned(chunk)
        fetched = with_image_feature(IMAGE_ROW).empty_table()
        if planned.num_rows:
            fetched = self.fetch(planned).drop_columns(["chunk"])
        return self.last.commit(chunk, fetched)

    def _planned(self, chunk: int) -> pa.Table:
        """The METADATA_ROW rows of a chunk that are to be fetched, with its number as `chunk`."""
        plan = read_chunk(self.run.plan_folder, chunk)
        rows = plan.filter(plan["mark"].is_null()).drop_columns(["mark"])
        blocked = Blocklist.read(self.table)  # it may have changed since the run was planned
        rows = rows.filter(pa.array(~blocked.mask(rows["key"], rows["url"])))
        return rows.append_column("chunk", pa.array([chunk] * rows.num_rows, pa.int64()))

    def close(self) -> None:
        """Close the fetcher's connections and end its decoders."""
        self.fetch.close()
