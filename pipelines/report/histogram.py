"""Histograms of integers as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipelines.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, ticks
from pipelines.report.html import Html, count, join, table, tag

MAX_BARS = 40


def histogram(title: str, counts: Mapping[int, int], unit: str, lead: str) -> Html:
    """Figure of captions (at least one) by their number of `unit`."""
    bars, width = binned(counts)
    last = max(bars) + width
    x = Scale(min(bars), last, LEFT, WIDTH - RIGHT)
    y = Scale(0, max(bars.values()) * 1.05, HEIGHT - BOTTOM, TOP)
    middle, least, most = quantile(counts, 0.5), min(counts), max(counts)
    summary = f"Median {count(middle)} {unit}, from {count(least)} to {count(most)}; "
    summary += f"nine tenths have at most {count(quantile(counts, 0.9))}."
    chart = tag(
        "svg",
        _axes(x, y, unit),
        *(_bar(start, start + width, number, x, y) for start, number in bars.items()),
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=f"{title}. {summary}",
    )
    rows = [(_range(start, width), count(number)) for start, number in bars.items()]
    values = tag("details", tag("summary", "As a table"), table([unit, "captions"], rows))
    parts = (tag("h3", title), tag("p", lead, class_="lead"), chart)
    return tag("figure", *parts, tag("figcaption", tag("p", summary), values), class_="chart")


def binned(counts: Mapping[int, int]) -> tuple[dict[int, int], int]:
    """Counts by the first number of each bin, at most MAX_BARS bins, and the bins' width."""
    least, most = min(counts), max(counts)
    rough = (most - least + 1) / MAX_BARS
    steps = [base * 10**power for power in range(12) for base in (1, 2, 5)]
    width = next(step for step in steps if step >= rough)
    if math.ceil((most + 1) / width) - least // width > MAX_BARS:  # bins begin at a multiple
        width = next(step for step in steps if step > width)
    first = least // width * width
    bars = dict.fromkeys(range(first, most + 1, width), 0)
    for number, times in counts.items():
        bars[number // width * width] += times
    return bars, width


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The quantile of counted integers: the least number with at least this share at or below it."""
    needed, so_far = share * sum(counts.values()), 0
    for number in sorted(counts):
        so_far += counts[number]
        if so_far >= needed:
            return number
    raise ValueError("nothing was counted")


def _range(start: int, width: int) -> str:
    return count(start) if width == 1 else f"{count(start)}\u2013{count(start + width - 1)}"


def _bar(start: float, end: float, number: int, x: Scale, y: Scale) -> Html:
    left, right, top = x(start), x(end), y(number)
    gap = min(1.0, 0.15 * (right - left))
    return tag(
        "rect",
        tag("title", f"{_range(int(start), int(end - start))}: {count(number)}"),
        x=f"{left + gap / 2:.1f}",
        y=f"{top:.1f}",
        width=f"{right - left - gap:.1f}",
        height=f"{y.start - top:.1f}",
    )


def _axes(x: Scale, y: Scale, unit: str) -> Html:
    parts = []
    for value in ticks(y.low, y.high, 5):
        if value == int(value):
            at, words = f"{y(value):.1f}", count(int(value))
            parts.append(
                tag("line", x1=f"{x.start:.1f}", x2=f"{x.end:.1f}", y1=at, y2=at, class_="grid")
            )
            parts.append(tag("text", words, x=x.start - 8, y=at, dy="0.35em", text_anchor="end"))
    for value in ticks(x.low, x.high):
        if value == int(value):
            place, below = f"{x(value):.1f}", y.start + 18
            parts.append(tag("text", count(int(value)), x=place, y=below, text_anchor="middle"))
    middle = (x.start + x.end) / 2
    parts.append(tag("text", unit, x=middle, y=HEIGHT - 5, text_anchor="middle", class_="name"))
    return join(parts)
