"""Fetching URLs of the open web: many at a time, bounded in every way, each failure of a class.

A `Downloader` is an event loop in a thread of its own and one pool of connections:

    URL -> slot of its host, slot of the process, room -> [connect, redirects, headers, body] -> use
              ^---------------- back-off, outside the slots, for transient classes <---'
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from aiohttp import SocketFactoryType
from pydantic import Field
from yarl import URL

from pipelines.ingest.addresses import Resolver, public_socket
from pipelines.ingest.answers import (
    DownloadError,
    check_image,
    classify,
    clean,
    decompress,
    http_class,
    is_packed,
    parse_url,
    redirected,
    retry_after,
)
from pipelines.ingest.machine import requests_that_fit, warn_of_proxies
from pipelines.ingest.optout import AGENT, agent_of, opted_out
from pipelines.ingest.pacing import Room, Share, Window
from pipelines.pictures.formats import sniffed
from pipelines.schemas import DOWNLOAD, OK, status
from pipelines.telemetry import INGEST_BYTES
from vlv_model.config import Config

T = TypeVar("T")

_DNS_THREADS, _DNS_CACHE_SECONDS = 32, 300
_IDLE_SECONDS = 1.0  # each of the many hosts that are asked but once costs an open file for so long
_FEW_FILES_IDLE_SECONDS = 0.05  # where the machine allows few of them
_REDIRECTS = (301, 302, 303, 307, 308)


_PRINTABLE = r"^[ -~]+$"  # what a header may hold


class DownloadConfig(Config):
    """How the web is asked."""

    concurrency: int | None = Field(
        None,
        ge=1,
        description="most requests in flight, of the whole job, which begins with fewer and halves "
        "them while bodies stall; fewer where the machine allows few open files; default: 256 for each "
        "CPU",
    )
    concurrency_per_host: int = Field(
        16,
        ge=1,
        description="requests in flight to one host, of the whole job (but one for each process)",
    )
    connect_timeout: float = Field(5.0, gt=0, description="seconds to connect to one address")
    read_timeout: float = Field(10.0, gt=0, description="seconds without a byte from the server")
    total_timeout: float = Field(30.0, gt=0, description="seconds for one attempt, with redirects")
    retries: int = Field(
        1, ge=0, description="further attempts after timeout, refused, http_429, http_5xx"
    )
    retry_delay: float = Field(
        1.0, gt=0, description="seconds before the first retry, doubled for each one, jittered"
    )
    max_retry_after: float = Field(
        30.0,
        ge=0,
        description="longest Retry-After that is waited for; beyond it there is no retry",
    )
    max_redirects: int = Field(5, ge=0, description="redirects that are followed")
    max_bytes: int = Field(
        32 << 20, ge=1, description="largest body, in bytes, as sent and after decompression"
    )
    allow_private: bool = Field(
        False, description="connect to loopback and private addresses too; for tests only"
    )
    respect_optout: bool = Field(
        True, description="honour X-Robots-Tag: noai, noimageai, noindex, noimageindex"
    )
    user_agent: str = Field(
        f"{AGENT}/1.0 (VLV image dataset ingest; honours X-Robots-Tag: noai)",
        pattern=_PRINTABLE,
        description="User-Agent header, followed by `contact`",
    )
    contact: str | None = Field(
        None,
        pattern=_PRINTABLE,
        description="URL or e-mail address where you can be reached, told to every server that is "
        "asked: give one before you ask the open web",
    )


_PER_CPU = 256  # requests in flight: most of the web answers late, and some of it never


def share_of(config: DownloadConfig, processes: int, cpus: float) -> DownloadConfig:
    """What each of `processes` downloaders of a job on `cpus` CPUs may do."""
    total = config.concurrency or int(_PER_CPU * cpus)
    return config.model_copy(
        update={
            "concurrency": max(1, total // processes),
            "concurrency_per_host": max(1, config.concurrency_per_host // processes),
        }
    )


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
    ) -> None:
        """`slots` and `room` in place of those of the configuration; `socket_factory` makes the
        sockets where no private address is allowed.
        """
        self.config, self.socket_factory = config, socket_factory
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="downloads", daemon=True).start()
        # A host's slots live as long as a request holds them: millions of hosts leave no trace.
        self.hosts: weakref.WeakValueDictionary[str, asyncio.Semaphore] = (
            weakref.WeakValueDictionary()
        )
        most = slots.most if slots else config.concurrency or _PER_CPU
        fit = requests_that_fit(most)
        self.slots = slots or Window(fit)
        self.idle_seconds = _IDLE_SECONDS if fit == most else _FEW_FILES_IDLE_SECONDS
        warn_of_proxies()
        # As many as there are requests, so that none waits for the look-up of a dead name.
        self.loop.set_default_executor(ThreadPoolExecutor(max(_DNS_THREADS, self.slots.most)))
        self.room = room or Room()
        self.agents = (AGENT, agent_of(config.user_agent))
        self.session = self._run(self._open_session())

    def each(self, urls: Sequence[str], use: Callable[[Fetched], Awaitable[T]]) -> list[T]:
        """What `use` makes of each of `urls`, fetched in any order, in the order of `urls`."""

        async def one(url: str) -> T:
            fetched = await self.fetch(url)
            try:
                return await use(fetched)
            finally:
                self.room.count(-len(fetched.data or b""))

        async def gather() -> list[T]:
            return await asyncio.gather(*(one(url) for url in urls))

        return self._run(gather())

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._run(self.session.close())
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _open_session(self) -> aiohttp.ClientSession:
        connector = _Connector(
            keepalive_timeout=self.idle_seconds,
            limit=0,  # ours are the slots, whose waiting is no part of a request's time-out
            resolver=Resolver(),
            ttl_dns_cache=_DNS_CACHE_SECONDS,
            socket_factory=None if self.config.allow_private else self.socket_factory,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=self.config.connect_timeout,
                sock_read=self.config.read_timeout,
            ),
            auto_decompress=False,  # `decompress` bounds it
            read_bufsize=self.room.allowance // 2,  # a connection stops reading at twice that
            headers={
                "User-Agent": self.config.user_agent
                + (f" (+{self.config.contact})" if self.config.contact else ""),
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )

    # ------------------------------------------------------------------------------ one URL

    async def fetch(self, url: str) -> Fetched:
        """Fetch one URL with retries. Never raises: whatever the web does becomes a status."""
        attempt = 0
        while True:
            try:
                return Fetched(await self._attempt(parse_url(url)), OK)
            except TimeoutError as error:
                limit = f"not done in {self.config.total_timeout:g} seconds"
                failure = DownloadError("timeout", str(error) or limit)
            except Exception as error:  # the web's inventions have no end
                failure = classify(error)
            delay = self._delay(failure, attempt)
            if delay is None:
                return Fetched(None, status(DOWNLOAD, failure.kind), clean(str(failure)))
            await asyncio.sleep(delay)
            attempt += 1

    def _host_slots(self, host: str) -> asyncio.Semaphore:
        host = host.lower().rstrip(".")
        return self.hosts.setdefault(host, asyncio.Semaphore(self.config.concurrency_per_host))

    def _delay(self, failure: DownloadError, attempt: int) -> float | None:
        """Seconds until the next attempt, or None when there is to be none."""
        if attempt >= self.config.retries or not failure.transient:
            return None
        if failure.retry_after > self.config.max_retry_after:
            return None
        backoff = self.config.retry_delay * 2**attempt * random.uniform(0.5, 1.5)
        return max(failure.retry_after, backoff)

    async def _attempt(self, target: URL) -> bytes:
        left = self.config.total_timeout
        for _ in range(self.config.max_redirects + 1):
            # Each hop takes a slot of its own host: many hosts may lead to one.
            async with self._host_slots(target.raw_host or ""), self.slots:
                async with Share(self.room, left) as share:
                    began = time.monotonic()
                    found = await self._hop(target, share)
                    left -= time.monotonic() - began
                    if isinstance(found, bytes):
                        share.kept = len(found)
                if isinstance(found, bytes):
                    if self.room.is_free:  # else it is not the line that they wait for
                        self.slots.grow()
                    INGEST_BYTES.add(len(found))
                    return found
                target = found
        raise DownloadError("other", f"more than {self.config.max_redirects} redirects")

    async def _hop(self, target: URL, share: Share) -> bytes | URL:
        """The body, or where a redirect leads."""
        async with self.session.get(target, allow_redirects=False) as response:
            if response.status not in (200, *_REDIRECTS):
                raise DownloadError(
                    http_class(response.status),
                    f"HTTP {response.status} {response.reason or ''}".rstrip(),
                    retry_after=retry_after(response.headers.get("Retry-After")),
                )
            tags = response.headers.getall("X-Robots-Tag", ())
            if self.config.respect_optout and (directive := opted_out(tags, self.agents)):
                raise DownloadError("opted_out", f"X-Robots-Tag: {directive}")
            if response.status == 200:
                try:
                    return await self._body(response, share)
                except (TimeoutError, asyncio.CancelledError):
                    self.slots.shrink()
                    raise
            location = response.headers.get("Location")
            if not location:
                raise DownloadError("other", f"HTTP {response.status} without Location")
            return redirected(target, location)

    async def _body(self, response: aiohttp.ClientResponse, share: Share) -> bytes:
        cap = self.config.max_bytes
        if (response.content_length or 0) > cap:
            raise DownloadError("too_large", f"{response.content_length} bytes announced")
        packed = is_packed(response.headers.get("Content-Encoding", ""))
        body = bytearray()
        looked = False
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > cap:
                raise DownloadError("too_large", f"more than {cap} bytes")
            if not packed and not looked and len(body) >= sniffed(body):
                check_image(body, response.content_type)  # before the rest is read
                looked = True
            await share.grown(len(body))
        data = decompress(body, cap) if packed else bytes(body)
        if not looked:
            check_image(data, response.content_type)
        return data


class _Connector(aiohttp.TCPConnector):
    """Uses no connection again on which something came that nobody had asked for."""

    async def _get(self, key: Any, traces: Any) -> Any:
        # It would be taken for the answer to the next request: another URL's picture, or the 408
        # with which servers close what is idle.
        while (connection := await super()._get(key, traces)) is not None:
            # A handler is false while it has no messages: it is asked for None by name.
            if connection.protocol is not None and not connection.protocol.should_close:
                break
            connection.close()
        return connection
