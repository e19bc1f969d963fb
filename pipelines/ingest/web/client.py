"""The HTTP client: one GET request, whose result is a body or the target of a redirect.

    aiohttp, whose parser is fast and strict -> response
        '-- cannot read it -> lenient.py, on a connection of its own -> response

So only a malformed response costs a second request. Both requests use the proxy, if there is one.
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
from pipelines.ingest.web.body import MalformedResponseError, Response, read_body, read_text
from pipelines.ingest.web.byte_budget import BodyReservation
from pipelines.ingest.web.concurrency import RequestWindow
from pipelines.ingest.web.config import DownloadConfig
from pipelines.ingest.web.failures import (
    DownloadError,
    check_range,
    http_class,
    redirect_target,
    retry_after,
)
from pipelines.ingest.web.lenient import LenientClient
from pipelines.ingest.web.optout import AGENT, agent_of, header_refusal
from pipelines.ingest.web.proxy import (
    AUTH_REQUIRED,
    PROBE_URL,
    Proxy,
    ProxyError,
    auth_error,
    check_tunnel,
    refuse_private,
)

_DNS_CACHE_SECONDS = 300
_IDLE_SECONDS = 1.0  # most hosts get one request; their idle connections cost open files
_FEW_FILES_IDLE_SECONDS = 0.05  # where the limit of open files is low
_REDIRECTS = (301, 302, 303, 307, 308)


class HttpClient:
    """Sends GET requests; created and used in one event loop."""

    def __init__(
        self,
        config: DownloadConfig,
        window: RequestWindow,
        socket_factory: SocketFactoryType | None,
        buffer: int,
        has_few_files: bool = False,
    ) -> None:
        """`window` shrinks when a body stalls; `socket_factory` refuses addresses that must not be
        reached. A connection stops reading at twice `buffer` bytes, and is closed early when idle if
        `has_few_files`.
        """
        self.config, self.window = config, window
        self.proxy = Proxy.parse(config.proxy) if config.proxy else None
        if self.proxy is not None:  # all connections are to the proxy, whose address may be private
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
            limit=0,  # `window` limits them; waiting for it does not count for a time-out
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
            auto_decompress=False,  # `decode_body` does it within a limit
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

    async def close(self) -> None:
        """Close the connections."""
        await self.session.close()

    async def get(
        self, target: URL, reservation: BodyReservation, text_bytes: int | None = None
    ) -> bytes | URL:
        """The body of an image, or the target of a redirect. Raises DownloadError and connection errors.

        With `text_bytes`, the first bytes of a file of any kind, to which no refusal applies.
        """
        if self.proxy is not None and not self.config.allow_private:
            refuse_private(target)
        proxied = _proxy_arguments(self.proxy, target) if self.proxy is not None else {}
        try:
            async with self.session.get(target, allow_redirects=False, **proxied) as response:
                stop = _raise_parser_errors(response)
                try:
                    return await self._result(target, _strict(response), reservation, text_bytes)
                finally:
                    stop()
        except aiohttp.ClientHttpProxyError as error:
            assert self.proxy is not None
            check_tunnel(self.proxy, error.status, error.message)
            raise
        except (aiohttp.ClientResponseError, HttpProcessingError, MalformedResponseError):
            async with self.lenient.get(target) as lenient_response:
                return await self._result(target, lenient_response, reservation, text_bytes)

    async def _result(
        self,
        target: URL,
        response: Response,
        reservation: BodyReservation,
        text_bytes: int | None,
    ) -> bytes | URL:
        status, headers = response.status, response.headers
        # A server may send a 407 too. In a tunnel only the server answers.
        is_unclear = status == AUTH_REQUIRED and target.scheme == "http"
        if is_unclear and self.proxy is not None and await self.proxy_status() == AUTH_REQUIRED:
            raise auth_error(self.proxy)
        location = headers.get("Location")
        redirects = status in _REDIRECTS or (status == 300 and location)
        if status == 204 and text_bytes is not None:
            return b""
        if not redirects and (not 200 <= status < 300 or status == 204):
            raise DownloadError(
                http_class(status),
                f"HTTP {status} {response.reason}".rstrip(),
                retry_after=retry_after(headers.get("Retry-After")),
            )
        if text_bytes is None:
            refusal = header_refusal(headers, self.config.rules, self.agents)
            if refusal is not None:
                raise DownloadError("opted_out", refusal)
        if redirects:
            if not location:
                raise DownloadError("redirects", f"HTTP {status} without Location")
            return redirect_target(target, location)
        if status == 206:
            check_range(headers.get("Content-Range"))
        try:
            if text_bytes is not None:
                return await read_text(response, reservation, text_bytes)
            return await read_body(response, reservation, self.config.max_bytes)
        except (TimeoutError, asyncio.CancelledError):
            self.window.shrink()
            raise

    async def proxy_status(self) -> int | None:
        """The HTTP status that the proxy sends for PROBE_URL; None if it does not answer in time."""
        assert self.proxy is not None
        proxied = _proxy_arguments(self.proxy, URL(PROBE_URL))
        try:
            async with (
                asyncio.timeout(self.config.total_timeout),
                self.session.get(PROBE_URL, allow_redirects=False, **proxied) as response,
            ):
                return response.status
        except (aiohttp.ClientError, OSError, ProxyError):
            return None


def _strict(response: aiohttp.ClientResponse) -> Response:
    """What aiohttp parsed; MalformedResponseError if aiohttp may miss that the body is chunked."""
    if response.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
        raise MalformedResponseError
    return Response(
        response.status,
        response.reason or "",
        response.headers,
        response.content_length,
        response.content.iter_any(),
    )


def _proxy_arguments(proxy: Proxy, target: URL) -> dict[str, Any]:
    """Arguments of a request through the proxy; in a tunnel no server sees its password."""
    if target.scheme == "https":
        return {"proxy": proxy.url, "proxy_headers": proxy.headers}
    return {"proxy": proxy.url, "headers": proxy.headers}


def _raise_parser_errors(response: aiohttp.ClientResponse) -> Callable[[], object]:
    """Raise HttpProcessingError in the reader of a body if aiohttp's parser fails half-way.

    Otherwise aiohttp only closes the connection, and the reader waits for its time-out. Returns a
    function that removes the callback, as the connection may serve thousands of requests.
    """
    connection, content = response.connection, response.content
    protocol = connection.protocol if connection is not None else None
    closed = protocol.closed if protocol is not None else None
    if protocol is None or closed is None:  # all of the body has arrived
        return _do_nothing

    def end(_: asyncio.Future[None]) -> None:
        error = protocol.exception()
        if isinstance(error, HttpProcessingError) and not content.is_eof():
            content.set_exception(error)

    closed.remove_done_callback(_retrieve_exception)
    closed.add_done_callback(_retrieve_exception)
    closed.add_done_callback(end)
    return partial(closed.remove_done_callback, end)


def _do_nothing() -> None:
    pass


def _retrieve_exception(closed: asyncio.Future[None]) -> None:
    """Otherwise asyncio logs "exception was never retrieved" for each connection that was reset."""
    if not closed.cancelled():
        closed.exception()


class _Connector(aiohttp.TCPConnector):
    """Does not reuse a connection on which unrequested data arrived.

    With a `proxy`, a failure to connect to it is a ProxyError, and opening a tunnel may take
    `tunnel_seconds`.
    """

    def __init__(self, proxy: Proxy | None, tunnel_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self.proxy, self.tunnel_seconds = proxy, tunnel_seconds

    async def _create_proxy_connection(self, *args: Any, **named: Any) -> Any:
        # aiohttp has no time-out for the response to CONNECT.
        async with asyncio.timeout(self.tunnel_seconds):
            return await super()._create_proxy_connection(*args, **named)

    async def _create_direct_connection(self, *args: Any, **named: Any) -> Any:
        try:
            return await super()._create_direct_connection(*args, **named)
        except (aiohttp.ClientError, OSError) as error:  # includes time-outs
            if self.proxy is None:
                raise
            raise ProxyError(f"{self.proxy}: {error or 'no connection in time'}") from error

    async def _get(self, key: Any, traces: Any) -> Any:
        # The data would pass for the response to the next request: another URL's picture, or the
        # 408 with which servers close idle connections.
        while (connection := await super()._get(key, traces)) is not None:
            # A protocol is falsy while it has no messages, so compare it with None.
            if connection.protocol is not None and not connection.protocol.should_close:
                break
            connection.close()
        return connection
