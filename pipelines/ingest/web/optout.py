"""Whether a server's X-Robots-Tag headers opt the image out.

    X-Robots-Tag: noai, noimageai              applies to all crawlers
    X-Robots-Tag: *: noindex                   applies to all crawlers
    X-Robots-Tag: vlv-ingest: noai             applies to this crawler
    X-Robots-Tag: googlebot: noindex           applies to another crawler only

A crawler's name applies to the directives after it, up to the next name or the end of the header.
This crawler has two names: AGENT, and the one that `download.user_agent` begins with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

AGENT = "vlv-ingest"
"""The crawler's name for servers; the default User-Agent begins with it."""

OPT_OUT = frozenset(["noai", "noimageai", "noindex", "noimageindex", "none"])
"""`none` is the standard's short form of "noindex, nofollow"."""

# Directives with a value: the colon does not follow a crawler's name. (Nor does it in the date of
# "unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT", which also has a comma.)
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_NAME = re.compile(r"[^\s:]+")


def agent_of(user_agent: str) -> str:
    """The crawler's name in a User-Agent: `my-crawler` in "My-Crawler/1.0 (…)"."""
    return re.split(r"[/\s]", user_agent.strip(), maxsplit=1)[0].lower()


def opted_out(headers: Iterable[str], agents: Collection[str] = (AGENT,)) -> str | None:
    """The first directive in X-Robots-Tag `headers` that opts out for one of `agents`, or None.

    Directives may also be separated by semicolons or spaces, or quoted.
    """
    for header in headers:
        addressee = "*"
        for item in re.split("[,;]", header.lower()):
            name, colon, rest = item.partition(":")
            name = name.strip()
            if colon and name in _VALUED:
                item = " ".join(rest.split()[1:])  # directives behind the value
            elif colon and _NAME.fullmatch(name):
                addressee, item = agent_of(name), rest  # some servers add the version
            if addressee != "*" and addressee not in agents:
                continue
            for word in item.split():
                if (directive := word.strip("\"'")) in OPT_OUT:
                    return directive
    return None
