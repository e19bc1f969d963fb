"""Histograms of integers. Template: charts.html.jinja."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.report.axes import Axis, horizontal, vertical
from pipelines.report.figures import count

MAX_BARS = 40


@dataclass(frozen=True)
class Histogram:
    """The figure of captions or images, `of` (at least one), by their number of `unit`."""

    title: str
    lead: str
    unit: str
    counts: Mapping[int, int]  # by number
    of: str = "captions"

    @property
    def summary(self) -> str:
        middle, least, most = quantile(self.counts, 0.5), min(self.counts), max(self.counts)
        return (
            f"Median {count(middle)} {self.unit}, from {count(least)} to {count(most)}; nine tenths "
            f"have at most {count(quantile(self.counts, 0.9))}."
        )

    @property
    def bars(self) -> list[tuple[int, int, int]]:
        """First number, end and captions of each bin."""
        bars, width = binned(self.counts)
        return [(start, start + width, number) for start, number in bars.items()]

    @property
    def x(self) -> Axis:
        return horizontal(self.bars[0][0], self.bars[-1][1])

    @property
    def y(self) -> Axis:
        highest = max(number for _, _, number in self.bars)
        return vertical(0, highest * 1.05, most_ticks=5, whole=True)


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
