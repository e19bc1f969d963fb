"""Whether a server's X-Robots-Tag headers ask us not to use the image.

    X-Robots-Tag: noai, noimageai              everybody
    X-Robots-Tag: *: noindex                   everybody
    X-Robots-Tag: vlv-ingest: noai             us, by name
    X-Robots-Tag: googlebot: noindex           another crawler, not us

An agent's name holds for the directives after it, up to the next name or the header's end.
"""

from __future__ import annotations

from collections.abc import Iterable

AGENT = "vlv-ingest"
"""The name under which servers may address us; the user agent begins with it."""

OPT_OUT = frozenset(["noai", "noimageai", "noindex", "noimageindex", "none"])
"""`none` is the standard's short form of "noindex, nofollow"."""

# Directives with a value of their own, whose colon follows no agent's name.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


def opted_out(headers: Iterable[str], agent: str = AGENT) -> str | None:
    """The first directive by which X-Robots-Tag `headers` exclude `agent`, or None."""
    for header in headers:
        addressee = "*"
        for item in header.lower().split(","):
            name, colon, rest = item.partition(":")
            if colon and name.strip() not in _VALUED:
                addressee, item = name.strip(), rest
            directive = item.strip()
            if directive in OPT_OUT and addressee in ("*", agent):
                return directive
    return None
