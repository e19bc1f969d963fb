"""The rules of each site that a URL may break: robots.txt and tdmrep.json, fetched once for a run.

    URL ──▶ its site's rules: in this process? ── in the store (rules_store.py)? ── fetched
              '── refused: DownloadError `opted_out`, before any request for the image

A site is a scheme, host and port, and each hop of a redirect has its own. Of the two files:

| answer | robots.txt | tdmrep.json |
|---|---|---|
| 2xx | its rules | its entries |
| 4xx but 429; more than five redirects | no rules | no entries |
| 429, 5xx, another status, no answer, a blocked address | refuses all, with the class of the failure | no entries |

Source: RFC 9309 section 2.3.1; TDM Reservation Protocol, section 5.1.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

from yarl import URL

from pipelines.ingest.web.failures import DownloadError, FailureClass, clean
from pipelines.ingest.web.hosts import host_name
from pipelines.ingest.web.optout import Rule
from pipelines.ingest.web.robots import (
    TDM_PATH,
    RobotsTxt,
    own_rules,
    reservation,
    reservations,
    text_of,
)
from pipelines.ingest.web.rules_store import RulesClient

T = TypeVar("T")

SITE_RULES: tuple[Rule, ...] = ("robots_txt", "tdm_file")
"""The rules that lie in a file of the site."""
MAX_REDIRECTS = 5
"""Redirects to follow to such a file (RFC 9309 section 2.3.1.2)."""
VALID_SECONDS = 24 * 3600.0
"""How long rules are valid (RFC 9309 section 2.4)."""
FAILURE_SECONDS = 300.0
"""How long a failure is: an outage must not refuse a large site for all of a run."""

_UNAVAILABLE: tuple[FailureClass, ...] = ("http_4xx", "http_404", "http_410", "redirects")
_MAX_SITES = 10_000  # with parsed rules in this process
_MAX_TEXT = 4 << 20  # characters of all of them; parsed they take about thirty times as much
_LARGE_TEXT = 16 << 10  # characters above which rules are parsed and matched beside the event loop

Fetch = Callable[[URL, int], Awaitable[bytes]]
"""Fetches a small file, with a priority; raises DownloadError."""


@dataclass
class SiteRules:
    """The rules of one site for this crawler."""

    until: float  # the time at which they have to be fetched again
    failure: tuple[FailureClass, str] | None = None  # why there is no robots.txt to read
    robots: str = ""  # the lines of `own_rules`
    reservations: list[tuple[str, bool]] = field(default_factory=list)

    @cached_property
    def robots_txt(self) -> RobotsTxt:
        """The parsed rules."""
        return RobotsTxt(self.robots)

    @property
    def size(self) -> int:
        """Characters of the rules."""
        return len(self.robots) + sum(len(location) for location, _ in self.reservations)

    def check(self, target: URL, reads_usage: bool) -> None:
        """Raise DownloadError if a URL of the site may not be fetched. With `reads_usage`, a Content-Usage
        rule of robots.txt counts too.
        """
        if self.failure is not None:
            kind, message = self.failure
            raise DownloadError(kind, f"robots.txt: {message}", final=True)
        if self.robots:
            refusal = self.robots_txt.refusal(target)
            if refusal is None and reads_usage:
                refusal = self.robots_txt.usage_refusal(target)
            if refusal:
                raise DownloadError("opted_out", f"robots.txt: {refusal}")
        if self.reservations and (location := reservation(self.reservations, target)):
            raise DownloadError("opted_out", f"tdmrep.json: {location}")


class SiteRulesChecker:
    """Checks URLs by the rules of their sites; used in one event loop."""

    def __init__(
        self, rules: Collection[Rule], agents: Collection[str], fetch: Fetch, client: RulesClient
    ) -> None:
        self.rules, self.agents, self.fetch, self.client = rules, agents, fetch, client
        self.reads_usage = "content_usage" in rules
        self.known: OrderedDict[str, SiteRules] = OrderedDict()  # the last used one at the end
        self.text = 0  # characters of all of them
        self.loading: dict[str, asyncio.Task[SiteRules]] = {}

    async def close(self) -> None:
        """End all that is loading."""
        tasks = list(self.loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.close()

    async def check(self, target: URL, priority: int) -> None:
        """Raise DownloadError if the rules of its site refuse a URL; fetch them if nobody has."""
        site = f"{target.scheme}://{host_name(target)}:{target.port}"
        rules = self.known.get(site)
        if rules is None or rules.until < time.time():
            rules = await self._loaded(site, target, priority)
        else:
            self.known.move_to_end(site)
        await _beside_the_loop(rules.size, rules.check, target, self.reads_usage)

    async def _loaded(self, site: str, target: URL, priority: int) -> SiteRules:
        task = self.loading.get(site)
        if task is None:
            task = self.loading[site] = asyncio.ensure_future(self._load(site, target, priority))
            task.add_done_callback(partial(self._end_loading, site))
        return await asyncio.shield(task)  # others may wait for it too

    def _end_loading(self, site: str, task: asyncio.Task[SiteRules]) -> None:
        del self.loading[site]
        if not task.cancelled():
            task.exception()  # otherwise asyncio logs it if nobody waits any more

    async def _load(self, site: str, target: URL, priority: int) -> SiteRules:
        content = await self.client.get(site)
        if content is not None:
            rules = SiteRules(**json.loads(content))
        else:
            try:
                rules = await self._fetch(target.origin(), priority)
            except BaseException:
                self.client.give_up(site)
                raise
            self.client.put(site, json.dumps(asdict(rules)).encode(), rules.until - time.time())
        self._remember(site, rules)
        return rules

    async def _fetch(self, origin: URL, priority: int) -> SiteRules:
        rules = SiteRules(until=time.time() + VALID_SECONDS)
        tdm_file = origin.with_path(TDM_PATH)
        if "robots_txt" in self.rules:
            try:
                content = await self.fetch(origin.with_path("/robots.txt"), priority)
                rules.robots = await _beside_the_loop(
                    len(content), own_rules, text_of(content), self.agents
                )
            except DownloadError as error:
                if error.kind not in _UNAVAILABLE:
                    failure = (error.kind, clean(str(error)))
                    return SiteRules(until=time.time() + FAILURE_SECONDS, failure=failure)
            if rules.robots and rules.robots_txt.refusal(tdm_file):
                return rules
        if "tdm_file" in self.rules:
            with suppress(DownloadError):  # then the site does not use the protocol
                rules.reservations = reservations(await self.fetch(tdm_file, priority))
        return rules

    def _remember(self, site: str, rules: SiteRules) -> None:
        if replaced := self.known.pop(site, None):
            self.text -= replaced.size
        self.known[site] = rules
        self.text += rules.size
        while len(self.known) > _MAX_SITES or (self.text > _MAX_TEXT and len(self.known) > 1):
            self.text -= self.known.popitem(last=False)[1].size


async def _beside_the_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """The result of `work` on a text of `size` characters, in a thread if that is large."""
    if size <= _LARGE_TEXT:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


def make_checker(
    rules: Collection[Rule], agents: Collection[str], fetch: Fetch, store: Any
) -> SiteRulesChecker | None:
    """A checker, in the running event loop; None if no rule lies in a site's file. `store`: see RulesClient."""
    if not set(rules) & set(SITE_RULES):
        return None
    return SiteRulesChecker(rules, agents, fetch, RulesClient(store))
