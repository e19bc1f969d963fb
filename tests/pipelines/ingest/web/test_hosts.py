"""Hosts that give nothing but time-outs: given up after evidence, and looked at again."""

from __future__ import annotations

import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from yarl import URL

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.web.answers import TRANSIENT, DownloadError
from pipelines.ingest.web.hosts import Hosts
from tests.pipelines.ingest.sites import Site, fetch_all, reply, statuses

A, B = URL("http://a.test/1"), URL("http://b.test/1")


def _ask(hosts: Hosts, target: URL, error: Exception | None, counts: bool = True) -> str:
    """How a request ends: in `error` or an answer, or unasked."""
    try:
        hosts.check(target)
    except DownloadError as refused:
        return refused.kind
    if error is None:
        hosts.answered(target)
        return "ok"
    hosts.failed(target, error, counts)
    return "failed"


def test_time_outs_in_a_row_are_evidence() -> None:
    hosts = Hosts(3, grace_seconds=0)
    for _ in range(2):
        assert _ask(hosts, A, TimeoutError()) == "failed"
    assert _ask(hosts, A, None) == "ok"  # and all is forgotten
    for _ in range(3):
        assert _ask(hosts, A, TimeoutError()) == "failed"
    assert _ask(hosts, A, None) == "host_down"
    assert _ask(hosts, URL("http://A.test./2"), None) == "host_down"
    assert _ask(hosts, URL("http://a.test:81/"), None) == "ok"
    assert _ask(hosts, B, None) == "ok"


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (TimeoutError(), "host_down"),
        (socket.gaierror(socket.EAI_AGAIN, "later"), "host_down"),  # after seconds of waiting
        (ConnectionRefusedError(), "ok"),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "ok"),
        (DownloadError("http_404", "HTTP 404"), "ok"),
        (DownloadError("not_an_image", "text/html"), "ok"),
    ],
)
def test_what_is_evidence_by_itself(error: Exception, end: str) -> None:
    hosts = Hosts(2)
    for _ in range(2):
        _ask(hosts, A, error)
    assert _ask(hosts, A, None) == end


@pytest.mark.parametrize(
    ("between", "end"),
    [
        (DownloadError("http_404", "HTTP 404"), "ok"),  # an answer
        (ConnectionRefusedError(), "host_down"),  # says nothing
    ],
)
def test_what_clears_a_host(between: Exception, end: str) -> None:
    hosts = Hosts(2, grace_seconds=0)
    for error in (TimeoutError(), between, TimeoutError()):
        _ask(hosts, A, error)
    assert _ask(hosts, A, None) == end


def test_a_host_that_has_answered_has_minutes_of_grace() -> None:
    """A line that fails for half a minute is no reason to give up all of a list."""
    for grace, end in ((60, "ok"), (0, "host_down")):
        hosts = Hosts(2, grace_seconds=grace)
        assert _ask(hosts, A, None) == "ok"
        for _ in range(2):
            assert _ask(hosts, A, TimeoutError()) == "failed"
        assert _ask(hosts, A, None) == end


def test_time_that_others_used_up_is_no_evidence() -> None:
    hosts = Hosts(1)
    assert _ask(hosts, A, TimeoutError(), counts=False) == "failed"
    assert _ask(hosts, A, None) == "ok"


def test_one_request_at_a_time_looks_whether_a_host_is_back() -> None:
    hosts = Hosts(1, look_seconds=0)
    _ask(hosts, A, TimeoutError())
    hosts.look_seconds = 60
    hosts.check(A)
    assert _ask(hosts, A, None) == "host_down"
    hosts = Hosts(1, look_seconds=0)
    _ask(hosts, A, TimeoutError())
    assert _ask(hosts, A, None) == "ok"
    assert _ask(hosts, A, None) == "ok"


def test_few_hosts_are_remembered() -> None:
    hosts = Hosts(1, most=10)
    for number in range(100):
        _ask(hosts, URL(f"http://{number}.test/"), TimeoutError())
    assert len(hosts.known) == 10
    assert _ask(hosts, URL("http://99.test/"), None) == "host_down"
    assert _ask(hosts, URL("http://0.test/"), None) == "ok"


def test_a_dead_host_does_not_hold_up_a_list(site: Site, open_downloader: Any) -> None:
    def silent(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.4)
        handler.close_connection = True

    site.answers = {"/": silent, "/ok": reply()}
    downloader = open_downloader(
        read_timeout=0.1, concurrency_per_host=8, host_timeouts=16, retries=1
    )
    found = fetch_all(downloader, *(site.url(f"/?{i}") for i in range(2000)))
    kinds = {fetched.status for fetched in found}
    assert kinds <= {"download:timeout", "download:host_down"}
    assert sum(site.requests.values()) < 16 + 8
    assert str(found[-1].error).endswith("time-outs in a row, and no answer")
    # Another port is another host.
    other = Site()
    other.answers = {"/ok": reply()}
    assert statuses(downloader, other.url("/ok"), site.url("/ok")) == ["ok", "download:host_down"]
    other.server.shutdown()
    other.server.server_close()


def test_a_retry_names_hosts_that_were_down() -> None:
    assert "host_down" in TRANSIENT
    assert not DownloadError("host_down", "").transient  # not in the same run
    for name in ("host_down", "transient"):
        config = IngestConfig.model_validate(
            {"data": {"input": "a.parquet", "output": "b"}, "retry": (name,)}
        )
        assert "download:host_down" in config.retried()
