"""Loss curves as inline SVG: training loss as a thin line, held-out loss as points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipelines.report.html import Html, count, join, table, tag

Point = tuple[float, float]
"""(step, loss)."""

WIDTH, HEIGHT = 440.0, 270.0  # user units; the browser scales them to the column
LEFT, RIGHT, TOP, BOTTOM = 52.0, 26.0, 16.0, 40.0  # margins for the labels
MAX_POINTS = 600  # of the training line: more would not be visible
OUTLIERS = 0.02  # share of training losses at either end that may lie outside the axis
LARGEST = 1e30  # larger losses count as infinite


@dataclass(frozen=True)
class Scale:
    """Maps values from `low`…`high` to user units `start`…`end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def series(events: Iterable[dict[str, Any]], event: str, value: str) -> list[Point]:
    """(step, value) of one kind of event in `metrics.jsonl`, sorted by step, without None."""
    points = [
        (float(e["step"]), float(e[value]))
        for e in events
        if e["event"] == event and e[value] is not None
    ]
    return sorted(points, key=lambda point: point[0])


def heldout_ends(events: Iterable[dict[str, Any]]) -> tuple[float, float] | None:
    """Held-out loss of the first and the last evaluation; None if there are fewer than two."""
    evaluations = series(events, "eval", "heldout_loss")
    return (evaluations[0][1], evaluations[-1][1]) if len(evaluations) > 1 else None


def format_loss(value: float) -> str:
    """Format a loss with four significant digits: 5.545, 0.009012."""
    return f"{value:#.4g}".rstrip(".")


def before_after(before: float, after: float) -> str:
    """Format `0.9821 → 0.7340` without line breaks."""
    return f"{format_loss(before)}\u00a0→\u00a0{format_loss(after)}"


def change(before: float, after: float) -> str:
    """Format the relative change of a loss: `−25.3 %`."""
    share = 100 * (after - before) / before if before else math.nan
    return f"{share:+.1f}\u00a0%".replace("-", "−") if math.isfinite(share) else "–"


def loss_chart(title: str, events: Sequence[dict[str, Any]], lead: str = "") -> Html:
    """Figure of one training run from its events (`pipelines.training.metrics.read_metrics`).

    Non-finite losses are left out of the curves and counted below them.
    """
    steps, evaluations = series(events, "step", "loss"), series(events, "eval", "heldout_loss")
    train, heldout = ([p for p in points if abs(p[1]) < LARGEST] for points in (steps, evaluations))
    parts = [tag("h3", title), tag("p", lead, class_="lead")]
    caption = [_summary(evaluations)]
    if train or heldout:
        y, outside = _y_scale(train, heldout)
        parts += [_legend(), _drawing(train, heldout, y, f"{title}. {caption[0]}")]
        if outside:
            caption.append(f"Outside the axis: {_of(outside, len(train))} training losses.")
    recorded, drawn = len(steps) + len(evaluations), len(train) + len(heldout)
    if drawn < recorded:
        caption.append(f"Not finite and not drawn: {_of(recorded - drawn, recorded)} losses.")
    below = [tag("p", " ".join(caption))]
    if evaluations:
        rows = [(count(int(step)), format_loss(loss)) for step, loss in evaluations]
        values = table(["step", "held-out loss"], rows)
        below.append(tag("details", tag("summary", "Held-out losses as a table"), values))
    return tag("figure", *parts, tag("figcaption", *below), class_="chart")


def _of(part: int, whole: int) -> str:
    return f"{count(part)}\u00a0of\u00a0{count(whole)}"


def _summary(heldout: list[Point]) -> str:
    if not heldout:
        return "No evaluation on held-out rows."
    (first, before), (last, after) = heldout[0], heldout[-1]
    if len(heldout) == 1:
        return f"Held-out loss {format_loss(before)} at step {count(int(first))}."
    moved = f"{before_after(before, after)} ({change(before, after)})"
    return f"Held-out loss {moved} from step {count(int(first))} to {count(int(last))}."


def _legend() -> Html:
    keys = (("train", "training loss, each step"), ("heldout", "held-out loss"))
    spans = [tag("span", tag("i", class_=name), words) for name, words in keys]
    return tag("p", *spans, class_="legend", aria_hidden="true")


def _drawing(train: list[Point], heldout: list[Point], y: Scale, label: str) -> Html:
    last = max(step for step, _ in (*train, *heldout))
    x = Scale(0.0, max(last, 1.0), LEFT, WIDTH - RIGHT)
    # A nested svg clips its content without an id, which another chart could repeat.
    clipped = tag(
        "svg",
        tag("path", d=_path(_thinned(train), x, y), class_="train"),
        tag("path", d=_path(heldout, x, y), class_="heldout"),
        width=_n(WIDTH),
        height=_n(HEIGHT - BOTTOM),
    )
    points = [tag("circle", cx=_n(x(s)), cy=_n(y(v)), r=3.2) for s, v in heldout]
    box = f"0 0 {WIDTH:g} {HEIGHT:g}"
    content = (_axes(x, y), clipped, *points, _end_values(heldout, x, y))
    return tag("svg", *content, viewBox=box, role="img", aria_label=label)


def _y_scale(train: list[Point], heldout: list[Point]) -> tuple[Scale, int]:
    """The loss axis, and the number of training losses outside it.

    Outliers of the training loss may leave the axis, since they would flatten the held-out curve.
    """
    losses = sorted(loss for _, loss in train)
    cut = int(len(losses) * OUTLIERS)
    needed = losses[cut : len(losses) - cut] + [loss for _, loss in heldout]
    low, high = min(needed), max(needed)
    if 0 <= low < 0.2 * high:
        low = 0.0
    room = max(0.06 * (high - low), 0.01 * max(abs(low), abs(high)), 1e-6)
    low, high = (low if low == 0 else low - room), high + room
    outside = sum(not low <= loss <= high for loss in losses)
    return Scale(low, high, HEIGHT - BOTTOM, TOP), outside


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round values (1, 2 or 5 times a power of ten) from low to high."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_labels(values: Sequence[float]) -> list[str]:
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    if not 1e-4 <= step < 1e7:
        return [f"{value:.4g}" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]


def _axes(x: Scale, y: Scale) -> Html:
    parts = []
    rows = ticks(y.low, y.high)
    for value, words in zip(rows, _tick_labels(rows), strict=True):
        at = _n(y(value))
        parts.append(tag("line", x1=_n(x.start), x2=_n(x.end), y1=at, y2=at, class_="grid"))
        parts.append(tag("text", words, x=_n(x.start - 8), y=at, dy="0.35em", text_anchor="end"))
    columns = [step for step in ticks(x.low, x.high) if step == int(step)]
    for value, words in zip(columns, _tick_labels(columns), strict=True):
        at = _n(x(value))
        parts.append(tag("text", words, x=at, y=_n(y.start + 18), text_anchor="middle"))
    base = _n(y.start)
    parts.append(tag("line", x1=_n(x.start), x2=_n(x.end), y1=base, y2=base, class_="axis"))
    middle, bottom = _n((x.start + x.end) / 2), _n(HEIGHT - 5)
    parts.append(tag("text", "step", x=middle, y=bottom, text_anchor="middle", class_="name"))
    return join(parts)


def _end_values(heldout: list[Point], x: Scale, y: Scale) -> Html:
    ends = [(heldout[0], "start", 5)] if heldout else []
    if len(heldout) > 1:
        ends.append((heldout[-1], "end", 0))
    return join(
        tag("text", format_loss(v), x=_n(x(s) + dx), y=_n(max(y(v) - 9, 12)), text_anchor=anchor,
            class_="value")
        for (s, v), anchor, dx in ends
    )  # fmt: skip


def _thinned(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS of a line: minimum and maximum of each stretch, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    ends = [(min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])) for s in stretches]
    return sorted({point for pair in ends for point in pair})


def _path(points: list[Point], x: Scale, y: Scale) -> str:
    return "".join(
        f"{'L' if i else 'M'}{_n(x(step))} {_n(y(loss))}" for i, (step, loss) in enumerate(points)
    )


def _n(value: float) -> str:
    """Format a coordinate with one decimal."""
    return f"{value:.1f}"
