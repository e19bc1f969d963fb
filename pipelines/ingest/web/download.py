"""Fetching URLs of the open web: many at a time, bounded in every way, each failure of a class.

A `Downloader` is an event loop in a thread of its own and one pool of connections:

    URL -> slot of its host, slot of the process, room -> [connect, redirects, headers, body] -> use
              ^---------------- back-off, outside the slots, for transient classes <---'
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from aiohttp import SocketFactoryType
from yarl import URL

from pipelines.execution.metrics import INGEST_BYTES
from pipelines.images.rows import DOWNLOAD, OK, status
from pipelines.ingest.web.addresses import public_socket
from pipelines.ingest.web.answers import DownloadError, classify, clean, parse_url
from pipelines.ingest.web.config import PER_CPU, DownloadConfig
from pipelines.ingest.web.exchange import Exchange
from pipelines.ingest.web.hosts import Hosts, host_name
from pipelines.ingest.web.machine import requests_that_fit
from pipelines.ingest.web.pacing import Room, Share, Window
from pipelines.ingest.web.proxy import Outage, Proxy
from pipelines.ingest.web.turns import Turns

T = TypeVar("T")

_DNS_THREADS = 32
_LEAST_TIMEOUTS = 8  # of a host in a row, before it is given up
# These failures do not tell whether the proxy is alive.
_NO_ANSWER = ("proxy", "timeout", "refused", "blocked_address", "bad_url")


@dataclass(frozen=True)
class Fetched:
    """What came of one URL: the body, or the status and message of its row."""

    data: bytes | None
    status: str
    error: str | None = None


class Downloader:
    """Fetches URLs for any number of threads at a time, within the limits of one configuration."""

    def __init__(
        self,
        config: DownloadConfig,
        slots: Window | None = None,
        room: Room | None = None,
        socket_factory: SocketFactoryType = public_socket,
        outage: Outage | None = None,
    ) -> None:
        """`slots`, `room` and `outage` in place of those of the configuration; `socket_factory` makes
        the sockets where no private address is allowed.
        """
        self.config, self.socket_factory = config, socket_factory
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="downloads", daemon=True).start()
        # A host's slots live as long as a request holds them: millions of hosts leave no trace.
        self.hosts: weakref.WeakValueDictionary[str, Turns] = weakref.WeakValueDictionary()
        self.calls = itertools.count()
        least = max(_LEAST_TIMEOUTS, 2 * config.concurrency_per_host)
        self.health = Hosts(config.host_timeouts or least)
        most = slots.most if slots else config.concurrency or PER_CPU
        fit = requests_that_fit(most)
        self.has_few_files = fit < most
        self.slots = slots or Window(fit)
        # As many as there are requests, so that none waits for the look-up of a dead name.
        self.loop.set_default_executor(ThreadPoolExecutor(max(_DNS_THREADS, self.slots.most)))
        self.room = room or Room()
        if config.proxy and outage is None:
            outage = Outage(Proxy.parse(config.proxy))
        self.outage = outage
        self.exchange = self._run(self._open_exchange())
        self.session = self.exchange.session

    def each(self, urls: Sequence[str], use: Callable[[Fetched], Awaitable[T]]) -> list[T]:
        """What `use` makes of each of `urls`, fetched in any order, in the order of `urls`.

        Of several calls at the same time the first has the slots, for its retries too: else none of
        the chunks that are in work would be done before nearly all of them are. Raises RunError where
        the proxy stays away.
        """
        rank = next(self.calls)

        async def one(url: str) -> T:
            fetched = await self.fetch(url, rank)
            try:
                return await use(fetched)
            finally:
                self.room.count(-len(fetched.data or b""))

        async def gather() -> list[T]:
            tasks = [asyncio.ensure_future(one(url)) for url in urls]
            try:
                return await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

        return self._run(gather())

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._run(self.session.close())
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _open_exchange(self) -> Exchange:
        factory = None if self.config.allow_private else self.socket_factory
        # A connection stops reading at twice half an allowance.
        buffer = self.room.allowance // 2
        return Exchange(self.config, self.slots, factory, buffer, self.has_few_files)

    # ------------------------------------------------------------------------------ one URL

    async def fetch(self, url: str, rank: int = 0) -> Fetched:
        """Fetch one URL with retries; the lowest `rank` has the slots first. Whatever the web does
        becomes a status; a proxy that stays away is a RunError.
        """
        attempt = 0
        proxy_failed: float | None = None  # when it did so first
        while True:
            try:
                return Fetched(await self._attempt(parse_url(url), rank), OK)
            except TimeoutError as error:
                limit = f"not done in {self.config.total_timeout:g} seconds"
                failure = DownloadError("timeout", str(error) or limit)
            except Exception as error:  # the web's inventions have no end
                failure = classify(error)
            if self.outage is not None and failure.kind == "timeout":
                failure = await self.outage.judge(failure, self.exchange.proxy_status)
            if self.outage is not None and failure.kind == "proxy":
                proxy_failed = proxy_failed or time.monotonic()
                if await self.outage.wait(failure, proxy_failed):
                    continue
                attempt = self.config.retries
            delay = self._delay(failure, attempt)
            if delay is None:
                return Fetched(None, status(DOWNLOAD, failure.kind), clean(str(failure)))
            await asyncio.sleep(delay)
            attempt += 1

    def _proxy_answered(self) -> None:
        if self.outage is not None:
            self.outage.over()

    def _host_slots(self, host: str) -> Turns:
        return self.hosts.setdefault(host, Turns(self.config.concurrency_per_host))

    def _delay(self, failure: DownloadError, attempt: int) -> float | None:
        """Seconds until the next attempt, or None when there is to be none."""
        if attempt >= self.config.retries or not failure.transient:
            return None
        if failure.retry_after > self.config.max_retry_after:
            return None
        backoff = self.config.retry_delay * 2**attempt * random.uniform(0.5, 1.5)
        return max(failure.retry_after, backoff)

    async def _attempt(self, target: URL, rank: int) -> bytes:
        left = self.config.total_timeout
        for _ in range(self.config.max_redirects + 1):
            # Each hop takes a slot of its own host: many hosts may lead to one.
            async with self._host_slots(host_name(target)).turn(rank):
                self.health.check(target)
                async with self.slots.turn(rank):
                    found, seconds = await self._hop(target, left)
            if isinstance(found, bytes):
                return found
            left -= seconds
            target = found
        raise DownloadError("redirects", f"more than {self.config.max_redirects} redirects")

    async def _hop(self, target: URL, left: float) -> tuple[bytes | URL, float]:
        """The body, or where a redirect leads; and the seconds that it took of those `left`."""
        # Where hosts before it have used up the time, a time-out is not the fault of this one.
        is_fair = left >= min(self.config.read_timeout, self.config.total_timeout)
        try:
            async with Share(self.room, left) as share:
                began = time.monotonic()
                found = await self.exchange.ask(target, share)
                seconds = time.monotonic() - began
                if isinstance(found, bytes):
                    share.kept = len(found)
        except Exception as error:
            self.health.failed(target, error, counts=is_fair)
            if classify(error).kind not in _NO_ANSWER:
                self._proxy_answered()
            raise
        self.health.answered(target)
        self._proxy_answered()
        if isinstance(found, bytes):
            if self.room.is_free:  # else it is not the line that they wait for
                self.slots.grow()
            INGEST_BYTES.add(len(found))
        return found, seconds
