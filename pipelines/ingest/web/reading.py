"""Reading the body of an answer: bounded on the wire and unpacked, and refused as soon as it can be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from multidict import MultiMapping

from pipelines.ingest.web.answers import DownloadError, check_image
from pipelines.ingest.web.codings import codings, unpacked
from pipelines.ingest.web.pacing import Share
from pipelines.ingest.web.whole import is_whole
from pipelines.pictures.formats import sniffed


@dataclass
class Answer:
    """What came before a body, and the body's `pieces` as they come."""

    status: int
    reason: str
    headers: MultiMapping[str]
    length: int | None  # bytes of the body as sent, where that is known
    pieces: AsyncIterator[bytes]
    is_lenient: bool = False  # read by lenient.py, which tells a clean end from a reset


class CutShortError(DownloadError):
    """The connection was closed, and not reset, before the end of the body: another try may help."""

    def __init__(self, message: str) -> None:
        super().__init__("refused", message)


class UntidyError(Exception):
    """An answer that the strict parser cannot read to its end; the lenient one may."""


async def read_body(answer: Answer, share: Share, cap: int) -> bytes:
    """The body of `answer`, at most `cap` bytes, without its codings.

    A body that is cut short counts where its connection was closed cleanly behind a whole image.
    Raises DownloadError, what `answer.pieces` raises, and UntidyError where the lenient reader is
    to say how the connection ended.
    """
    if (answer.length or 0) > cap:
        raise DownloadError("too_large", f"{answer.length} bytes announced")
    packings = codings(answer.headers)
    content_type = content_type_of(answer.headers)
    body = bytearray()
    looked = False
    try:
        async for piece in answer.pieces:
            body += piece
            if len(body) > cap:
                raise DownloadError("too_large", f"more than {cap} bytes")
            if not packings and not looked and len(body) >= sniffed(body):
                check_image(body, content_type)  # before the rest is read
                looked = True
            await share.grown(len(body))
    except (CutShortError, aiohttp.ClientPayloadError) as error:
        if not _is_whole(body, packings, cap):
            raise
        if not answer.is_lenient:
            raise UntidyError from error
    data = unpacked(body, packings, cap) if packings else bytes(body)
    if not looked:
        check_image(data, content_type)
    return data


def content_type_of(headers: MultiMapping[str]) -> str:
    """The media type of a Content-Type header, in lower case and without parameters."""
    value = headers.get("Content-Type", "application/octet-stream")
    return value.partition(";")[0].strip().lower()


def _is_whole(body: bytearray, packings: list[str], cap: int) -> bool:
    try:
        return is_whole(unpacked(body, packings, cap) if packings else body)
    except DownloadError:
        return False
