"""The rules of many sites, some hostile: what each URL becomes, and how often a site is asked."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.ingest.web import site_rules
from pipelines.ingest.web.addresses import BlockedAddressError
from pipelines.ingest.web.download import Downloader, Fetched
from pipelines.ingest.web.optout import RULES
from pipelines.ingest.web.rules_store import RulesClient, RulesStore
from tests.pipelines.ingest.hosts import (
    ROBOTS,
    TDM,
    Answer,
    Hosts,
    endless,
    redirect,
    serve_hosts,
    silent,
    text,
)
from tests.pipelines.ingest.sites import Site, fetch_all

ON: dict[str, Any] = {"respect_optout": True, "read_timeout": 3, "retries": 0}
NO = "User-agent: *\nDisallow: /no/"


def loopback_socket(info: Any) -> socket.socket:
    """As on the web, where no address is private but those of others' networks."""
    family, kind, protocol, _, address = info
    if not address[0].startswith("127."):
        raise BlockedAddressError(f"blocked address {address[0]}")
    return socket.socket(family, kind, protocol)


class Handle:
    """Calls of a store as a Ray actor serves them: one at a time, from any process."""

    def __init__(self, store: RulesStore) -> None:
        self.store, self.lock = store, threading.Lock()
        self.exchange = SimpleNamespace(remote=self._remote)

    async def _remote(self, *arguments: Any) -> Any:
        def call() -> Any:
            with self.lock:
                return self.store.exchange(*arguments)

        return await asyncio.to_thread(call)


@pytest.fixture
def few() -> Iterator[Hosts]:
    with serve_hosts(3) as hosts:
        yield hosts


def _sites(hosts: Hosts, sent: list[int]) -> list[tuple[dict[str, Answer], dict[str, str], int, int]]:  # fmt: skip
    """Of each site: its answers, paths with their expected status and error, and how often each of the
    two files is asked for.
    """
    reserved = json.dumps([{"location": "/no/", "tdm-reservation": 1}])
    refused = "download:opted_out robots.txt: Disallow: /no/"
    allows = {"/a.png": "ok"}
    plain = {"/a.png": "ok", "/no/a.png": refused, "/no/b.png": refused}
    nothing = {"/a.png": "ok", "/no/a.png": "ok"}
    back = f"{hosts.url(0)[: -len('/a.png')]}"
    cases: list[tuple[dict[str, Answer], dict[str, str], int, int]] = [
        ({ROBOTS: text(NO)}, plain, 1, 1),
        ({}, nothing, 1, 1),
        ({ROBOTS: text(f"User-agent: *\nAllow: /\n\nUser-agent: vlv-ingest\n{NO[14:]}")}, plain, 1, 1),
        ({ROBOTS: text("User-agent: GPTBot\nDisallow: /")}, nothing, 1, 1),
        ({ROBOTS: text("User-agent: *\nDisallow: /")}, {"/a.png": "download:opted_out robots.txt: Disallow: /"}, 1, 0),
        ({TDM: text(reserved)}, {"/a.png": "ok", "/no/a.png": "download:opted_out tdmrep.json: /no/"}, 1, 1),
        ({"/a.png": text(hosts.picture, tdm_reservation="1")}, {"/a.png": "download:opted_out tdm-reservation: 1"}, 1, 1),
        ({"/a.png": text(hosts.picture, X_Robots_Tag="noml")}, {"/a.png": "download:opted_out X-Robots-Tag: noml"}, 1, 1),
        ({"/a.png": text(hosts.picture, Content_Usage="train-ai=n")}, allows, 1, 1),
        # A redirect within the site, and to another site: the rules found are this site's.
        ({ROBOTS: redirect("/real"), "/real": text(NO)}, plain, 1, 1),
        ({ROBOTS: redirect(f"{back}/robots.txt")}, plain, 1, 1),
        ({ROBOTS: redirect(ROBOTS)}, nothing, 6, 1),  # five redirects, and no file
        ({"/to": redirect(f"{back}/no/x.png")}, {"/to": refused}, 1, 1),  # an image's redirect
        # Statuses.
        *(({ROBOTS: text("", code)}, nothing, 1, 1) for code in (204, 401, 403, 410, 451)),
        ({ROBOTS: text("", 429)}, {"/a.png": "download:http_429 robots.txt: HTTP 429"}, 1, 0),
        *(
            ({ROBOTS: text("", code)}, {"/a.png": f"download:http_5xx robots.txt: HTTP {code}"}, 1, 0)
            for code in (500, 503)
        ),
        ({ROBOTS: text("", 999)}, {"/a.png": "download:http_other robots.txt: HTTP 999"}, 1, 0),
        ({TDM: text("", 500)}, allows, 1, 1),
        # Hostile ones.
        ({ROBOTS: endless(10 << 20, sent)}, plain, 1, 1),
        ({TDM: endless(10 << 20, sent)}, nothing, 1, 1),
        ({ROBOTS: silent(hosts)}, {"/a.png": "download:timeout robots.txt: ", "/b.png": "download:timeout robots.txt: "}, 1, 0),
        ({TDM: silent(hosts)}, allows, 1, 1),
        ({ROBOTS: redirect("http://10.0.0.1/robots.txt")}, {"/a.png": "download:blocked_address robots.txt: "}, 1, 0),
        ({ROBOTS: redirect("http://169.254.169.254/latest")}, {"/a.png": "download:blocked_address robots.txt: "}, 1, 0),
        ({ROBOTS: redirect("file:///etc/passwd")}, {"/a.png": "download:bad_url robots.txt: "}, 1, 0),
        ({TDM: redirect("http://10.0.0.1/tdmrep.json")}, allows, 1, 1),
        ({ROBOTS: text("<!doctype html><p>User-agent: *\nDisallow")}, nothing, 1, 1),
        ({ROBOTS: text(bytes(range(256)) * 2000)}, nothing, 1, 1),
        ({ROBOTS: text(gzip.compress(NO.encode()), Content_Encoding="gzip")}, plain, 1, 1),
        ({ROBOTS: text(gzip.compress(bytes(64 << 20)), Content_Encoding="gzip")}, {"/a.png": "download:too_large robots.txt: "}, 1, 0),
        ({TDM: text("[" * 100_000)}, allows, 1, 1),
        ({ROBOTS: text("User-agent: *\nDisallow: /*" + "a*" * 9000)}, nothing, 1, 1),
    ]  # fmt: skip
    return cases


def test_fifty_sites_of_which_some_are_hostile(
    open_downloader: Callable[..., Downloader],
) -> None:
    """Three processes share a store; each fetches images of every site."""
    sent: list[int] = []
    with serve_hosts(50) as hosts:
        kinds = _sites(hosts, sent)
        sites = [kinds[i % len(kinds)] for i in range(50)]
        expected: dict[str, str] = {}
        for number, (answers, paths, _, _) in enumerate(sites):
            for path, answer in answers.items():
                hosts.put(number, path, answer)
            expected |= {hosts.url(number, path): found for path, found in paths.items()}
        handle = Handle(RulesStore())
        downloaders = [
            open_downloader(
                {"socket_factory": loopback_socket, "rules_store": handle},
                **{**ON, "allow_private": False, "concurrency_per_host": 1},
            )
            for _ in range(3)
        ]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda d: fetch_all(d, *expected), downloaders))
        for results in found:
            for (url, wanted), fetched in zip(expected.items(), results, strict=True):
                assert f"{fetched.status} {fetched.error}".startswith(wanted), (url, fetched)
        asked = {path: hosts.requests(path) for path in (ROBOTS, TDM)}
        for number, (answers, _, robots, tdm) in enumerate(sites):
            # The first site's file is also what others redirect to.
            if number:
                assert asked[ROBOTS][number] == robots, (number, answers)
            assert asked[TDM][number] == tdm, (number, answers)
        refused = {u for u, wanted in expected.items() if " robots.txt: " in wanted or "tdmrep" in wanted}  # fmt: skip
        fetched_urls = {hosts.url(*request) for request in hosts.others()}
        assert not {url for url in refused if not url.endswith("/to")} & fetched_urls
    assert len(sent) >= 2
    assert max(sent) < 8 << 20  # the rest of ten megabytes was not read


def test_a_rule_is_honoured_only_if_it_is_switched_on(
    few: Hosts, open_downloader: Callable[..., Downloader]
) -> None:
    few.put(0, ROBOTS, text("User-agent: *\nDisallow: /no/\nContent-Usage: /usage/ train-ai=n"))
    few.put(0, TDM, text(json.dumps([{"location": "/tdm/", "tdm-reservation": 1}])))
    headers = {"/x": "X-Robots-Tag: noai", "/ml": "X-Robots-Tag: noml", "/h": "tdm-reservation: 1"}
    for path, header in {**headers, "/u": "Content-Usage: train-ai=n"}.items():
        name, _, value = header.partition(": ")
        few.put(0, path, text(few.picture, **{name.replace("-", "_"): value}))
    paths = {"/no/a": "robots_txt", "/tdm/a": "tdm_file", "/x": "x_robots_tag", "/ml": "noml", "/h": "tdm_header", "/u": "content_usage"}  # fmt: skip
    urls = [few.url(0, path) for path in [*paths, "/usage/a"]]
    for rules in [(), *((rule,) for rule in RULES), RULES]:
        few.log.clear()
        found = [f.status for f in fetch_all(open_downloader(**{**ON, "respect_optout": rules}), *urls)]  # fmt: skip
        wanted = [rule in rules for rule in paths.values()]
        wanted.append({"robots_txt", "content_usage"} <= set(rules))
        assert [status == "download:opted_out" for status in found] == wanted, rules
        assert few.requests(ROBOTS)[0] == ("robots_txt" in rules)
        assert few.requests(TDM)[0] == ("tdm_file" in rules)


def test_a_transient_failure_is_retried_as_an_images_is(
    few: Hosts, open_downloader: Callable[..., Downloader]
) -> None:
    answers = iter([text("", 503), text(NO)])

    async def unsteady(request: Any) -> Any:
        return await next(answers)(request)

    few.put(0, ROBOTS, unsteady)
    few.put(1, ROBOTS, text("", 503))
    downloader = open_downloader(**{**ON, "retries": 1})
    urls = [few.url(0, "/no/a.png"), few.url(0), few.url(1), few.url(1, "/b")]
    assert [f.status for f in fetch_all(downloader, *urls)] == [
        "download:opted_out",
        "ok",
        "download:http_5xx",
        "download:http_5xx",
    ]
    assert few.requests(ROBOTS) == {0: 2, 1: 2}
    fetch_all(downloader, *urls)
    assert few.requests(ROBOTS) == {0: 2, 1: 2}


def test_a_failure_is_forgotten_sooner_than_rules(
    few: Hosts, open_downloader: Callable[..., Downloader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage of a large site must not refuse it for all of a run."""
    few.put(0, ROBOTS, text("", 503))
    few.put(1, ROBOTS, text(NO))
    monkeypatch.setattr(site_rules, "FAILURE_SECONDS", 0.0)
    downloader = open_downloader(**ON)
    urls = [few.url(0, "/no/a.png"), few.url(1, "/no/a.png")]
    assert [f.status for f in fetch_all(downloader, *urls)] == ["download:http_5xx", "download:opted_out"]  # fmt: skip
    few.put(0, ROBOTS, text(NO))
    assert [f.status for f in fetch_all(downloader, *urls)] == ["download:opted_out"] * 2
    assert few.requests(ROBOTS) == {0: 2, 1: 1}


def test_a_site_is_a_scheme_a_host_and_a_port(
    few: Hosts, site: Site, open_downloader: Callable[..., Downloader]
) -> None:
    few.put(0, ROBOTS, text(NO))
    downloader = open_downloader(**ON)
    host = few.url(0, "")
    urls = [
        f"{host}/no/a",
        f"{host.replace('http://', 'http://me:word@')}/no/b",
        f"{host}/no/c?d#e",
    ]
    found = fetch_all(downloader, *urls)
    assert {f.status for f in found} == {"download:opted_out"}
    assert few.requests(ROBOTS) == {0: 1}
    assert found[0] == Fetched(None, "download:opted_out", "robots.txt: Disallow: /no/")


def test_rules_that_left_the_memory_are_not_fetched_again(
    few: Hosts, open_downloader: Callable[..., Downloader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_rules, "_MAX_SITES", 1)
    for number in range(3):
        few.put(number, ROBOTS, text(NO))
    downloader = open_downloader(**ON)
    for _ in range(2):
        found = fetch_all(downloader, *(few.url(number, "/no/a") for number in range(3)))
        assert {f.status for f in found} == {"download:opted_out"}
    assert downloader.site_rules is not None
    assert len(downloader.site_rules.known) == 1
    assert downloader.site_rules.text == len("Disallow: /no/")
    assert few.requests(ROBOTS) == {0: 1, 1: 1, 2: 1}


# -------------------------------------------------------------------------------- the store


def test_one_process_at_a_time_fetches() -> None:
    store = RulesStore(claim_seconds=60)
    assert store.exchange("one", ["a", "b"], [], []) == {"a": "fetch", "b": "fetch"}
    assert store.exchange("two", ["a", "c"], [], []) == {"a": "wait", "c": "fetch"}
    store.exchange("one", [], [("a", b"rules", 60.0), ("b", b"old", -1.0)], [])
    assert store.exchange("two", ["a", "b"], [], []) == {"a": b"rules", "b": "fetch"}


def test_the_claim_of_a_process_that_ended_passes_on() -> None:
    store = RulesStore(claim_seconds=0.0)
    assert store.exchange("one", ["a"], [], []) == {"a": "fetch"}
    assert store.exchange("two", ["a"], [], []) == {"a": "fetch"}
    store.claim_seconds = 60
    store.exchange("two", [], [], ["a"])  # it renews its claim
    assert store.exchange("one", ["a"], [], []) == {"a": "wait"}


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def test_a_client_waits_for_another_ones_rules() -> None:
    async def work() -> list[bytes | None]:
        handle = Handle(RulesStore())
        one, two = RulesClient(handle), RulesClient(handle)
        first = await one.get("a")
        second = asyncio.ensure_future(two.get("a"))
        await asyncio.sleep(0.3)
        assert not second.done()
        one.put("a", b"rules", 60)
        found = [first, await second, await one.get("a")]
        await one.close()
        await two.close()
        return found

    assert _run(work()) == [None, b"rules", b"rules"]


def test_a_lost_store_ends_the_job() -> None:
    async def work() -> None:
        handle = Handle(RulesStore())
        handle.store.database.close()
        client = RulesClient(handle)
        try:
            await client.get("a")
        finally:
            await client.close()

    with pytest.raises(Exception, match="the store of the sites' rules is gone"):
        _run(work())
