"""Reading the body of a response, within a byte limit; bodies that are no images are refused early."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from multidict import MultiMapping

from pipelines.ingest.web.byte_budget import BodyReservation
from pipelines.ingest.web.completeness import is_complete
from pipelines.ingest.web.content_encodings import content_encodings, decode_body
from pipelines.ingest.web.failures import DownloadError
from pipelines.pictures.formats import image_format, sniff_length

_MAX_UNPACKED = 8  # times the limit of a small file that is compressed


@dataclass
class Response:
    """The status line and headers of a response, and its body as a stream of `pieces`."""

    status: int
    reason: str
    headers: MultiMapping[str]
    length: int | None  # bytes of the body as sent, if known
    pieces: AsyncIterator[bytes]
    is_lenient: bool = False  # read by lenient.py, which tells a clean end from a reset


class ConnectionClosedError(DownloadError):
    """The server closed the connection, without a reset, before the end; a retry may help."""

    def __init__(self, message: str) -> None:
        super().__init__("refused", message)


class MalformedResponseError(Exception):
    """The strict parser cannot read the response; the lenient one may."""


async def read_body(response: Response, reservation: BodyReservation, max_bytes: int) -> bytes:
    """The body of `response` without its content encodings, at most `max_bytes` bytes.

    A truncated body is accepted if the image in it is complete and the connection was closed
    without a reset. Raises DownloadError, what `response.pieces` raises, and MalformedResponseError
    where only the lenient parser can say how the connection ended.
    """
    if (response.length or 0) > max_bytes:
        raise DownloadError("too_large", f"{response.length} bytes announced")
    encodings = content_encodings(response.headers)
    media_type = content_type_of(response.headers)
    body = bytearray()
    checked = False
    try:
        async for piece in response.pieces:
            body += piece
            if len(body) > max_bytes:
                raise DownloadError("too_large", f"more than {max_bytes} bytes")
            if not encodings and not checked and len(body) >= sniff_length(body):
                check_image(body, media_type)  # before the rest is read
                checked = True
            await reservation.grow(len(body))
    except (ConnectionClosedError, aiohttp.ClientPayloadError) as error:
        if not _is_complete(body, encodings, max_bytes):
            raise
        if not response.is_lenient:
            raise MalformedResponseError from error
    data = decode_body(body, encodings, max_bytes) if encodings else bytes(body)
    if not checked:
        check_image(data, media_type)
    return data


async def read_text(response: Response, reservation: BodyReservation, max_bytes: int) -> bytes:
    """The first `max_bytes` bytes of a small file, without its content encodings; the rest is not read.

    Raises DownloadError, also for a compressed file that unpacks to far more, and what
    `response.pieces` raises.
    """
    body = bytearray()
    async for piece in response.pieces:
        body += piece
        if len(body) >= max_bytes:
            break
    if encodings := content_encodings(response.headers):
        body = bytearray(decode_body(body, encodings, _MAX_UNPACKED * max_bytes))
    return bytes(body[:max_bytes])


def content_type_of(headers: MultiMapping[str]) -> str:
    """The media type of a Content-Type header, in lower case and without parameters."""
    value = headers.get("Content-Type", "application/octet-stream")
    return value.partition(";")[0].strip().lower()


def check_image(head: bytes | bytearray, content_type: str) -> None:
    """Raise DownloadError `not_an_image` if neither the first bytes nor the media type are an image's."""
    if image_format(head) is None and not (head and content_type.startswith("image/")):
        raise DownloadError("not_an_image", f"{content_type}, begins with {bytes(head[:16])!r}")


def _is_complete(body: bytearray, encodings: list[str], max_bytes: int) -> bool:
    try:
        return is_complete(decode_body(body, encodings, max_bytes) if encodings else body)
    except DownloadError:
        return False
