"""Undoing Content-Encoding: within a bound, and only where it is what was sent.

We ask for no coding, and servers send them all the same: without need (gzip, br), by name alone
(`gzip` on a plain JPEG), or twice. What counts is the image: a body that is one as it came is
taken as it is.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence

import pyarrow as pa
from multidict import MultiMapping

from pipelines.ingest.web.answers import DownloadError
from pipelines.pictures.formats import image_format

_MAX_CODINGS = 4
_MAX_MEMBERS = 16  # each of them costs a copy of what follows it


def codings(headers: MultiMapping[str]) -> list[str]:
    """Codings of a body that can be undone, in the order in which they were applied.

    Source: RFC 9110 section 8.4, RFC 9112 section 6.1. Other names are passed over: `identity`,
    and `aws-chunked`, `binary` or `utf-8`, which tools store with a file that is not coded.
    """
    names = words(headers, "Content-Encoding") + words(headers, "Transfer-Encoding")
    return [name for name in names if name in _UNDO]


def words(headers: MultiMapping[str], header: str) -> list[str]:
    """The words of all headers of a name, in lower case, however they are separated or quoted."""
    values = headers.getall(header, ())
    return re.findall("[a-z-]+", " ".join(values).lower()) if values else []


def unpacked(body: bytes | bytearray, names: Sequence[str], cap: int) -> bytes:
    """`body` without its codings `names`, as far as they were applied; makes at most `cap` + 1
    bytes. DownloadError `encoding` where it is damaged, `too_large` beyond `cap`.
    """
    data = bytes(body)
    if len(names) > _MAX_CODINGS and image_format(data) is None:
        raise DownloadError("encoding", f"{len(names)} codings")
    for name in reversed(names[-_MAX_CODINGS:]):
        try:
            plain = _UNDO[name](data, cap)
        except DownloadError as error:
            if error.kind != "encoding" or image_format(data) is None:
                raise
            return data
        if image_format(plain) is None and image_format(data) is not None:
            return data  # any bytes may happen to be a stream of a coding without a signature
        data = plain
    return data


def decompress(body: bytes | bytearray, cap: int) -> bytes:
    """Undo gzip (of any number of members) or deflate, with zlib's header or without; never makes
    more than `cap` + 1 bytes. A stream that is cut gives what there is of it.
    """
    # A bare deflate stream has 8 there only in padding that is not zero.
    wrapped = body[:2] == b"\x1f\x8b" or (len(body) > 0 and body[0] & 15 == 8)
    wbits = zlib.MAX_WBITS | 32 if wrapped else -zlib.MAX_WBITS
    data, rest = bytearray(), bytes(body)
    try:
        for _ in range(_MAX_MEMBERS):
            unpacker = zlib.decompressobj(wbits=wbits)
            data += unpacker.decompress(rest, cap + 1 - len(data))
            _check_size(data, cap)
            rest = unpacker.unused_data
            if not rest.startswith(b"\x1f\x8b"):
                return bytes(data)
    except zlib.error as error:
        raise DownloadError("encoding", f"cannot decompress: {error}") from None
    raise DownloadError("encoding", f"cannot decompress: more than {_MAX_MEMBERS} gzip members")


def _by_arrow(codec: str) -> Callable[[bytes, int], bytes]:
    """Undoes a coding that Arrow knows: its own copies of brotli and zstd are installed anyway."""

    def undo(body: bytes, cap: int) -> bytes:
        if not body:
            return body
        try:
            with pa.CompressedInputStream(pa.BufferReader(body), codec) as stream:
                data: bytes = stream.read(cap + 1)
        except OSError as error:
            raise DownloadError("encoding", f"cannot decompress: {error}") from None
        _check_size(data, cap)
        return data

    return undo


def _check_size(data: bytes | bytearray, cap: int) -> None:
    if len(data) > cap:
        raise DownloadError("too_large", f"more than {cap} bytes when decompressed")


_UNDO: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": decompress,
    "x-gzip": decompress,
    "deflate": decompress,
    "br": _by_arrow("brotli"),
    "zstd": _by_arrow("zstd"),
}
