"""Curves of a training: its losses, and any other figure of its steps. Template: charts.html.jinja."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report.axes import Axis, horizontal, vertical
from pipelines.report.figures import before_after, change, count, known, loss

Point = tuple[float, float]
"""(step, loss)."""

MAX_POINTS = 600  # of the training line: more would not be visible
OUTLIERS = 0.02  # share of training losses at either end that may lie outside the axis
LARGEST = 1e30  # larger losses count as infinite


@dataclass(frozen=True)
class LossChart:
    """The figure of one training run; `train` and `heldout` are what is drawn of its losses."""

    title: str
    lead: str
    evaluations: Sequence[Point]
    train: Sequence[Point]
    heldout: Sequence[Point]
    y: Axis
    outside: int  # training losses beyond the axis
    not_finite: tuple[int, int]  # losses that are not drawn, and all losses

    @property
    def is_empty(self) -> bool:
        return not self.train and not self.heldout

    @property
    def x(self) -> Axis:
        return horizontal(0.0, max(1.0, *(step for step, _ in (*self.train, *self.heldout))))

    @property
    def summary(self) -> str:
        """The held-out loss of the first and the last evaluation, in words."""
        if not self.evaluations:
            return "No evaluation on held-out rows."
        (first, before), (last, after) = self.evaluations[0], self.evaluations[-1]
        if len(self.evaluations) == 1:
            return f"Held-out loss {loss(before)} at step {count(int(first))}."
        moved = f"{before_after(before, after)} ({change(before, after)})"
        return f"Held-out loss {moved} from step {count(int(first))} to {count(int(last))}."

    def path(self, points: Sequence[Point]) -> str:
        """The SVG path through the points, thinned."""
        return path_through(points, self.x, self.y)


@dataclass(frozen=True)
class LineChart:
    """One figure of a run's steps, from zero on; `summary` says in words what the line shows."""

    title: str
    lead: str
    summary: str
    points: Sequence[Point]  # at least one, all finite

    @property
    def x(self) -> Axis:
        return horizontal(0.0, max(1.0, self.points[-1][0]))

    @property
    def y(self) -> Axis:
        return vertical(0.0, 1.06 * max(value for _, value in self.points) or 1.0)

    @property
    def path(self) -> str:
        """The SVG path through the points, thinned."""
        return path_through(self.points, self.x, self.y)


def loss_chart(title: str, events: Sequence[Mapping[str, Any]], lead: str = "") -> LossChart:
    """The figure of one training run from its events (`pipelines.training.metrics.read_metrics`).

    Non-finite losses are left out of the curves and counted below them.
    """
    steps, evaluations = series(events, "step", "loss"), series(events, "eval", "heldout_loss")
    train, heldout = ([p for p in points if abs(p[1]) < LARGEST] for points in (steps, evaluations))
    recorded = len(steps) + len(evaluations)
    y, outside = _y_axis(train, heldout)
    not_finite = (recorded - len(train) - len(heldout), recorded)
    return LossChart(title, lead, evaluations, train, heldout, y, outside, not_finite)


def series(events: Iterable[Mapping[str, Any]], event: str, value: str) -> list[Point]:
    """(step, value) of one kind of event in `metrics.jsonl`, sorted by step, without None."""
    points = [
        (float(e["step"]), float(e[value]))
        for e in events
        if e["event"] == event and e.get(value) is not None
    ]
    return sorted(points, key=lambda point: point[0])


def heldout_ends(events: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Held-out loss of the first and the last evaluation; None if there are fewer than two."""
    evaluations = series(events, "eval", "heldout_loss")
    return (evaluations[0][1], evaluations[-1][1]) if len(evaluations) > 1 else None


def median_of_last(points: Sequence[Point], count: int) -> float | None:
    """The median of the last `count` values that are finite; None if there is none."""
    values = sorted(value for _, value in points[-count:] if known(value))
    return values[len(values) // 2] if values else None


def path_through(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The SVG path through points on two axes, thinned."""
    places = (f"{x(step):.1f} {y(value):.1f}" for step, value in _thinned(points))
    return "".join(f"{'L' if i else 'M'}{place}" for i, place in enumerate(places))


def _y_axis(train: list[Point], heldout: list[Point]) -> tuple[Axis, int]:
    """The loss axis, and the number of training losses outside it.

    Outliers of the training loss may leave the axis, since they would flatten the held-out curve.
    """
    losses = sorted(value for _, value in train)
    cut = int(len(losses) * OUTLIERS)
    needed = losses[cut : len(losses) - cut] + [value for _, value in heldout]
    low, high = min(needed, default=0.0), max(needed, default=1.0)
    if 0 <= low < 0.2 * high:
        low = 0.0
    room = max(0.06 * (high - low), 0.01 * max(abs(low), abs(high)), 1e-6)
    low, high = (low if low == 0 else low - room), high + room
    outside = sum(not low <= value <= high for value in losses)
    return vertical(low, high), outside


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most MAX_POINTS of a line: minimum and maximum of each stretch, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    ends = [(min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])) for s in stretches]
    return sorted({point for pair in ends for point in pair})
