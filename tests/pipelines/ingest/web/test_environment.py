"""Few open files make a downloader slower, and no row wrong; proxy variables are ignored."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from pipelines.ingest.web.environment import requests_that_fit, warn_of_ignored_proxies
from tests.pipelines.ingest.sites import Site, fetch_all, reply

FETCH = """
import collections, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
from pipelines.ingest.web.download import DownloadConfig, Downloader

async def itself(fetched):
    return fetched.status

downloader = Downloader(
    DownloadConfig(allow_private=True, retries=0, concurrency=200, concurrency_per_host=200,
                   respect_optout=False)
)
print(*collections.Counter(downloader.map_urls([sys.argv[1]] * 250, itself)).items())
downloader.close()
"""


@pytest.mark.parametrize("allowed", [80, 400])
def test_few_open_files_mean_fewer_requests(site: Site, allowed: int) -> None:
    def late(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.05)
        reply()(handler)

    site.answers["/a"] = late
    ended = subprocess.run(
        [sys.executable, "-c", FETCH, site.url("/a"), str(allowed)],
        env={"PYTHONPATH": str(Path(__file__).parents[4])},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "('ok', 250)\n", ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"warning: this machine allows a process {allowed} open files: ")
    assert "not 200" in line


def test_the_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert requests_that_fit(512) == 512
    assert limits[-1] == (2048, 4096)
    assert requests_that_fit(2000) < 2000
    assert limits[-1] == (4096, 4096)
    limits.append((256, resource.RLIM_INFINITY))
    assert requests_that_fit(10_000) == 10_000
    assert limits[-1] == (21_024, resource.RLIM_INFINITY)


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
def test_proxy_variables_cause_one_warning(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_proxies(monkeypatch)
    monkeypatch.setenv(name, "http://me:secret@127.0.0.1:9")
    warn_of_ignored_proxies()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: {name.lower()} in the environment: ignored, images are fetched without a proxy "
        "(download.proxy=http://host:port sets one)"
    )


def test_a_downloader_ignores_proxy_variables_without_a_warning(
    site: Site,
    open_downloader: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The job warns once; the output of its actors is not read."""
    site.answers["/a"] = reply()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (fetched,) = fetch_all(open_downloader(), site.url("/a"))
    assert fetched.status == "ok"
    assert not capsys.readouterr().err


def test_without_proxy_variables_there_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_proxies(monkeypatch)
    warn_of_ignored_proxies()
    assert not capsys.readouterr().err


def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
