"""Shares from 0 to 1: in per cent, as meters, and in tables of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from pipelines.report.html import MISSING, Html, percent, tag

OURS, OTHER = "ours", "other"
"""Looks of a meter: filled for what is claimed, hatched for what it is compared with."""


def share(value: float | None) -> str:
    """A share from 0 to 1 in per cent, as `97.0 %`."""
    return MISSING if not known(value) else percent(_within(value), 1)


def gap(value: float | None) -> str:
    """How much of the gap is closed, in whole per cent: it may lie below 0 and beyond 100."""
    return MISSING if not known(value) else f"{round(100 * value)}\u00a0%".replace("-", "−")


def known(value: float | None) -> TypeGuard[float]:
    """Whether there is a figure to show."""
    return value is not None and math.isfinite(value)


def shares_table(
    caption: str | None,
    headings: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, str, Sequence[float | None]]],
    looks: Sequence[str],
    groups: Sequence[str] = (),
) -> Html:
    """A table of shares, each with its figure above a meter; a look for each column.

    `groups` are headings above equally many columns each.
    """
    names = [tag("th", name, tag("small", note), scope="col") for name, note in headings]
    if groups:
        span = len(headings) // len(groups)
        over = (tag("th", group, colspan=span, scope="colgroup") for group in groups)
        lines = [[tag("td", rowspan=2), *over], names]
    else:
        lines = [[tag("td"), *names]]
    head = tag("thead", *(tag("tr", *line) for line in lines))
    body = []
    for name, note, values in rows:
        cells = [
            tag("td", share(value), meter(value, look))
            for value, look in zip(values, looks, strict=True)
        ]
        label = (name, tag("small", note)) if note else (name,)
        body.append(tag("tr", tag("th", *label, scope="row"), *cells))
    title = tag("caption", caption) if caption else Html()
    content = tag("table", title, head, tag("tbody", *body), class_="shares")
    return tag("div", content, class_="scroll")


def meter(value: float | None, look: str) -> Html:
    """The share as a length; it repeats the figure before it, which a screen reader has."""
    filled = _within(value) if known(value) else 0.0
    bar = tag("i", style=f"width:{100 * filled:.2f}%")
    return tag("span", bar, class_=f"meter {look}", aria_hidden="true")


def _within(value: float) -> float:
    """The nearest share from 0 to 1; max gives the first of equals, so no zero is negative."""
    return max(0.0, min(value, 1.0))
