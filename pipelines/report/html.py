"""Building blocks of reports: pure functions from plain data to HTML fragments.

A fragment is an `Html`; any other text is escaped when it becomes part of one, so captions and messages
from the web stay text. A page loads nothing from the network, and its content security policy allows at
most one script, given by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import groupby

from pipelines.images.rows import CAPTION, DECODE, DOWNLOAD, DUPLICATE, FILTERED, OK

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

KINDS = {
    OK: "",
    FILTERED: "dropped by a filter on the image",
    DOWNLOAD: "could not be fetched",
    DECODE: "could not be decoded as an image",
    DUPLICATE: "the same content as another row",
    CAPTION: "the captioner failed",
}
"""Descriptions of status kinds (the part before the colon); the style sheet has their colours."""

MISSING = "–"
"""Shown for a missing figure."""


class Html(str):
    """Markup; `tag` escapes all other text."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Children that are not Html are escaped; attributes that are None are left out.

    In attribute names `_` becomes `-`, and a trailing `_` is dropped (`class_`).
    """
    given = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    opening = "".join([f"<{name}", *(f' {k}="{_text(v)}"' for k, v in given.items()), ">"])
    return Html(opening + join(children) + ("" if name in _VOID else f"</{name}>"))


_VOID = frozenset(["img", "input", "link", "meta"])


def join(parts: Iterable[object]) -> Html:
    """Concatenate fragments and texts."""
    return Html("".join(part if isinstance(part, Html) else _text(part) for part in parts))


def _text(value: object) -> str:
    # A lone surrogate cannot be written as UTF-8, and NUL is an error in HTML.
    valid = str(value).encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    return escape(valid)


# --------------------------------------------------------------------------------------- figures


def count(number: int) -> str:
    """Format `12,345`."""
    return f"{number:,}"


def percent(part: float, whole: float) -> str:
    """Format a share with one decimal; only exactly 0 reads `0 %`, and only the whole `100 %`."""
    if not whole > 0 or not math.isfinite(part):
        return MISSING
    share = 100 * part / whole
    if share in (0, 100):
        return f"{share:.0f}\u00a0%"
    return "<\u00a00.1\u00a0%" if share < 0.05 else f"{min(share, 99.9):.1f}\u00a0%"


def duration(seconds: float) -> str:
    """Format seconds as `0.4 s`, `41 s`, `7 min 05 s` or `3 h 20 min`, without line breaks."""
    if not math.isfinite(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        words = [f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"]
    elif whole < 3600:
        words = [f"{whole // 60} min", f"{whole % 60:02d} s"]
    else:
        words = [f"{whole // 3600:,} h", f"{whole % 3600 // 60:02d} min"]
    return " ".join(word.replace(" ", "\u00a0") for word in words)


# ---------------------------------------------------------------------------------------- tables


def table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], caption: str | None = None
) -> Html:
    """A plain table; the first cell of a row is its heading."""
    head = tag("tr", *(tag("th", heading, scope="col") for heading in headings))
    body = [
        tag("tr", tag("th", first, scope="row"), *(tag("td", value) for value in rest))
        for first, *rest in rows
    ]
    title = tag("caption", caption) if caption else Html()
    return _scrolling(tag("table", title, tag("thead", head), tag("tbody", *body)))


def status_table(counts: Mapping[str, int], caption: str, unit: str = "rows") -> Html:
    """Counts by status with bars of their share: `ok` first, the others grouped by kind."""
    total = sum(counts.values())
    if not total:
        return tag("p", f"No {unit}.", class_="empty")
    groups = []
    for kind, statuses in groupby(sorted(counts, key=_status_order), key=_kind):
        of_kind = list(statuses)
        name = [kind, tag("small", KINDS[kind])] if KINDS.get(kind) else [kind]
        lines = [_bar_row(name, sum(counts[s] for s in of_kind), total, kind)]
        # A status without a colon is its own kind and needs no second line.
        lines += [_bar_row([tag("code", s)], counts[s], total, kind) for s in of_kind if s != kind]
        groups.append(tag("tbody", *lines, class_=f"kind {kind}" if kind in KINDS else "kind"))
    return _bars(caption, ["status", unit], groups, ["all", count(total)])


def _kind(status: str) -> str:
    return status.partition(":")[0]


def _status_order(status: str) -> tuple[int, str, str]:
    kind = _kind(status)
    return (list(KINDS).index(kind) if kind in KINDS else len(KINDS), kind, status)


def time_table(seconds: Mapping[str, float], caption: str) -> Html:
    """Duration of each phase in the order given, with bars of its share."""
    total = sum(value for value in seconds.values() if math.isfinite(value))
    if not seconds:
        return tag("p", "No phase was timed.", class_="empty")
    lines = [_bar_row([k], v, total, None, duration(v)) for k, v in seconds.items()]
    return _bars(caption, ["phase", "time"], [tag("tbody", *lines)], ["all", duration(total)])


def _bar_row(
    name: Sequence[object], value: float, total: float, kind: str | None, shown: str | None = None
) -> Html:
    whole = total > 0 and math.isfinite(value)
    width = 100 * value / total if whole else 0.0
    return tag(
        "tr",
        tag("th", *name, scope="row"),
        tag("td", shown or count(int(value)), class_="number"),
        tag("td", percent(value, total), class_="number"),
        # The bar repeats the share, so screen readers skip it.
        tag("td", tag("span", style=f"width:{width:.2f}%"), class_="bar", aria_hidden="true"),
        class_="kind-total" if kind and not isinstance(name[0], Html) else None,
    )


def _bars(caption: str, names: list[str], bodies: list[Html], foot: list[str]) -> Html:
    head = [tag("th", names[0], scope="col")]
    head += [tag("th", name, scope="col", class_="number") for name in (names[1], "share")]
    last = tag("tr", tag("th", foot[0], scope="row"), tag("td", foot[1], class_="number"))
    return _scrolling(
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", *head, tag("td", class_="bar"))),
            *bodies,
            tag("tfoot", last),
            class_="bars",
        )
    )


def _scrolling(content: Html) -> Html:
    return tag("div", content, class_="scroll")


# ------------------------------------------------------------------------------------------ page


@dataclass(frozen=True)
class Card:
    """A key figure: its name, its value, and an explanation."""

    label: str
    value: str
    note: str
    target: str | None = None  # id of the section with details


def cards(figures: Iterable[Card], label: str = "Key figures") -> Html:
    """Key figures in the order given; `label` is for screen readers."""
    items = []
    for card in figures:
        name = tag("a", card.label, href=f"#{card.target}") if card.target else card.label
        parts = (("label", name), ("value", card.value), ("note", card.note))
        items.append(tag("li", *(tag("span", part, class_=kind) for kind, part in parts)))
    return tag("ol", *items, class_="cards", aria_label=label)


def notes(lines: Sequence[str]) -> Html:
    """Notes before the figures; empty without lines."""
    if not lines:
        return Html()
    items = (tag("li", line) for line in lines)
    return tag("aside", tag("h2", "Before you read on"), tag("ul", *items), class_="notes")


def section(anchor: str, heading: str, lead: str, *content: Html) -> Html:
    """A section of the page with a heading, an id, and an introduction."""
    return tag(
        "section",
        tag("h2", heading, id=f"{anchor}-heading"),
        tag("p", lead, class_="lead"),
        *content,
        id=anchor,
        aria_labelledby=f"{anchor}-heading",
    )


def page(title: str, subtitle: str, content: Iterable[Html], script: str | None = None) -> str:
    """The whole document with its style sheet; its policy allows only `script` to run."""
    policy, scripts = POLICY, []
    if script is not None:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"{POLICY}; script-src 'sha256-{digest}'"
        scripts = [tag("script", Html(script))]
    style = resources.files(__package__).joinpath("report.css").read_text("utf-8")
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(style)),
    )
    header = tag("header", tag("h1", title), tag("p", subtitle, class_="lead"))
    document = tag(
        "html", tag("head", *head), tag("body", header, tag("main", *content), *scripts), lang="en"
    )
    return f"<!doctype html>\n{document}\n"
