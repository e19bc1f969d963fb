"""The HTTP proxy that requests go through where `download.proxy` names one.

    http://…   GET http://host/path HTTP/1.1     to the proxy, which answers
    https://…  CONNECT host:443 HTTP/1.1         to the proxy; TLS with the host through the tunnel

The proxy looks names up, so it decides which addresses are reached. The one check that is left to
us is on hosts that are private as they are written (`refuse_private`).

A proxy that does not answer, or wants a password, says nothing about a URL. So it is checked before
the first request (`check_proxy`), and waited for when it fails later (`Outage`).
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
from pipelines.ingest.web.answers import DownloadError, http_class
from pipelines.ingest.web.hosts import host_name
from vlv_model.errors import RunError, one_line

WANTS_PASSWORD = 407
PATIENCE_SECONDS = 60.0
"""How long a proxy that fails is waited for before the job ends."""
SILENCE_SECONDS = 30.0
"""After so long without any answer a time-out may be the proxy's."""
LOOK_SECONDS = 1.0
"""Between two requests that look whether it is back."""
CHECKED = "http://proxy-check.invalid/"
"""Of a name that no resolver knows (RFC 6761): every proxy answers for it, and no server is asked."""
_EXPECTED = (
    "expected http://host:port or https://host:port, with user:password@ before the host where the "
    "proxy wants them (signs such as @ : / # in them percent-encoded)"
)


@dataclass(frozen=True)
class Proxy:
    """A proxy without its secrets, and the header that holds them."""

    url: URL  # scheme, host and port alone: it may be in a message
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Proxy:
        """ValueError, which quotes nothing of it, for a text that is no proxy's URL."""
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
        """What the proxy alone is to read."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}

    def __str__(self) -> str:
        return f"{self.url.scheme}://{self.url.host_port_subcomponent}"


def _checked(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(_EXPECTED)  # pydantic's own line would quote the value
    Proxy.parse(value)
    return value


def _without_secrets(value: str) -> str:
    proxy = Proxy.parse(value)
    return str(proxy).replace("://", "://***@", 1) if proxy.authorization else str(proxy)


ProxyURL = Annotated[
    str,
    BeforeValidator(_checked),
    PlainSerializer(_without_secrets, return_type=str, when_used="json"),
]
"""A setting that is shown, printed and stored without user and password."""


class ProxyError(DownloadError):
    """The proxy itself cannot be used: it does not answer, or it wants another password."""

    def __init__(self, message: str) -> None:
        super().__init__("proxy", message)


def wants_password(proxy: Proxy) -> ProxyError:
    """The error for a 407."""
    given = "another user or password than" if proxy.authorization else "a user and password in"
    return ProxyError(f"HTTP {WANTS_PASSWORD}: it wants {given} download.proxy")


def check_tunnel(proxy: Proxy, status: int, reason: str) -> None:
    """Raise for an answer to CONNECT that opens no tunnel, with the class that its status has of a server."""
    if status == WANTS_PASSWORD:
        raise wants_password(proxy)
    if not 200 <= status < 300:
        what = f"the proxy's answer to CONNECT: HTTP {status} {reason}".rstrip()
        raise DownloadError(http_class(status), what)


def refuse_private(target: URL) -> None:
    """Raise for a host that is private as it is written; what other names lead to, the proxy decides."""
    host = host_name(target)
    if is_private_name(host):
        raise BlockedAddressError(f"blocked address {host}")


def check_proxy(proxy: Proxy, seconds: float) -> None:
    """Raise RunError for a proxy that does not answer within `seconds`, or wants a password."""
    secure = proxy.url.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(proxy.url.raw_host or "", proxy.url.port, timeout=seconds)
    try:
        connection.request("GET", CHECKED, headers=proxy.headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise RunError(
            f"download.proxy: {proxy} does not answer as an HTTP proxy ({one_line(error)}): start it, "
            "or give another one; without download.proxy images are fetched directly"
        ) from None
    finally:
        connection.close()
    if status == WANTS_PASSWORD:
        raise RunError(f"download.proxy: {proxy}: {wants_password(proxy)}")


class Outage:
    """Has the URLs of one event loop wait while the proxy fails, and ends the job when it stays so."""

    def __init__(
        self,
        proxy: Proxy,
        patience_seconds: float = PATIENCE_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self.proxy = proxy
        self.patience_seconds, self.look_seconds = patience_seconds, look_seconds
        self.silence_seconds = silence_seconds
        self.answered = time.monotonic()  # when an answer came through last
        self.began: float | None = None  # it has failed since then, for all
        self._looks = asyncio.Lock()

    def over(self) -> None:
        """An answer came through."""
        self.answered, self.began = time.monotonic(), None

    async def judge(
        self, failure: DownloadError, proxy_status: Callable[[], Awaitable[int | None]]
    ) -> DownloadError:
        """`failure`, which is a time-out, or a ProxyError in its place where the proxy answers nobody."""
        if not self._is_silent():
            return failure
        async with self._looks:
            if not self._is_silent():
                return failure
            if await proxy_status() is None:
                return ProxyError(f"{self.proxy}: no answer in time")
            self.over()
            return failure

    def _is_silent(self) -> bool:
        return time.monotonic() - self.answered >= self.silence_seconds

    async def wait(self, failure: DownloadError, since: float) -> bool:
        """Wait for the next request; False for a URL that has failed so `since` long ago.

        Others came through meanwhile, so it may be its own fault. Raises RunError where none did.
        """
        now = time.monotonic()
        if self.began is None:
            self.began = now
        if now - self.began >= self.patience_seconds:
            raise RunError(
                f"download.proxy: {self.proxy} has failed for {self.patience_seconds:g} seconds "
                f"({failure}): the same command continues when it answers again"
            )
        if now - since >= self.patience_seconds:
            return False
        async with self._looks:  # one URL at a time looks whether it is back
            if self.began is not None:
                await asyncio.sleep(self.look_seconds)
        return True
