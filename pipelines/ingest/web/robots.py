"""A site's robots.txt (RFC 9309) and tdmrep.json (TDM Reservation Protocol): do they refuse a URL?

Protego matches the paths of both. It gets only the group of this crawler: for a file with thousands of
groups it would copy each rule to each of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from urllib.parse import quote

from protego import Protego
from yarl import URL

from pipelines.ingest.web.optout import agent_of, training_refusal

MAX_BYTES = 500 << 10
"""Bytes of either file that are read; the rest is ignored (RFC 9309 section 2.5)."""
TDM_PATH = "/.well-known/tdmrep.json"

_AGENT_LINE = re.compile(r"user[ -]?agent(?:\s*:|\s)\s*(.*)", re.IGNORECASE)
# With the misspellings that Protego accepts.
_RULE_LINE = re.compile(r"(allow|diss?al+[ao]w|diasllow)(?:\s*:|\s|$)\s*(.*)", re.IGNORECASE)
_USAGE_LINE = re.compile(r"content-usage\s*:\s*(/\S*(?=\s))?\s*(.*)", re.IGNORECASE)
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
# Not the ends of a line here, but for Python's `splitlines`, which Protego uses.
_OTHER_LINE_ENDS = re.compile("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_EXPLAINED = 100  # rules that are searched for the one that refuses a URL


def text_of(content: bytes) -> str:
    """The text of a file, without the line that MAX_BYTES cut."""
    text = content[:MAX_BYTES].decode("utf-8-sig", "replace")
    if len(content) < MAX_BYTES:
        return text
    return text[: max(text.rfind("\n"), text.rfind("\r")) + 1]


def own_rules(text: str, agents: Collection[str]) -> str:
    """The rules of a robots.txt for a crawler with any of these names, in lower case; else those of `*`.

    A line is a rule to allow or disallow, or a Content-Usage. Source: RFC 9309 section 2.2.1: groups of
    the same name are combined, and records of other kinds end no group.
    """
    ours: list[str] = []
    everybodys: list[str] = []
    is_named, is_begun = False, True
    names: set[str] = set()
    for line in _LINE_ENDS.split(text):
        line = line.partition("#")[0].strip()
        if match := _AGENT_LINE.fullmatch(line):
            if is_begun:
                names, is_begun = set(), False
            names.add(agent_of(match[1].replace("*", "") or match[1]))
            is_named |= not names.isdisjoint(agents)
        elif _RULE_LINE.fullmatch(line) or _USAGE_LINE.fullmatch(line):
            is_begun = True
            line = _OTHER_LINE_ENDS.sub(lambda end: quote(end[0]), line)
            if "*" in names:
                everybodys.append(line)
            if not names.isdisjoint(agents):
                ours.append(line)
    return "\n".join(ours if is_named else everybodys)


class RobotsTxt:
    """The rules of `own_rules`."""

    def __init__(self, rules: str) -> None:
        lines = rules.split("\n")
        self.usages = [match for line in lines if (match := _USAGE_LINE.fullmatch(line))]
        matches = [match for line in lines if (match := _RULE_LINE.fullmatch(line))]
        self._rules = Protego.parse(_group(match[0] for match in matches))
        refusals = [match for match in matches if match[2] and match[1].lower() != "allow"]
        self._refusals = sorted(refusals, key=lambda match: len(match[2]), reverse=True)

    def refusal(self, target: URL) -> str | None:
        """The rule that disallows a URL, such as `Disallow: /private/`; None if it is allowed."""
        path = target.raw_path_qs
        if self._rules.can_fetch(f"http://site{path}", "*"):
            return None
        found = (m[2] for m in self._refusals[:_EXPLAINED] if _matches(m[2], path))
        return f"Disallow: {next(found, '…')}"

    def usage_refusal(self, target: URL) -> str | None:
        """The Content-Usage rule that refuses training on a URL's content, or None.

        The longest path that matches counts. Source: draft-ietf-aipref-attach, section 5.
        """
        path = target.raw_path_qs
        matching = [(m[1] or "/", m[2]) for m in self.usages if _matches(m[1] or "/", path)]
        longest = max((len(location) for location, _ in matching), default=0)
        for location, preferences in matching:
            if len(location) == longest and training_refusal(preferences):
                return f"Content-Usage: {location} {preferences}"
        return None


Reservations = list[tuple[str, bool]]
"""The entries of a tdmrep.json, in order: pattern of paths, and whether the rights are reserved."""


def reservations(content: bytes) -> Reservations:
    """The entries of a tdmrep.json that have a location and a reservation; none if it is no such file."""
    try:
        entries = json.loads(content[:MAX_BYTES].decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return []
    if isinstance(entries, dict):  # a single rule without its brackets
        entries = [entries]
    return list(_entries(entries)) if isinstance(entries, list) else []


def _entries(entries: list[object]) -> Iterator[tuple[str, bool]]:
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        location, value = entry.get("location"), str(entry.get("tdm-reservation")).strip().lower()
        if isinstance(location, str) and value in ("0", "1", "true", "false"):
            # In a robots.txt these characters would end the pattern.
            location = re.sub(r"[\s#\x00-\x1f]", lambda c: quote(c[0]), location.strip())
            yield location, value in ("1", "true")


def reservation(entries: Reservations, target: URL) -> str | None:
    """The location that reserves a URL; None if no entry matches, or the first one that does reserves nothing.

    Source: TDM Reservation Protocol, section 5.1.
    """
    path = target.raw_path_qs
    for location, is_reserved in entries:
        if _matches(location, path):
            return location if is_reserved else None
    return None


def _group(lines: Iterable[str]) -> str:
    return "\n".join(["User-agent: *", *lines])


def _matches(pattern: str, path: str) -> bool:
    return not _disallowing(pattern).can_fetch(f"http://site{path}", "*")


@lru_cache(4096)
def _disallowing(pattern: str) -> Protego:
    return Protego.parse(_group([f"Disallow: {pattern}"]))
