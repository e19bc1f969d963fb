"""Whether a server's X-Robots-Tag headers ask us not to use the image.

    X-Robots-Tag: noai, noimageai              everybody
    X-Robots-Tag: *: noindex                   everybody
    X-Robots-Tag: vlv-ingest: noai             us, by name
    X-Robots-Tag: googlebot: noindex           another crawler, not us

An agent's name holds for the directives after it, up to the next name or the header's end. We are
addressed by AGENT and by the name that `download.user_agent` begins with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

AGENT = "vlv-ingest"
"""The name under which servers may address us; the user agent begins with it."""

OPT_OUT = frozenset(["noai", "noimageai", "noindex", "noimageindex", "none"])
"""`none` is the standard's short form of "noindex, nofollow"."""

# Directives with a value of their own, whose colon follows no agent's name. (A date's does not
# either: "unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT" has a comma, too.)
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_NAME = re.compile(r"[^\s:]+")


def agent_of(user_agent: str) -> str:
    """The name by which a server knows a User-Agent: `my-crawler` of "My-Crawler/1.0 (…)"."""
    return re.split(r"[/\s]", user_agent.strip(), maxsplit=1)[0].lower()


def opted_out(headers: Iterable[str], agents: Collection[str] = (AGENT,)) -> str | None:
    """The first directive by which X-Robots-Tag `headers` exclude one of `agents`, or None.

    Directives that are separated by semicolons or blanks, or quoted, are meant as well.
    """
    for header in headers:
        addressee = "*"
        for item in re.split("[,;]", header.lower()):
            name, colon, rest = item.partition(":")
            name = name.strip()
            if colon and name in _VALUED:
                item = " ".join(rest.split()[1:])  # what follows the value
            elif colon and _NAME.fullmatch(name):
                addressee, item = agent_of(name), rest  # some give the version, too
            if addressee != "*" and addressee not in agents:
                continue
            for word in item.split():
                if (directive := word.strip("\"'")) in OPT_OUT:
                    return directive
    return None
