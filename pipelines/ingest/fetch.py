"""What an ingest's actor does with the rows of a chunk: fetches and decodes the rows of its part.

    urls ──▶ Downloader: event loop, connections ──▶ bodies ──▶ decoders: a child process each
             ^                                         |
             '---- waits while MAX_WAITING bytes are --'

A body goes to a decoder as soon as it has come, in the memory of one process, and no further.
Chunks that the actor works on at the same time share connections and decoders, so a slow host in
one chunk leaves neither of them idle.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipelines.images.rows import IMAGE_ROW, with_image_feature
from pipelines.ingest.decoder import Decoder
from pipelines.ingest.web.config import DownloadConfig
from pipelines.ingest.web.download import Downloader, Fetched
from pipelines.lists.filters import FilterConfig
from pipelines.pictures.encode import ImageConfig

CPUS_PER_FETCHER = 4
"""CPUs that one event loop keeps busy with decoding: it takes half a CPU itself."""


def fetchers_of(nodes: Sequence[float]) -> tuple[int, int]:
    """How many fetchers suit nodes with so many CPUs, and how many decoders each of them has.

    A fetcher lives on one node, so it is cut to fit the largest. Where there is only a head without
    CPUs, the first fetcher asks the autoscaler for a node that fits it.
    """
    largest = int(max(nodes, default=0))
    if not largest:
        return 1, CPUS_PER_FETCHER
    decoders = max(1, largest // max(1, largest // CPUS_PER_FETCHER))
    return max(1, sum(int(cpus // decoders) for cpus in nodes)), decoders


def image_rows(rows: pa.Table, made: Sequence[Mapping[str, Any]]) -> pa.Table:
    """IMAGE_ROW rows of METADATA_ROW `rows` (and their `chunk`) and what was `made` of each."""
    columns = [
        rows[field.name]
        if field.name in rows.column_names
        else pa.array([row.get(field.name) for row in made], field.type)
        for field in IMAGE_ROW
    ]
    table = pa.table(columns, schema=with_image_feature(IMAGE_ROW))
    return table.append_column("chunk", rows["chunk"])


class ImageFetcher:
    """Maps METADATA_ROW rows (and their `chunk`) to IMAGE_ROW rows, one for one, in their order."""

    def __init__(
        self, download: DownloadConfig, image: ImageConfig, filters: FilterConfig, decoders: int
    ) -> None:
        self.downloader = Downloader(download)
        self.threads = ThreadPoolExecutor(decoders, thread_name_prefix="decoding")
        self.idle: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        for _ in range(decoders):
            self.idle.put(Decoder(image, filters))

    def __call__(self, rows: pa.Table) -> pa.Table:
        return image_rows(rows, self.downloader.each(rows["url"].to_pylist(), self._row))

    def close(self) -> None:
        """End the connections and the decoders."""
        self.downloader.close()
        self.threads.shutdown()
        while not self.idle.empty():
            self.idle.get().close()

    async def _row(self, fetched: Fetched) -> dict[str, Any]:
        if fetched.data is None:
            return {"status": fetched.status, "error": fetched.error}
        return await self.downloader.loop.run_in_executor(self.threads, self._decode, fetched.data)

    def _decode(self, data: bytes) -> dict[str, Any]:
        decoder = self.idle.get()  # as many as there are threads
        try:
            return decoder(data)
        finally:
            self.idle.put(decoder)
