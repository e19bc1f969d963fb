"""Failure classes of downloads, and the checks of URLs, statuses and headers that raise them."""

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

from pipelines.ingest.web.addresses import BlockedAddressError, is_nonstandard_ipv4

FailureClass = Literal[
    "dns",
    "refused",  # also: the connection was reset, or closed within the body
    "timeout",
    "host_down",  # not requested: its host only timed out before
    "proxy",  # the proxy of `download.proxy` could not be used
    "tls",
    "http_4xx",
    "http_404",
    "http_410",
    "http_429",
    "http_5xx",
    "http_other",  # a status without an image, such as 204, 304 or 999
    "redirects",  # too many, or one without a target
    "partial",  # status 206 with only a part of the file
    "protocol",  # not HTTP, or an ambiguous response
    "encoding",  # a Content-Encoding that cannot be decoded
    "too_large",
    "not_an_image",
    "opted_out",
    "blocked_address",
    "bad_url",
    "other",
]
FAILURE_CLASSES: tuple[str, ...] = get_args(FailureClass)
"""All classes that follow `download:` in a row's status."""

TRANSIENT = frozenset(["timeout", "host_down", "proxy", "refused", "http_429", "http_5xx"])
"""Classes for which a retry may succeed; so may one after a resolver's temporary `dns` failure.
`host_down` is only retried by a later run."""

MESSAGE_LENGTH = 200
_MAX_URL = 8192
_BLOCKED = "blocked address"
_RANGE = re.compile(
    r"\s*(?:bytes[\s=]+)?([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})\s*", re.IGNORECASE
)


class DownloadError(Exception):
    """The failure of one attempt, with its class (`kind`); `retry_after` is in seconds.

    A `final` one is not retried in the same run, whatever its class.
    """

    def __init__(
        self,
        kind: FailureClass,
        message: str,
        transient: bool = False,
        retry_after: float = 0.0,
        final: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind, self.final = kind, final
        self.transient = transient or (kind in TRANSIENT and kind != "host_down")
        self.retry_after = retry_after


def parse_url(url: str) -> URL:
    """Parse an http(s) URL with a host. Raises DownloadError `bad_url` for anything else.

    An IPv4 address in a nonstandard spelling is a `blocked_address`, public or not.
    """
    if len(url) > _MAX_URL:
        raise DownloadError("bad_url", f"longer than {_MAX_URL} characters")
    try:
        parsed = _keep_quoted(url)
        host, _ = parsed.raw_host or "", parsed.port
        is_nonstandard = is_nonstandard_ipv4(host)
    except (ValueError, UnicodeError) as error:
        raise DownloadError("bad_url", str(error)) from None
    if parsed.scheme not in ("http", "https"):
        raise DownloadError("bad_url", f"scheme '{parsed.scheme}': only http and https are fetched")
    if not host:
        raise DownloadError("bad_url", "no host")
    if is_nonstandard:
        raise DownloadError("blocked_address", f"{_BLOCKED} {host}: odd spelling")
    return parsed


def redirect_target(target: URL, location: str) -> URL:
    """The target of a redirect of `target`. Raises DownloadError as `parse_url` does."""
    # Bytes that are not UTF-8 arrive as surrogates. yarl would drop them, which changes the target.
    location = re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) & 0xFF:02X}", location)
    try:
        joined = str(target.join(_keep_quoted(location)))
    except (ValueError, UnicodeError) as error:
        raise DownloadError("bad_url", f"Location: {error}") from None
    return parse_url(joined)


def _keep_quoted(url: str) -> URL:
    """A URL that is already quoted keeps its spelling, which a signature may cover."""
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
    """Raise DownloadError `partial` unless a Content-Range covers the complete file.

    Source: RFC 9110 section 14.4, `bytes first-last/complete`.
    """
    match = _RANGE.fullmatch(content_range or "")
    if match is None or int(match[1]) != 0 or int(match[2]) + 1 != int(match[3]):
        raise DownloadError("partial", f"HTTP 206, Content-Range: {content_range}")


def retry_after(header: str | None) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 if it is absent or invalid."""
    if not header:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def classify(error: Exception) -> DownloadError:
    """The DownloadError for any exception of an attempt."""
    message = str(error) or type(error).__name__
    match error:
        case DownloadError():
            return error
        case TimeoutError():  # the base class of aiohttp's time-outs
            return DownloadError("timeout", message)
        case aiohttp.ClientConnectorDNSError():
            temporary = isinstance(error.os_error, socket.gaierror) and (
                error.os_error.errno == socket.EAI_AGAIN
            )
            return DownloadError("dns", message, transient=temporary)
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, socket.gaierror):
            return DownloadError("dns", message)  # for example an IPv6 address with an unknown zone
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
        case aiohttp.ServerDisconnectedError():  # its message quotes all received headers
            return DownloadError("refused", "closed before the end of the headers")
        case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError() | OSError():
            return DownloadError("refused", message)
        case _:
            return DownloadError("other", f"{type(error).__name__}: {message}")


def clean(message: str) -> str:
    """A message without control characters, cut to MESSAGE_LENGTH: safe in a log, a page and a table."""
    cut = message[: 20 * MESSAGE_LENGTH]  # a server may send megabytes
    text = "".join(" " if unicodedata.category(c).startswith(("C", "Z")) else c for c in cut)
    return " ".join(text.split())[:MESSAGE_LENGTH]
