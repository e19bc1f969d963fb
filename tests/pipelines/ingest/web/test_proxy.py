"""Fetching through a proxy: the same rows as without one, and failures of the proxy."""

from __future__ import annotations

import re
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli.config import build, dump, load
from pipelines.images.runs import last_run
from pipelines.ingest.job import IngestConfig, ingest
from pipelines.ingest.web import lenient
from pipelines.ingest.web.config import DownloadConfig
from pipelines.ingest.web.proxy import Outage, Proxy
from pipelines.storage.tables import Table
from pipelines.tiny_world.dataset import write_world
from pipelines.tiny_world.server import serve
from tests.pipelines.ingest.proxies import HttpProxy, certificate, proxied
from tests.pipelines.ingest.sites import HEADERS_ALONE, JPEG, Site, fetch_all, reply, statuses
from vlv_model.errors import ConfigError, RunError

PUBLIC = {"allow_private": False}  # as in a job: QUICK of the tests has it otherwise
SECRET = "pass:w0rd@%"
QUOTED = "pass%3Aw0rd%40%25"


def malformed(handler: BaseHTTPRequestHandler) -> None:
    """A response that the strict parser refuses."""
    handler.close_connection = True
    head = f"HTTP/1.1 200 OK\r\nno header\r\nContent-Length: {len(JPEG)}\r\n\r\n"
    handler.wfile.write(head.encode() + JPEG)


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + JPEG)


@pytest.fixture
def proxy(site: Site) -> Iterator[HttpProxy]:
    with proxied({"pictures.test": site.port, "other.test": site.port}) as proxy:
        yield proxy


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """The context of servers whose certificate (pictures.test, 127.0.0.1) is the only trusted one."""
    file, context = certificate(tmp_path, "pictures.test")
    ours = ssl.create_default_context(cafile=str(file))
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", ours)
    monkeypatch.setattr(lenient, "_tls_context", lambda: ours)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    return context


def behind_tls(site: Site, context: ssl.SSLContext) -> Site:
    site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
    return site


def down_for(proxy: HttpProxy, max_seconds: float, silence: float = 60) -> dict[str, Any]:
    return {"outage": Outage(Proxy.parse(proxy.url()), max_seconds, 0.02, silence)}


# ------------------------------------------------------------------------------------- the way through


def test_http_requests_have_absolute_urls_and_the_proxy_resolves_names(
    site: Site, proxy: HttpProxy, open_downloader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    genuine = socket.getaddrinfo

    def resolver(host: str, *more: Any, **named: Any) -> Any:
        looked_up.append(host)
        return genuine(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    site.answers = {"/a%20b": reply(), "/malformed": malformed}
    downloader = open_downloader(proxy=proxy.url(), **PUBLIC)
    urls = ["http://pictures.test/a%20b?c=%2F#there", "http://pictures.test:8080/malformed"]
    assert [fetched.data for fetched in fetch_all(downloader, *urls)] == [JPEG, JPEG]
    assert sorted(proxy.asked) == [
        "GET http://pictures.test/a%20b?c=%2F HTTP/1.1",
        *["GET http://pictures.test:8080/malformed HTTP/1.1"] * 2,
    ]
    assert set(looked_up) <= {"127.0.0.1"}


@pytest.mark.parametrize("path", ["/well_formed", "/malformed"])
@pytest.mark.parametrize("kind", ["http", "https"])
def test_https_is_verified_through_the_tunnel(
    kind: str, path: str, trusted: ssl.SSLContext, site: Site, open_downloader: Any
) -> None:
    behind_tls(site, trusted).answers = {"/well_formed": reply(), "/malformed": malformed}
    names = {"pictures.test": site.port, "other.test": site.port}
    with proxied(names, tls=trusted if kind == "https" else None) as proxy:
        downloader = open_downloader(proxy=proxy.url(), read_timeout=5, **PUBLIC)
        urls = [f"https://pictures.test{path}", f"https://other.test{path}"]
        (right, wrong) = fetch_all(downloader, *urls)
    assert (right.status, right.data) == ("ok", JPEG)
    # Aborting TLS within TLS failed in asyncio (gh-113214): the class is lost, the check is not.
    mended = sys.version_info >= (3, 12, 2) or (3, 11, 8) <= sys.version_info < (3, 12)
    assert wrong.status == ("download:tls" if kind == "http" or mended else "download:refused")
    assert {line.split(" ")[1] for line in proxy.asked} == {"pictures.test:443", "other.test:443"}
    assert {line.split(" ")[0] for line in proxy.asked} == {"CONNECT"}


def test_a_large_malformed_response_is_read_through_a_tunnel(
    trusted: ssl.SSLContext, site: Site, proxy: HttpProxy, open_downloader: Any
) -> None:
    body = JPEG + bytes(range(256)) * 20_000

    def large(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nno header\r\n\r\n" + body)

    behind_tls(site, trusted).answers = {"/large": large}
    (fetched,) = fetch_all(
        open_downloader(proxy=proxy.url(), read_timeout=5, **PUBLIC), "https://pictures.test/large"
    )
    assert fetched.data == body


def test_failures_of_servers_have_the_same_class_as_without_a_proxy(
    site: Site, proxy: HttpProxy, open_downloader: Any
) -> None:
    waits = threading.Event()
    site.answers = {
        "/gone": reply(410),
        "/moved": reply(302, Location="http://other.test/image"),
        "/image": reply(),
        "/loop": reply(302, Location="/loop"),
        "/noai": reply(X_Robots_Tag="noai"),
        "/large": reply(body=JPEG + bytes(9000)),
        "/page": reply(body=b"<html>"),
        "/stalls": lambda handler: waits.wait(5) and None,
        "/cut": cut,
    }
    downloader = open_downloader(proxy=proxy.url(), retries=0, max_bytes=5000, **PUBLIC)
    urls = [f"http://pictures.test{path}" for path in site.answers]
    found = dict(zip(site.answers, statuses(downloader, *urls), strict=True))
    waits.set()
    assert found == {
        "/gone": "download:http_410",
        "/moved": "ok",
        "/image": "ok",
        "/loop": "download:redirects",
        "/noai": "download:opted_out",
        "/large": "download:too_large",
        "/page": "download:not_an_image",
        "/stalls": "download:timeout",
        "/cut": "download:refused",
    }
    assert "GET http://other.test/image HTTP/1.1" in proxy.asked
    assert statuses(downloader, "http://unknown.test/") == ["download:http_5xx"]


def test_host_slots_apply_behind_a_proxy(
    site: Site, proxy: HttpProxy, open_downloader: Any
) -> None:
    seen = threading.Barrier(2, timeout=5)

    def together(handler: BaseHTTPRequestHandler) -> None:
        seen.wait()
        reply()(handler)

    site.answers = {"/": together}
    downloader = open_downloader(
        proxy=proxy.url(), concurrency_per_host=2, read_timeout=10, **PUBLIC
    )
    urls = [f"http://pictures.test/?{number}" for number in range(12)]
    assert statuses(downloader, *urls) == ["ok"] * 12
    assert site.most_in_flight == 2


@pytest.mark.parametrize(
    ("status", "found"), [("403 Forbidden", "http_4xx"), ("504 Gateway Timeout", "http_5xx")]
)
def test_a_refused_tunnel_has_the_class_of_its_status(
    status: str, found: str, proxy: HttpProxy, open_downloader: Any
) -> None:
    proxy.connect_status = status
    downloader = open_downloader(proxy=proxy.url(), retries=0, **PUBLIC)
    (fetched,) = fetch_all(downloader, "https://pictures.test/")
    assert fetched.status == f"download:{found}"
    assert fetched.error == f"the proxy's answer to CONNECT: HTTP {status}"


def test_a_tunnel_that_never_opens_is_a_time_out_of_the_host(
    proxy: HttpProxy, open_downloader: Any
) -> None:
    proxy.silent = True
    limits = {"connect_timeout": 0.1, "read_timeout": 0.1, "retries": 0}
    downloader = open_downloader(proxy=proxy.url(), **limits, **PUBLIC)
    urls = ["https://pictures.test/", "http://pictures.test/"]
    assert statuses(downloader, *urls) == ["download:timeout"] * 2


# ---------------------------------------------------------------------------------- private places


def test_urls_with_private_addresses_are_refused(
    site: Site, proxy: HttpProxy, open_downloader: Any
) -> None:
    hosts = ["127.0.0.1", "10.0.0.1", "[::1]", "[::ffff:10.0.0.1]", "localhost", "a.localhost"]
    hosts += ["127.0.0.1.", "LOCALHOST.", "169.254.169.254", "2130706433", "0x7f.1", "0x7f.1."]
    site.answers = {
        f"/{i}": reply(302, Location=f"http://{host}:{site.port}/secret")
        for i, host in enumerate(hosts)
    } | {"/secret": reply()}
    downloader = open_downloader(proxy=proxy.url(), **PUBLIC)
    straight = [f"{scheme}://{host}/" for host in hosts for scheme in ("http", "https")]
    assert set(statuses(downloader, *straight)) == {"download:blocked_address"}
    assert not proxy.asked
    redirecting = [f"http://pictures.test/{number}" for number in range(len(hosts))]
    assert set(statuses(downloader, *redirecting)) == {"download:blocked_address"}
    assert not site.requests["/secret"]
    proxy.names["127.0.0.1"] = site.port
    assert statuses(open_downloader(proxy=proxy.url()), site.url("/secret")) == ["ok"]


# ------------------------------------------------------------------------------------- passwords


def test_only_the_proxy_gets_the_password(
    trusted: ssl.SSLContext, site: Site, open_downloader: Any
) -> None:
    told: list[str] = []

    def note(handler: BaseHTTPRequestHandler) -> None:
        told.append(str(handler.headers))
        (malformed if handler.path == "/malformed" else reply())(handler)

    secure = behind_tls(Site(), trusted)
    site.answers = secure.answers = {"/well_formed": note, "/malformed": note}
    names = {"plain.test": site.port, "pictures.test": secure.port}
    with proxied(names, login=f"me:{SECRET}") as proxy:
        downloader = open_downloader(proxy=proxy.url(f"me:{QUOTED}"), read_timeout=5, **PUBLIC)
        places = ("http://plain.test", "https://pictures.test")
        urls = [f"{place}{path}" for place in places for path in ("/well_formed", "/malformed")]
        assert statuses(downloader, *urls) == ["ok"] * 4
        assert len(told) == 6
        assert not [headers for headers in told if "proxy" in headers.lower()]
        for login in ("", "me:wrong"):
            downloader = open_downloader(
                down_for(proxy, max_seconds=0), proxy=proxy.url(login), **PUBLIC
            )
            for url in urls[::2]:
                with pytest.raises(RunError, match="HTTP 407: it wants ") as refused:
                    statuses(downloader, url)
                assert "wrong" not in str(refused.value)
    secure.server.shutdown()
    secure.server.server_close()


def config_of(folder: Path, proxy: str | None, **download: Any) -> IngestConfig:
    """The job's settings, from its command line."""
    given = {"proxy": proxy, "total_timeout": 9, "retries": 0, **download}
    given.setdefault("respect_optout", ",".join(HEADERS_ALONE))
    return load(IngestConfig, None, [
        f"data.input={folder / 'metadata.parquet'}", f"data.output={folder / 'out'}", "image.size=32",
        "image.format=png", "ray.address=in-process", "rows_per_chunk=4",
        *(f"download.{name}={value}" for name, value in given.items() if value is not None),
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("socks5://me:w0rd@p.test:1080", "it does not begin with http:// or https://: expected"),
        ("p.test:3128", "it does not begin with http:// or https://: expected"),
        ("http://me:w0rd@p.test", "it has no port: expected http://host:port"),
        ("http://me:w0rd@:3128", "expected http://host:port"),
        ("http://me:w0/rd@p.test:3128", "expected http://host:port"),
        ("http://p.test:3128/w0rd", "something follows the port: expected"),
        ("http://p.test:99999", "expected http://host:port"),
        ("", "it does not begin with http:// or https://: expected"),
        (["http://me:w0rd@p.test:1"], "expected http://host:port"),
    ],
)
def test_an_invalid_proxy_is_one_line_without_the_password(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        build(DownloadConfig, {"proxy": given})
    line = str(refused.value)
    assert line.startswith("proxy: ")
    assert "w0" not in line
    assert "\n" not in line


# ------------------------------------------------------------------------- a proxy that fails


@pytest.fixture
def listed(tmp_path: Path) -> Iterator[int]:
    """The port of a site; a list has its six pictures under pictures.test."""
    with serve(tmp_path) as web:
        write_world(tmp_path, "http://pictures.test", 6)
        yield int(web.base_url.rpartition(":")[2])


@pytest.mark.parametrize("wrong", ["dead", "silent", "no proxy", "password", "name"])
def test_an_unusable_proxy_ends_the_job_before_the_first_request(
    wrong: str, listed: int, tmp_path: Path
) -> None:
    speechless = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_babble, args=(speechless,), daemon=True).start()
    with proxied({"pictures.test": listed}, login="me:it") as proxy:
        given = {
            "no proxy": f"http://127.0.0.1:{speechless.getsockname()[1]}",
            "name": f"http://{'x' * 70}.invalid:3128",
        }.get(wrong, proxy.url())
        proxy.silent = wrong == "silent"
        if wrong == "dead":
            proxy.stop()
        with pytest.raises(RunError) as refused:
            ingest(config_of(tmp_path, given, total_timeout=0.3 if wrong == "silent" else 20))
        if wrong == "dead":
            proxy.start()
    speechless.close()
    line = str(refused.value)
    assert line.startswith(f"download.proxy: {given}")
    expected = "HTTP 407: it wants a user and password in download.proxy"
    assert (expected if wrong == "password" else "does not answer as an HTTP proxy (") in line
    assert not rows_written(tmp_path)


def _babble(listener: socket.socket) -> None:
    try:
        connection, _ = listener.accept()
    except OSError:
        return
    with connection:
        connection.recv(65536)
        connection.sendall(b"SSH-2.0-OpenSSH\r\n")


def rows_written(folder: Path) -> int:
    return sum(Table(str(folder / "out")).counts().values())


@pytest.mark.parametrize("failure", ["gone", "password"])
def test_requests_wait_for_a_failing_proxy(
    failure: str, site: Site, proxy: HttpProxy, open_downloader: Any
) -> None:
    """All URLs have the result that they have without the outage."""
    site.answers = {"/a": reply(), "/b": reply(404)}
    downloader = open_downloader(
        down_for(proxy, max_seconds=60), proxy=proxy.url(), retries=0, **PUBLIC
    )
    if failure == "gone":
        proxy.stop()
        back = proxy.start
    else:
        proxy.login = "me:it"
        back = lambda: setattr(proxy, "login", None)  # noqa: E731
    timer = threading.Timer(0.15, back)
    timer.start()
    urls = [f"http://pictures.test/{'ab'[number % 2]}?{number}" for number in range(8)]
    assert statuses(downloader, *urls) == ["ok", "download:http_404"] * 4
    timer.join()
    assert (downloader.budget.used, downloader.window.in_flight) == (0, 0)


def test_a_proxy_that_keeps_failing_ends_the_call(
    site: Site, proxy: HttpProxy, open_downloader: Any
) -> None:
    site.answers = {"/": reply()}
    downloader = open_downloader(down_for(proxy, max_seconds=0.2), proxy=proxy.url(), **PUBLIC)
    assert statuses(downloader, "http://pictures.test/") == ["ok"]
    proxy.stop()
    urls = [f"http://pictures.test/?{number}" for number in range(50)]
    with pytest.raises(RunError, match=r"has failed for 0\.2 seconds \(.*the same command conti"):
        statuses(downloader, *urls)
    assert (downloader.budget.used, downloader.window.in_flight) == (0, 0)
    proxy.start()
    assert statuses(downloader, urls[0]) == ["ok"]


@pytest.mark.parametrize("kind", ["http", "https"])
def test_a_proxy_that_accepts_connections_and_never_answers_fails(
    kind: str, proxy: HttpProxy, open_downloader: Any
) -> None:
    """If it only waits for a dead host, the host has timed out."""
    limits = {"connect_timeout": 0.1, "read_timeout": 0.1, "retries": 0}
    downloader = open_downloader(
        down_for(proxy, max_seconds=0.1, silence=0), proxy=proxy.url(), **limits, **PUBLIC
    )
    proxy.muted = "pictures.test"
    urls = [f"{kind}://pictures.test/{number}" for number in range(3)]
    assert statuses(downloader, *urls) == ["download:timeout"] * 3
    proxy.silent = True
    with pytest.raises(RunError, match=r"has failed for 0\.1 seconds \(.*: no answer in time\)"):
        statuses(downloader, *urls)


def test_a_single_url_that_fails_the_proxy_is_a_failed_row(
    site: Site, proxy: HttpProxy, open_downloader: Any
) -> None:
    """Other URLs get answers, so the job continues."""
    site.answers = {"/": reply()}
    proxy.locked = "pictures.test"
    downloader = open_downloader(
        down_for(proxy, max_seconds=0.3), proxy=proxy.url(), retries=0, **PUBLIC
    )
    found: list[str] = []
    locked = threading.Thread(
        target=lambda: found.extend(statuses(downloader, "https://pictures.test/"))
    )
    locked.start()
    number = 0
    while locked.is_alive():
        number += 1
        assert statuses(downloader, f"http://other.test/?{number}") == ["ok"]
    assert found == ["download:proxy"]


def test_a_407_from_a_server_is_not_from_the_proxy(
    trusted: ssl.SSLContext, site: Site, proxy: HttpProxy, open_downloader: Any
) -> None:
    """Otherwise one hostile site could end a job."""
    secure = behind_tls(Site(), trusted)
    site.answers = secure.answers = {"/": reply(407, Proxy_Authenticate="Basic")}
    proxy.names["pictures.test"] = secure.port
    downloader = open_downloader(
        down_for(proxy, max_seconds=0), proxy=proxy.url(), read_timeout=5, **PUBLIC
    )
    urls = ["http://other.test/", "https://pictures.test/"]
    assert statuses(downloader, *urls) == ["download:http_4xx"] * 2
    secure.server.shutdown()
    secure.server.server_close()


def test_a_job_continues_after_a_proxy_outage_and_stores_no_password(
    listed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "pipelines.ingest.web.download.Outage", lambda proxy: Outage(proxy, 0.1, 0.05)
    )
    monkeypatch.setenv("http_proxy", f"http://me:{QUOTED}@127.0.0.1:9")
    with proxied({"pictures.test": listed}, login=f"me:{SECRET}") as proxy:
        config = config_of(tmp_path, proxy.url(f"me:{QUOTED}"))
        answer = proxy._answer
        asked = 0

        async def until_the_fifth(*streams: Any) -> None:
            nonlocal asked
            asked += 1
            if asked > 5:  # the check, and a chunk of four rows
                proxy.login = "me:another"
            await answer(*streams)

        proxy._answer = until_the_fifth  # type: ignore[method-assign]
        with pytest.raises(RunError, match="has failed for") as refused:
            ingest(config)
        assert rows_written(tmp_path) == 4
        proxy.login, proxy._answer = f"me:{SECRET}", answer  # type: ignore[method-assign]
        assert ingest(config) == {"ok": 6}
    # Another way to the same list is the same run: there is nothing to do, and no proxy is asked.
    assert ingest(config_of(tmp_path, "http://127.0.0.1:9")) == {"ok": 6}
    run = last_run(Table(str(tmp_path / "out")))
    assert run is not None
    assert run.number == 1
    written = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {"run.json", "_report.html"} <= {file.name for file in written}
    shown = [*written.values(), repr(config).encode(), str(dump(config)).encode()]
    out, err = capsys.readouterr()
    assert "http_proxy" not in err
    assert ingest(config_of(tmp_path, None)) == {"ok": 6}
    again = capsys.readouterr().err
    assert again.count("warning: http_proxy in the environment: ignored") == 1
    shown += [text.encode() for text in (out, err, again, str(refused.value))]
    assert not [text for text in shown if b"w0rd" in text]
    assert dump(config)["download"]["proxy"] == f"http://***@127.0.0.1:{proxy.port}"
