"""Which hosts give nothing but time-outs: after some of them in a row a host is down.

One dead host may have ten thousand addresses in a list, and each of them would hold one of its few
slots for `total_timeout`, twice. Once in a while one request looks whether it is back.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from yarl import URL

from pipelines.ingest.answers import DownloadError, classify

LOOK_SECONDS = 60.0
"""How long the URLs of a host that is down fail without a request, between two that look again."""
_MOST = 10_000  # hosts that are remembered; what is forgotten is learned again

# They say nothing of the host: no answer came, and no time was lost.
_NEUTRAL = ("refused", "tls", "dns", "blocked_address", "bad_url")


@dataclass
class _Silence:
    time_outs: int = 0  # in a row
    look_at: float = 0.0  # when the next request may look again, once the host is down


class Hosts:
    """Remembers the hosts (with their ports) that have not answered since their last time-out."""

    def __init__(self, limit: int, look_seconds: float = LOOK_SECONDS, most: int = _MOST) -> None:
        """`limit` time-outs in a row are evidence that a host is down; the `most` hosts are
        remembered whose time-outs are the latest.
        """
        self.limit, self.look_seconds, self.most = limit, look_seconds, most
        self.silent: OrderedDict[tuple[str, int | None], _Silence] = OrderedDict()

    def check(self, target: URL) -> None:
        """Raise DownloadError `host_down` where nothing is to be asked of the host of `target`."""
        silence = self.silent.get(_host(target))
        if silence is None or silence.time_outs < self.limit:
            return
        now = time.monotonic()
        if now < silence.look_at:
            count = silence.time_outs
            raise DownloadError("host_down", f"{count} time-outs in a row, and no answer")
        silence.look_at = now + self.look_seconds

    @contextmanager
    def asked(self, target: URL, counts: bool = True) -> Iterator[None]:
        """Note how a request ends; a time-out is the host's only where it `counts`."""
        host = _host(target)
        try:
            yield
        except Exception as error:
            failure = classify(error)
            late = failure.kind == "timeout" or (failure.kind == "dns" and failure.transient)
            if late and counts:
                self._note(host)
            elif not late and failure.kind not in _NEUTRAL:
                self.silent.pop(host, None)
            raise
        self.silent.pop(host, None)

    def _note(self, host: tuple[str, int | None]) -> None:
        silence = self.silent.setdefault(host, _Silence())
        self.silent.move_to_end(host)
        silence.time_outs += 1
        if silence.time_outs == self.limit:
            silence.look_at = time.monotonic() + self.look_seconds
        if len(self.silent) > self.most:
            self.silent.popitem(last=False)


def _host(target: URL) -> tuple[str, int | None]:
    return (target.raw_host or "").lower().rstrip("."), target.port
