"""Which hosts give nothing but time-outs: after some of them in a row a host is down.

One dead host may have ten thousand addresses in a list, and each of them would hold one of its few
slots for `total_timeout`, twice. Once in a while one request looks whether it is back.

URLs of a host that is down fail as fast as they come. So a host that has answered before gets
minutes of grace: else half a minute without a line would cost all of a list that it has most of.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from yarl import URL

from pipelines.ingest.web.answers import DownloadError, classify

LOOK_SECONDS = 60.0
"""How long the URLs of a host that is down fail without a request, between two that look again."""
GRACE_SECONDS = 300.0
"""How long a host that has answered has to be silent before it may be down."""
_MOST = 10_000  # hosts that are remembered; what is forgotten is learned again

# These failures do not tell whether the host is alive: no answer came, and no time was lost.
_NEUTRAL = ("refused", "proxy", "tls", "dns", "blocked_address", "bad_url")

_Name = tuple[str, int | None]


@dataclass
class _Host:
    answered: float | None = None  # when it last did
    time_outs: int = 0  # in a row, since then
    look_at: float = 0.0  # when the next request may look again, once the host is down


class Hosts:
    """Remembers of the hosts (with their ports) that were asked last whether they answered."""

    def __init__(
        self,
        limit: int,
        look_seconds: float = LOOK_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        most: int = _MOST,
    ) -> None:
        """`limit` time-outs in a row are evidence that a host is down; `most` hosts are kept."""
        self.limit, self.most = limit, most
        self.look_seconds, self.grace_seconds = look_seconds, grace_seconds
        self.known: OrderedDict[_Name, _Host] = OrderedDict()

    def check(self, target: URL) -> None:
        """Raise DownloadError `host_down` where nothing is to be asked of the host of `target`."""
        host = self.known.get(_name(target))
        if host is None or host.time_outs < self.limit:
            return
        now = time.monotonic()
        if host.answered is not None and now - host.answered < self.grace_seconds:
            return
        if now < host.look_at:
            raise DownloadError("host_down", f"{host.time_outs} time-outs in a row, and no answer")
        host.look_at = now + self.look_seconds

    def answered(self, target: URL) -> None:
        """Note an answer."""
        host = self._get(_name(target))
        host.answered, host.time_outs = time.monotonic(), 0

    def failed(self, target: URL, error: Exception, counts: bool = True) -> None:
        """Note how a request failed: many an error is an answer, and a time-out is the host's only
        where it `counts`.
        """
        failure = classify(error)
        if failure.kind == "timeout" or (failure.kind == "dns" and failure.transient):
            if counts:
                self._timed_out(_name(target))
        elif failure.kind not in _NEUTRAL:
            self.answered(target)

    def _timed_out(self, name: _Name) -> None:
        host = self._get(name)
        host.time_outs += 1
        if host.time_outs == self.limit:
            host.look_at = time.monotonic() + self.look_seconds

    def _get(self, name: _Name) -> _Host:
        host = self.known.setdefault(name, _Host())
        self.known.move_to_end(name)
        if len(self.known) > self.most:
            self.known.popitem(last=False)
        return host


def host_name(target: URL) -> str:
    """A URL's host in its one spelling."""
    return (target.raw_host or "").lower().rstrip(".")


def _name(target: URL) -> _Name:
    return host_name(target), target.port
