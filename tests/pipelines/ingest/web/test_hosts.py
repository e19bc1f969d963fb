"""Circuit breakers: a host that only times out counts as down, and is probed."""

from __future__ import annotations

import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from yarl import URL

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.web.failures import TRANSIENT, DownloadError
from pipelines.ingest.web.hosts import CircuitBreakers
from tests.pipelines.ingest.sites import Site, fetch_all, reply, statuses

A, B = URL("http://a.test/1"), URL("http://b.test/1")


def _request(
    breakers: CircuitBreakers, target: URL, error: Exception | None, counts: bool = True
) -> str:
    """The outcome of a request: `failed` with `error`, `ok`, or the class of a refusal."""
    try:
        breakers.check(target)
    except DownloadError as refused:
        return refused.kind
    if error is None:
        breakers.record_answer(target)
        return "ok"
    breakers.record_failure(target, error, counts)
    return "failed"


def test_a_host_is_down_after_time_outs_in_a_row() -> None:
    breakers = CircuitBreakers(3, grace_seconds=0)
    for _ in range(2):
        assert _request(breakers, A, TimeoutError()) == "failed"
    assert _request(breakers, A, None) == "ok"  # which resets the count
    for _ in range(3):
        assert _request(breakers, A, TimeoutError()) == "failed"
    assert _request(breakers, A, None) == "host_down"
    assert _request(breakers, URL("http://A.test./2"), None) == "host_down"
    assert _request(breakers, URL("http://a.test:81/"), None) == "ok"
    assert _request(breakers, B, None) == "ok"


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
def test_which_errors_count(error: Exception, end: str) -> None:
    breakers = CircuitBreakers(2)
    for _ in range(2):
        _request(breakers, A, error)
    assert _request(breakers, A, None) == end


@pytest.mark.parametrize(
    ("between", "end"),
    [
        (DownloadError("http_404", "HTTP 404"), "ok"),  # an answer
        (ConnectionRefusedError(), "host_down"),  # neither
    ],
)
def test_which_errors_reset_the_count(between: Exception, end: str) -> None:
    breakers = CircuitBreakers(2, grace_seconds=0)
    for error in (TimeoutError(), between, TimeoutError()):
        _request(breakers, A, error)
    assert _request(breakers, A, None) == end


def test_a_host_that_has_answered_has_a_grace_period() -> None:
    """A network outage of half a minute must not fail a whole list."""
    for grace, end in ((60, "ok"), (0, "host_down")):
        breakers = CircuitBreakers(2, grace_seconds=grace)
        assert _request(breakers, A, None) == "ok"
        for _ in range(2):
            assert _request(breakers, A, TimeoutError()) == "failed"
        assert _request(breakers, A, None) == end


def test_time_used_up_by_other_hosts_does_not_count() -> None:
    breakers = CircuitBreakers(1)
    assert _request(breakers, A, TimeoutError(), counts=False) == "failed"
    assert _request(breakers, A, None) == "ok"


def test_one_request_at_a_time_probes_a_host() -> None:
    breakers = CircuitBreakers(1, probe_seconds=0)
    _request(breakers, A, TimeoutError())
    breakers.probe_seconds = 60
    breakers.check(A)
    assert _request(breakers, A, None) == "host_down"
    breakers = CircuitBreakers(1, probe_seconds=0)
    _request(breakers, A, TimeoutError())
    assert _request(breakers, A, None) == "ok"
    assert _request(breakers, A, None) == "ok"


def test_the_number_of_hosts_is_limited() -> None:
    breakers = CircuitBreakers(1, max_hosts=10)
    for number in range(100):
        _request(breakers, URL(f"http://{number}.test/"), TimeoutError())
    assert len(breakers.hosts) == 10
    assert _request(breakers, URL("http://99.test/"), None) == "host_down"
    assert _request(breakers, URL("http://0.test/"), None) == "ok"


def test_a_dead_host_does_not_delay_a_list(site: Site, open_downloader: Any) -> None:
    def silent(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.4)
        handler.close_connection = True

    site.answers = {"/": silent, "/ok": reply()}
    downloader = open_downloader(read_timeout=0.1, concurrency_per_host=8, retries=1)
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


def test_a_later_run_can_retry_host_down() -> None:
    assert "host_down" in TRANSIENT
    assert not DownloadError("host_down", "").transient  # not in the same run
    for name in ("host_down", "transient"):
        config = IngestConfig.model_validate(
            {"data": {"input": "a.parquet", "output": "b"}, "retry": (name,)}
        )
        assert "download:host_down" in config.retried()
