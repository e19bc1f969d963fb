"""A lenient HTTP client, which accepts malformed responses as browsers and curl do.

It is used where the strict parser failed. Leniency is safe because a connection serves only one
request: bytes behind the response cannot become the response to another URL. An ambiguous response
(two lengths, a chunk longer than its size) fails as `protocol`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

import aiohappyeyeballs
from aiohttp import BasicAuth, SocketFactoryType
from aiohttp.abc import AbstractResolver, ResolveResult
from multidict import CIMultiDict
from yarl import URL

from pipelines.ingest.web.body import ConnectionClosedError, Response
from pipelines.ingest.web.content_encodings import header_tokens
from pipelines.ingest.web.failures import DownloadError
from pipelines.ingest.web.proxy import Proxy, ProxyError, check_tunnel
from pipelines.pictures.formats import image_format

T = TypeVar("T")

MAX_HEADERS = 256 << 10
"""Bytes of all headers of a response together, as in browsers."""
_MAX_HEADER_LINES = 2000  # each takes far more memory than its bytes
_MAX_CHUNK_LINE = 4096  # bytes
_LONG_HEADERS = f"headers of more than {MAX_HEADERS} bytes or {_MAX_HEADER_LINES} lines"
_LONG_CHUNK_LINE = f"a chunk's line of more than {_MAX_CHUNK_LINE} bytes"
_SNIFFED_BYTES = 64  # enough to tell an image from a chunk size
_MAX_INTERIM = 8  # responses of status 1xx before the final one
_READ_BYTES = 64 << 10
# Radio servers send ICY. The version does not matter: each request has a connection of its own.
_STATUS = re.compile(
    rb"(?:HTTP(?:/\s*[\d.]+)?|ICY)\s+0*([1-9]\d\d)(?!\d)\s*(.*)", re.IGNORECASE | re.DOTALL
)
_CHUNK = re.compile(rb"\s*([0-9a-fA-F]{1,16})(?:[\s;].*)?", re.DOTALL)
_LENGTH = re.compile(
    r"\s*0*([0-9]{1,18})\s*", re.ASCII
)  # longer ones are negative numbers as unsigned


class LenientClient:
    """Sends each GET request on a new connection."""

    def __init__(
        self,
        headers: Mapping[str, str],
        resolver: AbstractResolver,
        socket_factory: SocketFactoryType | None,
        connect_timeout: float,
        read_timeout: float,
        buffer: int,
        proxy: Proxy | None = None,
    ) -> None:
        """`headers` are sent with every request; a connection stops reading at twice `buffer` bytes;
        time-outs are in seconds. `socket_factory` refuses addresses that must not be reached.
        """
        self.headers, self.resolver, self.socket_factory = headers, resolver, socket_factory
        self.connect_timeout, self.read_timeout = connect_timeout, read_timeout
        self.buffer, self.proxy = buffer, proxy

    @contextlib.asynccontextmanager
    async def get(self, target: URL) -> AsyncIterator[Response]:
        """The response to a GET of `target`. Raises OSError, TimeoutError and DownloadError."""
        if self.proxy is None:
            reader, writer = await self._connect(target)
        else:
            try:
                reader, writer = await self._connect(self.proxy.url)
            except OSError as error:  # includes time-outs
                raise ProxyError(f"{self.proxy}: {error}") from error
        try:
            if self.proxy is not None and target.scheme == "https":
                await self._tunnel(self.proxy, target, reader, writer)
            writer.write(self._request(target))
            yield await _response(_Connection(reader, self.read_timeout))
        finally:
            writer.transport.abort()

    async def _connect(self, url: URL) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host = _host(url)
        # As in aiohttp, a name look-up may take as long as the request.
        results = await self.resolver.resolve(host, url.port or 80, socket.AF_UNSPEC)
        message = f"Connection timeout to host {url.host}"
        return await _within(self.connect_timeout, message, self._open(url, host, results))

    async def _open(
        self, url: URL, host: str, results: Iterable[ResolveResult]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        infos: list[Any] = []
        for result in results:
            flow_and_scope = (0, 0) if result["family"] == socket.AF_INET6 else ()
            address = (result["host"], result["port"], *flow_and_scope)
            infos.append((result["family"], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address))
        sock = await aiohappyeyeballs.start_connection(
            infos, happy_eyeballs_delay=0.25, socket_factory=self.socket_factory
        )
        tls: dict[str, Any] = {"ssl": _tls_context(), "server_hostname": host}
        return await asyncio.open_connection(
            sock=sock, limit=self.buffer, **(tls if url.scheme == "https" else {})
        )

    async def _tunnel(
        self,
        proxy: Proxy,
        target: URL,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Open a tunnel to `target` through the proxy, and start TLS in it."""
        authority = f"{target.host_subcomponent}:{target.port}"
        headers = {"Host": authority, "User-Agent": self.headers["User-Agent"], **proxy.headers}
        writer.write(_request_head(f"CONNECT {authority} HTTP/1.1", headers))
        connection = _Connection(reader, self.read_timeout)
        status, reason, _ = await _status_and_headers(connection)
        check_tunnel(proxy, status, reason)
        if connection.buffer:  # the host cannot have sent them: it has received nothing yet
            raise DownloadError("protocol", "bytes behind the proxy's answer to CONNECT")
        handshake = writer.start_tls(_tls_context(), server_hostname=_host(target))
        await _within(self.connect_timeout, f"Connection timeout to host {target.host}", handshake)

    def _request(self, target: URL) -> bytes:
        headers = {"Host": target.host_port_subcomponent or "", **self.headers}
        if auth := BasicAuth.from_url(target):
            headers["Authorization"] = auth.encode()
        path = target.raw_path_qs
        if self.proxy is not None and target.scheme == "http":
            path = f"http://{headers['Host']}{path}"
            headers |= self.proxy.headers
        return _request_head(f"GET {path} HTTP/1.1", headers | {"Connection": "close"})


def _host(url: URL) -> str:
    return (url.raw_host or "").rstrip(".")


def _request_head(line: str, headers: Mapping[str, str]) -> bytes:
    lines = [line, *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


@cache
def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _within(seconds: float, message: str, work: Coroutine[Any, Any, T]) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise TimeoutError(message) from None


class _Connection:
    """A buffered reader of a connection, with a time-out in `seconds` for each read."""

    def __init__(self, reader: asyncio.StreamReader, seconds: float) -> None:
        self.reader, self.seconds = reader, seconds
        self.buffer = bytearray()

    async def fill(self) -> bool:
        """Read more bytes into the buffer; False at the end of the connection."""
        message = "Timeout on reading data from socket"
        piece = await _within(self.seconds, message, self.reader.read(_READ_BYTES))
        self.buffer += piece
        return bool(piece)

    async def line(self, max_bytes: int, too_long: str) -> bytes | None:
        """The next line without its line break, at most `max_bytes`; None at the end of the connection."""
        searched = 0
        while (end := self.buffer.find(b"\n", searched)) < 0 and len(self.buffer) <= max_bytes:
            searched = len(self.buffer)
            if not await self.fill():
                return None
        if end < 0 or end > max_bytes:
            raise DownloadError("protocol", too_long)
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        return line.removesuffix(b"\r")

    async def read(self, max_bytes: int = _READ_BYTES) -> bytes:
        """Up to `max_bytes` bytes; empty at the end of the connection."""
        if not self.buffer:
            await self.fill()
        piece = bytes(self.buffer[:max_bytes])
        del self.buffer[:max_bytes]
        return piece


async def _response(connection: _Connection) -> Response:
    status, reason, headers = await _status_and_headers(connection)
    if status in (204, 304):
        return Response(status, reason, headers, 0, _exactly(connection, 0), is_lenient=True)
    length, pieces = await _framing(connection, headers)
    return Response(status, reason, headers, length, pieces, is_lenient=True)


async def _status_and_headers(connection: _Connection) -> tuple[int, str, CIMultiDict[str]]:
    """Status, reason and headers of the first response whose status is not 1xx."""
    for _ in range(_MAX_INTERIM + 1):
        bytes_left = MAX_HEADERS
        line = await connection.line(bytes_left, _LONG_HEADERS)
        while line is not None and not line.strip():  # such as the rest of an earlier body
            bytes_left -= len(line) + 1
            line = await connection.line(bytes_left, _LONG_HEADERS)
        if line is None:
            raise DownloadError("refused", "closed without an answer")
        match = _STATUS.fullmatch(line.strip())
        if match is None:
            raise DownloadError("protocol", f"no HTTP: begins with {line[:16]!r}")
        status, reason = int(match[1]), match[2].decode("latin-1")
        headers = await _headers(connection, bytes_left - len(line))
        if status >= 200:
            return status, reason, headers
    raise DownloadError("protocol", f"more than {_MAX_INTERIM} answers of status 1xx")


async def _headers(connection: _Connection, bytes_left: int) -> CIMultiDict[str]:
    """Headers of at most `bytes_left` bytes (RFC 9112 section 5).

    Lines that are no headers are skipped; spaces around a name are dropped.
    """
    headers: list[tuple[str, str]] = []
    lines = 0
    while line := await connection.line(bytes_left, _LONG_HEADERS):
        bytes_left -= len(line) + 1
        lines += 1
        if bytes_left <= 0 or lines > _MAX_HEADER_LINES:
            raise DownloadError("protocol", _LONG_HEADERS)
        text = line.replace(b"\0", b"").decode("utf-8", "surrogateescape")
        name, colon, value = text.partition(":")
        if text[0:1] in (" ", "\t") and headers:  # a continuation of the previous line
            headers[-1] = (headers[-1][0], f"{headers[-1][1]} {text.strip()}".strip())
        elif colon and name.strip():
            headers.append((name.strip(), value.strip()))
    if line is None:
        raise ConnectionClosedError("closed within the headers")
    return CIMultiDict(headers)


async def _framing(
    connection: _Connection, headers: CIMultiDict[str]
) -> tuple[int | None, AsyncIterator[bytes]]:
    """The length of a body, if known, and its pieces (RFC 9112 section 6.3)."""
    if "chunked" in header_tokens(headers, "Transfer-Encoding"):
        buffer = connection.buffer
        while len(buffer) < _SNIFFED_BYTES and b"\n" not in buffer and await connection.fill():
            pass
        if buffer:
            # No chunk size looks like an image: a body that begins as an image is not chunked.
            if image_format(buffer) is None:
                return None, _chunks(connection)
        else:
            raise ConnectionClosedError("closed before the first chunk")
    length = _length(headers)
    return length, _to_end(connection) if length is None else _exactly(connection, length)


def _length(headers: CIMultiDict[str]) -> int | None:
    """The number on which all Content-Length headers agree; None if they have no number."""
    values = ",".join(headers.getall("Content-Length", ())).split(",")
    lengths = {int(match[1]) for match in map(_LENGTH.fullmatch, values) if match is not None}
    if len(lengths) > 1:
        raise DownloadError("protocol", f"Content-Length: {', '.join(map(str, sorted(lengths)))}")
    return lengths.pop() if lengths else None


async def _exactly(connection: _Connection, length: int) -> AsyncIterator[bytes]:
    left = length
    while left:
        if not (piece := await connection.read(left)):
            raise ConnectionClosedError(f"closed after {length - left} of {length} bytes")
        left -= len(piece)
        yield piece


async def _to_end(connection: _Connection) -> AsyncIterator[bytes]:
    while piece := await connection.read():
        yield piece


async def _chunks(connection: _Connection) -> AsyncIterator[bytes]:
    """The data of the chunks (RFC 9112 section 7.1); trailers are not read."""
    while (line := await connection.line(_MAX_CHUNK_LINE, _LONG_CHUNK_LINE)) is not None:
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise DownloadError("protocol", f"a chunk's size is {line[:16]!r}")
        size = int(match[1], 16)
        if not size:
            return
        async for piece in _exactly(connection, size):
            yield piece
        if await connection.line(_MAX_CHUNK_LINE, _LONG_CHUNK_LINE):
            raise DownloadError("protocol", "a chunk is longer than its size")
    raise ConnectionClosedError("closed before the last chunk")
