"""HTTP as it is spoken: a reader of one answer that forgives what browsers and curl forgive.

It is asked where the strict parser gave up. What is forgiven is safe because a connection serves
one request alone: whatever else comes on it is dropped with it, and is no other URL's answer.
Where an answer may mean two things (two lengths, a chunk that is not as long as it says) it is
refused as `protocol`.
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

from pipelines.ingest.web.answers import DownloadError
from pipelines.ingest.web.codings import words
from pipelines.ingest.web.proxy import Proxy, ProxyError, check_tunnel
from pipelines.ingest.web.reading import Answer, CutShortError
from pipelines.pictures.formats import image_format

T = TypeVar("T")

MAX_HEADERS = 256 << 10
"""Bytes of all headers of an answer together, as in browsers."""
_MAX_HEADER_LINES = 2000  # in memory each of them takes far more than its bytes
_MAX_LINE = 4096  # bytes of a line between chunks
_LONG_HEADERS = f"headers of more than {MAX_HEADERS} bytes or {_MAX_HEADER_LINES} lines"
_LONG_LINE = f"a chunk's line of more than {_MAX_LINE} bytes"
_TOLD_BY = 64  # bytes of a body that tell an image from a chunk's size
_MAX_INTERIM = 8  # answers of status 1xx before the one that counts
_PIECE = 64 << 10  # bytes that are read at once
# ICY is what radio servers say. The version is of no use: we ask for one answer and the end.
_STATUS = re.compile(
    rb"(?:HTTP(?:/\s*[\d.]+)?|ICY)\s+0*([1-9]\d\d)(?!\d)\s*(.*)", re.IGNORECASE | re.DOTALL
)
_CHUNK = re.compile(rb"\s*([0-9a-fA-F]{1,16})(?:[\s;].*)?", re.DOTALL)
_LENGTH = re.compile(r"\s*0*([0-9]{1,18})\s*", re.ASCII)  # longer ones are -1 or such, unsigned


class LenientClient:
    """Asks for one URL on a connection of its own."""

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
        """`headers` of every request; `buffer` bytes at twice which a connection stops reading;
        time-outs in seconds. `socket_factory` refuses the addresses that are not to be reached.
        """
        self.headers, self.resolver, self.socket_factory = headers, resolver, socket_factory
        self.connect_timeout, self.read_timeout = connect_timeout, read_timeout
        self.buffer, self.proxy = buffer, proxy

    @contextlib.asynccontextmanager
    async def get(self, target: URL) -> AsyncIterator[Answer]:
        """The answer to a GET of `target`. Raises OSError, TimeoutError and DownloadError."""
        if self.proxy is None:
            reader, writer = await self._connect(target)
        else:
            try:
                reader, writer = await self._connect(self.proxy.url)
            except OSError as error:  # time-outs are among them
                raise ProxyError(f"{self.proxy}: {error}") from error
        try:
            if self.proxy is not None and target.scheme == "https":
                await self._tunnel(self.proxy, target, reader, writer)
            writer.write(self._request(target))
            yield await _answer(_Wire(reader, self.read_timeout))
        finally:
            writer.transport.abort()

    async def _connect(self, place: URL) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host = _host(place)
        # As with aiohttp, a look-up has as long as the request.
        found = await self.resolver.resolve(host, place.port or 80, socket.AF_UNSPEC)
        what = f"Connection timeout to host {place.host}"
        return await _within(self.connect_timeout, what, self._open(place, host, found))

    async def _open(
        self, place: URL, host: str, found: Iterable[ResolveResult]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        infos: list[Any] = []
        for result in found:
            six = (0, 0) if result["family"] == socket.AF_INET6 else ()
            address = (result["host"], result["port"], *six)
            infos.append((result["family"], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address))
        sock = await aiohappyeyeballs.start_connection(
            infos, happy_eyeballs_delay=0.25, socket_factory=self.socket_factory
        )
        secure: dict[str, Any] = {"ssl": _tls(), "server_hostname": host}
        return await asyncio.open_connection(
            sock=sock, limit=self.buffer, **(secure if place.scheme == "https" else {})
        )

    async def _tunnel(
        self,
        proxy: Proxy,
        target: URL,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Have the proxy connect to `target`, and begin TLS with it."""
        place = f"{target.host_subcomponent}:{target.port}"
        headers = {"Host": place, "User-Agent": self.headers["User-Agent"], **proxy.headers}
        writer.write(_head(f"CONNECT {place} HTTP/1.1", headers))
        wire = _Wire(reader, self.read_timeout)
        status, reason, _ = await _status_and_headers(wire)
        check_tunnel(proxy, status, reason)
        if wire.held:  # sent before the host could know of us
            raise DownloadError("protocol", "bytes behind the proxy's answer to CONNECT")
        secured = writer.start_tls(_tls(), server_hostname=_host(target))
        await _within(self.connect_timeout, f"Connection timeout to host {target.host}", secured)

    def _request(self, target: URL) -> bytes:
        headers = {"Host": target.host_port_subcomponent or "", **self.headers}
        if auth := BasicAuth.from_url(target):
            headers["Authorization"] = auth.encode()
        path = target.raw_path_qs
        if self.proxy is not None and target.scheme == "http":
            path = f"http://{headers['Host']}{path}"
            headers |= self.proxy.headers
        return _head(f"GET {path} HTTP/1.1", headers | {"Connection": "close"})


def _host(place: URL) -> str:
    return (place.raw_host or "").rstrip(".")


def _head(line: str, headers: Mapping[str, str]) -> bytes:
    lines = [line, *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


@cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _within(seconds: float, what: str, work: Coroutine[Any, Any, T]) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise TimeoutError(what) from None


class _Wire:
    """The bytes that came on a connection and are not read yet."""

    def __init__(self, reader: asyncio.StreamReader, seconds: float) -> None:
        self.reader, self.seconds = reader, seconds
        self.held = bytearray()

    async def fill(self) -> bool:
        """Hold more bytes; False at the end of the connection."""
        what = "Timeout on reading data from socket"
        piece = await _within(self.seconds, what, self.reader.read(_PIECE))
        self.held += piece
        return bool(piece)

    async def line(self, most: int, too_long: str) -> bytes | None:
        """The next line without its end, of `most` bytes; None where the connection ends."""
        looked = 0
        while (end := self.held.find(b"\n", looked)) < 0 and len(self.held) <= most:
            looked = len(self.held)
            if not await self.fill():
                return None
        if end < 0 or end > most:
            raise DownloadError("protocol", too_long)
        line = bytes(self.held[:end])
        del self.held[: end + 1]
        return line.removesuffix(b"\r")

    async def some(self, most: int = _PIECE) -> bytes:
        """Up to `most` bytes; none at the end of the connection."""
        if not self.held:
            await self.fill()
        piece = bytes(self.held[:most])
        del self.held[:most]
        return piece


async def _answer(wire: _Wire) -> Answer:
    status, reason, headers = await _status_and_headers(wire)
    if status in (204, 304):
        return Answer(status, reason, headers, 0, _exactly(wire, 0), is_lenient=True)
    length, pieces = await _framing(wire, headers)
    return Answer(status, reason, headers, length, pieces, is_lenient=True)


async def _status_and_headers(wire: _Wire) -> tuple[int, str, CIMultiDict[str]]:
    """Status, reason and headers of the first answer that is not of status 1xx."""
    for _ in range(_MAX_INTERIM + 1):
        left = MAX_HEADERS
        line = await wire.line(left, _LONG_HEADERS)
        while line is not None and not line.strip():  # such as what a body before it had left
            left -= len(line) + 1
            line = await wire.line(left, _LONG_HEADERS)
        if line is None:
            raise DownloadError("refused", "closed without an answer")
        match = _STATUS.fullmatch(line.strip())
        if match is None:
            raise DownloadError("protocol", f"no HTTP: begins with {line[:16]!r}")
        status, reason = int(match[1]), match[2].decode("latin-1")
        headers = await _headers(wire, left - len(line))
        if status >= 200:
            return status, reason, headers
    raise DownloadError("protocol", f"more than {_MAX_INTERIM} answers of status 1xx")


async def _headers(wire: _Wire, left: int) -> CIMultiDict[str]:
    """Headers of at most `left` bytes (RFC 9112 section 5): a line that is none is passed over,
    blanks around a name are no part of it.
    """
    found: list[tuple[str, str]] = []
    lines = 0
    while line := await wire.line(left, _LONG_HEADERS):
        left -= len(line) + 1
        lines += 1
        if left <= 0 or lines > _MAX_HEADER_LINES:
            raise DownloadError("protocol", _LONG_HEADERS)
        text = line.replace(b"\0", b"").decode("utf-8", "surrogateescape")
        name, colon, value = text.partition(":")
        if text[0:1] in (" ", "\t") and found:  # it goes on from the line before
            found[-1] = (found[-1][0], f"{found[-1][1]} {text.strip()}".strip())
        elif colon and name.strip():
            found.append((name.strip(), value.strip()))
    if line is None:
        raise CutShortError("closed within the headers")
    return CIMultiDict(found)


async def _framing(
    wire: _Wire, headers: CIMultiDict[str]
) -> tuple[int | None, AsyncIterator[bytes]]:
    """The length of a body, where it is known, and its pieces (RFC 9112 section 6.3)."""
    if "chunked" in words(headers, "Transfer-Encoding"):
        while len(wire.held) < _TOLD_BY and b"\n" not in wire.held and await wire.fill():
            pass
        if wire.held:
            # No image begins like a chunk's size, so this one is chunked by name alone.
            if image_format(wire.held) is None:
                return None, _chunks(wire)
        else:
            raise CutShortError("closed before the first chunk")
    length = _length(headers)
    return length, _to_the_end(wire) if length is None else _exactly(wire, length)


def _length(headers: CIMultiDict[str]) -> int | None:
    """What all Content-Length headers agree on; None without a number in them."""
    values = ",".join(headers.getall("Content-Length", ())).split(",")
    lengths = {int(match[1]) for match in map(_LENGTH.fullmatch, values) if match is not None}
    if len(lengths) > 1:
        raise DownloadError("protocol", f"Content-Length: {', '.join(map(str, sorted(lengths)))}")
    return lengths.pop() if lengths else None


async def _exactly(wire: _Wire, length: int) -> AsyncIterator[bytes]:
    left = length
    while left:
        if not (piece := await wire.some(left)):
            raise CutShortError(f"closed after {length - left} of {length} bytes")
        left -= len(piece)
        yield piece


async def _to_the_end(wire: _Wire) -> AsyncIterator[bytes]:
    while piece := await wire.some():
        yield piece


async def _chunks(wire: _Wire) -> AsyncIterator[bytes]:
    """The data of chunks (RFC 9112 section 7.1); trailers stay unread."""
    while (line := await wire.line(_MAX_LINE, _LONG_LINE)) is not None:
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise DownloadError("protocol", f"a chunk's size is {line[:16]!r}")
        size = int(match[1], 16)
        if not size:
            return
        async for piece in _exactly(wire, size):
            yield piece
        if await wire.line(_MAX_LINE, _LONG_LINE):
            raise DownloadError("protocol", "a chunk is longer than its size")
    raise CutShortError("closed before the last chunk")
