"""The actor of ingest: from rows of a list to rows of the image table, in one process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.images.rows import IMAGE_ROW, METADATA_ROW
from pipelines.ingest.steps import ImageFetcher, fetchers_of
from pipelines.ingest.web.config import DownloadConfig
from pipelines.lists.filters import FilterConfig
from pipelines.pictures.encode import ImageConfig
from pipelines.tiny_world.dataset import write_world
from pipelines.tiny_world.server import serve


@pytest.fixture
def fetcher() -> Iterator[ImageFetcher]:
    fetcher = ImageFetcher(
        DownloadConfig(allow_private=True, retries=0),
        ImageConfig(size=32, format="png"),
        FilterConfig(),
        decoders=2,
    )
    yield fetcher
    fetcher.close()


def chunk_of(urls: list[str]) -> pa.Table:
    rows = [
        {"key": number, "url": url, "alt_text": f"text {number}"} for number, url in enumerate(urls)
    ]
    return pa.Table.from_pylist(rows, METADATA_ROW)


def children() -> list[int]:
    """Process ids of the decoders that run."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it may be gone by now
            if "pipelines.ingest.decoder" in child.cmdline():
                found.append(child.pid)
    return found


def test_rows_keep_their_number_and_order(tmp_path: Path, fetcher: ImageFetcher) -> None:
    with serve(tmp_path) as web:
        write_world(tmp_path, web.base_url, 6, num_broken=2)
        urls = pq.read_table(tmp_path / "metadata.parquet")["URL"].to_pylist()
        rows = fetcher(chunk_of(urls))
    assert rows.schema.equals(IMAGE_ROW)
    assert rows["url"].to_pylist() == urls
    assert rows["alt_text"].to_pylist() == [f"text {n}" for n in range(len(urls))]
    assert rows["status"].to_pylist().count("ok") == 6
    for row in rows.to_pylist():
        assert (row["status"] == "ok") == (row["image"] is not None) == (row["error"] is None)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([], (1, 4)),
        ([0], (1, 4)),  # a head without work: a node has to be started for the fetcher
        ([1], (1, 1)),
        ([2], (1, 2)),
        ([4], (1, 4)),
        ([7], (1, 7)),
        ([64], (16, 4)),
        ([2] * 10, (10, 2)),  # none needs more CPUs than a node has
        ([1, 16, 16], (8, 4)),
        ([0, 0, 8], (2, 4)),
    ],
)
def test_fetchers_fit_the_nodes(nodes: list[float], expected: tuple[int, int]) -> None:
    assert fetchers_of(nodes) == expected


def test_a_chunk_of_dead_links_needs_no_decoder(fetcher: ImageFetcher) -> None:
    rows = fetcher(chunk_of(["http://127.0.0.1:9/a", "ftp://b", "", "http://"]))
    assert rows["status"].to_pylist() == ["download:refused"] + ["download:bad_url"] * 3
    assert not children()


def test_killed_decoders_cost_at_most_their_files_rows(
    tmp_path: Path, fetcher: ImageFetcher
) -> None:
    """Chunks come from several threads, and somebody kills a decoder again and again.

    A file that was in a killed child is tried in one more, so a lone kill costs no row.
    """
    made: list[pa.Table] = []
    with serve(tmp_path) as web:
        write_world(tmp_path, web.base_url, 40, num_broken=0)
        urls = pq.read_table(tmp_path / "metadata.parquet")["URL"].to_pylist()
        threads = [
            threading.Thread(target=lambda: made.append(fetcher(chunk_of(urls)))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        killed = 0
        while any(thread.is_alive() for thread in threads):
            for child in children()[: 1 if killed < 4 else 0]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    killed += 1
            threads[0].join(0.5)
    statuses = [status for rows in made for status in rows["status"].to_pylist()]
    assert len(statuses) == 120
    assert set(statuses) <= {"ok", "decode:crashed"}
    assert killed >= 1
    assert 2 * statuses.count("decode:crashed") <= killed
