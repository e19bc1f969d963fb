"""A server whose answers a test writes, and downloaders that are closed behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from pipelines.ingest.web.download import DownloadConfig, Downloader
from tests.pipelines.ingest.sites import FIXED, QUICK, Site


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def open_downloader() -> Iterator[Callable[..., Downloader]]:
    opened: list[Downloader] = []

    def opener(
        parts: Mapping[str, Any] | None = None,  # in place of what the downloader has of its own
        **settings: Any,
    ) -> Downloader:
        given = {**QUICK, **settings}
        fixed = {name: given.pop(name) for name in FIXED if name in given}
        config = DownloadConfig(**given)
        vars(config).update(fixed)  # in place of what follows from total_timeout
        opened.append(Downloader(config, **(parts or {})))
        return opened[-1]

    yield opener
    for downloader in opened:
        downloader.close()
