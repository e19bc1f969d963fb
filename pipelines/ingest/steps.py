"""The one step of a chunk: read its plan, download and decode its images, write its part.

    urls ──▶ Downloader: event loop, connections ──▶ bodies ──▶ DecoderPool: a child process each
             ^                                         |
             '---- waits while the byte budget is used '

A body goes to a decoder as soon as it has arrived. Chunks that an actor works on at the same time share
connections and decoders, so a slow host in one chunk leaves neither of them idle.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution.steps import Chunk
from pipelines.images.blocklist import Blocklist
from pipelines.images.external import ExternalImages, UndecodableImage
from pipelines.images.rows import DECODE, IMAGE_ROW, status, with_image_feature
from pipelines.images.runs import Run
from pipelines.ingest.decoder import DecoderPool
from pipelines.ingest.known_rows import UPDATABLE, with_marks
from pipelines.ingest.located_rows import PLACE
from pipelines.ingest.plan import read_chunk
from pipelines.ingest.unpack import UnpackedImages
from pipelines.ingest.web.config import DownloadConfig
from pipelines.ingest.web.download import Downloader
from pipelines.ingest.web.failures import clean
from pipelines.lists.filters import FilterConfig
from pipelines.pictures.arrays import png_of
from pipelines.pictures.decode import DecodeError
from pipelines.pictures.encode import ImageConfig
from pipelines.pictures.formats import Encoding
from pipelines.storage.parquet import open_parquet, read_parquet_file
from pipelines.storage.tables import IMAGE_ROW_GROUP, Table

# Writing a part takes several times its memory. A retry of few rows in many chunks would otherwise
# write as many parts at a time as chunks are in flight.
_write_slots = threading.BoundedSemaphore(2)

CPUS_PER_FETCHER = 4
"""CPUs that one event loop keeps busy with decoding; the loop itself takes half a CPU."""


def fetchers_of(nodes: Sequence[float]) -> tuple[int, int]:
    """The number of fetchers for nodes with these numbers of CPUs, and the decoders of each.

    A fetcher runs on one node, so it must fit the largest. For a cluster with only a head without
    CPUs, the first fetcher makes the autoscaler start a node that fits it.
    """
    largest = int(max(nodes, default=0))
    if not largest:
        return 1, CPUS_PER_FETCHER
    decoders = max(1, largest // max(1, largest // CPUS_PER_FETCHER))
    return max(1, sum(int(cpus // decoders) for cpus in nodes)), decoders


def image_rows(rows: pa.Table, results: Sequence[Mapping[str, Any]]) -> pa.Table:
    """IMAGE_ROW rows: METADATA_ROW `rows`, and the other columns of each."""
    columns = [
        rows[field.name]
        if field.name in rows.column_names
        else pa.array([result.get(field.name) for result in results], field.type)
        for field in IMAGE_ROW
    ]
    return pa.table(columns, schema=with_image_feature(IMAGE_ROW))


class ImageFetcher:
    """Maps METADATA_ROW rows to IMAGE_ROW rows, in the same order."""

    def __init__(
        self,
        download: DownloadConfig,
        image: ImageConfig,
        filters: FilterConfig,
        decoders: int,
        rules_store: Any = None,
    ) -> None:
        """`rules_store` as in Downloader."""
        self.downloader = Downloader(download, rules_store=rules_store)
        self.decoders = DecoderPool(decoders, image, filters)

    def __call__(self, rows: pa.Table) -> pa.Table:
        urls = rows["url"].to_pylist()
        return image_rows(rows, self.downloader.map_urls(urls, self.decoders.columns))

    def close(self) -> None:
        """Close the connections and end the decoders."""
        self.downloader.close()
        self.decoders.close()


class ImageReader:
    """Maps METADATA_ROW and PLACE rows to IMAGE_ROW rows, in the same order."""

    def __init__(
        self,
        image: ImageConfig,
        filters: FilterConfig,
        decoders: int,
        column: str | None = None,
        encoding: Encoding = "file",
        run: Run | None = None,
    ) -> None:
        """`column` is the image column of Parquet, if there is one; `run` has unpacked its images."""
        self.encoding = encoding
        self.images = ExternalImages(column)
        self.unpacked = UnpackedImages(run) if run is not None else None
        self.decoders = DecoderPool(decoders, image, filters)

    def __call__(self, rows: pa.Table) -> pa.Table:
        places = rows.select(["key", *PLACE.names]).to_pylist()
        order = sorted(range(len(places)), key=lambda i: _position(places[i]))
        threads = self.decoders.threads
        read = threads.map(self._read, [places[i] for i in order])
        results: list[dict[str, Any]] = [{}] * len(places)
        for i, columns in zip(order, read, strict=True):
            results[i] = columns
        return image_rows(rows, results)

    def _read(self, place: dict[str, Any]) -> dict[str, Any]:
        if place["lost"] is not None:
            return {"status": place["lost"], "error": place["reason"]}
        data = None
        if self.unpacked is not None:
            data = self.unpacked.read(place["unit"], place["key"])
        try:
            data = data or self.images.read({**place, "image": {"path": place["path"]}})
        except UndecodableImage as error:
            return {"status": status(DECODE, error.kind), "error": clean(str(error))}
        if not data:
            return {"status": status(DECODE, "no_image"), "error": "no bytes"}
        if self.encoding != "file":
            try:
                data = png_of(data, self.encoding)
            except DecodeError as error:
                return {"status": status(DECODE, error.kind), "error": clean(str(error))}
        return self.decoders.decode(data)

    def close(self) -> None:
        """End the decoders."""
        self.decoders.close()


def _position(place: Mapping[str, Any]) -> tuple[str, int, int]:
    """Orders images as they lie."""
    return place["path"] or "", place["group"] or 0, place["offset"] or place["row"] or 0


@dataclass(frozen=True)
class FetchedChunk(Chunk):
    """A chunk whose rows are the fetched ones, IMAGE_ROW."""

    marked: pa.Table = field(default_factory=partial(pa.table, {}))
    """The new marks and metadata of other rows, rows of the chunk's plan."""


class WritePart:
    """Writes a chunk's part: fetched and marked rows replace those of the existing one."""

    def __init__(self, table: Table, run: Run) -> None:
        self.table = table
        self.run = run

    def __call__(self, chunk: FetchedChunk) -> None:
        with _write_slots:
            if chunk.rows.num_rows or not self.table.is_committed(chunk.number):
                self._write(chunk.number, chunk.rows, chunk.marked)
            else:
                self._update(chunk.number, chunk.marked)

    def _write(self, chunk: int, fetched: pa.Table, marked: pa.Table) -> None:
        number = pa.array([self.run.number] * fetched.num_rows, pa.int32())
        position = fetched.schema.get_field_index("run")
        rows = fetched.set_column(position, IMAGE_ROW.field("run"), number)
        if self.table.is_committed(chunk):
            rows = pa.concat_tables([self._other_rows(chunk, rows["key"], marked), rows])
        order = pc.sort_indices(rows["key"])
        self.table.write(
            chunk, rows.take(order), run=self.run.number, row_group_size=IMAGE_ROW_GROUP
        )

    def _other_rows(self, chunk: int, fetched: pa.ChunkedArray, marked: pa.Table) -> pa.Table:
        """The rows of the part that were not fetched, with their new marks and metadata."""
        stored = read_parquet_file(self.table.part(chunk))
        stored = stored.filter(pc.invert(pc.is_in(stored["key"], value_set=fetched)))
        return with_marks(stored, marked)

    def _update(self, chunk: int, marked: pa.Table) -> None:
        """Mark rows of a part without fetched rows; its images are not rewritten."""
        with open_parquet(self.table.part(chunk)) as parquet:
            stored = parquet.read(columns=["key", "status", *UPDATABLE])
        rows = with_marks(stored, marked)
        changed = [name for name in UPDATABLE if not rows[name].equals(stored[name])]
        columns = rows.select(["status", *changed])
        self.table.update(chunk, columns, run=self.run.number, row_group_size=IMAGE_ROW_GROUP)


class IngestChunk:
    """The one step of a chunk: reads its plan and fetches its rows."""

    def __init__(
        self,
        fetcher: type[ImageFetcher] | type[ImageReader],
        settings: tuple[Any, ...],
        run: Run,
        table: Table,
    ) -> None:
        self.fetch = fetcher(*settings)
        self.run = run
        self.table = table

    def __call__(self, chunk: Chunk) -> FetchedChunk:
        plan = read_chunk(self.run.plan_folder, chunk.number)
        marked = plan.filter(plan["mark"].is_valid())
        rows = plan.filter(plan["mark"].is_null()).drop_columns(["mark"])
        blocked = Blocklist.read(self.table)  # it may have changed since the run was planned
        rows = rows.filter(pa.array(~blocked.mask(rows["key"], rows["url"])))
        fetched = with_image_feature(IMAGE_ROW).empty_table()
        if rows.num_rows:
            fetched = self.fetch(rows)
        return FetchedChunk(chunk.number, fetched, marked=marked)

    def close(self) -> None:
        """Close the fetcher's connections and end its decoders."""
        self.fetch.close()
