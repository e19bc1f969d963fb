"""Limits of requests in flight, and the byte budget of their bodies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from pipelines.ingest.web.byte_budget import BodyReservation, ByteBudget
from pipelines.ingest.web.concurrency import PrioritySemaphore, RequestWindow
from pipelines.ingest.web.download import Fetched
from tests.pipelines.ingest.sites import JPEG, Site, fetch_all, reply, statuses


def _slow_answer(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.05)
    reply()(handler)


@pytest.mark.parametrize(("total", "per_host", "expected"), [(100, 3, 3), (4, 100, 4)])
def test_concurrency_is_bounded_and_used(
    site: Site, open_downloader: Any, total: int, per_host: int, expected: int
) -> None:
    site.answers = {"/": _slow_answer}
    downloader = open_downloader(concurrency=total, concurrency_per_host=per_host, read_timeout=5)
    assert set(statuses(downloader, *(site.url(f"/?{i}") for i in range(20)))) == {"ok"}
    assert site.most_in_flight == expected
    assert not downloader.host_slots  # no entry remains


def test_hosts_that_redirect_to_one_host_share_its_slots(
    site: Site, open_downloader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the old servers of a photo site."""
    most = in_flight = 0

    def resolver(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        nonlocal most, in_flight
        with site.lock:
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(0.05)
        with site.lock:
            in_flight -= 1
        reply()(handler)

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    there = f"http://One.test:{site.port}/new"
    site.answers = {"/old": reply(302, body=b"", Location=there), "/new": answer}
    downloader = open_downloader(concurrency_per_host=2, read_timeout=5)
    urls = [f"http://farm{i}.test:{site.port}/old" for i in range(12)]
    assert set(statuses(downloader, *urls)) == {"ok"}
    assert most == 2


def test_waiting_for_a_slot_does_not_time_out(site: Site, open_downloader: Any) -> None:
    site.answers = {"/": _slow_answer}
    downloader = open_downloader(concurrency_per_host=1, total_timeout=0.4, retries=0)
    assert set(statuses(downloader, *(site.url(f"/?{i}") for i in range(15)))) == {"ok"}


def test_chunks_share_the_connections(site: Site, open_downloader: Any) -> None:
    """Calls from several threads, as Ray Data makes them, run at the same time."""
    site.answers = {"/": _slow_answer}
    downloader = open_downloader(read_timeout=5)
    lists = [[site.url(f"/?{i}{j}") for j in range(4)] for i in range(4)]
    threads = [threading.Thread(target=fetch_all, args=(downloader, *urls)) for urls in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.most_in_flight > 4


def test_the_lowest_priority_gets_a_slot_first() -> None:
    """Waiters that were cancelled, before or just when they got a slot, get none."""

    async def waits() -> None:
        semaphore, order = PrioritySemaphore(1), list[tuple[int, int]]()
        await semaphore.acquire()
        assert semaphore.locked()

        async def take(priority: int, number: int) -> None:
            async with semaphore.slot(priority):
                order.append((priority, number))
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(take(priority, n)) for n in range(3) for priority in (2, 1, 0)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # (2, 0)
        semaphore.release()
        tasks[2].cancel()  # (0, 0), which has just got the slot
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
        assert not semaphore.locked()
        await semaphore.acquire()
        assert semaphore.locked()

    asyncio.run(waits())


def test_a_retry_has_priority_over_later_chunks(site: Site, open_downloader: Any) -> None:
    """Otherwise a chunk with many retries is committed last."""
    asked: list[str] = []

    def note(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        if asked == ["/?old"]:
            later.start()
        time.sleep(0.05)
        reply(503 if asked == ["/?old"] else 200)(handler)

    site.answers = {"/": note}
    downloader = open_downloader(concurrency=1, concurrency_per_host=1, read_timeout=5, retries=1)
    urls = [site.url(f"/?new{i}") for i in range(12)]
    later = threading.Thread(target=fetch_all, args=(downloader, *urls))
    assert statuses(downloader, site.url("/?old")) == ["ok"]
    assert asked.index("/?old", 1) <= 4
    later.join()


def test_unused_bodies_delay_further_requests(site: Site, open_downloader: Any) -> None:
    site.answers = {"/": reply(body=JPEG)}
    budget = ByteBudget(max_bytes=10 * len(JPEG), reservation=len(JPEG))
    downloader = open_downloader({"budget": budget}, concurrency=100, concurrency_per_host=100)
    most, size = 0, downloader.window.size

    async def slowly(fetched: Fetched) -> str:
        nonlocal most
        most = max(most, downloader.budget.used)
        await asyncio.sleep(0.5)
        return fetched.status

    assert set(downloader.map_urls([site.url(f"/?{i}") for i in range(40)], slowly)) == {"ok"}
    assert 5 * len(JPEG) < most <= 10 * len(JPEG)
    assert downloader.window.size == size  # more requests would not help: the bodies are not used
    assert downloader.budget.used == 0
    # A body whose use fails is released too.
    with pytest.raises(ZeroDivisionError):
        downloader.map_urls([site.url("/")], _fail)
    assert downloader.budget.used == 0


def test_the_budget_wakes_as_many_waiters_as_fit() -> None:
    """Waiters that were cancelled, before or just when they were woken, count nothing."""

    async def waits() -> None:
        budget, entered = ByteBudget(max_bytes=30, reservation=10), list[int]()
        budget.count(30)

        async def enter(number: int) -> None:
            await budget.reserve()
            entered.append(number)

        tasks = [asyncio.create_task(enter(number)) for number in range(7)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        budget.count(-20)
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        assert entered == [1, 3]
        assert budget.used == 30
        late = asyncio.create_task(enter(7))
        for _ in range(4):
            budget.count(-10)
            await asyncio.sleep(0)
        assert entered == [1, 3, 4, 5, 6, 7]
        assert budget.used == 30
        await late

    asyncio.run(waits())


class SeenBudget(ByteBudget):
    """Records the largest sum of large bodies."""

    most = 0

    def count(self, size: int) -> None:
        self.most = max(self.most, sum(self.large.values()))
        super().count(size)


def test_large_bodies_share_a_limit(site: Site, open_downloader: Any) -> None:
    """Twelve bodies of 4 MB are read one after the other; a small one does not wait."""
    budget = SeenBudget(large_body=10_000, max_large_bytes=1 << 20)
    site.answers = {"/large": reply(body=JPEG + bytes(4 << 20)), "/small": reply()}
    downloader = open_downloader(
        {"budget": budget}, concurrency_per_host=64, total_timeout=5, read_timeout=5, retries=0
    )
    urls = [site.url(f"/large?{i}") for i in range(12)]
    found = fetch_all(downloader, *urls, site.url("/small"))
    assert {(fetched.status, fetched.error) for fetched in found} == {("ok", None)}
    assert 4 << 20 < budget.most < 16 << 20  # one, and the buffers of the other connections
    assert not budget.large
    assert budget.used == 0


def test_a_waiting_body_does_not_time_out() -> None:
    """Twelve in sequence take longer than one may; a small one does not wait."""
    order = list[str]()

    async def read(budget: ByteBudget, name: str, sizes: tuple[int, ...]) -> None:
        async with BodyReservation(budget, seconds=0.6) as reservation:
            for size in sizes:
                await reservation.grow(size)
            if name != "small":
                await asyncio.sleep(0.1)
            order.append(name)

    async def all_at_once() -> ByteBudget:
        budget = ByteBudget(large_body=10, max_large_bytes=30)
        large = [read(budget, f"large {i}", (20, 40)) for i in range(12)]
        await asyncio.gather(*large, read(budget, "small", (10,)))
        return budget

    budget = asyncio.run(all_at_once())
    assert order == ["small", *(f"large {i}" for i in range(12))]
    assert (budget.used, budget.large) == (0, {})


def test_a_body_that_is_read_too_long_times_out() -> None:
    async def read() -> None:
        async with BodyReservation(ByteBudget(large_body=10), seconds=0.05) as reservation:
            await reservation.grow(20)
            await asyncio.sleep(5)

    with pytest.raises(TimeoutError):
        asyncio.run(read())


async def _fail(fetched: Fetched) -> float:
    return 1 / 0


def test_stalled_bodies_halve_the_requests_in_flight(site: Site, open_downloader: Any) -> None:
    """The bandwidth serves four bodies at a time, for a tenth of a second each."""
    line = threading.Semaphore(4)

    def narrow(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(JPEG)))
        handler.end_headers()
        handler.wfile.write(JPEG[:50])
        handler.wfile.flush()
        with line:
            time.sleep(0.1)
        handler.wfile.write(JPEG[50:])

    site.answers = {"/": narrow}
    parts = {"window": RequestWindow(64, initial=16, min_size=2, recovery_seconds=0.2)}
    downloader = open_downloader(
        parts, concurrency_per_host=64, read_timeout=0.3, retries=8, retry_delay=0.05
    )
    found = statuses(downloader, *(site.url(f"/?{i}") for i in range(60)))
    assert found.count("ok") >= 55
    assert downloader.window.size < 16


def test_requests_in_flight_grow_while_bodies_arrive(site: Site, open_downloader: Any) -> None:
    site.answers = {"/": reply()}
    downloader = open_downloader(concurrency=70, concurrency_per_host=500)
    assert downloader.window.size == 64
    assert set(statuses(downloader, *(site.url(f"/?{i}") for i in range(200)))) == {"ok"}
    assert downloader.window.size == 70  # and no more


def test_failed_requests_are_no_longer_in_flight() -> None:
    async def run() -> list[int]:
        window = RequestWindow(4)
        seen = []
        with contextlib.suppress(OSError):
            async with window.slot():
                async with window.slot():
                    seen.append(window.in_flight)
                raise OSError
        return [*seen, window.in_flight]

    assert asyncio.run(run()) == [2, 0]
