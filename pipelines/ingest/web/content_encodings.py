"""Decoding Content-Encoding within a byte limit, and only where it was really applied.

The client requests no encoding, and servers send them all the same: gzip or br without need, `gzip`
as a header on a plain JPEG, or an encoding twice. A body that already is an image stays as it is.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence

import pyarrow as pa
from multidict import MultiMapping

from pipelines.ingest.web.failures import DownloadError
from pipelines.pictures.formats import image_format

_MAX_ENCODINGS = 4
_MAX_GZIP_MEMBERS = 16  # each one costs a copy of the bytes behind it


def content_encodings(headers: MultiMapping[str]) -> list[str]:
    """Encodings of a body that can be decoded, in the order in which they were applied.

    Source: RFC 9110 section 8.4, RFC 9112 section 6.1. Other names are ignored: `identity`, and
    `aws-chunked`, `binary` or `utf-8`, which tools store with a file that is not encoded.
    """
    names = header_tokens(headers, "Content-Encoding") + header_tokens(headers, "Transfer-Encoding")
    return [name for name in names if name in _DECODERS]


def header_tokens(headers: MultiMapping[str], header: str) -> list[str]:
    """The tokens of all headers of that name, in lower case, however they are separated or quoted."""
    values = headers.getall(header, ())
    return re.findall("[a-z-]+", " ".join(values).lower()) if values else []


def decode_body(body: bytes | bytearray, encodings: Sequence[str], max_bytes: int) -> bytes:
    """`body` without those of its `encodings` that were applied; no more than `max_bytes` + 1 bytes are made.

    Raises DownloadError `encoding` for a damaged body, `too_large` beyond `max_bytes`.
    """
    data = bytes(body)
    if len(encodings) > _MAX_ENCODINGS and image_format(data) is None:
        raise DownloadError("encoding", f"{len(encodings)} encodings")
    for name in reversed(encodings[-_MAX_ENCODINGS:]):
        try:
            decoded = _DECODERS[name](data, max_bytes)
        except DownloadError as error:
            if error.kind != "encoding" or image_format(data) is None:
                raise
            return data
        if image_format(decoded) is None and image_format(data) is not None:
            return data  # an encoding without a signature may accept any bytes
        data = decoded
    return data


def decompress(body: bytes | bytearray, max_bytes: int) -> bytes:
    """Decompress gzip (any number of members) or deflate, with or without zlib's header.

    No more than `max_bytes` + 1 bytes are made. A truncated stream gives the bytes that it has.
    """
    # A raw deflate stream has 8 in these bits only if its padding is not zero.
    has_header = body[:2] == b"\x1f\x8b" or (len(body) > 0 and body[0] & 15 == 8)
    wbits = zlib.MAX_WBITS | 32 if has_header else -zlib.MAX_WBITS
    data, rest = bytearray(), bytes(body)
    try:
        for _ in range(_MAX_GZIP_MEMBERS):
            decompressor = zlib.decompressobj(wbits=wbits)
            data += decompressor.decompress(rest, max_bytes + 1 - len(data))
            _check_size(data, max_bytes)
            rest = decompressor.unused_data
            if not rest.startswith(b"\x1f\x8b"):
                return bytes(data)
    except zlib.error as error:
        raise DownloadError("encoding", f"cannot decompress: {error}") from None
    raise DownloadError(
        "encoding", f"cannot decompress: more than {_MAX_GZIP_MEMBERS} gzip members"
    )


def _arrow_decoder(codec: str) -> Callable[[bytes, int], bytes]:
    """A decoder of Arrow's: it is installed anyway and contains brotli and zstd."""

    def decode(body: bytes, max_bytes: int) -> bytes:
        if not body:
            return body
        try:
            with pa.CompressedInputStream(pa.BufferReader(body), codec) as stream:
                data: bytes = stream.read(max_bytes + 1)
        except OSError as error:
            raise DownloadError("encoding", f"cannot decompress: {error}") from None
        _check_size(data, max_bytes)
        return data

    return decode


def _check_size(data: bytes | bytearray, max_bytes: int) -> None:
    if len(data) > max_bytes:
        raise DownloadError("too_large", f"more than {max_bytes} bytes when decompressed")


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": decompress,
    "x-gzip": decompress,
    "deflate": decompress,
    "br": _arrow_decoder("brotli"),
    "zstd": _arrow_decoder("zstd"),
}
