"""Shares from 0 to 1 in per cent, as meters, and in tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from pipelines.report.html import MISSING, Html, percent, tag

OURS, OTHER = "ours", "other"
"""Styles of a meter: filled for our result, hatched for a baseline."""


def share(value: float | None) -> str:
    """Format a share from 0 to 1 in per cent, as `97.0 %`."""
    return MISSING if not known(value) else percent(_within(value), 1)


def gap(value: float | None) -> str:
    """Format the closed share of a gap in whole per cent; it may be below 0 or above 100."""
    return MISSING if not known(value) else f"{round(100 * value)}\u00a0%".replace("-", "−")


def known(value: float | None) -> TypeGuard[float]:
    """Whether the value is neither None nor non-finite."""
    return value is not None and math.isfinite(value)


def shares_table(
    caption: str | None,
    headings: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, str, Sequence[float | None]]],
    looks: Sequence[str],
    groups: Sequence[str] = (),
) -> Html:
    """A table of shares, each as a number above a meter; `looks` has the style of each column.

    `groups` are headings, each above the same number of columns.
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
    """The share as a bar, hidden from screen readers, since it repeats the number before it."""
    filled = _within(value) if known(value) else 0.0
    bar = tag("i", style=f"width:{100 * filled:.2f}%")
    return tag("span", bar, class_=f"meter {look}", aria_hidden="true")


def _within(value: float) -> float:
    """Clamp to 0…1; max returns the first of equal values, so never -0.0."""
    return max(0.0, min(value, 1.0))
