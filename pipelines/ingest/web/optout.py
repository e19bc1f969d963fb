"""The refusals of a site's owner that are honoured, and those in the headers of a response.

    X-Robots-Tag: noai, noimageai              applies to all crawlers
    X-Robots-Tag: *: noindex                   applies to all crawlers
    X-Robots-Tag: vlv-ingest: noai             applies to this crawler
    X-Robots-Tag: googlebot: noindex           applies to another crawler only
    tdm-reservation: 1                         TDM Reservation Protocol
    Content-Usage: train-ai=n                  drafts of the IETF's working group aipref

A crawler's name applies to the directives of X-Robots-Tag after it, up to the next name or the end of
the header. This crawler has two names: AGENT, and the one that `download.user_agent` begins with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, Literal, get_args

from multidict import MultiMapping

Rule = Literal["x_robots_tag", "noml", "tdm_header", "robots_txt", "tdm_file", "content_usage"]
"""The rules of `download.respect_optout`; `robots_txt` and `tdm_file` each cost a request to a site."""
RULES: tuple[Rule, ...] = get_args(Rule)
DEFAULT_RULES: tuple[Rule, ...] = tuple(rule for rule in RULES if rule != "content_usage")
"""The rules of a new table."""
RULES_OF_TRUE: tuple[Rule, ...] = ("x_robots_tag",)
"""What `respect_optout: true` meant in the tables of earlier versions."""

AGENT = "vlv-ingest"
"""The crawler's name for servers; the default User-Agent begins with it."""

OPT_OUT = frozenset(["noai", "noimageai", "noindex", "noimageindex", "none"])
"""`none` is the standard's short form of "noindex, nofollow"."""
NO_ML = frozenset(["noml"])
"""The directive of https://noml.info."""

# Directives with a value: the colon does not follow a crawler's name. (Nor does it in the date of
# "unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT", which also has a comma.)
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_NAME = re.compile(r"[^\s:]+")

# Labels of Content-Usage, from the use to those that include it. The drafts renamed them several times.
_TRAINING = ("train-ai", "ai", "tdm", "bots", "all")
_USES = (_TRAINING, ("train-genai", "genai", *_TRAINING))


def recorded_rules(value: Any) -> tuple[Rule, ...]:
    """The rules that a run recorded, in the order of RULES: a list of them, or what earlier versions wrote."""
    if isinstance(value, bool):
        return RULES_OF_TRUE if value else ()
    return tuple(rule for rule in RULES if rule in value)


def agent_of(user_agent: str) -> str:
    """The crawler's name in a User-Agent: `my-crawler` in "My-Crawler/1.0 (…)"."""
    return re.split(r"[/\s]", user_agent.strip(), maxsplit=1)[0].lower()


def header_refusal(
    headers: MultiMapping[str], rules: Collection[Rule], agents: Collection[str]
) -> str | None:
    """The header that refuses an image under `rules`, with what it says; None if none does."""
    directives = OPT_OUT if "x_robots_tag" in rules else frozenset[str]()
    if "noml" in rules:
        directives |= NO_ML
    if directive := opted_out(headers.getall("X-Robots-Tag", ()), agents, directives):
        return f"X-Robots-Tag: {directive}"
    reservations = headers.getall("tdm-reservation", ()) if "tdm_header" in rules else ()
    if any(value.strip() == "1" for value in reservations):
        return "tdm-reservation: 1"
    usages = headers.getall("Content-Usage", ()) if "content_usage" in rules else ()
    if usages and (preference := training_refusal(", ".join(usages))):
        return f"Content-Usage: {preference}"
    return None


def opted_out(
    headers: Iterable[str],
    agents: Collection[str] = (AGENT,),
    directives: Collection[str] = OPT_OUT,
) -> str | None:
    """The first of `directives` in X-Robots-Tag `headers` that applies to one of `agents`, or None.

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
                if (directive := word.strip("\"'")) in directives:
                    return directive
    return None


def training_refusal(preferences: str) -> str | None:
    """The preference that refuses training, such as `train-ai=n`, in a Content-Usage dictionary; or None.

    The most specific label with a preference counts. Source: draft-ietf-aipref-vocab, sections 6 and 7;
    unlike there, a malformed entry leaves the others valid.
    """
    values = {}
    for item in preferences.split(","):
        label, _, value = item.partition(";")[0].partition("=")
        values[label.strip()] = value.strip()  # the last one counts
    for labels in _USES:
        stated = [label for label in labels if values.get(label) in ("y", "n")]
        if stated and values[stated[0]] == "n":
            return f"{stated[0]}=n"
    return None
