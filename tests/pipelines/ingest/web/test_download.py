"""The downloader against a real server on loopback that does what the web does."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from pipelines.ingest.web.addresses import public_socket
from pipelines.ingest.web.config import DownloadConfig, config_per_process
from pipelines.ingest.web.download import Fetched
from pipelines.tiny_world.server import Web, serve
from tests.pipelines.ingest.sites import JPEG, Site, fetch_all, reply, statuses


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with serve(tmp_path) as web:
        yield web


def test_results_are_in_the_order_of_the_urls(site: Site, open_downloader: Any) -> None:
    site.answers = {"/a": reply(body=JPEG + b"a"), "/b": reply(404), "/c": reply(body=JPEG + b"c")}
    assert fetch_all(open_downloader(), *(site.url(path) for path in ("/a", "/b", "/c"))) == [
        Fetched(JPEG + b"a", "ok"),
        Fetched(None, "download:http_404", "HTTP 404 Not Found"),
        Fetched(JPEG + b"c", "ok"),
    ]


def test_hostile_responses_have_their_class(web: Web, open_downloader: Any) -> None:
    expected = {
        "missing": "download:http_404",
        "gone": "download:http_410",
        "truncated": "ok",  # found by the decoder
        "html": "download:not_an_image",
        "noai": "download:opted_out",
        "error": "download:http_5xx",
        "large": "download:too_large",
        "slow": "download:timeout",
    }
    # The server draws its picture when it is first asked for.
    downloader = open_downloader(retries=0, read_timeout=3)
    found = statuses(downloader, *(web.hostile(name) for name in expected))
    assert dict(zip(expected, found, strict=True)) == expected


def test_opt_outs_are_ignored_only_on_request(web: Web, open_downloader: Any) -> None:
    assert statuses(open_downloader(respect_optout=False), web.hostile("noai")) == ["ok"]


# -------------------------------------------------------------------------------- private places


def test_loopback_is_blocked_in_every_spelling(web: Web, open_downloader: Any) -> None:
    port = web.base_url.rpartition(":")[2]
    hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0"]
    urls = [f"http://{host}:{port}/x" for host in [*hosts, "127.0.0.1", "①②⑦.⓪.⓪.①"]]
    found = statuses(open_downloader(allow_private=False), *urls, "http://169.254.169.254/meta")
    assert found == ["download:blocked_address"] * len(found)
    assert not web.requests


def test_neither_a_name_nor_a_proxy_variable_reaches_a_private_address(
    site: Site, open_downloader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address of the connection is checked; proxy variables are ignored."""
    answers = {"mixed.test": ["127.0.0.1", "::1"], "later.test": ["127.0.0.1"]}

    def resolver(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        looked_up[host] += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in answers[host]]

    looked_up: Counter[str] = Counter()
    site.answers = {"/": reply()}
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, site.url(""))
    downloader = open_downloader(allow_private=False)
    urls = [f"http://{host}:{site.port}/" for host in answers]
    assert statuses(downloader, *urls) == ["download:blocked_address"] * 2
    assert set(looked_up) == set(answers)
    assert not site.requests


def test_a_name_with_many_addresses_does_not_delay_others(
    site: Site, open_downloader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile name server may send such a response."""
    answers = {
        "private.test": [f"10.0.{i // 256}.{i % 256}" for i in range(4000)],
        "live.test": ["127.0.0.1"] * 4000,
        "none.test": [],
    }

    def resolver(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in answers[host]]

    site.answers = {"/": reply()}
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    urls = [f"http://{host}:{site.port}/" for host in answers]
    began = time.process_time()
    found = statuses(open_downloader(allow_private=False, retries=0), *urls)
    assert found == ["download:blocked_address", "download:blocked_address", "download:dns"]
    assert statuses(open_downloader(retries=0, read_timeout=30), urls[1]) == ["ok"]
    assert time.process_time() - began < 1


def test_look_ups_of_dead_names_do_not_delay_others(
    site: Site, open_downloader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def resolver(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if host.startswith("dead"):
            over.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        over.set()  # otherwise it would only time out
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    site.answers = {"/": reply()}
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    downloader = open_downloader(concurrency=60, retries=0, read_timeout=30)
    hosts = [*(f"dead{i}.test" for i in range(59)), "live.test"]
    found = statuses(downloader, *(f"http://{host}:{site.port}/" for host in hosts))
    assert found == ["download:dns"] * 59 + ["ok"]


def test_redirects_are_checked_hop_by_hop(site: Site, open_downloader: Any) -> None:
    """The first hop counts as public here; the second is really checked."""

    def factory(info: Any) -> socket.socket:
        return socket.socket(*info[:3]) if info[4][0] == "127.0.0.1" else public_socket(info)

    site.answers = {
        "/inner": reply(302, Location=f"http://[::1]:{site.port}/secret"),
        "/odd": reply(302, Location=f"http://2130706433:{site.port}/secret"),
        "/file": reply(302, Location="file:///etc/passwd"),
        "/secret": reply(),
    }
    downloader = open_downloader({"socket_factory": factory}, allow_private=False)
    found = statuses(downloader, *map(site.url, ("/inner", "/odd", "/file")))
    assert found == ["download:blocked_address"] * 2 + ["download:bad_url"]
    assert "/secret" not in site.requests


def test_redirects_are_followed_up_to_a_limit(site: Site, open_downloader: Any) -> None:
    site.answers = {
        "/1": reply(301, Location="/2"),
        "/2": reply(307, Location=f"http://127.0.0.1:{site.port}/image"),
        "/image": reply(),
        "/loop": reply(302, Location="/loop"),
        "/nowhere": reply(302),
        "/shy": reply(302, Location="/image", X_Robots_Tag="noai"),
        "/404": reply(404, X_Robots_Tag="noindex"),  # as error pages often have
    }
    downloader = open_downloader(max_redirects=3)
    paths = ("/1", "/loop", "/nowhere", "/shy", "/404")
    found = statuses(downloader, *map(site.url, paths))
    kinds = ["redirects", "redirects", "opted_out", "http_404"]
    assert found == ["ok", *(f"download:{kind}" for kind in kinds)]
    assert site.requests["/loop"] == 4


def test_unrequested_data_is_not_taken_for_the_next_response(
    site: Site, open_downloader: Any
) -> None:
    """It arrives late, on an idle connection."""
    peers = []

    def twice(handler: BaseHTTPRequestHandler) -> None:
        peers.append(handler.client_address)
        reply()(handler)
        handler.wfile.flush()
        time.sleep(0.1)
        reply(408, body=b"")(handler)

    def note(handler: BaseHTTPRequestHandler) -> None:
        peers.append(handler.client_address)
        reply()(handler)

    site.answers = {"/twice": twice, "/next": note}
    downloader = open_downloader(read_timeout=5)
    assert statuses(downloader, site.url("/twice")) == ["ok"]
    time.sleep(0.4)
    assert statuses(downloader, site.url("/next"), site.url("/next?2")) == ["ok", "ok"]
    assert peers[0] not in peers[1:]


def test_connections_are_reused(site: Site, open_downloader: Any) -> None:
    peers = set()

    def note(handler: BaseHTTPRequestHandler) -> None:
        peers.add(handler.client_address)
        reply()(handler)

    site.answers = {"/": note}
    downloader = open_downloader(concurrency=3, concurrency_per_host=3, read_timeout=5)
    assert set(statuses(downloader, *(site.url(f"/?{i}") for i in range(30)))) == {"ok"}
    assert len(peers) == 3


def test_idle_connections_are_soon_closed(site: Site, open_downloader: Any) -> None:
    """Lists have thousands of hosts with one URL: each would keep a file open."""
    site.answers = {"/": reply()}
    downloader = open_downloader(read_timeout=5)
    assert statuses(downloader, site.url("/")) == ["ok"]
    assert downloader.client.session.connector._conns
    deadline = time.monotonic() + 10
    while downloader.client.session.connector._conns and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not downloader.client.session.connector._conns


# ---------------------------------------------------------------------------------------- bodies


def test_max_bytes_is_checked_while_reading(site: Site, open_downloader: Any) -> None:
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b"10000\r\n" + JPEG[:4] + bytes(0x10000 - 4) + b"\r\n")
            sent.append(0x10000)

    bomb = gzip.compress(JPEG + bytes(10 << 20))
    site.answers = {
        "/endless": endless,
        "/bomb": reply(body=bomb, Content_Encoding="gzip"),
        "/packed": reply(body=gzip.compress(JPEG), Content_Encoding="gzip"),
        "/named": reply(body=JPEG, Content_Encoding="utf-8"),
    }
    downloader = open_downloader(max_bytes=1 << 20)
    found = fetch_all(
        downloader, *(site.url(p) for p in ("/endless", "/bomb", "/packed", "/named"))
    )
    assert [f.status for f in found] == ["download:too_large"] * 2 + ["ok"] * 2
    assert found[2].data == found[3].data == JPEG
    assert sum(sent) < 20 << 20


def test_a_page_is_refused_by_its_first_bytes(site: Site, open_downloader: Any) -> None:
    site.answers = {
        "/page": reply(body=b"<html>" * 100, Content_Type="text/html"),
        "/lying": reply(body=JPEG, Content_Type="text/html"),
        "/empty": reply(body=b"", Content_Type="image/jpeg"),
    }
    found = statuses(open_downloader(), *map(site.url, ("/page", "/lying", "/empty")))
    assert found == ["download:not_an_image", "ok", "download:not_an_image"]


# --------------------------------------------------------------------------------------- retries


def test_only_transient_classes_are_retried(site: Site, open_downloader: Any) -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "5000")
        handler.end_headers()
        handler.wfile.write(JPEG)
        handler.close_connection = True

    site.answers = {f"/{code}": reply(code) for code in (404, 410, 403, 429, 500, 503)}
    site.answers["/cut"] = cut
    paths = ["/404", "/410", "/403", "/429", "/500", "/503", "/cut"]
    found = statuses(open_downloader(retries=2), *map(site.url, paths))
    assert found[-1] == "download:refused"
    assert [site.requests[path] for path in paths] == [1, 1, 1, 3, 3, 3, 3]


def test_a_retry_may_succeed(site: Site, open_downloader: Any) -> None:
    def at_last(handler: BaseHTTPRequestHandler) -> None:
        reply(200 if site.requests["/flaky"] == 3 else 503)(handler)

    site.answers = {"/flaky": at_last}
    assert statuses(open_downloader(retries=2), site.url("/flaky")) == ["ok"]


def test_retry_after_is_honoured_up_to_a_limit(site: Site, open_downloader: Any) -> None:
    site.answers = {"/1": reply(429, Retry_After="1"), "/99": reply(429, Retry_After="99")}
    started = time.monotonic()
    found = statuses(open_downloader(), site.url("/1"), site.url("/99"))
    assert 1.0 <= time.monotonic() - started < 5
    assert found == ["download:http_429"] * 2
    assert site.requests == {"/1": 2, "/99": 1}


def test_connections_that_fail_are_classified(site: Site, open_downloader: Any) -> None:
    site.answers = {"/": reply()}
    dead = "http://127.0.0.1:1/"
    not_tls = f"https://127.0.0.1:{site.port}/"
    found = statuses(open_downloader(retries=0), dead, not_tls, "http://no-such-host.invalid/")
    assert found == ["download:refused", "download:tls", "download:dns"]


def test_the_total_time_out_ends_a_trickle(site: Site, open_downloader: Any) -> None:
    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"\xff\xd8\xff")
            handler.wfile.flush()
            time.sleep(0.1)

    site.answers = {"/trickle": trickle}
    started = time.monotonic()
    found = fetch_all(open_downloader(retries=0, total_timeout=0.5), site.url("/trickle"))
    assert found == [Fetched(None, "download:timeout", "not done in 0.5 seconds")]
    assert time.monotonic() - started < 2


def test_every_request_has_the_user_agent_and_contact(site: Site, open_downloader: Any) -> None:
    agents: list[str] = []

    def note(handler: BaseHTTPRequestHandler) -> None:
        agents.append(handler.headers["User-Agent"])
        reply()(handler)

    site.answers = {"/": note}
    for contact in (None, "https://example.org/crawl"):
        assert statuses(open_downloader(contact=contact), site.url("/")) == ["ok"]
    assert agents[1] == f"{agents[0]} (+https://example.org/crawl)"
    with pytest.raises(ValueError, match="contact"):
        DownloadConfig(contact="a\r\nX-Header: b")


def test_the_limits_are_divided_among_processes() -> None:
    config = DownloadConfig(concurrency=100, concurrency_per_host=10)
    share = config_per_process(config, 4, 16)
    assert (share.concurrency, share.concurrency_per_host) == (25, 2)
    share = config_per_process(config, 200, 800)
    assert (share.concurrency, share.concurrency_per_host) == (1, 1)
    by_itself = config_per_process(DownloadConfig(), 4, 16).concurrency
    assert by_itself == config_per_process(DownloadConfig(), 1, 4).concurrency
    assert by_itself is not None
    assert by_itself > 100
