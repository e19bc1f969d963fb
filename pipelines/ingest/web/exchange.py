"""One request and what its answer says: the body of an image, or where a redirect leads.

    aiohttp, whose parser is fast and strict -> its answer
        '-- cannot read it -> lenient.py, on a connection of its own -> its answer

So an untidy server costs a second request, and a tidy one nothing. Both go through the proxy, where
there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import aiohttp
from aiohttp import SocketFactoryType
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from pipelines.ingest.web.addresses import Resolver
from pipelines.ingest.web.answers import (
    DownloadError,
    check_range,
    http_class,
    redirected,
    retry_after,
)
from pipelines.ingest.web.config import DownloadConfig
from pipelines.ingest.web.lenient import LenientClient
from pipelines.ingest.web.optout import AGENT, agent_of, opted_out
from pipelines.ingest.web.pacing import Share, Window
from pipelines.ingest.web.proxy import (
    CHECKED,
    WANTS_PASSWORD,
    Proxy,
    ProxyError,
    check_tunnel,
    refuse_private,
    wants_password,
)
from pipelines.ingest.web.reading import Answer, UntidyError, read_body

_DNS_CACHE_SECONDS = 300
_IDLE_SECONDS = 1.0  # each of the many hosts that are asked but once costs an open file for so long
_FEW_FILES_IDLE_SECONDS = 0.05  # where the machine allows few of them
_REDIRECTS = (301, 302, 303, 307, 308)


class Exchange:
    """Asks for URLs, one answer each; made and used in one event loop."""

    def __init__(
        self,
        config: DownloadConfig,
        slots: Window,
        socket_factory: SocketFactoryType | None,
        buffer: int,
        has_few_files: bool = False,
    ) -> None:
        """`slots` shrink where a body stalls; `socket_factory` refuses the addresses that are not
        to be reached; a connection stops reading at twice `buffer` bytes, and idles shortly where `has_few_files`.
        """
        self.config, self.slots = config, slots
        self.proxy = Proxy.parse(config.proxy) if config.proxy else None
        if self.proxy is not None:  # it is what is connected to, wherever it may be
            socket_factory = None
        self.agents = (AGENT, agent_of(config.user_agent))
        contact = f" (+{config.contact})" if config.contact else ""
        headers = {
            "User-Agent": config.user_agent + contact,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
        }
        resolver = Resolver()
        connector = _Connector(
            self.proxy,
            config.connect_timeout + config.read_timeout,
            keepalive_timeout=_FEW_FILES_IDLE_SECONDS if has_few_files else _IDLE_SECONDS,
            limit=0,  # ours are the slots, whose waiting is no part of a request's time-out
            resolver=resolver,
            ttl_dns_cache=_DNS_CACHE_SECONDS,
            socket_factory=socket_factory,
        )
        self.session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=config.connect_timeout, sock_read=config.read_timeout
            ),
            auto_decompress=False,  # `unpacked` bounds it
            read_bufsize=buffer,
            headers=headers,
        )
        self.lenient = LenientClient(
            headers,
            resolver,
            socket_factory,
            config.connect_timeout,
            config.read_timeout,
            buffer,
            self.proxy,
        )

    async def ask(self, target: URL, share: Share) -> bytes | URL:
        """The body, or where a redirect leads. Raises DownloadError and what connections raise."""
        if self.proxy is not None and not self.config.allow_private:
            refuse_private(target)
        through = _through(self.proxy, target) if self.proxy is not None else {}
        try:
            async with self.session.get(target, allow_redirects=False, **through) as response:
                unwatch = _tell_of_refusal(response)
                try:
                    return await self._judge(target, _strict(response), share)
                finally:
                    unwatch()
        except aiohttp.ClientHttpProxyError as error:
            assert self.proxy is not None
            check_tunnel(self.proxy, error.status, error.message)
            raise
        except (aiohttp.ClientResponseError, HttpProcessingError, UntidyError):
            async with self.lenient.get(target) as answer:
                return await self._judge(target, answer, share)

    async def _judge(self, target: URL, answer: Answer, share: Share) -> bytes | URL:
        status, headers = answer.status, answer.headers
        # A server may send a 407 as well, and in a tunnel only servers speak.
        is_odd = status == WANTS_PASSWORD and target.scheme == "http"
        if is_odd and self.proxy is not None and await self.proxy_status() == WANTS_PASSWORD:
            raise wants_password(self.proxy)
        location = headers.get("Location")
        redirects = status in _REDIRECTS or (status == 300 and location)
        if not redirects and (not 200 <= status < 300 or status == 204):
            raise DownloadError(
                http_class(status),
                f"HTTP {status} {answer.reason}".rstrip(),
                retry_after=retry_after(headers.get("Retry-After")),
            )
        tags = headers.getall("X-Robots-Tag", ())
        if self.config.respect_optout and (directive := opted_out(tags, self.agents)):
            raise DownloadError("opted_out", f"X-Robots-Tag: {directive}")
        if redirects:
            if not location:
                raise DownloadError("redirects", f"HTTP {status} without Location")
            return redirected(target, location)
        if status == 206:
            check_range(headers.get("Content-Range"))
        try:
            return await read_body(answer, share, self.config.max_bytes)
        except (TimeoutError, asyncio.CancelledError):
            self.slots.shrink()
            raise

    async def proxy_status(self) -> int | None:
        """The proxy's answer for a name that nobody has; None where it has none in time."""
        assert self.proxy is not None
        through = _through(self.proxy, URL(CHECKED))
        try:
            async with (
                asyncio.timeout(self.config.total_timeout),
                self.session.get(CHECKED, allow_redirects=False, **through) as response,
            ):
                return response.status
        except (aiohttp.ClientError, OSError, ProxyError):
            return None


def _strict(response: aiohttp.ClientResponse) -> Answer:
    """What aiohttp made of an answer; UntidyError where it does not see that it is chunked."""
    if response.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
        raise UntidyError
    return Answer(
        response.status,
        response.reason or "",
        response.headers,
        response.content_length,
        response.content.iter_any(),
    )


def _through(proxy: Proxy, target: URL) -> dict[str, Any]:
    """Arguments of a request that goes through the proxy; its password is no server's to see."""
    if target.scheme == "https":
        return {"proxy": proxy.url, "proxy_headers": proxy.headers}
    return {"proxy": proxy.url, "headers": proxy.headers}


def _tell_of_refusal(response: aiohttp.ClientResponse) -> Callable[[], object]:
    """Raise HttpProcessingError where a body is read that the parser refuses half-way, until what
    is returned is called: the connection may serve thousands of requests.

    By itself aiohttp closes the connection then, and who reads would wait until the last time-out.
    """
    connection, content = response.connection, response.content
    protocol = connection.protocol if connection is not None else None
    closed = protocol.closed if protocol is not None else None
    if protocol is None or closed is None:  # all of the body has come
        return _nothing

    def end(_: asyncio.Future[None]) -> None:
        error = protocol.exception()
        if isinstance(error, HttpProcessingError) and not content.is_eof():
            content.set_exception(error)

    closed.remove_done_callback(_seen)
    closed.add_done_callback(_seen)
    closed.add_done_callback(end)
    return partial(closed.remove_done_callback, end)


def _nothing() -> None:
    pass


def _seen(closed: asyncio.Future[None]) -> None:
    """Else asyncio reports each connection that was reset as an error that nobody saw."""
    if not closed.cancelled():
        closed.exception()


class _Connector(aiohttp.TCPConnector):
    """Uses no connection again on which something came that nobody had asked for.

    With a `proxy`, what fails on the way to it is a ProxyError, and a tunnel has `tunnel_seconds`.
    """

    def __init__(self, proxy: Proxy | None, tunnel_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self.proxy, self.tunnel_seconds = proxy, tunnel_seconds

    async def _create_proxy_connection(self, *args: Any, **named: Any) -> Any:
        # By itself aiohttp waits without an end for the answer to CONNECT.
        async with asyncio.timeout(self.tunnel_seconds):
            return await super()._create_proxy_connection(*args, **named)

    async def _create_direct_connection(self, *args: Any, **named: Any) -> Any:
        try:
            return await super()._create_direct_connection(*args, **named)
        except (aiohttp.ClientError, OSError) as error:  # time-outs are among them
            if self.proxy is None:
                raise
            raise ProxyError(f"{self.proxy}: {error or 'no connection in time'}") from error

    async def _get(self, key: Any, traces: Any) -> Any:
        # It would be taken for the answer to the next request: another URL's picture, or the 408
        # with which servers close what is idle.
        while (connection := await super()._get(key, traces)) is not None:
            # A handler is false while it has no messages: it is asked for None by name.
            if connection.protocol is not None and not connection.protocol.should_close:
                break
            connection.close()
        return connection
