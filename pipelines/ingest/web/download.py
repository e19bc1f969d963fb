"""Fetching URLs of the open web: many at a time, all resources bounded, each failure with a class.

A `Downloader` is an event loop in its own thread, with one pool of connections:

    URL -> rules of its site -> slot of its host, slot of the process, byte budget
              ^                     -> [connect, redirects, headers, body] -> use
              '---------- retry with backoff, outside the slots, for transient classes <---'
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

from pipelines.execution.telemetry import INGEST_BYTES
from pipelines.images.rows import DOWNLOAD, OK, status
from pipelines.ingest.web.addresses import public_socket
from pipelines.ingest.web.byte_budget import BodyReservation, ByteBudget
from pipelines.ingest.web.client import HttpClient
from pipelines.ingest.web.concurrency import PrioritySemaphore, RequestWindow
from pipelines.ingest.web.config import PER_CPU, DownloadConfig
from pipelines.ingest.web.environment import requests_that_fit
from pipelines.ingest.web.failures import DownloadError, classify, clean, parse_url
from pipelines.ingest.web.hosts import CircuitBreakers, host_name
from pipelines.ingest.web.proxy import Outage, Proxy
from pipelines.ingest.web.robots import MAX_BYTES
from pipelines.ingest.web.site_rules import MAX_REDIRECTS, SiteRulesChecker, make_checker
from vlv_model.errors import RunError

T = TypeVar("T")

_MIN_DNS_THREADS = 32
_MIN_HOST_TIMEOUTS = 8  # in a row, before a host counts as down
# These failures do not show whether the proxy is alive.
_NO_ANSWER = ("proxy", "timeout", "refused", "blocked_address", "bad_url")


@dataclass(frozen=True)
class Fetched:
    """The result of one URL: the body, or the status and error message of its row."""

    data: bytes | None
    status: str
    error: str | None = None


class Downloader:
    """Fetches URLs for any number of threads, within the limits of one configuration."""

    def __init__(
        self,
        config: DownloadConfig,
        window: RequestWindow | None = None,
        budget: ByteBudget | None = None,
        socket_factory: SocketFactoryType = public_socket,
        outage: Outage | None = None,
        rules_store: Any = None,
    ) -> None:
        """`window`, `budget` and `outage` replace those of the configuration; `socket_factory` makes
        the sockets, unless private addresses are allowed; `rules_store` is the handle of a RulesStore
        that the downloaders of other processes use too.
        """
        self.config, self.socket_factory = config, socket_factory
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="downloads", daemon=True).start()
        # An entry lives as long as a request uses it, so memory does not grow with the hosts.
        self.host_slots: weakref.WeakValueDictionary[str, PrioritySemaphore] = (
            weakref.WeakValueDictionary()
        )
        self.calls = itertools.count()
        limit = max(_MIN_HOST_TIMEOUTS, 2 * config.concurrency_per_host)
        self.breakers = CircuitBreakers(limit)
        wanted = window.max_size if window else config.concurrency or PER_CPU
        fit = requests_that_fit(wanted)
        self.has_few_files = fit < wanted
        self.window = window or RequestWindow(fit)
        # One thread per request, so that none waits for the look-up of a dead name.
        threads = max(_MIN_DNS_THREADS, self.window.max_size)
        self.loop.set_default_executor(ThreadPoolExecutor(threads))
        self.budget = budget or ByteBudget()
        if config.proxy and outage is None:
            outage = Outage(Proxy.parse(config.proxy))
        self.outage = outage
        self.client, self.site_rules = self._run(self._open(rules_store))

    def map_urls(self, urls: Sequence[str], use: Callable[[Fetched], Awaitable[T]]) -> list[T]:
        """Fetch `urls` in any order and return `use(fetched)` of each, in the order of `urls`.

        An earlier call has priority over a later one, with its retries too: otherwise almost all
        chunks in flight would end at the same time. Raises RunError if the proxy stays unavailable.
        """
        priority = next(self.calls)

        async def one(url: str) -> T:
            fetched = await self.fetch(url, priority)
            try:
                return await use(fetched)
            finally:
                self.budget.count(-len(fetched.data or b""))

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
        self._run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _open(self, rules_store: Any) -> tuple[HttpClient, SiteRulesChecker | None]:
        factory = None if self.config.allow_private else self.socket_factory
        # asyncio stops reading from a connection at twice its buffer size.
        buffer = self.budget.reservation // 2
        client = HttpClient(self.config, self.window, factory, buffer, self.has_few_files)
        return client, make_checker(
            self.config.rules, client.agents, self._fetch_rules, rules_store
        )

    async def _close(self) -> None:
        if self.site_rules is not None:
            await self.site_rules.close()
        await self.client.close()

    # ------------------------------------------------------------------------------ one URL

    async def fetch(self, url: str, priority: int = 0) -> Fetched:
        """Fetch one URL, with retries; the lowest `priority` gets a slot first.

        Every failure of the web becomes a status. Raises RunError if the proxy stays unavailable.
        """
        try:
            data = await self._with_retries(lambda: self._fetch_image(parse_url(url), priority))
        except DownloadError as failure:
            return Fetched(None, status(DOWNLOAD, failure.kind), clean(str(failure)))
        return Fetched(data, OK)

    async def _with_retries(self, attempt: Callable[[], Awaitable[bytes]]) -> bytes:
        """The result of an attempt. Raises the last one's DownloadError; RunError as `fetch` does."""
        number = 0
        proxy_failed_at: float | None = None  # the first time
        while True:
            try:
                return await attempt()
            except RunError:
                raise
            except TimeoutError as error:
                limit = f"not done in {self.config.total_timeout:g} seconds"
                failure = DownloadError("timeout", str(error) or limit)
            except Exception as error:  # servers cause errors of any type
                failure = classify(error)
            if failure.final:
                raise failure
            if self.outage is not None and failure.kind == "timeout":
                failure = await self.outage.judge(failure, self.client.proxy_status)
            if self.outage is not None and failure.kind == "proxy":
                proxy_failed_at = proxy_failed_at or time.monotonic()
                if await self.outage.wait(failure, proxy_failed_at):
                    continue
                number = self.config.retries
            delay = self._delay(failure, number)
            if delay is None:
                raise failure
            await asyncio.sleep(delay)
            number += 1

    def _end_outage(self) -> None:
        if self.outage is not None:
            self.outage.end()

    def _slots_of(self, host: str) -> PrioritySemaphore:
        return self.host_slots.setdefault(host, PrioritySemaphore(self.config.concurrency_per_host))

    def _delay(self, failure: DownloadError, attempt: int) -> float | None:
        """Seconds until the next attempt, or None for no retry."""
        if attempt >= self.config.retries or not failure.transient:
            return None
        if failure.retry_after > self.config.total_timeout:
            return None
        backoff = self.config.retry_delay * 2**attempt * random.uniform(0.5, 1.5)
        return max(failure.retry_after, backoff)

    async def _fetch_image(self, target: URL, priority: int) -> bytes:
        seconds_left = self.config.total_timeout
        for _ in range(self.config.max_redirects + 1):
            if self.site_rules is not None:  # before a slot is taken: it may need one itself
                await self.site_rules.check(target, priority)
            result, seconds = await self._hop(target, priority, seconds_left)
            if isinstance(result, bytes):
                if self.budget.is_free:  # otherwise requests wait for the decoders, not for a slot
                    self.window.grow()
                INGEST_BYTES.add(len(result))
                return result
            seconds_left -= seconds
            target = result
        raise DownloadError("redirects", f"more than {self.config.max_redirects} redirects")

    async def _fetch_rules(self, target: URL, priority: int) -> bytes:
        """A file with a site's rules, with retries. Raises DownloadError; RunError as `fetch` does."""
        return await self._with_retries(lambda: self._fetch_text(target, priority))

    async def _fetch_text(self, target: URL, priority: int) -> bytes:
        seconds_left = self.config.total_timeout
        for _ in range(MAX_REDIRECTS + 1):
            result, seconds = await self._hop(target, priority, seconds_left, MAX_BYTES)
            if isinstance(result, bytes):
                return result
            seconds_left -= seconds
            target = result
        raise DownloadError("redirects", f"more than {MAX_REDIRECTS} redirects")

    async def _hop(
        self, target: URL, priority: int, seconds_left: float, text_bytes: int | None = None
    ) -> tuple[bytes | URL, float]:
        """The body, or the target of a redirect; and the seconds that it took.

        Each hop takes a slot of its own host: many hosts may redirect to one. `text_bytes` as in
        `HttpClient.get`.
        """
        async with self._slots_of(host_name(target)).slot(priority):
            self.breakers.check(target)
            async with self.window.slot(priority):
                return await self._request(target, seconds_left, text_bytes)

    async def _request(
        self, target: URL, seconds_left: float, text_bytes: int | None
    ) -> tuple[bytes | URL, float]:
        # If earlier hosts have used up the time, a time-out does not count against this one.
        is_fair = seconds_left >= self.config.read_timeout
        try:
            async with BodyReservation(self.budget, seconds_left) as reservation:
                began = time.monotonic()
                result = await self.client.get(target, reservation, text_bytes)
                seconds = time.monotonic() - began
                if isinstance(result, bytes) and text_bytes is None:
                    reservation.kept = len(result)
        except Exception as error:
            self.breakers.record_failure(target, error, counts=is_fair)
            if classify(error).kind not in _NO_ANSWER:
                self._end_outage()
            raise
        self.breakers.record_answer(target)
        self._end_outage()
        return result, seconds
