"""Curves of a few points each, such as a distance by guidance. Template: charts.html.jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.report.axes import Axis, horizontal, vertical
from pipelines.report.charts import path_through

DASHES = ("", "7 4", "2 4", "9 3 2 3")
"""Of the lines, so that they can be told apart without colour."""


@dataclass(frozen=True)
class Curve:
    """The figure of one or more lines; each has a point (x, y) at least, sorted by x."""

    title: str
    lead: str
    x_name: str
    lines: Mapping[str, Sequence[tuple[float, float]]]

    @property
    def x(self) -> Axis:
        places = [x for points in self.lines.values() for x, _ in points]
        return horizontal(min(places) - 0.25, max(places) + 0.25)

    @property
    def y(self) -> Axis:
        values = [y for points in self.lines.values() for _, y in points]
        room = max(0.08 * (max(values) - min(values)), 0.02 * max(map(abs, values)), 1e-6)
        return vertical(min(values) - room, max(values) + room)

    @property
    def summary(self) -> str:
        """The least value of each line, in words."""
        least = {name: min(points, key=lambda p: p[1]) for name, points in self.lines.items()}
        words = (f"{name} {y:.4g} at {x:g}" for name, (x, y) in least.items())
        return f"Least: {', '.join(words)}."

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """The SVG path through the points."""
        return path_through(points, self.x, self.y)

    @property
    def dashes(self) -> dict[str, str]:
        """The dashes of each line."""
        return {name: DASHES[i % len(DASHES)] for i, name in enumerate(self.lines)}
