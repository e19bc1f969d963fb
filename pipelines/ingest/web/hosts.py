"""A circuit breaker per host: after several time-outs in a row a host counts as down.

One dead host may have ten thousand URLs in a list, and each would hold one of its few slots for
`total_timeout`, twice. URLs of a host that is down fail at once; one request a minute probes it.

A host that has answered before gets minutes of grace: otherwise an outage of half a minute would
fail all of a list that has most of its URLs there.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from yarl import URL

from pipelines.ingest.web.failures import DownloadError, classify

PROBE_SECONDS = 60.0
"""Time between two requests that probe a host that is down."""
GRACE_SECONDS = 300.0
"""How long a host that has answered must be silent before it counts as down."""
_MAX_HOSTS = 10_000  # remembered; a forgotten host is learned again

# These failures do not show whether the host is alive: no answer came, and no time was lost.
_NEUTRAL = ("refused", "proxy", "tls", "dns", "blocked_address", "bad_url")

_HostPort = tuple[str, int | None]


@dataclass
class _Host:
    answered_at: float | None = None
    time_outs: int = 0  # in a row, since then
    next_probe: float = 0.0  # once the host is down


class CircuitBreakers:
    """The state of each recently used host and port."""

    def __init__(
        self,
        limit: int,
        probe_seconds: float = PROBE_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        max_hosts: int = _MAX_HOSTS,
    ) -> None:
        """A host is down after `limit` time-outs in a row; the last `max_hosts` hosts are kept."""
        self.limit, self.max_hosts = limit, max_hosts
        self.probe_seconds, self.grace_seconds = probe_seconds, grace_seconds
        self.hosts: OrderedDict[_HostPort, _Host] = OrderedDict()

    def check(self, target: URL) -> None:
        """Raise DownloadError `host_down` if the host of `target` is down and no probe is due."""
        host = self.hosts.get(_host_port(target))
        if host is None or host.time_outs < self.limit:
            return
        now = time.monotonic()
        if host.answered_at is not None and now - host.answered_at < self.grace_seconds:
            return
        if now < host.next_probe:
            raise DownloadError("host_down", f"{host.time_outs} time-outs in a row, and no answer")
        host.next_probe = now + self.probe_seconds

    def record_answer(self, target: URL) -> None:
        """Note that the host answered."""
        host = self._get(_host_port(target))
        host.answered_at, host.time_outs = time.monotonic(), 0

    def record_failure(self, target: URL, error: Exception, counts: bool = True) -> None:
        """Note how a request failed: a time-out only if it `counts`; many other errors are answers."""
        failure = classify(error)
        if failure.kind == "timeout" or (failure.kind == "dns" and failure.transient):
            if counts:
                self._record_time_out(_host_port(target))
        elif failure.kind not in _NEUTRAL:
            self.record_answer(target)

    def _record_time_out(self, name: _HostPort) -> None:
        host = self._get(name)
        host.time_outs += 1
        if host.time_outs == self.limit:
            host.next_probe = time.monotonic() + self.probe_seconds

    def _get(self, name: _HostPort) -> _Host:
        host = self.hosts.setdefault(name, _Host())
        self.hosts.move_to_end(name)
        if len(self.hosts) > self.max_hosts:
            self.hosts.popitem(last=False)
        return host


def host_name(target: URL) -> str:
    """The normalised host name of a URL."""
    return (target.raw_host or "").lower().rstrip(".")


def _host_port(target: URL) -> _HostPort:
    return host_name(target), target.port
