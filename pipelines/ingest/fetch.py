"""What an actor of ingest does with the rows of a chunk: it downloads and decodes their images.

    urls ──▶ Downloader: event loop, connections ──▶ bodies ──▶ DecoderPool: a child process each
             ^                                         |
             '---- waits while the byte budget is used '

A body goes to a decoder as soon as it has arrived. Chunks that the actor works on at the same time
share connections and decoders, so a slow host in one chunk leaves neither of them idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.images.rows import IMAGE_ROW, with_image_feature
from pipelines.ingest.decoder import DecoderPool
from pipelines.ingest.web.config import DownloadConfig
from pipelines.ingest.web.download import Downloader
from pipelines.lists.filters import FilterConfig
from pipelines.pictures.encode import ImageConfig

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
    """IMAGE_ROW rows: METADATA_ROW `rows` (with their `chunk`), and the other columns of each."""
    columns = [
        rows[field.name]
        if field.name in rows.column_names
        else pa.array([result.get(field.name) for result in results], field.type)
        for field in IMAGE_ROW
    ]
    table = pa.table(columns, schema=with_image_feature(IMAGE_ROW))
    return table.append_column("chunk", rows["chunk"])


class ImageFetcher:
    """Maps METADATA_ROW rows (with their `chunk`) to IMAGE_ROW rows, in the same order."""

    def __init__(
        self, download: DownloadConfig, image: ImageConfig, filters: FilterConfig, decoders: int
    ) -> None:
        self.downloader = Downloader(download)
        self.decoders = DecoderPool(decoders, image, filters)

    def __call__(self, rows: pa.Table) -> pa.Table:
        urls = rows["url"].to_pylist()
        return image_rows(rows, self.downloader.map_urls(urls, self.decoders.columns))

    def close(self) -> None:
        """Close the connections and end the decoders."""
        self.downloader.close()
        self.decoders.close()
