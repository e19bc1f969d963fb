"""The HTTP proxy of `download.proxy`.

    http://…   GET http://host/path HTTP/1.1     to the proxy, which answers
    https://…  CONNECT host:443 HTTP/1.1         to the proxy; TLS with the host through the tunnel

The proxy resolves host names, so it decides which addresses are reached. The client only refuses
URLs whose host is written as a private one (`refuse_private`).

A proxy that does not answer, or requires a password, says nothing about a URL. So it is checked
before the first request (`check_proxy`), and requests wait while it fails later (`Outage`).
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer
from yarl import URL

from pipelines.ingest.web.addresses import BlockedAddressError, is_private_name
from pipelines.ingest.web.failures import DownloadError, http_class
from pipelines.ingest.web.hosts import host_name
from vlv_model.errors import RunError, one_line

AUTH_REQUIRED = 407
MAX_OUTAGE_SECONDS = 60.0
"""How long the proxy may fail before the job ends."""
SILENCE_SECONDS = 30.0
"""After this time without any answer, a time-out may be the proxy's fault."""
PROBE_SECONDS = 1.0
"""Time between two requests that probe a failing proxy."""
PROBE_URL = "http://proxy-check.invalid/"
"""No resolver knows this name (RFC 6761): the proxy itself answers, and no server is reached."""
_EXPECTED = (
    "expected http://host:port or https://host:port, with user:password@ before the host where the "
    "proxy wants them (signs such as @ : / # in them percent-encoded)"
)


@dataclass(frozen=True)
class Proxy:
    """A proxy's address, and its credentials apart from it."""

    url: URL  # scheme, host and port only, as it may be in a message
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Proxy:
        """Parse a proxy's URL. Raises ValueError, without the text, which may contain a password."""
        try:
            url = URL(text)
            host, port = url.raw_host, url.explicit_port
            user, password = url.user, url.password
        except ValueError:
            raise ValueError(f"not a URL: {_EXPECTED}") from None
        if url.scheme not in ("http", "https"):
            raise ValueError(f"it does not begin with http:// or https://: {_EXPECTED}")
        if not host or port is None:
            raise ValueError(f"it has no {'port' if host else 'host'}: {_EXPECTED}")
        if url.raw_path not in ("", "/") or url.raw_query_string or url.raw_fragment:
            raise ValueError(f"something follows the port: {_EXPECTED}")
        authorization = None
        if user is not None or password is not None:
            secret = f"{user or ''}:{password or ''}".encode()
            authorization = f"Basic {base64.b64encode(secret).decode()}"
        return cls(url.with_user(None).with_path("/"), authorization)

    @property
    def headers(self) -> dict[str, str]:
        """Headers for the proxy only."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}

    def __str__(self) -> str:
        return f"{self.url.scheme}://{self.url.host_port_subcomponent}"


def _validate(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(_EXPECTED)  # pydantic's message would quote the value
    Proxy.parse(value)
    return value


def _hide_credentials(value: str) -> str:
    proxy = Proxy.parse(value)
    return str(proxy).replace("://", "://***@", 1) if proxy.authorization else str(proxy)


ProxyURL = Annotated[
    str,
    BeforeValidator(_validate),
    PlainSerializer(_hide_credentials, return_type=str, when_used="json"),
]
"""A setting that is printed and stored without user and password."""


class ProxyError(DownloadError):
    """The proxy itself cannot be used: it does not answer, or it requires another password."""

    def __init__(self, message: str) -> None:
        super().__init__("proxy", message)


def auth_error(proxy: Proxy) -> ProxyError:
    """The error for a status 407."""
    wanted = "another user or password than" if proxy.authorization else "a user and password in"
    return ProxyError(f"HTTP {AUTH_REQUIRED}: it wants {wanted} download.proxy")


def check_tunnel(proxy: Proxy, status: int, reason: str) -> None:
    """Raise DownloadError if a response to CONNECT opens no tunnel.

    Its class is that of the same status from a server; status 407 raises ProxyError.
    """
    if status == AUTH_REQUIRED:
        raise auth_error(proxy)
    if not 200 <= status < 300:
        message = f"the proxy's answer to CONNECT: HTTP {status} {reason}".rstrip()
        raise DownloadError(http_class(status), message)


def refuse_private(target: URL) -> None:
    """Raise BlockedAddressError if the host of a URL is written as a private address or name."""
    host = host_name(target)
    if is_private_name(host):
        raise BlockedAddressError(f"blocked address {host}")


def check_proxy(proxy: Proxy, seconds: float) -> None:
    """Raise RunError if a proxy does not answer within `seconds`, or requires a password."""
    is_https = proxy.url.scheme == "https"
    connect = http.client.HTTPSConnection if is_https else http.client.HTTPConnection
    connection = connect(proxy.url.raw_host or "", proxy.url.port, timeout=seconds)
    try:
        connection.request("GET", PROBE_URL, headers=proxy.headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise RunError(
            f"download.proxy: {proxy} does not answer as an HTTP proxy ({one_line(error)}): start it, "
            "or give another one; without download.proxy images are fetched directly"
        ) from None
    finally:
        connection.close()
    if status == AUTH_REQUIRED:
        raise RunError(f"download.proxy: {proxy}: {auth_error(proxy)}")


class Outage:
    """Makes the requests of one event loop wait while the proxy fails; ends the job if it keeps failing."""

    def __init__(
        self,
        proxy: Proxy,
        max_seconds: float = MAX_OUTAGE_SECONDS,
        probe_seconds: float = PROBE_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self.proxy = proxy
        self.max_seconds, self.probe_seconds = max_seconds, probe_seconds
        self.silence_seconds = silence_seconds
        self.answered_at = time.monotonic()  # the last answer to any request
        self.began_at: float | None = None  # all requests have failed since then
        self._probe = asyncio.Lock()

    def end(self) -> None:
        """Note that an answer came through the proxy."""
        self.answered_at, self.began_at = time.monotonic(), None

    async def judge(
        self, failure: DownloadError, proxy_status: Callable[[], Awaitable[int | None]]
    ) -> DownloadError:
        """The time-out `failure`, or a ProxyError if the proxy does not answer at all."""
        if not self._is_silent():
            return failure
        async with self._probe:
            if not self._is_silent():
                return failure
            if await proxy_status() is None:
                return ProxyError(f"{self.proxy}: no answer in time")
            self.end()
            return failure

    def _is_silent(self) -> bool:
        return time.monotonic() - self.answered_at >= self.silence_seconds

    async def wait(self, failure: DownloadError, since: float) -> bool:
        """Wait before the next attempt of a URL that has failed this way `since` a time.

        False if it failed for too long while other URLs got answers: it may be its own fault. Raises
        RunError if no URL got an answer.
        """
        now = time.monotonic()
        if self.began_at is None:
            self.began_at = now
        if now - self.began_at >= self.max_seconds:
            raise RunError(
                f"download.proxy: {self.proxy} has failed for {self.max_seconds:g} seconds "
                f"({failure}): the same command continues when it answers again"
            )
        if now - since >= self.max_seconds:
            return False
        async with self._probe:  # one URL at a time probes the proxy
            if self.began_at is not None:
                await asyncio.sleep(self.probe_seconds)
        return True
