"""Judging what the web answers: URLs, statuses, headers, errors, and the class of each failure."""

from __future__ import annotations

import email.utils
import re
import socket
import ssl
import time
import unicodedata
from typing import Literal, get_args

import aiohttp
from yarl import URL

from pipelines.ingest.web.addresses import BlockedAddressError, odd_spelling
from pipelines.pictures.formats import image_format

FailureClass = Literal[
    "dns",
    "refused",  # also reset, or cut in the middle of the body
    "timeout",
    "host_down",  # not asked: its host gave nothing but time-outs
    "proxy",  # the proxy of `download.proxy` could not be used for it
    "tls",
    "http_4xx",
    "http_404",
    "http_410",
    "http_429",
    "http_5xx",
    "http_other",  # a status that brings no picture, such as 204, 304 or 999
    "redirects",  # too many of them, or one that leads nowhere
    "partial",  # status 206 of a part
    "protocol",  # no HTTP, or an answer that may mean two things
    "encoding",  # a Content-Encoding that cannot be undone
    "too_large",
    "not_an_image",
    "opted_out",
    "blocked_address",
    "bad_url",
    "other",
]
FAILURE_CLASSES: tuple[str, ...] = get_args(FailureClass)
"""The closed list behind `download:` in a row's status."""

TRANSIENT = frozenset(["timeout", "host_down", "proxy", "refused", "http_429", "http_5xx"])
"""Classes that another attempt may mend; of `dns`, a resolver's temporary failure too. An attempt
of the same run does not mend `host_down`."""

MESSAGE_LENGTH = 200
_MAX_URL = 8192
_BLOCKED = "blocked address"
_RANGE = re.compile(
    r"\s*(?:bytes[\s=]+)?([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})\s*", re.IGNORECASE
)


class DownloadError(Exception):
    """One attempt's failure, by class."""

    def __init__(
        self, kind: FailureClass, message: str, transient: bool = False, retry_after: float = 0.0
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.transient = transient or (kind in TRANSIENT and kind != "host_down")
        self.retry_after = retry_after


def parse_url(url: str) -> URL:
    """An http(s) URL with a host; DownloadError `bad_url` for anything else.

    An IPv4 address in an odd spelling is a `blocked_address`, wherever it may lead.
    """
    if len(url) > _MAX_URL:
        raise DownloadError("bad_url", f"longer than {_MAX_URL} characters")
    try:
        parsed = _to_the_letter(url)
        host, _ = parsed.raw_host or "", parsed.port
        odd = odd_spelling(host)
    except (ValueError, UnicodeError) as error:
        raise DownloadError("bad_url", str(error)) from None
    if parsed.scheme not in ("http", "https"):
        raise DownloadError("bad_url", f"scheme '{parsed.scheme}': only http and https are fetched")
    if not host:
        raise DownloadError("bad_url", "no host")
    if odd:
        raise DownloadError("blocked_address", f"{_BLOCKED} {host}: odd spelling")
    return parsed


def redirected(target: URL, location: str) -> URL:
    """Where a redirect of `target` leads; DownloadError as `parse_url` raises it."""
    # Bytes that are no UTF-8 come as surrogates. Dropped, as yarl does, they lead elsewhere.
    location = re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) & 0xFF:02X}", location)
    try:
        joined = str(target.join(_to_the_letter(location)))
    except (ValueError, UnicodeError) as error:
        raise DownloadError("bad_url", f"Location: {error}") from None
    return parse_url(joined)


def _to_the_letter(url: str) -> URL:
    """What is quoted already is sent as it is: a signature may cover its spelling."""
    quoted = url.isascii() and all("!" <= c <= "~" and c not in '"<>\\^`{|}' for c in url)
    return URL(url, encoded=quoted)


def http_class(code: int) -> FailureClass:
    """The class of an HTTP status that is neither success nor a redirect."""
    if code == 404:
        return "http_404"
    if code == 410:
        return "http_410"
    if code == 429:
        return "http_429"
    return "http_4xx" if 400 <= code < 500 else "http_5xx" if 500 <= code < 600 else "http_other"


def check_range(content_range: str | None) -> None:
    """DownloadError `partial` where a Content-Range does not say that all of the file is there.

    Source: RFC 9110 section 14.4, `bytes first-last/complete`.
    """
    match = _RANGE.fullmatch(content_range or "")
    if match is None or int(match[1]) != 0 or int(match[2]) + 1 != int(match[3]):
        raise DownloadError("partial", f"HTTP 206, Content-Range: {content_range}")


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 without a sound one."""
    if not header:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def classify(error: Exception) -> DownloadError:
    """The class of whatever an attempt raised."""
    message = str(error) or type(error).__name__
    match error:
        case DownloadError():
            return error
        case TimeoutError():  # aiohttp's derive from it
            return DownloadError("timeout", message)
        case aiohttp.ClientConnectorDNSError():
            temporary = isinstance(error.os_error, socket.gaierror) and (
                error.os_error.errno == socket.EAI_AGAIN
            )
            return DownloadError("dns", message, transient=temporary)
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, socket.gaierror):
            return DownloadError("dns", message)  # such as an IPv6 address with an unknown zone
        case socket.gaierror():
            return DownloadError("dns", message, transient=error.errno == socket.EAI_AGAIN)
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return DownloadError("tls", message)
        case aiohttp.InvalidURL() | UnicodeError():
            return DownloadError("bad_url", message)
        case aiohttp.ClientConnectorError() if _BLOCKED in str(error.os_error):
            return DownloadError("blocked_address", str(error.os_error))
        case OSError() if isinstance(error, BlockedAddressError) or _BLOCKED in message:
            return DownloadError("blocked_address", message)
        case aiohttp.ServerDisconnectedError():  # its message has all headers that came
            return DownloadError("refused", "closed before the end of the headers")
        case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError() | OSError():
            return DownloadError("refused", message)
        case _:
            return DownloadError("other", f"{type(error).__name__}: {message}")


def clean(message: str) -> str:
    """A message that is safe in a log, a page and a table: no control characters, cut."""
    cut = message[: 20 * MESSAGE_LENGTH]  # a server may say megabytes
    text = "".join(" " if unicodedata.category(c).startswith(("C", "Z")) else c for c in cut)
    return " ".join(text.split())[:MESSAGE_LENGTH]


def check_image(head: bytes | bytearray, content_type: str) -> None:
    """Raise `not_an_image` for a body that neither begins like an image nor is called one."""
    if image_format(head) is None and not (head and content_type.startswith("image/")):
        raise DownloadError("not_an_image", f"{content_type}, begins with {bytes(head[:16])!r}")
