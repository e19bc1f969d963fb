"""How many requests are in flight, and how much of their bodies is in memory."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from pipelines.ingest.web.download import Fetched
from pipelines.ingest.web.pacing import Room, Share, Window
from pipelines.ingest.web.turns import Turns
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
    assert not downloader.hosts  # a host leaves no trace


def test_hosts_that_lead_to_one_share_its_slots(
    site: Site, open_downloader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the old farms of a photo site all lead to its new host."""
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


def test_waiting_for_a_slot_is_no_time_out(site: Site, open_downloader: Any) -> None:
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


def test_slots_go_to_the_lowest_rank_and_then_in_turn() -> None:
    """And not to those who gave up, before or just when they were given one."""

    async def waits() -> None:
        turns, order = Turns(1), list[tuple[int, int]]()
        await turns.acquire()
        assert turns.locked()

        async def take(rank: int, number: int) -> None:
            async with turns.turn(rank):
                order.append((rank, number))
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(take(rank, n)) for n in range(3) for rank in (2, 1, 0)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # (2, 0)
        turns.release()
        tasks[2].cancel()  # (0, 0), whose turn it is
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
        assert not turns.locked()
        await turns.acquire()
        assert turns.locked()

    asyncio.run(waits())


def test_a_retry_comes_before_the_rows_of_later_chunks(site: Site, open_downloader: Any) -> None:
    """Else a chunk of many retries is committed when all the others are done."""
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


def test_bodies_that_nobody_uses_yet_hold_up_the_next_requests(
    site: Site, open_downloader: Any
) -> None:
    site.answers = {"/": reply(body=JPEG)}
    room = Room(max_waiting=10 * len(JPEG), allowance=len(JPEG))
    downloader = open_downloader({"room": room}, concurrency=100, concurrency_per_host=100)
    most, size = 0, downloader.slots.size

    async def slowly(fetched: Fetched) -> str:
        nonlocal most
        most = max(most, downloader.room.taken)
        await asyncio.sleep(0.5)
        return fetched.status

    assert set(downloader.each([site.url(f"/?{i}") for i in range(40)], slowly)) == {"ok"}
    assert 5 * len(JPEG) < most <= 10 * len(JPEG)
    assert downloader.slots.size == size  # more in flight would not help: nobody takes the bodies
    assert downloader.room.taken == 0
    # What fails while it is used is used, too.
    with pytest.raises(ZeroDivisionError):
        downloader.each([site.url("/")], _fail)
    assert downloader.room.taken == 0


def test_room_is_given_to_as_many_as_it_holds_in_turn() -> None:
    """And not to those who gave up, before or just when it was given them."""

    async def waits() -> None:
        room, entered = Room(max_waiting=30, allowance=10), list[int]()
        room.count(30)

        async def enter(number: int) -> None:
            await room.enter()
            entered.append(number)

        tasks = [asyncio.create_task(enter(number)) for number in range(7)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        room.count(-20)
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        assert entered == [1, 3]
        assert room.taken == 30
        late = asyncio.create_task(enter(7))
        for _ in range(4):
            room.count(-10)
            await asyncio.sleep(0)
        assert entered == [1, 3, 4, 5, 6, 7]
        assert room.taken == 30
        await late

    asyncio.run(waits())


class SeenRoom(Room):
    """Tells the most that large bodies held when one of them had come."""

    most = 0

    def count(self, size: int) -> None:
        self.most = max(self.most, sum(self.large.values()))
        super().count(size)


def test_large_bodies_take_turns_in_memory(site: Site, open_downloader: Any) -> None:
    """Twelve of four megabytes at once, one after the other, and a small one that passes."""
    room = SeenRoom(large_from=10_000, max_large=1 << 20)
    site.answers = {"/large": reply(body=JPEG + bytes(4 << 20)), "/small": reply()}
    downloader = open_downloader(
        {"room": room}, concurrency_per_host=64, total_timeout=5, read_timeout=5, retries=0
    )
    urls = [site.url(f"/large?{i}") for i in range(12)]
    found = fetch_all(downloader, *urls, site.url("/small"))
    assert {(fetched.status, fetched.error) for fetched in found} == {("ok", None)}
    assert 4 << 20 < room.most < 16 << 20  # one, and what the others' connections have at hand
    assert not room.large
    assert room.taken == 0


def test_a_body_that_waits_for_its_turn_does_not_time_out() -> None:
    """Twelve in turn take longer than one may; a small one passes them all."""
    order = list[str]()

    async def read(room: Room, name: str, sizes: tuple[int, ...]) -> None:
        async with Share(room, seconds=0.6) as share:
            for size in sizes:
                await share.grown(size)
            if name != "small":
                await asyncio.sleep(0.1)
            order.append(name)

    async def all_at_once() -> Room:
        room = Room(large_from=10, max_large=30)
        large = [read(room, f"large {i}", (20, 40)) for i in range(12)]
        await asyncio.gather(*large, read(room, "small", (10,)))
        return room

    room = asyncio.run(all_at_once())
    assert order == ["small", *(f"large {i}" for i in range(12))]
    assert (room.taken, room.large) == (0, {})


def test_a_body_that_takes_too_long_in_its_turn_times_out() -> None:
    async def read() -> None:
        async with Share(Room(large_from=10), seconds=0.05) as share:
            await share.grown(20)
            await asyncio.sleep(5)

    with pytest.raises(TimeoutError):
        asyncio.run(read())


async def _fail(fetched: Fetched) -> float:
    return 1 / 0


def test_bodies_that_stall_halve_the_requests_in_flight(site: Site, open_downloader: Any) -> None:
    """A line with room for four bodies at a time, a tenth of a second each."""
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
    parts = {"slots": Window(64, first=16, least=2, patience=0.2)}
    downloader = open_downloader(
        parts, concurrency_per_host=64, read_timeout=0.3, retries=8, retry_delay=0.05
    )
    found = statuses(downloader, *(site.url(f"/?{i}") for i in range(60)))
    assert found.count("ok") >= 55
    assert downloader.slots.size < 16


def test_requests_in_flight_grow_while_bodies_come(site: Site, open_downloader: Any) -> None:
    site.answers = {"/": reply()}
    downloader = open_downloader(concurrency=70, concurrency_per_host=500)
    assert downloader.slots.size == 64
    assert set(statuses(downloader, *(site.url(f"/?{i}") for i in range(200)))) == {"ok"}
    assert downloader.slots.size == 70  # and no more


def test_requests_in_flight_are_counted_also_when_they_fail() -> None:
    async def run() -> list[int]:
        window = Window(4)
        seen = []
        with contextlib.suppress(OSError):
            async with window.turn():
                async with window.turn():
                    seen.append(window.taken)
                raise OSError
        return [*seen, window.taken]

    assert asyncio.run(run()) == [2, 0]
